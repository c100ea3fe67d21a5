#!/bin/bash
# compare.sh - a shared folder under Lodger and under QEMU (TCG, with its virtiofsd), both virtio-fs on the same folder on a tmpfs.
#
# usage: compare.sh --kernel FILE --initrd FILE [OPTION...]
#
#   --kernel FILE     Linux bzImage, and
#   --initrd FILE     its initramfs: of the image `mini` (`lodger image list` says where)
#   --lodger FILE     the monitor under test (default: target/release/lodger)
#   --engine NAME     its engine (default: dbt)
#   --virtiofsd FILE  QEMU's server (default: /usr/lib/qemu/virtiofsd)
#   --repeat N        repetitions, round robin; the table shows medians (default: 3)
#
# Needs root for virtiofsd, qemu-system-x86_64 and a tmpfs in /dev/shm. Ratios of a host that is busy otherwise mean little.
set -euo pipefail
export LC_ALL=C
lodger=target/release/lodger engine=dbt virtiofsd=/usr/lib/qemu/virtiofsd repeat=3 kernel= initrd=
while [ $# -gt 0 ]; do
	case $1 in
	--kernel | --initrd | --lodger | --engine | --virtiofsd | --repeat)
		declare "${1#--}=$2"
		shift 2
		;;
	*)
		sed -n '2,/^set/{/^#/p}' "$0" >&2
		exit 2
		;;
	esac
done
[ -n "$kernel" ] && [ -n "$initrd" ] || { echo "compare.sh: --kernel and --initrd are needed" >&2; exit 2; }

here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
folder=$(mktemp -d -p /dev/shm)
trap 'rm -rf "$work" "$folder"' EXIT
cp "$here/work.sh" "$folder/"
for dir in $(seq 50); do
	mkdir -p "$folder/tree/$dir"
	for file in $(seq 100); do
		echo "$file" >"$folder/tree/$dir/$file"
	done
done
append='console=ttyS0 quiet cryptomgr.notests'
run='lodger.run="sh /srv/work.sh"'

lodger() {
	"$lodger" run -q --engine "$engine" --net none --kernel "$kernel" --initrd "$initrd" --share "$folder:/srv" \
		--append "$append $run" </dev/null
}

qemu() {
	"$virtiofsd" --socket-path="$work/socket" -o source="$folder" -o cache=auto >"$work/virtiofsd" 2>&1 &
	while [ ! -S "$work/socket" ]; do sleep 0.1; done
	qemu-system-x86_64 -accel tcg -cpu max -m 512 -net none -nographic -no-reboot \
		-object memory-backend-memfd,id=ram,size=512M,share=on -numa node,memdev=ram \
		-chardev "socket,id=fs,path=$work/socket" -device vhost-user-fs-pci,chardev=fs,tag=share0 \
		-kernel "$kernel" -initrd "$initrd" -append "$append lodger.share=share0:/srv $run" </dev/null
	wait
	rm -f "$work/socket"
}

for _ in $(seq "$repeat"); do
	for monitor in lodger qemu; do
		$monitor 2>"$work/errors" | tr -d '\r' | sed -n "s/^WORK /$monitor /p" >>"$work/results"
	done
done
awk '
	{ times[$1, $2, ++n[$1, $2]] = $3; if (!seen[$2]++) order[++kinds] = $2 }
	function median(monitor, kind,    i, j, t, count, a) {
		count = n[monitor, kind]
		for (i = 1; i <= count; i++) a[i] = times[monitor, kind, i]
		for (i = 1; i <= count; i++) for (j = i + 1; j <= count; j++) if (a[j] < a[i]) { t = a[i]; a[i] = a[j]; a[j] = t }
		return a[int((count + 1) / 2)]
	}
	END {
		printf "%-10s %8s %8s %6s\n", "seconds", "lodger", "qemu", "ratio"
		for (k = 1; k <= kinds; k++) {
			kind = order[k]; l = median("lodger", kind); q = median("qemu", kind)
			printf "%-10s %8.2f %8.2f %6.1f\n", kind, l, q, q / l
		}
	}' "$work/results"
