/* Code that is written and run at once, as a just-in-time compiler does: small functions, each called a few times.
 *
 * The code buffer is used again by every chunk, so new code also replaces old code.
 */
#define _GNU_SOURCE
#include "suite.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define FUNCTIONS 64
#define OPERATIONS 16
#define CALLS 5
#define SLOT 256	/* bytes that a function gets; it needs less than OPERATIONS * 8 */
#define BYTES (FUNCTIONS * SLOT)

typedef uint64_t function(uint64_t);

static uint8_t *writable, *executable; /* the same bytes */

static uint8_t *put(uint8_t *p, const void *bytes, size_t n)
{
	return (uint8_t *)memcpy(p, bytes, n) + n;
}

/* A function from the seed's random numbers: rax = rdi, some operations on it, a loop of three rounds around them. */
static void emit(uint8_t *p, uint32_t *seed)
{
	static const uint8_t prologue[] = { 0x48, 0x89, 0xf8, 0xb9, 3, 0, 0, 0 }; /* mov rax, rdi; mov ecx, 3 */
	static const uint8_t epilogue[] = { 0xff, 0xc9, 0x0f, 0x85 };		  /* dec ecx; jnz (32 bits) */
	uint8_t *loop;
	int32_t back;

	p = loop = put(p, prologue, sizeof prologue);
	for (int i = 0; i < OPERATIONS; i++) {
		uint32_t immediate = random32(seed);

		switch (immediate >> 8 & 3) {
		case 0: p = put(p, "\x48\x05", 2); break;	/* add rax, imm32 */
		case 1: p = put(p, "\x48\x35", 2); break;	/* xor rax, imm32 */
		case 2: p = put(p, "\x48\x69\xc0", 3); break;	/* imul rax, rax, imm32 */
		case 3:						/* ror rax, imm8 */
			p = put(p, "\x48\xc1\xc8", 3);
			*p++ = immediate & 63;
			continue;
		}
		p = put(p, &immediate, 4);
	}
	p = put(p, epilogue, sizeof epilogue);
	back = loop - (p + 4);
	p = put(p, &back, 4);
	*p = 0xc3; /* ret */
}

static void write_functions(size_t first, size_t count, uint32_t *seed)
{
	for (size_t i = first; i < first + count; i++)
		emit(writable + i * SLOT, seed);
}

static uint64_t call_functions(size_t first, size_t count, uint64_t x)
{
	for (size_t i = first; i < first + count; i++)
		for (int call = 0; call < CALLS; call++)
			x = ((function *)(uintptr_t)(executable + i * SLOT))(x);
	return x;
}

/* rwx: memory that is writable and executable; a function is called as soon as it is written, beside its elder ones. */

static void rwx_setup(void)
{
	writable = executable = mmap(NULL, BYTES, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(writable != MAP_FAILED);
}

static uint64_t rwx(void)
{
	uint32_t seed = 13;
	uint64_t x = 1;

	for (size_t i = 0; i < FUNCTIONS; i++) {
		write_functions(i, 1, &seed);
		x = call_functions(i, 1, x);
	}
	return x;
}

/* dual: the same memory mapped twice, once writable and once executable; batches of 16. */

static void dual_setup(void)
{
	int fd = memfd_create("code", 0);

	CHECK(fd >= 0 && ftruncate(fd, BYTES) == 0);
	writable = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	executable = mmap(NULL, BYTES, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
	CHECK(writable != MAP_FAILED && executable != MAP_FAILED);
}

static uint64_t dual(void)
{
	uint32_t seed = 13;
	uint64_t x = 1;

	for (size_t i = 0; i < FUNCTIONS; i += 16) {
		write_functions(i, 16, &seed);
		x = call_functions(i, 16, x);
	}
	return x;
}

/* flip: memory that is either writable or executable; batches of 16, a page. */

static uint64_t flip(void)
{
	uint32_t seed = 13;
	uint64_t x = 1;

	for (size_t i = 0; i < FUNCTIONS; i += 16) {
		CHECK(mprotect(writable, BYTES, PROT_READ | PROT_WRITE) == 0);
		write_functions(i, 16, &seed);
		CHECK(mprotect(writable, BYTES, PROT_READ | PROT_EXEC) == 0);
		x = call_functions(i, 16, x);
	}
	return x;
}

const struct row codegen_rows[] = {
	{ "rwx", "functions", FUNCTIONS, rwx, rwx_setup, NULL },
	{ "dual", "functions", FUNCTIONS, dual, dual_setup, NULL },
	{ "flip", "functions", FUNCTIONS, flip, rwx_setup, NULL },
	{ 0 },
};
