/* Page tables: what a process asks the kernel to do with its address space. */
#define _GNU_SOURCE
#include "suite.h"

#include <sys/mman.h>

#define PAGE 4096
#define FAULT_PAGES 256
#define MAPPINGS 200
#define PROTECTIONS 200

/* fault: the first touch of a page. */
static uint64_t fault(void)
{
	volatile uint8_t *p = map_pages(FAULT_PAGES * PAGE);
	uint64_t sum = 0;

	for (size_t i = 0; i < FAULT_PAGES; i++) {
		sum += p[i * PAGE + i] + i;
		p[i * PAGE + i] = 1;
	}
	munmap((void *)p, FAULT_PAGES * PAGE);
	return sum;
}

/* mmap: a mapping of some pages, of which one is used, comes and goes. */
static uint64_t map_unmap(void)
{
	uint64_t sum = 0;

	for (int i = 0; i < MAPPINGS; i++) {
		uint8_t *p = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		CHECK(p != MAP_FAILED);
		p[3 * PAGE] = i;
		sum += p[3 * PAGE];
		munmap(p, 4 * PAGE);
	}
	return sum;
}

/* mprotect: 16 pages in use, made read-only and writable again. */

static uint8_t *guarded;

static void protect_setup(void)
{
	guarded = map_pages(16 * PAGE);
	for (int i = 0; i < 16; i++)
		guarded[i * PAGE] = i;
}

static uint64_t protect(void)
{
	uint64_t sum = 0;

	for (int i = 0; i < PROTECTIONS; i++) {
		CHECK(mprotect(guarded, 16 * PAGE, PROT_READ) == 0);
		sum += guarded[i % 16 * PAGE];
		CHECK(mprotect(guarded, 16 * PAGE, PROT_READ | PROT_WRITE) == 0);
		guarded[i % 16 * PAGE] = i % 16;
	}
	return sum;
}

const struct row mmu_rows[] = {
	{ "fault", "faults", FAULT_PAGES, fault, NULL, NULL },
	{ "mmap", "mappings", MAPPINGS, map_unmap, NULL, NULL },
	{ "mprotect", "pairs", PROTECTIONS, protect, protect_setup, NULL },
	{ 0 },
};
