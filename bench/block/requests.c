/*
 * requests.c - both ends of a measurement of a guest's disk.
 *
 *   requests guest DEVICE [SCALE [KIND]]    in the guest: does the work, all or one kind, past the guest's page cache, and says when
 *   requests watch                          on the host: reads the guest's console, prints a line for each kind of work
 *
 * Times are the host's, because a guest's clock is part of what is being compared.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define DEEPEST 16

static uint64_t size;
static const char *only;
static char *buffers[DEEPEST];

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

/* Does `count` requests of `len` bytes, `depth` of them at a time. */
static void work(const char *name, int fd, int write, int random, uint64_t len, int depth, int count)
{
	static uint64_t state = 1;
	aio_context_t context = 0;
	struct iocb blocks[DEEPEST], *list[DEEPEST];
	struct io_event events[DEEPEST];
	uint64_t places = size / len;
	if (only && strcmp(only, name))
		return;
	int begun = 0, ended = 0, free_count = depth;
	if (syscall(SYS_io_setup, DEEPEST, &context))
		die("io_setup");
	for (int i = 0; i < depth; i++)
		list[i] = &blocks[i];
	printf("\nBEGIN %s\n", name);
	fflush(stdout);
	while (ended < count) {
		int batch = free_count < count - begun ? free_count : count - begun;
		for (int i = 0; i < batch; i++) {
			struct iocb *b = list[i];
			int slot = b - blocks;
			state = state * 6364136223846793005ull + 1442695040888963407ull;
			uint64_t place = random ? (state >> 33) % places : (uint64_t)begun % places;
			memset(b, 0, sizeof *b);
			b->aio_fildes = fd;
			b->aio_lio_opcode = write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
			b->aio_buf = (uintptr_t)buffers[slot];
			b->aio_nbytes = len;
			b->aio_offset = place * len;
			begun++;
		}
		if (batch && syscall(SYS_io_submit, context, batch, list) != batch)
			die("io_submit");
		/* What is left of the list moves to its front. */
		free_count -= batch;
		memmove(list, list + batch, free_count * sizeof *list);
		int n = syscall(SYS_io_getevents, context, 1, depth, events, NULL);
		if (n < 1)
			die("io_getevents");
		for (int i = 0; i < n; i++) {
			if (events[i].res != (int64_t)len) {
				fprintf(stderr, "%s: %lld\n", name, (long long)events[i].res);
				exit(1);
			}
			list[free_count++] = (struct iocb *)(uintptr_t)events[i].obj;
		}
		ended += n;
	}
	if (write && fsync(fd))
		die("fsync");
	printf("END %s %d %llu\n", name, count, (unsigned long long)len);
	fflush(stdout);
	syscall(SYS_io_destroy, context);
}

static int guest(const char *path, double scale)
{
	int fd = open(path, O_RDWR | O_DIRECT);
	if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size))
		die(path);
	for (int i = 0; i < DEEPEST; i++) {
		if (posix_memalign((void **)&buffers[i], 4096, 1 << 20))
			return 1;
		memset(buffers[i], i + 1, 1 << 20);
	}
	work("warm-up", fd, 0, 0, 1 << 20, 4, 64);
	work("random-read-1", fd, 0, 1, 4096, 1, 20000 * scale);
	work("random-read-16", fd, 0, 1, 4096, 16, 60000 * scale);
	work("random-write-1", fd, 1, 1, 4096, 1, 20000 * scale);
	work("random-write-16", fd, 1, 1, 4096, 16, 60000 * scale);
	work("sequential-read", fd, 0, 0, 1 << 20, 4, 6000 * scale);
	work("sequential-write", fd, 1, 0, 1 << 20, 4, 4000 * scale);
	return 0;
}

static int watch(void)
{
	char line[4096], name[64];
	double start = 0;
	int count;
	unsigned long long len;
	while (fgets(line, sizeof line, stdin)) {
		if (sscanf(line, "BEGIN %63s", name) == 1) {
			start = now();
		} else if (sscanf(line, "END %63s %d %llu", name, &count, &len) == 3) {
			double seconds = now() - start;
			if (strcmp(name, "warm-up"))
				printf("%s %.1f\n", name, len > 4096 ? count * len / seconds / 1e6 : count / seconds);
		}
	}
	return 0;
}

int main(int argc, char **argv)
{
	only = argc > 4 ? argv[4] : NULL;
	if (argc > 2 && !strcmp(argv[1], "guest"))
		return guest(argv[2], argc > 3 ? atof(argv[3]) : 1);
	if (argc == 2 && !strcmp(argv[1], "watch"))
		return watch();
	return 2;
}
