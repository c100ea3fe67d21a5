#!/bin/sh
# Called by busybox's acpid when the power button is pressed: the image's program
# gets its stop signal, or the machine ends if there is none.
. /lodger/settings
if read -r main </run/main; then
	kill -s "$stop" "$main"
else
	poweroff -f
fi
