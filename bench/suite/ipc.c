/* Two processes on one CPU that talk to each other. */
#define _GNU_SOURCE
#include "suite.h"

#include <linux/futex.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define ROUND_TRIPS 100
#define BLOCK (32 << 10)
#define BLOCKS 50

static int child;
static int request_to, request_from, reply_to, reply_from; /* write to, read from */

static void stop_child(void)
{
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
}

/* pipe, socket: one byte there and back. */

static void echo(void)
{
	char byte;

	while (read(request_from, &byte, 1) == 1) {
		byte ^= 1;
		if (write(reply_to, &byte, 1) != 1)
			break;
	}
}

static void pipe_setup(void)
{
	int request[2], reply[2];

	CHECK(pipe(request) == 0 && pipe(reply) == 0);
	request_from = request[0], request_to = request[1];
	reply_from = reply[0], reply_to = reply[1];
	child = start_child(echo);
}

static void socket_setup(void)
{
	int ends[2];

	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
	request_to = reply_from = ends[0];
	request_from = reply_to = ends[1];
	child = start_child(echo);
}

static uint64_t round_trips(void)
{
	uint64_t sum = 0;

	for (int i = 0; i < ROUND_TRIPS; i++) {
		char byte = i;
		CHECK(write(request_to, &byte, 1) == 1 && read(reply_from, &byte, 1) == 1);
		sum = fold(sum, byte);
	}
	return sum;
}

/* pipe-32K, socket-32K: blocks into the kernel and out of it, in one process. */

static char block_out[BLOCK], block_in[BLOCK];

static void block_setup(void)
{
	for (int i = 0; i < BLOCK; i++)
		block_out[i] = i * 7;
}

static void pipe_block_setup(void)
{
	int ends[2];

	CHECK(pipe(ends) == 0);
	request_from = ends[0], request_to = ends[1];
	block_setup();
}

static void socket_block_setup(void)
{
	int ends[2];

	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
	request_to = ends[0], request_from = ends[1];
	block_setup();
}

static uint64_t blocks(void)
{
	uint64_t same = 0;

	for (int i = 0; i < BLOCKS; i++) {
		block_out[0] = i;
		CHECK(write(request_to, block_out, BLOCK) == BLOCK);
		for (size_t n = 0; n < BLOCK;) {
			ssize_t part = read(request_from, block_in + n, BLOCK - n);
			CHECK(part > 0);
			n += part;
		}
		same += block_in[0] == block_out[0] && block_in[BLOCK - 1] == block_out[BLOCK - 1];
	}
	return same;
}

/* switch: the CPU is handed over from one process to the other through a word of shared memory. */

static volatile uint32_t *turn; /* even: the parent's */

static void wait_for_turn(uint32_t parity)
{
	for (;;) {
		uint32_t seen = *turn;
		if (seen % 2 == parity)
			return;
		syscall(SYS_futex, turn, FUTEX_WAIT, seen, NULL, NULL, 0);
	}
}

static void hand_over(void)
{
	*turn = *turn + 1;
	syscall(SYS_futex, turn, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static void answer_turns(void)
{
	for (;;) {
		wait_for_turn(1);
		hand_over();
	}
}

static void switch_setup(void)
{
	void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	CHECK(page != MAP_FAILED);
	turn = page;
	child = start_child(answer_turns);
}

static uint64_t switches(void)
{
	uint32_t start = *turn;

	for (int i = 0; i < ROUND_TRIPS; i++) {
		hand_over();
		wait_for_turn(0);
	}
	return *turn - start;
}

const struct row ipc_rows[] = {
	{ "pipe", "round-trips", ROUND_TRIPS, round_trips, pipe_setup, stop_child },
	{ "socket", "round-trips", ROUND_TRIPS, round_trips, socket_setup, stop_child },
	{ "pipe-32K", "bytes", (double)BLOCK * BLOCKS, blocks, pipe_block_setup, NULL },
	{ "socket-32K", "bytes", (double)BLOCK * BLOCKS, blocks, socket_block_setup, NULL },
	{ "switch", "switches", 2 * ROUND_TRIPS, switches, switch_setup, stop_child },
	{ 0 },
};
