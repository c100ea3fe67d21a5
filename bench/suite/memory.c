/* Memory: long and short copies, and loads that wait for each other. */
#include "suite.h"

#include <string.h>

#define LARGE (16 << 20)
#define SMALL (8 << 10)
#define SMALL_ROUNDS 500
#define SET_BYTES (64 << 10)
#define SET_ROUNDS 100
#define L1_LOADS 100000
#define PAGES_LOADS 40000
#define LARGE_LOADS 10000

static uint8_t *from, *to;

/* Calls of the C library, which the compiler must not see through. */
static void *(*volatile copy)(void *, const void *, size_t) = memcpy;
static void *(*volatile set)(void *, int, size_t) = memset;

static void map_buffers(size_t bytes)
{
	from = map_pages(bytes);
	to = map_pages(bytes);
	for (size_t i = 0; i < LARGE; i += 64)
		from[i] = i >> 6 ^ i >> 14;
}

/* As malloc places large blocks: a page more, for its header. */
static void copy_setup(void)
{
	map_buffers(LARGE + 4096);
}

/* A power of two apart: the pages that are used together have the same place in a direct-mapped table. */
static void alias_setup(void)
{
	map_buffers(LARGE);
}

static uint64_t sample(const uint8_t *p, size_t bytes)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < bytes; i += bytes / 64)
		sum = fold(sum, p[i]);
	return sum;
}

static uint64_t copy_large(void)
{
	copy(to, from, LARGE);
	return sample(to, LARGE);
}

static uint64_t copy_small(void)
{
	for (int i = 0; i < SMALL_ROUNDS; i++)
		copy(to, from, SMALL);
	return sample(to, SMALL);
}

static uint64_t set_bytes(void)
{
	for (int i = 0; i < SET_ROUNDS; i++)
		set(to, i, SET_BYTES);
	return sample(to, SET_BYTES);
}

/* chase: every load's address is the value of the load before. */

static void **chase_start;
static size_t chase_steps;

/* A cycle in random order through `count` places, `stride` bytes apart. */
static void chase_map(size_t count, size_t stride, size_t steps)
{
	char *base = map_pages(count * stride);
	uint32_t seed = 9;
	void **last = (void **)base;

	/* Sattolo's shuffle of the places, which are their own array. */
	for (size_t i = 0; i < count; i++)
		*(size_t *)(base + i * stride) = i;
	for (size_t i = count - 1; i > 0; i--) {
		size_t j = random32(&seed) % i;
		size_t *a = (size_t *)(base + i * stride), *b = (size_t *)(base + j * stride), t = *a;
		*a = *b;
		*b = t;
	}
	for (size_t i = 0; i < count; i++) {
		last = (void **)(base + i * stride);
		*last = base + *(size_t *)last * stride;
	}
	chase_start = (void **)base;
	chase_steps = steps;
}

static void chase_l1_setup(void)
{
	chase_map(256, 64, L1_LOADS);
}

static void chase_large_setup(void)
{
	chase_map(1 << 20, 64, LARGE_LOADS);
}

/* One line in a page; not the same line, or the pages would compete for a few sets of the caches. */
static void chase_pages_setup(void)
{
	chase_map(2048, 4096 + 64, PAGES_LOADS);
}

static uint64_t chase(void)
{
	void **p = chase_start;

	for (size_t i = 0; i < chase_steps; i++)
		p = *p;
	return (uint64_t)((char *)p - (char *)chase_start);
}

const struct row memory_rows[] = {
	{ "memcpy-16M", "bytes", LARGE, copy_large, copy_setup, NULL },
	{ "memcpy-L1", "bytes", (double)SMALL * SMALL_ROUNDS, copy_small, copy_setup, NULL },
	{ "memcpy-alias", "bytes", (double)SMALL * SMALL_ROUNDS, copy_small, alias_setup, NULL },
	{ "memset", "bytes", (double)SET_BYTES * SET_ROUNDS, set_bytes, copy_setup, NULL },
	{ "chase-L1", "loads", L1_LOADS, chase, chase_l1_setup, NULL },
	{ "chase-pages", "loads", PAGES_LOADS, chase, chase_pages_setup, NULL },
	{ "chase-64M", "loads", LARGE_LOADS, chase, chase_large_setup, NULL },
	{ 0 },
};
