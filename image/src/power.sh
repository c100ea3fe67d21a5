#!/bin/sh
# Called by busybox's acpid when the power button is pressed.
sync
umount -a -r
poweroff -f
