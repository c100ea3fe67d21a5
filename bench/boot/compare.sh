#!/bin/bash
# compare.sh - boot time and integer speed of Lodger's interpreter, Bochs and QEMU TCG, side by side.
#
# usage: compare.sh --kernel FILE --initrd FILE [OPTION...]
#
#   --kernel FILE     Linux bzImage
#   --initrd FILE     its initramfs, which prints a line that --marker matches
#   --marker REGEX    that line, the initramfs's first output (default: Lodger mini:|LODGER-READY)
#   --memtest FILE    memtest86+ for the test of that name (default: /boot/memtest86+x64.bin)
#   --lodger FILE     the monitor under test (default: target/release/lodger)
#   --engine NAME     its engine (default: interp)
#   --monitors LIST   of lodger,bochs,qemu,native (default: all that are installed)
#   --tests LIST      of boot,loop,memtest (default: boot,loop)
#   --repeat N        repetitions; the table shows medians (default: 3)
#   --cpu N           pin every monitor to host CPU N
#   --memory MIB      guest memory (default: 512)
#   --timeout S       for one run (default: 180)
#   --bochs-cpu NAME  Bochs's CPU model (default: corei7_haswell_4770, has AVX2 like Lodger)
#   --bochs-ips N     guest instructions that Bochs takes for a second (default: 100000000)
#   --work DIR        keep consoles, logs and generated files here (default: removed at the end)
#
# What is measured, on the host's clock, from the lines that the guest prints:
#   boot   until the initramfs's first output, command line "console=ttyS0 panic=-1 quiet"
#   init   until the first process runs (loop.c in place of the initramfs's own /init)
#   loop   the integer loop of loop.c alone
#   mtest  until memtest86+ (no Linux: bare metal, its own drivers) is in its first pass; its
#          console's raw bytes are in DIR/MONITOR-memtest-N.console with --work DIR
# boot, init and mtest count from the start of the monitor; Bochs cannot load a kernel itself, so its
# time starts when GRUB hands over to the kernel. "cpu" is the CPU time that the monitor's
# process used meanwhile: on a busy host its ratios mean more than those of wall time.
# Instruction rates are per second of CPU time (wall time for native, which is over too soon).
# Repetitions go round robin, so a slow spell of the host hits every monitor.
set -euo pipefail
export LC_ALL=C

usage() { sed -n '2,/^set -e/p' "$0" | sed -n 's/^# \{0,1\}//p'; exit "${1:-2}"; }
say() { printf 'compare: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
in_list() { case ",$2," in *",$1,"*) ;; *) return 1 ;; esac; }

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
KERNEL='' INITRD='' MARKER='Lodger mini:|LODGER-READY' MEMTEST='/boot/memtest86+x64.bin'
LODGER=${CARGO_TARGET_DIR:-$HERE/../../target}/release/lodger ENGINE=interp
MONITORS=lodger,bochs,qemu,native TESTS=boot,loop
REPEAT=3 CPU='' MEMORY=512 TIMEOUT=180 WORK=''
BOCHS_CPU=corei7_haswell_4770 BOCHS_IPS=100000000

while [ $# -gt 0 ]; do
	case $1 in -h | --help) usage 0 ;; esac
	[ $# -ge 2 ] || usage
	case $1 in
	--kernel) KERNEL=$2 ;; --initrd) INITRD=$2 ;; --marker) MARKER=$2 ;; --memtest) MEMTEST=$2 ;;
	--lodger) LODGER=$2 ;; --engine) ENGINE=$2 ;;
	--monitors) MONITORS=$2 ;; --tests) TESTS=$2 ;;
	--repeat) REPEAT=$2 ;; --cpu) CPU=$2 ;; --memory) MEMORY=$2 ;; --timeout) TIMEOUT=$2 ;;
	--bochs-cpu) BOCHS_CPU=$2 ;; --bochs-ips) BOCHS_IPS=$2 ;; --work) WORK=$2 ;;
	*) usage ;;
	esac
	shift 2
done
if [ -z "$KERNEL" ] || [ -z "$INITRD" ]; then die "--kernel and --initrd are required (see --help)"; fi
[ -r "$KERNEL" ] || die "cannot read $KERNEL"
[ -r "$INITRD" ] || die "cannot read $INITRD"

# ---- what is installed -----------------------------------------------------

lacks() { # MONITOR: prints what is missing and how to get it
	local tool
	case $1 in
	lodger) [ -x "$LODGER" ] || echo "$LODGER is not there: cargo build --release" ;;
	qemu) have qemu-system-x86_64 || echo "no qemu-system-x86_64: apt-get install qemu-system-x86" ;;
	bochs)
		have bochs-bin || echo "no bochs: apt-get install bochs bochs-term"
		compgen -G '/usr/lib/*/bochs/plugins/libbx_term_gui.so' >/dev/null ||
			echo "no terminal display for bochs: apt-get install bochs-term"
		for tool in grub-mkrescue:grub-common xorriso:xorriso mformat:mtools script:bsdutils; do
			have "${tool%:*}" || echo "no ${tool%:*}: apt-get install ${tool#*:}"
		done
		[ -d /usr/lib/grub/i386-pc ] || echo "no GRUB for PC BIOS: apt-get install grub-pc-bin" ;;
	native) ;;
	*) die "unknown monitor $1 (see --help)" ;;
	esac
}

PRESENT=()
for m in ${MONITORS//,/ }; do
	missing=$(lacks "$m")
	if [ -z "$missing" ]; then PRESENT+=("$m"); else
		while IFS= read -r line; do say "without $m: $line"; done <<<"$missing"
	fi
done
[ ${#PRESENT[@]} -gt 0 ] || die "nothing to measure"
for t in gcc cpio taskset; do have $t || die "needs $t: apt-get install gcc libc6-dev cpio util-linux"; done

# ---- guest files -----------------------------------------------------------

PID=''
KEEP=$WORK
[ -n "$WORK" ] || WORK=$(mktemp -d)
mkdir -p "$WORK"
rm -f "$WORK"/{pid,console}
WORK=$(cd "$WORK" && pwd)
stop_monitor() { # its process, and for Bochs the script that it runs under
	local pid
	[ -n "$PID" ] || return 0
	for pid in "$PID" $(cat "$WORK/pid" 2>/dev/null || true); do kill -KILL "$pid" 2>/dev/null || true; done
	wait "$PID" 2>/dev/null || true
	PID=''
}
cleanup() {
	stop_monitor
	[ -n "$KEEP" ] || rm -rf "$WORK"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# The loop goes into a second archive behind the initramfs: the kernel unpacks both. An archive
# starts at a multiple of 4 bytes.
gcc -O2 -static -o "$WORK/bench-loop" "$HERE/loop.c" || die "cannot build loop.c (libc6-dev?)"
{
	cat "$INITRD"
	head -c $((-$(stat -Lc %s "$INITRD") & 3)) /dev/zero
	(cd "$WORK" && echo bench-loop | cpio -o -H newc -R 0:0 --quiet)
} >"$WORK/initrd"
cp -L "$KERNEL" "$WORK/kernel"

guest() { # TEST: sets the guest's KERNEL, INITRD (empty: none) and APPEND
	KERNEL=$WORK/kernel INITRD=$WORK/initrd
	case $1 in
	boot) APPEND="console=ttyS0 panic=-1 quiet" ;;
	loop) APPEND="console=ttyS0 panic=-1 quiet rdinit=/bench-loop" ;;
	memtest)
		[ -r "$MEMTEST" ] || die "cannot read $MEMTEST: apt-get install memtest86+, or --memtest FILE"
		KERNEL=$MEMTEST INITRD='' APPEND="console=ttyS0,115200"
		;;
	*) die "unknown test $1 (see --help)" ;;
	esac
}

bochs_files() { # TEST: an ISO whose GRUB boots the kernel, and a configuration for it
	local d=$WORK/bochs-$1
	mkdir -p "$d/iso/boot/grub"
	cp "$KERNEL" "$d/iso/boot/kernel"
	[ -z "$INITRD" ] || cp "$INITRD" "$d/iso/boot/initrd"
	cat >"$d/iso/boot/grub/grub.cfg" <<-END
		serial --unit=0 --speed=115200
		terminal_output serial
		linux /boot/kernel $APPEND
		${INITRD:+initrd /boot/initrd}
		echo 'BENCH-HANDOVER[' # ends the line for the reader of every test
		boot
	END
	grub-mkrescue -o "$d/boot.iso" "$d/iso" >"$d/mkrescue.log" 2>&1 || die "grub-mkrescue failed, see $d/mkrescue.log (--work)"
	rm -r "$d/iso"
	cat >"$d/bochsrc" <<-END
		config_interface: textconfig
		display_library: term
		memory: guest=$MEMORY, host=$MEMORY
		romimage: file=/usr/share/bochs/BIOS-bochs-latest
		vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
		boot: cdrom
		ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
		ata0-master: type=cdrom, path=$d/boot.iso, status=inserted
		cpu: model=$BOCHS_CPU, count=1, ips=$BOCHS_IPS, reset_on_triple_fault=0, ignore_bad_msrs=1
		clock: sync=none
		com1: enabled=1, mode=file, dev=$WORK/console
		log: $d/bochs.log
		panic: action=fatal
		error: action=ignore
		info: action=ignore
		debug: action=ignore
	END
	echo c >"$d/rc" # Debian's Bochs has its debugger built in: continue at once
}

# ---- one run ---------------------------------------------------------------

# monitor MONITOR TEST: becomes the monitor, its guest's console on $WORK/console
monitor() {
	local pin=() initrd=() d=$WORK/bochs-$2
	[ -z "$INITRD" ] || initrd=(--initrd "$INITRD")
	[ -z "$CPU" ] || pin=(taskset -c "$CPU")
	case $1 in
	lodger) exec "${pin[@]}" "$LODGER" run --engine "$ENGINE" --no-reboot --memory "${MEMORY}M" \
		--kernel "$KERNEL" "${initrd[@]}" --append "$APPEND" >"$WORK/console" ;;
	qemu) exec "${pin[@]}" qemu-system-x86_64 -accel tcg -cpu max -machine q35 -m "$MEMORY" -no-reboot \
		-nodefaults -display none -serial stdio \
		-kernel "$KERNEL" "${initrd[@]/#--/-}" -append "$APPEND" >"$WORK/console" ;;
	# the terminal display wants a terminal, which script provides
	bochs) TERM=xterm exec script -qefc "echo \$\$ >'$WORK/pid'; exec ${pin[*]} bochs-bin -q -f '$d/bochsrc' -rc '$d/rc'" /dev/null ;;
	native) exec "${pin[@]}" "$WORK/bench-loop" >"$WORK/console" ;;
	esac
}

now() { local t=$EPOCHREALTIME; echo "${t/./}"; } # microseconds
TICK=$((1000000 / $(getconf CLK_TCK)))
cpu_time() { # PID: microseconds of CPU time so far
	local stat fields
	stat=$(cat "/proc/$1/stat" 2>/dev/null) || { echo 0; return 0; }
	read -r -a fields <<<"${stat##*) }"
	echo $(((fields[11] + fields[12]) * TICK))
}

# result METRIC MONITOR WALL CPU
result() { echo "$1 $2 $3 $4" >>"$WORK/results"; }

# run MONITOR TEST NUMBER: one boot, its results noted; fails when the last line does not come
run() {
	local mon=$1 test=$2 log=$WORK/$1-$2-$3 from line='' part='' pid wall cpu cpu_from=0 start=0 start_cpu=0 deadline ok='' end=$'\n'
	[ "$test" != memtest ] || end='[' # it moves the cursor and writes no line ends
	guest "$test"
	rm -f "$WORK/console" "$WORK/pid"
	mkfifo "$WORK/console"
	exec 3<>"$WORK/console"
	from=$(now) deadline=$((SECONDS + TIMEOUT))
	monitor "$mon" "$test" </dev/null >"$log.log" 2>&1 3<&- &
	PID=$!
	while [ -z "$ok" ]; do
		if ! IFS= read -r -d "$end" -t 1 -u 3 line; then
			part+=$line # what came of an unfinished line
			kill -0 "$PID" 2>/dev/null || break
			[ $SECONDS -lt $deadline ] || break
			continue
		fi
		wall=$(now)
		line=$part$line part=''
		printf '%s%s' "$line" "$end" >>"$log.console"
		pid=$PID
		[ ! -s "$WORK/pid" ] || pid=$(cat "$WORK/pid")
		cpu=$(cpu_time "$pid")
		case $line in
		*BENCH-HANDOVER*) from=$wall cpu_from=$cpu ;;
		*BENCH-INIT*) [ "$mon" = native ] || result init "$mon" $((wall - from)) $((cpu - cpu_from)) ;;
		*BENCH-START*) start=$wall start_cpu=$cpu ;;
		*BENCH-END*) result loop "$mon" $((wall - start)) $((cpu - start_cpu)); echo "${line//[^ -~]/}" >>"$WORK/ends"; ok=1 ;;
		"Address test"*) result mtest "$mon" $((wall - from)) $((cpu - cpu_from)); ok=1 ;; # its test #0
		*) if [ "$test" = boot ] && [[ $line =~ $MARKER ]]; then
			result boot "$mon" $((wall - from)) $((cpu - cpu_from)); ok=1
		fi ;;
		esac
	done
	stop_monitor
	exec 3<&-
	[ -n "$ok" ]
}

# ---- the measurement -------------------------------------------------------

: >"$WORK/results"
: >"$WORK/ends"
for t in ${TESTS//,/ }; do
	guest "$t"
	if in_list bochs "$(IFS=,; echo "${PRESENT[*]}")"; then bochs_files "$t"; fi
done
failed=0
for ((n = 1; n <= REPEAT; n++)); do
	for t in ${TESTS//,/ }; do
		for m in "${PRESENT[@]}"; do
			[ "$m" != native ] || [ "$t" = loop ] || continue
			if run "$m" "$t" "$n"; then
				say "run $n of $REPEAT: $t on $m"
			else
				failed=$((failed + 1))
				say "run $n of $REPEAT: $t on $m FAILED; the end of its output:"
				tail -n 5 "$WORK/$m-$t-$n".{console,log} >&2 2>/dev/null || true
			fi
		done
	done
done
[ "$(sort -u "$WORK/ends" | wc -l)" -le 1 ] || { say "the loop's checksums differ:"; sort "$WORK/ends" | uniq -c >&2; failed=$((failed + 1)); }

# instructions of the loop, for the rate column; 0 when nothing here can count them
count_instructions() {
	local n=''
	n=$(perf stat -x, -e instructions:u "$WORK/bench-loop" 2>&1 >/dev/null | awk -F, '$1 ~ /^[0-9]+$/ { print $1 }') || true
	[ -n "$n" ] || n=$(valgrind --tool=callgrind --callgrind-out-file=/dev/null "$WORK/bench-loop" 2>&1 |
		sed -n 's/^.*Collected : \([0-9]*\).*/\1/p') || true
	echo "${n:-0}"
}
COUNT=0
if in_list loop "$TESTS"; then
	COUNT=$(count_instructions)
	[ "$COUNT" != 0 ] || say "no instruction rates: neither perf (hardware counters) nor valgrind works here"
fi

echo "$(grep -m1 'model name' /proc/cpuinfo | sed 's/.*: //'), $(nproc) CPUs, load $(cut -d' ' -f1 /proc/loadavg); $(uname -sr); medians of $REPEAT"
awk -v count="$COUNT" '
	{ k = $1 " " $2; n[k]++; w[k, n[k]] = $3 / 1e6; c[k, n[k]] = $4 / 1e6 }
	function median(a, k,   i, j, t, v) { # of a[k, 1..n[k]]; sorts a copy
		for (i = 1; i <= n[k]; i++) v[i] = a[k, i]
		for (i = 2; i <= n[k]; i++) for (j = i; j > 1 && v[j] < v[j - 1]; j--) { t = v[j]; v[j] = v[j - 1]; v[j - 1] = t }
		low = v[1]; high = v[n[k]]
		return n[k] % 2 ? v[(n[k] + 1) / 2] : (v[n[k] / 2] + v[n[k] / 2 + 1]) / 2
	}
	END {
		printf "%-5s %-8s %4s %8s  %-15s %7s %8s  %s\n", "test", "monitor", "runs", "wall s", "(min-max)", "cpu s", "M ins/s", "speed, Bochs = 1: wall, cpu"
		split("boot init loop mtest", tests, " "); split("lodger bochs qemu native", mons, " ")
		for (i = 1; i <= 4; i++) for (j = 1; j <= 4; j++) {
			k = tests[i] " " mons[j]; if (!n[k]) continue
			b = tests[i] " bochs"; cpu = median(c, k); wall = median(w, k); range = sprintf("(%.2f-%.2f)", low, high)
			rate = tests[i] == "loop" && count > 0 ? sprintf("%.0f", count / (cpu > 0 ? cpu : wall) / 1e6) : "-"
			printf "%-5s %-8s %4d %8.3f  %-15s %7s %8s  %s, %s\n", tests[i], mons[j], n[k], wall, range,
				(cpu > 0 ? sprintf("%.2f", cpu) : "-"), rate, (n[b] ? sprintf("%.2f", median(w, b) / wall) : "-"),
				(n[b] && cpu > 0 ? sprintf("%.2f", median(c, b) / cpu) : "-")
		}
	}' "$WORK/results"
if [ "$failed" -gt 0 ]; then die "$failed failures"; fi
