/* Integer loop: xorshift random numbers, a byte hash, a table walk and data-dependent branches.
 *
 * On the host it is an ordinary program. In a guest it is the first process (rdinit=/bench-loop):
 * it says BENCH-INIT when it starts, BENCH-START and BENCH-END around the loop, and powers the
 * guest off. Whoever reads the console takes the times, so the guest's own clock does not matter.
 *
 * usage: loop [ROUNDS]	(default 6,000,000: about 300 million instructions)
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/reboot.h>
#include <termios.h>
#include <unistd.h>

#define ROUNDS 6000000L
#define TABLE 8192 /* 32 KiB: more than a page, less than a first-level cache */

static uint32_t table[TABLE];

__attribute__((noinline)) static uint32_t hash(uint32_t h, uint64_t x)
{
	for (int i = 0; i < 4; i++, x >>= 8)
		h = (h ^ (x & 0xff)) * 16777619u; /* FNV-1a */
	return h;
}

__attribute__((noinline)) static uint32_t run(long rounds)
{
	uint64_t x = 88172645463325252u;
	uint32_t h = 2166136261u;

	for (long i = 0; i < rounds; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		uint32_t *slot = &table[x % TABLE];
		h = hash(h ^ *slot, x);
		if (h & 1)
			*slot += h;
		else
			*slot ^= (uint32_t)(x >> 32);
	}
	return h;
}

/* A marker must be out before the loop starts, not wait in the serial port's queue. */
static void say(const char *line)
{
	puts(line);
	fflush(stdout);
	tcdrain(STDOUT_FILENO);
}

int main(int argc, char **argv)
{
	long rounds = argc > 1 ? atol(argv[1]) : ROUNDS;
	char end[32];

	say("BENCH-INIT");
	say("BENCH-START");
	snprintf(end, sizeof end, "BENCH-END %08x", run(rounds));
	say(end);
	if (getpid() == 1) {
		sync();
		reboot(RB_POWER_OFF);
	}
	return 0;
}
