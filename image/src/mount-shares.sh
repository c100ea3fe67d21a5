#!/bin/sh
# Mounts the shared folders that the kernel command line tells of, as
# lodger.share=TAG:DIR[:ro], below the directory that is the first argument.
read -r cmdline </proc/cmdline
for word in $cmdline; do
	case $word in
	lodger.share=*)
		tag=${word#lodger.share=}
		dir=${tag#*:}
		options=rw
		case $dir in
		*:ro) dir=${dir%:ro} options=ro ;;
		esac
		busybox mkdir -p "$1$dir"
		busybox mount -t virtiofs -o $options "${tag%%:*}" "$1$dir"
		;;
	esac
done
