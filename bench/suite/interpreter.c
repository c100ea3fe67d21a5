/* Interpreters: jumps whose targets come from data. */
#include "suite.h"

/* Both interpreters run this program: how many numbers below LIMIT reach 1, and in how many steps all together, by
 * halving the even and taking 3n + 1 of the odd (Collatz). Instructions are an opcode and two operands. */

enum opcode { SET, COPY, ADD, ADDI, MULI, HALF, ODD, JZ, JMP, EQI, LT, HALT, OPCODES };

#define LIMIT 200

static const int8_t program[][3] = {
	{ SET, 0, 1 },				 /*  0: n = 1 */
	{ SET, 5, LIMIT / 2 },			 /*  1 */
	{ ADD, 5, 5 },				 /*  2: limit */
	{ SET, 4, 0 },				 /*  3: steps = 0 */
	{ COPY, 1, 0 },				 /*  4: next number: x = n */
	{ COPY, 2, 1 },				 /*  5: step: */
	{ EQI, 2, 1 },				 /*  6: x == 1? */
	{ JZ, 2, 10 },				 /*  7 */
	{ ADDI, 0, 1 },				 /*  8: n++ */
	{ JMP, 0, 18 },				 /*  9 */
	{ ADDI, 4, 1 },				 /* 10: steps++ */
	{ COPY, 3, 1 },				 /* 11 */
	{ ODD, 3, 0 },				 /* 12 */
	{ JZ, 3, 16 },				 /* 13 */
	{ MULI, 1, 3 },				 /* 14 */
	{ ADDI, 1, 1 },				 /* 15 */
	{ HALF, 1, 3 },				 /* 16: halve it unless it was odd */
	{ JMP, 0, 5 },				 /* 17 */
	{ COPY, 2, 0 },				 /* 18: n < limit? */
	{ LT, 2, 5 },				 /* 19 */
	{ JZ, 2, 22 },				 /* 20 */
	{ JMP, 0, 4 },				 /* 21 */
	{ HALT, 0, 0 },				 /* 22 */
};

NOINLINE static uint64_t run_switch(const int8_t (*code)[3], uint64_t *executed)
{
	int64_t r[8] = { 0 };
	uint64_t count = 0;

	for (long pc = 0;; pc++) {
		int a = code[pc][1], b = code[pc][2];

		count++;
		switch ((enum opcode)code[pc][0]) {
		case SET: r[a] = b; break;
		case COPY: r[a] = r[b]; break;
		case ADD: r[a] += r[b]; break;
		case ADDI: r[a] += b; break;
		case MULI: r[a] *= b; break;
		case HALF: r[a] = r[b] ? r[a] : r[a] >> 1; break;
		case ODD: r[a] &= 1; break;
		case JZ: pc = r[a] ? pc : b - 1; break;
		case JMP: pc = b - 1; break;
		case EQI: r[a] = r[a] == b; break;
		case LT: r[a] = r[a] < r[b]; break;
		case HALT: *executed = count; return r[4];
		default: __builtin_unreachable();
		}
	}
}

NOINLINE static uint64_t run_threaded(const int8_t (*code)[3], uint64_t *executed)
{
	static const void *const labels[OPCODES] = { &&set,  &&copy, &&add, &&addi, &&muli, &&half,
						     &&odd, &&jz,   &&jmp, &&eqi,  &&lt,   &&halt };
	int64_t r[8] = { 0 };
	uint64_t count = 0;
	const int8_t *i = code[0];

#define NEXT(step) i += 3 * (step); count++; goto *labels[i[0]]
	NEXT(0);
set:	r[i[1]] = i[2]; NEXT(1);
copy:	r[i[1]] = r[i[2]]; NEXT(1);
add:	r[i[1]] += r[i[2]]; NEXT(1);
addi:	r[i[1]] += i[2]; NEXT(1);
muli:	r[i[1]] *= i[2]; NEXT(1);
half:	r[i[1]] = r[i[2]] ? r[i[1]] : r[i[1]] >> 1; NEXT(1);
odd:	r[i[1]] &= 1; NEXT(1);
jz:	if (!r[i[1]]) { i = code[i[2]]; NEXT(0); } NEXT(1);
jmp:	i = code[i[2]]; NEXT(0);
eqi:	r[i[1]] = r[i[1]] == i[2]; NEXT(1);
lt:	r[i[1]] = r[i[1]] < r[i[2]]; NEXT(1);
halt:	*executed = count;
	return r[4];
#undef NEXT
}

static uint64_t executed; /* by one run: what a row's work is */

static uint64_t switched(void)
{
	uint64_t steps = run_switch(program, &executed);
	return steps << 32 | executed;
}

static uint64_t threaded(void)
{
	uint64_t steps = run_threaded(program, &executed);
	return steps << 32 | executed;
}

/* indirect: calls through a table, in a random order that repeats after 1024 calls. */

#define CALLS 100000
#define SHAPE(n) NOINLINE static uint64_t shape##n(uint64_t x) { return (x ^ n) * (2 * n + 3) + (x >> (n + 1)); }
SHAPE(0) SHAPE(1) SHAPE(2) SHAPE(3) SHAPE(4) SHAPE(5) SHAPE(6) SHAPE(7)
SHAPE(8) SHAPE(9) SHAPE(10) SHAPE(11) SHAPE(12) SHAPE(13) SHAPE(14) SHAPE(15)

static uint64_t (*const shapes[])(uint64_t) = {
	shape0, shape1, shape2,	 shape3,  shape4,  shape5,  shape6,  shape7,
	shape8, shape9, shape10, shape11, shape12, shape13, shape14, shape15,
};

static uint8_t call_order[1024];

static void indirect_setup(void)
{
	uint32_t seed = 5;

	for (size_t i = 0; i < COUNT(call_order); i++)
		call_order[i] = random32(&seed) % COUNT(shapes);
}

static uint64_t indirect(void)
{
	uint64_t x = 1;

	for (int i = 0; i < CALLS; i++)
		x = shapes[call_order[i % COUNT(call_order)]](x);
	return x;
}

const struct row interpreter_rows[] = {
	{ "switch", "runs", 1, switched, NULL, NULL },
	{ "threaded", "runs", 1, threaded, NULL, NULL },
	{ "indirect", "calls", CALLS, indirect, indirect_setup, NULL },
	{ 0 },
};
