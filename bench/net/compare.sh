#!/bin/bash
# compare.sh - TCP between a guest and its host over user-mode networks: Lodger's, and QEMU's (TCG with slirp).
#
# usage: compare.sh --kernel FILE --initrd FILE [OPTION...]
#
#   --kernel FILE     Linux bzImage, and
#   --initrd FILE     its initramfs: of the image `mini` (`lodger image list` says where)
#   --lodger FILE     the monitor under test (default: target/release/lodger)
#   --engine NAME     its engine (default: dbt)
#   --bytes N         sent, and received, in one run (default: 300000000)
#   --turns N         bytes there and back in one run (default: 2000)
#   --repeat N        repetitions, round robin; the table shows medians (default: 3)
#
# Needs gcc with a static C library, cpio and qemu-system-x86_64. Ratios of a host that is busy otherwise mean little.
set -euo pipefail
export LC_ALL=C
lodger=target/release/lodger engine=dbt bytes=300000000 turns=2000 repeat=3 kernel= initrd=
while [ $# -gt 0 ]; do
	case $1 in
	--kernel | --initrd | --lodger | --engine | --bytes | --turns | --repeat)
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
port=$((20000 + RANDOM % 20000))
trap 'kill "$server" 2>/dev/null; rm -rf "$work"' EXIT
gcc -O2 -static -o "$work/traffic" "$here/traffic.c"
(cd "$work" && mkdir -p extra/bin && cp traffic extra/bin/ && cd extra && find . | cpio -o -H newc --quiet >../extra.cpio)
cat "$initrd" "$work/extra.cpio" >"$work/initrd"
"$work/traffic" serve "$port" >>"$work/results" &
server=$!

commands="traffic turns 10.0.2.2 $port $turns; traffic send 10.0.2.2 $port $bytes; traffic receive 10.0.2.2 $port $bytes"
append="console=ttyS0 quiet cryptomgr.notests lodger.run=\"$commands\""
for ((i = 0; i < repeat; i++)); do
	for monitor in lodger qemu; do
		: >"$work/results"
		case $monitor in
		lodger)
			timeout 300 "$lodger" run -q --engine "$engine" --memory 512M --kernel "$kernel" --initrd "$work/initrd" \
				--append "$append" </dev/null >"$work/console" 2>&1
			;;
		qemu)
			timeout 300 qemu-system-x86_64 -accel tcg -cpu max -m 512 -display none -no-reboot -serial "file:$work/console" \
				-kernel "$kernel" -initrd "$work/initrd" -append "$append" \
				-nic user,model=virtio-net-pci </dev/null
			;;
		esac || { cat "$work/console" >&2; exit 1; }
		sed "s/^/$monitor /" "$work/results" | tee -a "$work/all" >&2
	done
done
awk '
	{ n[$1, $2]++; value[$1, $2, n[$1, $2]] = $3 }
	function median(m, what, i, j, t) {
		for (i = 1; i <= n[m, what]; i++) v[i] = value[m, what, i]
		for (i = 1; i < n[m, what]; i++) for (j = i + 1; j <= n[m, what]; j++) if (v[j] < v[i]) { t = v[i]; v[i] = v[j]; v[j] = t }
		return v[int((n[m, what] + 1) / 2)]
	}
	END {
		split("turns send receive", whats, " ")
		for (w = 1; w <= 3; w++) {
			l = median("lodger", whats[w]); q = median("qemu", whats[w])
			printf "%-8s lodger %10.1f  qemu %10.1f  ratio %.2f\n", whats[w], l, q, l / q
		}
	}' "$work/all"
