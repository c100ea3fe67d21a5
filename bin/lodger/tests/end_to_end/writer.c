/*
 * writer.c - in the guest: changes disks for ever, and says which changes are durable.
 *
 *   writer FIRST DISK...
 *
 * Change n is a function of n alone (see durability.rs, which knows the same one): blocks of 4 KiB that tell n and where they are, or
 * zeroes. After each change to all disks it may fsync them all and print "SYNCED n".
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define BLOCK 4096
#define MOST 16

static uint64_t mix(uint64_t x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

static void must(int good, const char *what)
{
	if (!good) {
		perror(what);
		exit(1);
	}
}

int main(int argc, char **argv)
{
	static uint64_t words[MOST * BLOCK / 8] __attribute__((aligned(BLOCK)));
	int fds[8], count = argc - 2;
	uint64_t size = 0;
	for (int i = 0; i < count; i++) {
		fds[i] = open(argv[i + 2], O_RDWR | O_DIRECT);
		must(fds[i] >= 0 && !ioctl(fds[i], BLKGETSIZE64, &size), argv[i + 2]);
	}
	printf("\nWRITING\n");
	fflush(stdout);
	for (uint64_t n = strtoull(argv[1], NULL, 10);; n++) {
		uint64_t r = mix(n), kind = r % 8, many = (r >> 8) % MOST + 1;
		uint64_t first = (r >> 16) % (size / BLOCK - many);
		uint64_t offset = first * BLOCK, len = many * BLOCK, range[2] = {offset, len};
		for (uint64_t b = 0; b < many; b++)
			for (uint64_t i = 0; i < BLOCK / 8; i++)
				words[b * BLOCK / 8 + i] = i ? mix(n ^ (first + b) << 40 ^ i) : n;
		for (int i = 0; i < count; i++) {
			if (kind == 0)
				must(!fallocate(fds[i], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, len), "punch");
			else if (kind == 1)
				must(!ioctl(fds[i], BLKZEROOUT, range), "zero");
			else
				must(pwrite(fds[i], words, len, offset) == (ssize_t)len, "write");
		}
		if (r >> 40 & 3)
			continue;
		for (int i = 0; i < count; i++)
			must(!fsync(fds[i]), "fsync");
		printf("SYNCED %llu\n", (unsigned long long)n);
		fflush(stdout);
	}
}
