/* The harness: runs rows, prints their rates. See README.md; the lines it prints are read by measure.py.
 *
 * usage: suite [--ms N] [--rows LIST] [--dir DIR] [--idle N] [--list]
 *
 *   --ms N       how long a row is measured (default 300 ms)
 *   --rows LIST  groups and rows (group/row) with commas between (default: all)
 *   --dir DIR    where the file rows work; should be a tmpfs (default: /tmp)
 *   --idle N     then sleep N seconds between two marks
 *   --list       print the rows' names only
 *
 * As a machine's first process it mounts what the rows need, and powers the machine off at the end.
 */
#define _GNU_SOURCE
#include "suite.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static const struct {
	const char *name;
	const struct row *rows;
} groups[] = {
	{ "integer", integer_rows },	 { "floating", floating_rows }, { "interpreter", interpreter_rows },
	{ "memory", memory_rows },	 { "mmu", mmu_rows },		{ "trap", trap_rows },
	{ "ipc", ipc_rows },		 { "process", process_rows },	{ "file", file_rows },
	{ "codegen", codegen_rows },	 { "atomics", atomics_rows },
};

const char *scratch_dir = "/tmp";

_Noreturn void fail(const char *what)
{
	printf("SUITE-ERROR %s: %s\n", what, strerror(errno));
	fflush(stdout);
	_exit(1);
}

void *map_pages(size_t bytes)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(p != MAP_FAILED);
	madvise(p, bytes, MADV_NOHUGEPAGE); /* fails on kernels without huge pages, which is as good */
	return p;
}

int start_child(void (*body)(void))
{
	int pid = fork();

	CHECK(pid >= 0);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		body();
		_exit(0);
	}
	return pid;
}

/* A line that the reader may take the time of: it must not wait in the serial port's queue. */
static void say(const char *line)
{
	puts(line);
	fflush(stdout);
	tcdrain(STDOUT_FILENO);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

static void measure(const char *group, const struct row *row, double seconds)
{
	uint64_t sum;
	double start, end;
	long chunks = 0;
	char line[160];

	if (row->setup)
		row->setup();
	start = now();
	do
		sum = row->chunk();
	while ((end = now()) - start < seconds / 10); /* warm caches, of every kind */
	start = end;
	do {
		if (row->chunk() != sum) {
			errno = 0;
			fail("the checksum changed between chunks");
		}
		chunks++;
	} while ((end = now()) - start < seconds);
	if (row->teardown)
		row->teardown();
	snprintf(line, sizeof line, "SUITE-ROW %s/%s %.6e %s %016llx %.3f", group, row->name,
		 chunks * row->work / (end - start), row->unit, (unsigned long long)sum, end - start);
	say(line);
}

static int selected(const char *list, const char *group, const char *row)
{
	char full[64];

	if (!list)
		return 1;
	snprintf(full, sizeof full, "%s/%s", group, row);
	for (const char *p = list; *p; p += strspn(p, ",")) {
		size_t n = strcspn(p, ",");
		if ((n == strlen(group) && !memcmp(p, group, n)) || (n == strlen(full) && !memcmp(p, full, n)))
			return 1;
		p += n;
	}
	return 0;
}

static void run_rows(const char *list, double seconds, int only_names)
{
	for (size_t g = 0; g < COUNT(groups); g++) {
		for (const struct row *row = groups[g].rows; row->name; row++) {
			int pid, status;

			if (!selected(list, groups[g].name, row->name))
				continue;
			if (only_names) {
				printf("%s/%s\n", groups[g].name, row->name);
				continue;
			}
			pid = fork();
			CHECK(pid >= 0);
			if (pid == 0) {
				measure(groups[g].name, row, seconds);
				_exit(0);
			}
			CHECK(waitpid(pid, &status, 0) == pid);
			if (status) {
				printf("SUITE-FAILED %s/%s %s %d\n", groups[g].name, row->name,
				       WIFSIGNALED(status) ? "signal" : "status",
				       WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
				fflush(stdout);
			}
		}
	}
}

/* The host's scheduler would spread the rows of several processes over its CPUs, a guest's with one CPU cannot. */
static void stay_on_this_cpu(void)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(sched_getcpu(), &set);
	sched_setaffinity(0, sizeof set, &set);
}

/* Which mitigations the kernel chooses by the processor it sees decides what a system call costs. */
static void describe_kernel(void)
{
	static const char *const weaknesses[] = { "meltdown", "spectre_v2", "retbleed" };
	struct utsname name;
	char line[1024];
	size_t n;

	uname(&name);
	n = snprintf(line, sizeof line, "SUITE-KERNEL %s %s", name.sysname, name.release);
	for (size_t i = 0; i < COUNT(weaknesses); i++) {
		char path[96], text[160] = "unknown";
		FILE *f;

		snprintf(path, sizeof path, "/sys/devices/system/cpu/vulnerabilities/%s", weaknesses[i]);
		f = fopen(path, "r");
		if (f) {
			if (fgets(text, sizeof text, f))
				text[strcspn(text, ",;\n")] = 0;
			fclose(f);
		}
		n += snprintf(line + n, sizeof line - n, "; %s: %s", weaknesses[i], text);
	}
	say(line);
}

static void mount_all(void)
{
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/tmp", 0755);
	CHECK(mount("proc", "/proc", "proc", 0, NULL) == 0);
	CHECK(mount("sysfs", "/sys", "sysfs", 0, NULL) == 0);
	CHECK(mount("tmpfs", "/tmp", "tmpfs", 0, NULL) == 0);
}

int main(int argc, char **argv)
{
	const char *list = NULL;
	double seconds = 0.3, start = now();
	int idle = 0, only_names = 0, is_init = getpid() == 1;
	char line[64];

	for (int i = 1; i < argc; i++) {
		const char *value = i + 1 < argc ? argv[i + 1] : "";

		if (!strcmp(argv[i], "--list")) {
			only_names = 1;
			continue;
		}
		if (!strcmp(argv[i], "--ms"))
			seconds = atof(value) / 1000;
		else if (!strcmp(argv[i], "--rows"))
			list = value;
		else if (!strcmp(argv[i], "--dir"))
			scratch_dir = value;
		else if (!strcmp(argv[i], "--idle"))
			idle = atoi(value);
		else if (!is_init) { /* the kernel passes its own parameters to the first process */
			fprintf(stderr, "suite: what is %s?\n", argv[i]);
			return 2;
		}
		i++;
	}
	if (only_names) {
		run_rows(list, seconds, 1);
		return 0;
	}
	say("SUITE-INIT");
	if (is_init)
		mount_all();
	describe_kernel();
	stay_on_this_cpu();
	run_rows(list, seconds, 0);
	snprintf(line, sizeof line, "SUITE-ROWS-END %.3f", now() - start);
	say(line);
	if (idle) {
		sleep(1); /* what is left to do after the rows */
		say("SUITE-IDLE");
		sleep(idle);
		say("SUITE-IDLE-END");
	}
	say("SUITE-END");
	if (is_init)
		reboot(RB_POWER_OFF);
	return 0;
}
