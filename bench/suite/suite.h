/* What the row files and the harness (main.c) know of each other.
 *
 * A row is a chunk of work of fixed size, repeated until the row's time is over. A chunk starts from the same state
 * every time and returns a checksum of its results, so a row's checksum depends neither on the number of chunks nor on
 * the machine: an engine that computes something else is found out. Each row runs in a process of its own.
 *
 * Chunks take about a millisecond on the host, so that an engine that is a hundred times slower still ends in time.
 */
#ifndef SUITE_H
#define SUITE_H

#include <stddef.h>
#include <stdint.h>

struct row {
	const char *name;
	const char *unit;		/* what is counted, per second */
	double work;			/* units in a chunk */
	uint64_t (*chunk)(void);	/* returns the checksum */
	void (*setup)(void);		/* or NULL; not measured */
	void (*teardown)(void);		/* or NULL; the process ends afterwards, only children need care */
};

/* Each ends with a row without a name. */
extern const struct row integer_rows[], floating_rows[], interpreter_rows[], memory_rows[], mmu_rows[], trap_rows[],
	ipc_rows[], process_rows[], file_rows[], codegen_rows[], atomics_rows[];

/* A directory on a tmpfs, empty at the start, for the file rows. */
extern const char *scratch_dir;

/* Says what failed, with errno, and ends the row's process: the row counts as failed. */
_Noreturn void fail(const char *what);

/* Zeroed memory of small pages everywhere, whatever the system's policy on huge ones. */
void *map_pages(size_t bytes);

/* A process that runs body() and then exits; it dies with its parent. */
int start_child(void (*body)(void));

#define CHECK(condition) ((condition) ? (void)0 : fail(#condition))
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define NOINLINE __attribute__((noinline))

/* Xorshift random numbers; the state must not be 0. */
static inline uint32_t random32(uint32_t *state)
{
	uint32_t x = *state;

	x ^= x << 13;
	x ^= x >> 17;
	x ^= x << 5;
	return *state = x;
}

/* One step of a checksum. */
static inline uint64_t fold(uint64_t sum, uint64_t value)
{
	sum = (sum ^ value) * 0x9e3779b97f4a7c15u;
	return sum ^ sum >> 29;
}

#endif
