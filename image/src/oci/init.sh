#!/bin/sh
# PID 1 of images from a registry, in the RAM disk of mini: mounts the root disk,
# brings up the network, runs the image's program (/lodger/run) in it, and ends
# the machine with the program's status (/lodger/status).
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox --install -s /bin
mount -t devtmpfs dev /dev

# Ends the machine. The serial line is drained first (a terminal setting waits).
finish() {
	stty sane
	/lodger/status "$1"
	poweroff -f
}

fail() {
	echo "Lodger: $1"
	finish 125
}

. /lodger/settings # hostname, stop, directory, user

# Drivers for the virtio devices that are there, by PCI ID (virtio 1.2, 4.1.2).
drivers=
later=
for device in /sys/bus/pci/devices/*; do
	read -r vendor <"$device/vendor" && [ "$vendor" = 0x1af4 ] || continue
	read -r id <"$device/device"
	case $id in
	0x1000 | 0x1041) drivers="$drivers virtio_net" ;;
	0x1003 | 0x1043) drivers="$drivers virtio_console" ;;
	0x1005 | 0x1044) drivers="$drivers virtio_rng" ;;
	0x1053) drivers="$drivers vmw_vsock_virtio_transport" ;;
	0x1002 | 0x1045) later=virtio_balloon ;;
	0x105a) drivers="$drivers virtiofs" ;;
	esac
done
modprobe -a virtio_pci virtio_blk ext4 $drivers

# The power button, by which the host asks for an end, and the balloon, by which it
# asks for memory. Nobody waits for them.
(modprobe -a button evdev $later && acpid -c /lodger/acpi -l /dev/null -p /run/acpid.pid) >/dev/null 2>&1 &

hostname "$hostname"
ifconfig lo 127.0.0.1
# As in container engines: everybody may use low ports, and ping.
echo 0 >/proc/sys/net/ipv4/ip_unprivileged_port_start
echo 0 2147483647 >/proc/sys/net/ipv4/ping_group_range
case $drivers in
*virtio_net*) udhcpc -i eth0 -s /lodger/udhcpc -n -q -t 3 -T 1 >/dev/null 2>&1 ;;
esac

# A disk that the guest has not been told of yet comes within a moment.
tries=50
while [ ! -b /dev/vda ] && [ $tries -gt 0 ]; do
	sleep 0.1
	tries=$((tries - 1))
done
mount -t ext4 /dev/vda /mnt || fail "cannot mount the root disk /dev/vda"

mkdir -p /dev/pts /dev/shm
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
ln -sf /proc/self/fd /dev/fd
ln -sf /proc/self/fd/0 /dev/stdin
ln -sf /proc/self/fd/1 /dev/stdout
ln -sf /proc/self/fd/2 /dev/stderr
mount -o rbind /dev /mnt/dev
mount -t proc proc /mnt/proc
mount -t sysfs sysfs /mnt/sys

# The image's own are of the machine that it was built on.
for file in resolv.conf hostname hosts; do
	[ ! -L /mnt/etc/$file ] || rm /mnt/etc/$file
done
[ ! -f /etc/resolv.conf ] || cat /etc/resolv.conf >/mnt/etc/resolv.conf
echo "$hostname" >/mnt/etc/hostname
cat >/mnt/etc/hosts <<END
127.0.0.1 localhost
127.0.1.1 $hostname
::1 localhost ip6-localhost ip6-loopback
END
case $drivers in
*virtiofs*) mount-shares /mnt ;;
esac
[ -d "/mnt$directory" ] || mkdir -p "/mnt$directory"

# Serves the host's commands and copies.
case $drivers in
*vsock*) sh /lodger/agent </dev/null >/dev/null 2>&1 & ;;
esac

read -r cmdline </proc/cmdline
for word in $cmdline; do
	case $word in
	lodger.size=*)
		size=${word#lodger.size=}
		stty rows "${size%x*}" cols "${size#*x}"
		;;
	esac
done
[ "$user" = 0 ] || chown "$user" /dev/console /dev/ttyS0 /dev/hvc0 2>/dev/null

# An init of its own becomes this process.
[ ! -e /lodger/become ] || exec sh /lodger/become

sh /lodger/run
status=$?

# What it has left behind ends, and the disk is clean.
kill -9 -1
sync
mount -o remount,ro /mnt 2>/dev/null
finish $status
