/* Integer code: what compilers make of ordinary programs. */
#include "suite.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* mix: shifts, multiplications, data-dependent branches, a table that fits a first-level cache. */

#define MIX_ROUNDS 60000

static uint64_t mix(void)
{
	static uint32_t table[8192];
	uint64_t x = 88172645463325252u;
	uint32_t h = 2166136261u;

	memset(table, 0, sizeof table);
	for (int i = 0; i < MIX_ROUNDS; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		uint32_t *slot = &table[x % COUNT(table)];
		h = (h ^ *slot ^ (uint32_t)x) * 16777619u;
		if (h & 1)
			*slot += h;
		else
			*slot ^= (uint32_t)(x >> 32);
	}
	return h;
}

/* hash: a table with open addressing; insertions, hits and misses. */

#define HASH_KEYS 12000

struct entry {
	uint64_t key;
	uint32_t value;
};

static struct entry hash_table[1 << 14];

NOINLINE static struct entry *hash_find(uint64_t key)
{
	size_t mask = COUNT(hash_table) - 1, i = (key * 0x9e3779b97f4a7c15u) >> 50;

	while (hash_table[i & mask].key && hash_table[i & mask].key != key)
		i++;
	return &hash_table[i & mask];
}

static uint64_t hash(void)
{
	uint32_t seed = 1;
	uint64_t sum = 0;

	memset(hash_table, 0, sizeof hash_table);
	for (uint32_t i = 0; i < HASH_KEYS; i++) {
		struct entry *e = hash_find(random32(&seed) % (2 * HASH_KEYS) + 1);
		e->key = e->key ? e->key : seed % (2 * HASH_KEYS) + 1;
		e->value += i;
	}
	for (uint32_t i = 1; i <= 2 * HASH_KEYS; i++)
		sum += hash_find(i)->value;
	return sum;
}

/* sort: quicksort, insertion sort for the rest. */

#define SORT_ITEMS 12000

NOINLINE static void quicksort(uint32_t *a, long n)
{
	while (n > 12) {
		uint32_t pivot = a[n / 2];
		long i = 0, j = n - 1;

		for (;; i++, j--) {
			while (a[i] < pivot)
				i++;
			while (a[j] > pivot)
				j--;
			if (i >= j)
				break;
			uint32_t t = a[i];
			a[i] = a[j];
			a[j] = t;
		}
		quicksort(a, i);
		a += i;
		n -= i;
	}
	for (long i = 1; i < n; i++) {
		uint32_t v = a[i];
		long j = i;

		for (; j > 0 && a[j - 1] > v; j--)
			a[j] = a[j - 1];
		a[j] = v;
	}
}

static uint64_t sort(void)
{
	static uint32_t items[SORT_ITEMS];
	uint32_t seed = 7;
	uint64_t sum = 0;

	for (int i = 0; i < SORT_ITEMS; i++)
		items[i] = random32(&seed);
	quicksort(items, SORT_ITEMS);
	for (int i = 0; i < SORT_ITEMS; i++)
		sum = sum * 31 + items[i];
	return sum;
}

/* lz: compression by the last place of every three bytes, and back. */

#define LZ_BYTES 65536

static uint8_t lz_text[LZ_BYTES], lz_packed[2 * LZ_BYTES], lz_again[LZ_BYTES];

static void lz_setup(void)
{
	uint32_t seed = 3;
	char words[64][12];
	size_t n = 0;

	for (int w = 0; w < 64; w++) {
		int length = 2 + random32(&seed) % 9;
		for (int i = 0; i < length; i++)
			words[w][i] = 'a' + random32(&seed) % 26;
		words[w][length] = ' ';
		words[w][length + 1] = 0;
	}
	while (n < LZ_BYTES) {
		/* the smaller of two: some words are frequent */
		uint32_t a = random32(&seed) % 64, b = random32(&seed) % 64;
		for (const char *p = words[a < b ? a : b]; *p && n < LZ_BYTES; p++)
			lz_text[n++] = *p;
	}
}

NOINLINE static size_t lz_pack(const uint8_t *in, size_t n, uint8_t *out)
{
	static uint16_t last[4096];
	size_t o = 0;

	memset(last, 0, sizeof last);
	for (size_t i = 0; i < n;) {
		size_t length = 0, from = 0;

		if (i + 3 < n) {
			uint32_t h = ((in[i] << 16 | in[i + 1] << 8 | in[i + 2]) * 2654435761u) >> 20;
			from = last[h];
			last[h] = i;
			while (from < i && length < 130 && i + length < n && in[from + length] == in[i + length])
				length++;
		}
		if (length >= 4) {
			out[o++] = 0x80 | (length - 4);
			out[o++] = (i - from) & 0xff;
			out[o++] = (i - from) >> 8;
			i += length;
		} else {
			out[o++] = in[i++] & 0x7f;
		}
	}
	return o;
}

NOINLINE static size_t lz_unpack(const uint8_t *in, size_t n, uint8_t *out)
{
	size_t o = 0;

	for (size_t i = 0; i < n;) {
		if (in[i] & 0x80) {
			size_t length = (in[i] & 0x7f) + 4, back = in[i + 1] | in[i + 2] << 8;
			for (; length; length--, o++)
				out[o] = out[o - back];
			i += 3;
		} else {
			out[o++] = in[i++];
		}
	}
	return o;
}

static uint64_t lz(void)
{
	size_t packed = lz_pack(lz_text, LZ_BYTES, lz_packed);
	size_t n = lz_unpack(lz_packed, packed, lz_again);

	return packed << 32 | (n == LZ_BYTES && !memcmp(lz_text, lz_again, n));
}

/* calls: a recursive function. */

#define FIBONACCI 24
#define FIBONACCI_CALLS 150049

NOINLINE static uint64_t fibonacci(uint64_t n)
{
	uint64_t a, b;

	if (n < 2)
		return n;
	a = fibonacci(n - 1);
	b = fibonacci(n - 2);
	__asm__("" : "+r"(a), "+r"(b)); /* keeps the compiler from making a loop of one of the calls */
	return a + b;
}

static uint64_t calls(void)
{
	return fibonacci(FIBONACCI);
}

/* sha256: rotations and additions (FIPS 180-4, the compression function on a counter). */

#define SHA_BLOCKS 800

static const uint32_t sha_k[64] = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
	0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
	0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
	0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
	0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
	0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
	0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
	0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static inline uint32_t rotate(uint32_t x, int n)
{
	return x >> n | x << (32 - n);
}

NOINLINE static void sha_block(uint32_t state[8], uint32_t w[64])
{
	uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
	uint32_t e = state[4], f = state[5], g = state[6], h = state[7];

	for (int i = 16; i < 64; i++) {
		uint32_t x = w[i - 15], y = w[i - 2];
		w[i] = w[i - 16] + (rotate(x, 7) ^ rotate(x, 18) ^ x >> 3) + w[i - 7] +
		       (rotate(y, 17) ^ rotate(y, 19) ^ y >> 10);
	}
	for (int i = 0; i < 64; i++) {
		uint32_t t = h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g)) + sha_k[i] + w[i];
		uint32_t u = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
		h = g, g = f, f = e, e = d + t;
		d = c, c = b, b = a, a = t + u;
	}
	state[0] += a, state[1] += b, state[2] += c, state[3] += d;
	state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

static uint64_t sha256(void)
{
	uint32_t state[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
			      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };
	uint32_t w[64];

	for (uint32_t block = 0; block < SHA_BLOCKS; block++) {
		for (uint32_t i = 0; i < 16; i++)
			w[i] = block * 16 + i;
		sha_block(state, w);
	}
	return (uint64_t)state[0] << 32 | state[7];
}

/* sieve: bytes with growing strides. */

#define SIEVE_LIMIT 200000

static uint64_t sieve(void)
{
	static uint8_t composite[SIEVE_LIMIT];
	uint64_t primes = 0;

	memset(composite, 0, sizeof composite);
	for (uint32_t i = 2; i < SIEVE_LIMIT; i++) {
		if (composite[i])
			continue;
		primes++;
		for (uint32_t j = 2 * i; j < SIEVE_LIMIT; j += i)
			composite[j] = 1;
	}
	return primes;
}

/* queens: recursion over bit sets. */

#define QUEENS 8

NOINLINE static uint64_t queens_below(uint32_t columns, uint32_t left, uint32_t right)
{
	uint32_t all = (1 << QUEENS) - 1, free = all & ~(columns | left | right);
	uint64_t found = 0;

	if (columns == all)
		return 1;
	while (free) {
		uint32_t bit = free & -free;
		free ^= bit;
		found += queens_below(columns | bit, (left | bit) << 1, (right | bit) >> 1);
	}
	return found;
}

static uint64_t queens(void)
{
	uint64_t found = 0;

	for (int i = 0; i < 20; i++)
		found += queens_below(0, 0, 0);
	return found;
}

/* bignum: products of 2048-bit numbers, add-with-carry chains and 128-bit products. */

#define LIMBS 32
#define BIGNUM_PRODUCTS 600

NOINLINE static void multiply(uint64_t *out, const uint64_t *a, const uint64_t *b)
{
	memset(out, 0, 2 * LIMBS * sizeof *out);
	for (int i = 0; i < LIMBS; i++) {
		uint64_t carry = 0;
		for (int j = 0; j < LIMBS; j++) {
			unsigned __int128 t = (unsigned __int128)a[i] * b[j] + out[i + j] + carry;
			out[i + j] = (uint64_t)t;
			carry = t >> 64;
		}
		out[i + LIMBS] = carry;
	}
}

static uint64_t bignum(void)
{
	uint64_t a[LIMBS], b[LIMBS], product[2 * LIMBS];

	for (int i = 0; i < LIMBS; i++) {
		a[i] = ~(uint64_t)i * 0x9e3779b97f4a7c15u;
		b[i] = a[i] ^ 0x5555555555555555u;
	}
	for (int i = 0; i < BIGNUM_PRODUCTS; i++) {
		multiply(product, a, b);
		memcpy(a, product + LIMBS / 2, sizeof a);
	}
	return a[0] ^ a[LIMBS - 1];
}

/* text: numbers formatted, parsed and divided by the C library. */

#define TEXT_LINES 2500

static uint64_t text(void)
{
	uint32_t seed = 11;
	uint64_t sum = 0;
	char line[80];

	for (int i = 0; i < TEXT_LINES; i++) {
		uint32_t a = random32(&seed), b = random32(&seed) % 100000;
		char *end;

		snprintf(line, sizeof line, "%u:%s %x,%05d", a, i & 1 ? "odd" : "even", b, i);
		sum += strtoul(line, &end, 10) % 1000003 + strlen(line);
		sum += strtoul(strchr(end, ' ') + 1, NULL, 16) / (b % 97 + 1);
	}
	return sum;
}

const struct row integer_rows[] = {
	{ "mix", "rounds", MIX_ROUNDS, mix, NULL, NULL },
	{ "hash", "operations", 3 * HASH_KEYS, hash, NULL, NULL },
	{ "sort", "items", SORT_ITEMS, sort, NULL, NULL },
	{ "lz", "bytes", LZ_BYTES, lz, lz_setup, NULL },
	{ "calls", "calls", FIBONACCI_CALLS, calls, NULL, NULL },
	{ "sha256", "bytes", SHA_BLOCKS * 64, sha256, NULL, NULL },
	{ "sieve", "numbers", SIEVE_LIMIT, sieve, NULL, NULL },
	{ "queens", "boards", 20, queens, NULL, NULL },
	{ "bignum", "products", BIGNUM_PRODUCTS, bignum, NULL, NULL },
	{ "text", "lines", TEXT_LINES, text, NULL, NULL },
	{ 0 },
};
