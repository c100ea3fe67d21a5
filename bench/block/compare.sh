#!/bin/bash
# compare.sh - a guest's disk under Lodger and under QEMU (TCG), both virtio-blk on the same image on a tmpfs.
#
# usage: compare.sh --kernel FILE --initrd FILE [OPTION...]
#
#   --kernel FILE     Linux bzImage, and
#   --initrd FILE     its initramfs: of the image `mini` (`lodger image list` says where)
#   --lodger FILE     the monitor under test (default: target/release/lodger)
#   --engine NAME     its engine (default: dbt)
#   --format FORMAT   of the image: raw (default) or qcow2, made by `lodger disk create`
#   --size SIZE       of the disk (default: 512M)
#   --scale X         times as many requests (default: 1)
#   --repeat N        repetitions, round robin; the table shows medians (default: 3)
#
# Needs gcc with a static C library, cpio, qemu-system-x86_64 and a tmpfs in /dev/shm. Ratios of a host that is busy otherwise mean little.
set -euo pipefail
export LC_ALL=C
lodger=target/release/lodger engine=dbt format=raw size=512M scale=1 repeat=3 kernel= initrd=
while [ $# -gt 0 ]; do
	case $1 in
	--kernel | --initrd | --lodger | --engine | --format | --size | --scale | --repeat)
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
disk=$(mktemp -d -p /dev/shm)/disk
trap 'rm -rf "$work" "${disk%/disk}"' EXIT
gcc -O2 -static -o "$work/requests" "$here/requests.c"
(cd "$work" && mkdir -p extra/bin && cp requests extra/bin/ && cd extra && find . | cpio -o -H newc --quiet >../extra.cpio)
cat "$initrd" "$work/extra.cpio" >"$work/initrd"
case $format in
raw) truncate -s "$size" "$disk" && dd if=/dev/zero of="$disk" bs=1M count="$(($(stat -c %s "$disk") >> 20))" conv=notrunc status=none ;;
*) "$lodger" -q disk create "$disk" "$size" --format "$format" ;;
esac

append="console=ttyS0 quiet cryptomgr.notests lodger.run=\"requests guest /dev/vda $scale\""
for ((i = 0; i < repeat; i++)); do
	for monitor in lodger qemu; do
		case $monitor in
		lodger)
			timeout 600 "$lodger" run -q --engine "$engine" --memory 512M --net none --kernel "$kernel" --initrd "$work/initrd" \
				--append "$append" --disk "$disk" </dev/null
			;;
		qemu)
			timeout 600 qemu-system-x86_64 -accel tcg -cpu max -m 512 -display none -no-reboot -serial stdio -monitor none -nic none \
				-kernel "$kernel" -initrd "$work/initrd" -append "$append" \
				-drive "file=$disk,format=$format,if=virtio,discard=unmap" </dev/null
			;;
		esac | tee "$work/console" | "$work/requests" watch >"$work/results"
		grep -q 'LODGER-EXIT rc=0' "$work/console" || { cat "$work/console" >&2; exit 1; }
		sed "s/^/$monitor /" "$work/results" | tee -a "$work/all" >&2
	done
done
awk '
	{ if (!n["lodger", $2] && $1 == "lodger") order[++whats] = $2; n[$1, $2]++; value[$1, $2, n[$1, $2]] = $3 }
	function median(m, what, i, j, t) {
		for (i = 1; i <= n[m, what]; i++) v[i] = value[m, what, i]
		for (i = 1; i < n[m, what]; i++) for (j = i + 1; j <= n[m, what]; j++) if (v[j] < v[i]) { t = v[i]; v[i] = v[j]; v[j] = t }
		return v[int((n[m, what] + 1) / 2)]
	}
	END {
		for (w = 1; w <= whats; w++) {
			l = median("lodger", order[w]); q = median("qemu", order[w])
			printf "%-17s lodger %10.1f  qemu %10.1f  %s  ratio %.2f\n", order[w], l, q, order[w] ~ /random/ ? "/s  " : "MB/s", l / q
		}
	}' "$work/all"
