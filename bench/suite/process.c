/* Processes and threads: their birth and death. */
#define _GNU_SOURCE
#include "suite.h"

#include <pthread.h>
#include <spawn.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define FORKS 10
#define EXECS 4
#define SPAWNS 100
#define THREADS 40

/* What is started: program.c, beside this program. */
static char *program[] = { NULL, NULL };

static void find_program(void)
{
	static char path[4096];
	ssize_t n = readlink("/proc/self/exe", path, sizeof path - 10);

	CHECK(n > 0);
	path[n] = 0;
	strcpy(strrchr(path, '/') + 1, "program");
	program[0] = path;
	CHECK(access(path, X_OK) == 0);
}

static uint64_t reap(void)
{
	int status;

	CHECK(wait(&status) > 0);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1000;
}

static uint64_t forks(void)
{
	uint64_t sum = 0;

	for (int i = 0; i < FORKS; i++) {
		int pid = fork();
		CHECK(pid >= 0);
		if (pid == 0)
			_exit(i);
		sum += reap();
	}
	return sum;
}

static uint64_t execs(void)
{
	uint64_t sum = 0;

	for (int i = 0; i < EXECS; i++) {
		int pid = fork();
		CHECK(pid >= 0);
		if (pid == 0) {
			execv(program[0], program);
			_exit(99);
		}
		sum += reap() + 1;
	}
	return sum;
}

/* spawn-100: a hundred programs are started, then their ends awaited, as a shell or a build does. */
static uint64_t spawns(void)
{
	extern char **environ;
	uint64_t sum = 0;
	pid_t pid;

	for (int i = 0; i < SPAWNS; i++)
		CHECK(posix_spawn(&pid, program[0], NULL, NULL, program, environ) == 0);
	for (int i = 0; i < SPAWNS; i++)
		sum += reap() + 1;
	return sum;
}

static void *thread_body(void *argument)
{
	return argument;
}

static uint64_t threads(void)
{
	uint64_t sum = 0;

	for (uintptr_t i = 0; i < THREADS; i++) {
		pthread_t thread;
		void *result;

		CHECK(pthread_create(&thread, NULL, thread_body, (void *)i) == 0);
		CHECK(pthread_join(thread, &result) == 0);
		sum += (uintptr_t)result;
	}
	return sum;
}

const struct row process_rows[] = {
	{ "fork", "processes", FORKS, forks, NULL, NULL },
	{ "fork-exec", "programs", EXECS, execs, find_program, NULL },
	{ "spawn-100", "programs", SPAWNS, spawns, find_program, NULL },
	{ "thread", "threads", THREADS, threads, NULL, NULL },
	{ 0 },
};
