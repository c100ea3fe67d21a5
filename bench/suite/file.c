/* Files on a tmpfs: the kernel's paths, no disk. */
#define _GNU_SOURCE
#include "suite.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define FILES 50
#define STATS 500
#define READS 50
#define LISTINGS 10
#define FILE_BYTES (64 << 10)

static char buffer[FILE_BYTES];

static void enter_scratch(void)
{
	char path[256];

	snprintf(path, sizeof path, "%s/suite", scratch_dir);
	mkdir(path, 0755);
	CHECK(chdir(path) == 0);
}

static void write_file(const char *name, size_t bytes)
{
	int fd = open(name, O_CREAT | O_TRUNC | O_WRONLY, 0644);

	CHECK(fd >= 0);
	CHECK(write(fd, buffer, bytes) == (ssize_t)bytes);
	close(fd);
}

static uint64_t read_file(const char *name, size_t bytes)
{
	int fd = open(name, O_RDONLY);

	CHECK(fd >= 0);
	CHECK(read(fd, buffer, bytes) == (ssize_t)bytes);
	close(fd);
	return (uint8_t)buffer[bytes - 1];
}

/* create: a small file's whole life. */
static uint64_t create(void)
{
	uint64_t sum = 0;

	for (int i = 0; i < FILES; i++) {
		char name[16];

		snprintf(name, sizeof name, "file-%d", i);
		buffer[4095] = i;
		write_file(name, 4096);
		sum = fold(sum, read_file(name, 4096));
		CHECK(unlink(name) == 0);
	}
	return sum;
}

static void stat_setup(void)
{
	enter_scratch();
	mkdir("one", 0755);
	mkdir("one/two", 0755);
	write_file("one/two/three", 100);
}

static uint64_t stats(void)
{
	struct stat s;
	uint64_t sum = 0;

	for (int i = 0; i < STATS; i++) {
		CHECK(stat("one/two/three", &s) == 0);
		sum += s.st_size;
		CHECK(stat("one/two/four", &s) < 0);
	}
	return sum;
}

static void read_setup(void)
{
	enter_scratch();
	memset(buffer, 42, FILE_BYTES);
	write_file("large", FILE_BYTES);
}

static uint64_t reads(void)
{
	uint64_t sum = 0;

	for (int i = 0; i < READS; i++)
		sum += read_file("large", FILE_BYTES);
	return sum;
}

static void list_setup(void)
{
	enter_scratch();
	mkdir("listed", 0755);
	CHECK(chdir("listed") == 0);
	for (int i = 0; i < FILES; i++) {
		char name[16];

		snprintf(name, sizeof name, "file-%d", i);
		write_file(name, 10);
	}
}

static uint64_t listings(void)
{
	uint64_t sum = 0;

	for (int i = 0; i < LISTINGS; i++) {
		DIR *dir = opendir(".");
		struct dirent *entry;

		CHECK(dir);
		while ((entry = readdir(dir)))
			sum += strlen(entry->d_name);
		closedir(dir);
	}
	return sum;
}

const struct row file_rows[] = {
	{ "create-read", "files", FILES, create, enter_scratch, NULL },
	{ "stat", "calls", 2 * STATS, stats, stat_setup, NULL },
	{ "read-64K", "bytes", (double)READS * FILE_BYTES, reads, read_setup, NULL },
	{ "list", "entries", LISTINGS * (FILES + 2), listings, list_setup, NULL },
	{ 0 },
};
