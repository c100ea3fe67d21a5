#!/bin/sh
# PID 1 of the mini image. A slow processor may be running this, so the shell's
# own built-ins do the work: every other command costs a fork and an exec.
#
# Kernel command line:  lodger.run="COMMAND"  runs COMMAND, prints LODGER-EXIT
# rc=N and powers off. Otherwise: a shell on the console; its end powers off.
# lodger.size=ROWSxCOLUMNS  is the size of its terminal.
# lodger.share=TAG:DIR[:ro]  mounts a shared folder.
export PATH=/bin HOME=/root
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys

# The first sign of life comes before anything slow.
read -r release </proc/sys/kernel/osrelease
read -r _ kib _ </proc/meminfo
read -r online </sys/devices/system/cpu/online
cpus=0
IFS=,
for range in $online; do
	cpus=$((cpus + ${range#*-} - ${range%-*} + 1))
done
unset IFS
case $cpus in
1) cpus="1 CPU" ;;
*) cpus="$cpus CPUs" ;;
esac
echo "Lodger mini: Linux $release, $cpus, $((kib / 1024)) MiB"

busybox --install -s /bin
mount -t devtmpfs dev /dev

# Drivers for the virtio devices that are there, by PCI ID (virtio 1.2, 4.1.2).
drivers=
later=
for device in /sys/bus/pci/devices/*; do
	read -r vendor <"$device/vendor" && [ "$vendor" = 0x1af4 ] || continue
	read -r id <"$device/device"
	case $id in
	0x1000 | 0x1041) drivers="$drivers virtio_net" ;;
	0x1001 | 0x1042) drivers="$drivers virtio_blk" ;;
	0x1003 | 0x1043) drivers="$drivers virtio_console" ;;
	0x1005 | 0x1044) drivers="$drivers virtio_rng" ;;
	0x1053) drivers="$drivers vmw_vsock_virtio_transport" ;;
	0x1002 | 0x1045) later=virtio_balloon ;;
	0x105a) drivers="$drivers virtiofs" ;;
	esac
done
[ -z "$drivers" ] || modprobe -a virtio_pci $drivers
case $drivers in
*virtio_net*)
	# An address from the network, if somebody there gives one at once.
	udhcpc -i eth0 -n -q -t 3 -T 1 >/dev/null 2>&1
	;;
esac

# Serves the host's commands and copies.
case $drivers in
*vsock*) /usr/lib/lodger/agent </dev/null >/dev/null 2>&1 & ;;
esac

# The power button, by which the host asks for an end, and the balloon, by which it
# asks for memory. Nobody waits for them.
(modprobe -a button evdev $later && acpid -l /dev/null -p /run/acpid.pid) >/dev/null 2>&1 &

read -r cmdline </proc/cmdline
case $drivers in
*virtiofs*) mount-shares '' ;;
esac

case $cmdline in
*'lodger.run="'*)
	run=${cmdline#*'lodger.run="'}
	run=${run%%'"'*}
	;;
*lodger.run=*)
	run=${cmdline#*lodger.run=}
	run=${run%% *}
	;;
*) run= ;;
esac

if [ -n "$run" ]; then
	sh -c "$run"
	echo "LODGER-EXIT rc=$?"
else
	case $cmdline in
	*lodger.size=*)
		size=${cmdline#*lodger.size=}
		size=${size%% *}
		stty rows "${size%x*}" cols "${size#*x}"
		;;
	esac
	setsid cttyhack sh -l
fi

# Leave disks clean, and the console's last bytes sent (a terminal setting waits
# for them).
while read -r device dir type _; do
	case $type:$device in
	virtiofs:* | *:/dev/*) umount "$dir" ;;
	esac
done </proc/mounts
stty sane
poweroff -f
