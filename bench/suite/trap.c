/* Ways into the kernel and back. */
#define _GNU_SOURCE
#include "suite.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SYSCALLS 2000
#define READINGS 5000
#define SIGNALS 300

static uint64_t getppid_calls(void)
{
	uint64_t sum = 0;

	for (int i = 0; i < SYSCALLS; i++)
		sum += syscall(SYS_getppid) > 0;
	return sum;
}

/* clock_gettime: without a system call where the kernel trusts the clock. */
static uint64_t clock_readings(void)
{
	struct timespec last = { 0 }, t;
	uint64_t in_order = 0;

	for (int i = 0; i < READINGS; i++) {
		clock_gettime(CLOCK_MONOTONIC, &t);
		in_order += t.tv_sec > last.tv_sec || (t.tv_sec == last.tv_sec && t.tv_nsec >= last.tv_nsec);
		last = t;
	}
	return in_order;
}

static volatile sig_atomic_t caught;
static sigjmp_buf after_fault;
static volatile uint8_t *forbidden;

static void count_signal(int signal)
{
	(void)signal;
	caught++;
}

static void leave_fault(int signal)
{
	(void)signal;
	caught++;
	siglongjmp(after_fault, 0);
}

static void signal_setup(void)
{
	sigaction(SIGUSR1, &(struct sigaction){ .sa_handler = count_signal }, NULL);
}

static uint64_t signals(void)
{
	int pid = getpid();

	caught = 0;
	for (int i = 0; i < SIGNALS; i++)
		kill(pid, SIGUSR1);
	return caught;
}

static void segv_setup(void)
{
	sigaction(SIGSEGV, &(struct sigaction){ .sa_handler = leave_fault, .sa_flags = SA_NODEFER }, NULL);
	forbidden = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(forbidden != MAP_FAILED);
}

/* segv: an access that is caught, as language runtimes do for null pointers and garbage collection. */
static uint64_t segvs(void)
{
	caught = 0;
	for (volatile int i = 0; i < SIGNALS; i++)
		if (!sigsetjmp(after_fault, 0))
			forbidden[0] = 1;
	return caught;
}

const struct row trap_rows[] = {
	{ "getppid", "calls", SYSCALLS, getppid_calls, NULL, NULL },
	{ "clock_gettime", "calls", READINGS, clock_readings, NULL, NULL },
	{ "signal", "signals", SIGNALS, signals, signal_setup, NULL },
	{ "segv", "faults", SIGNALS, segvs, segv_setup, NULL },
	{ 0 },
};
