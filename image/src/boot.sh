#!/bin/sh
# PID 1 of the initial RAM disk of images with a root disk: loads the drivers that
# the disk needs, mounts it and goes on there. The first virtio disk is the root;
# init=PROGRAM on the kernel command line starts that instead of /sbin/init, and
# lodger.share=TAG:DIR[:ro] mounts a shared folder.
export PATH=/bin
busybox mount -t devtmpfs dev /dev
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
init=/sbin/init
read -r cmdline </proc/cmdline
while read -r module; do
	case $module:$cmdline in
	fuse.ko:*lodger.share=* | virtiofs.ko:*lodger.share=*) ;;
	fuse.ko:* | virtiofs.ko:*) continue ;;
	esac
	busybox insmod "/modules/$module"
done </modules/order
for word in $cmdline; do
	case $word in
	init=*) init=${word#init=} ;;
	esac
done

# A disk that the guest has not been told of yet comes within a moment.
tries=50
while [ ! -b /dev/vda ] && [ $tries -gt 0 ]; do
	busybox sleep 0.1
	tries=$((tries - 1))
done
if busybox mount -t ext4 /dev/vda /root; then
	case $cmdline in
	*lodger.share=*) mount-shares /root ;;
	esac
	for dir in dev proc sys; do
		busybox mount -o move /$dir /root/$dir
	done
	exec busybox switch_root /root "$init"
fi
echo "Lodger: cannot mount the root disk /dev/vda"
exec busybox sh
