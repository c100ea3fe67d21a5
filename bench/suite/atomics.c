/* Locked instructions without contention. */
#include "suite.h"

#include <pthread.h>
#include <stdatomic.h>

#define ADDITIONS 40000
#define EXCHANGES 40000
#define LOCKS 20000

static _Atomic uint64_t counters[16];

static uint64_t additions(void)
{
	for (size_t i = 0; i < COUNT(counters); i++)
		atomic_store_explicit(&counters[i], i, memory_order_relaxed);
	for (uint64_t i = 0; i < ADDITIONS; i++)
		atomic_fetch_add(&counters[i % COUNT(counters)], i);
	return counters[3];
}

/* cas: a loop of compare-and-exchange, as lock-free structures do it. */
static uint64_t exchanges(void)
{
	atomic_store(&counters[0], 1);
	for (uint64_t i = 0; i < EXCHANGES; i++) {
		uint64_t seen = atomic_load(&counters[0]);
		while (!atomic_compare_exchange_weak(&counters[0], &seen, seen * 5 + i))
			;
	}
	return counters[0];
}

static uint64_t locks(void)
{
	static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
	uint64_t x = 1;

	for (uint64_t i = 0; i < LOCKS; i++) {
		pthread_mutex_lock(&mutex);
		x = x * 5 + i;
		pthread_mutex_unlock(&mutex);
	}
	return x;
}

const struct row atomics_rows[] = {
	{ "add", "operations", ADDITIONS, additions, NULL, NULL },
	{ "cas", "operations", EXCHANGES, exchanges, NULL, NULL },
	{ "mutex", "pairs", LOCKS, locks, NULL, NULL },
	{ 0 },
};
