#!/bin/bash
# run.sh - the benchmark suite: a static set of small programs natively, under QEMU TCG and under
# Lodger's engines, on the same kernel and image, side by side in one run.
#
# usage: run.sh [--engines LIST] [--rows LIST] [--quick] [--json FILE] [OPTION...]
#
# The suite is built and packed into an initramfs here; measure.py does the rest and knows the
# options: run.sh --help. Needs gcc and python3; QEMU for the comparison.
set -euo pipefail
export LC_ALL=C

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
die() { printf 'run.sh: %s\n' "$*" >&2; exit 1; }
for tool in gcc:'gcc libc6-dev' cpio:cpio python3:python3; do
	command -v "${tool%%:*}" >/dev/null || die "no ${tool%%:*}: apt-get install ${tool#*:}"
done
case " $* " in *" --help "* | *" -h "*) exec python3 "$HERE/measure.py" --help ;; esac

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
cd "$HERE"
# x86-64-v2: what distributions build for; the C library chooses for the processor it finds.
gcc -O2 -static -march=x86-64-v2 -Wall -Wextra -pthread -o "$WORK/init" \
	main.c integer.c floating.c interpreter.c memory.c mmu.c trap.c ipc.c process.c file.c codegen.c atomics.c -lm ||
	die "cannot build the suite (libc6-dev?)"
gcc -O2 -static -nostdlib -ffreestanding -Wall -Wextra -o "$WORK/program" program.c
(cd "$WORK" && printf 'init\nprogram\n' | cpio -o -H newc -R 0:0 --quiet >initrd)
python3 "$HERE/measure.py" --files "$WORK" "$@"
