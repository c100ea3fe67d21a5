/* Floating point. Checksums are of rounded results where the C library may choose between methods (with or without
 * fused multiplication) by the processor. */
#include "suite.h"

#include <math.h>

/* matmul: double precision, the textbook's three loops. */

#define N 72

static double matrix_a[N][N], matrix_b[N][N], matrix_c[N][N];

static void matmul_setup(void)
{
	for (int i = 0; i < N; i++)
		for (int j = 0; j < N; j++) {
			matrix_a[i][j] = (i * 7 + j * 3) % 11 - 5;
			matrix_b[i][j] = (i * 5 + j * 13) % 17 - 8;
		}
}

NOINLINE static void multiply(void)
{
	for (int i = 0; i < N; i++)
		for (int j = 0; j < N; j++) {
			double sum = 0;
			for (int k = 0; k < N; k++)
				sum += matrix_a[i][k] * matrix_b[k][j];
			matrix_c[i][j] = sum;
		}
}

static uint64_t matmul(void)
{
	uint64_t sum = 0;

	multiply();
	for (int i = 0; i < N; i++)
		for (int j = 0; j < N; j++)
			sum = fold(sum, (int64_t)matrix_c[i][j]);
	return sum;
}

/* nbody: square roots, divisions, structures in memory. */

#define BODIES 5
#define NBODY_STEPS 3000

struct body {
	double x[3], v[3], mass;
};

NOINLINE static void nbody_step(struct body *bodies, double dt)
{
	for (int i = 0; i < BODIES; i++)
		for (int j = i + 1; j < BODIES; j++) {
			struct body *a = &bodies[i], *b = &bodies[j];
			double d[3], square = 0, magnitude;

			for (int k = 0; k < 3; k++) {
				d[k] = a->x[k] - b->x[k];
				square += d[k] * d[k];
			}
			magnitude = dt / (square * sqrt(square));
			for (int k = 0; k < 3; k++) {
				a->v[k] -= d[k] * b->mass * magnitude;
				b->v[k] += d[k] * a->mass * magnitude;
			}
		}
	for (int i = 0; i < BODIES; i++)
		for (int k = 0; k < 3; k++)
			bodies[i].x[k] += dt * bodies[i].v[k];
}

static uint64_t nbody(void)
{
	struct body bodies[BODIES];
	double sum = 0;

	for (int i = 0; i < BODIES; i++)
		bodies[i] = (struct body){ { 3.0 * i, 2.0 - i, 0.5 * i * i }, { 0.1 * i, 0.3, -0.1 * i }, 1.0 / (i + 1) };
	for (int i = 0; i < NBODY_STEPS; i++)
		nbody_step(bodies, 0.001);
	for (int i = 0; i < BODIES; i++)
		sum += bodies[i].x[0] + bodies[i].x[1] + bodies[i].x[2];
	return llround(sum * 1e9);
}

/* libm: the usual functions. */

#define LIBM_CALLS 6000

static uint64_t libm(void)
{
	double sum = 0;

	for (int i = 1; i <= LIBM_CALLS; i++) {
		double x = i * 0.01;
		sum += sin(x) * cos(x * 0.7) + log(x) + exp(-x * 0.01) + pow(x, 0.3) + atan2(x, 2.0);
	}
	return llround(sum * 1e5);
}

/* mandelbrot: scalar arithmetic in registers. */

#define MANDELBROT_SIZE 48

static uint64_t mandelbrot(void)
{
	uint64_t sum = 0;

	for (int py = 0; py < MANDELBROT_SIZE; py++)
		for (int px = 0; px < MANDELBROT_SIZE; px++) {
			double cx = px * 3.0 / MANDELBROT_SIZE - 2.0, cy = py * 2.0 / MANDELBROT_SIZE - 1.0;
			double x = 0, y = 0;
			int n = 0;

			for (; n < 200 && x * x + y * y < 4.0; n++) {
				double t = x * x - y * y + cx;
				y = 2 * x * y + cy;
				x = t;
			}
			sum += n;
		}
	return sum;
}

/* vector: a single-precision filter, four lanes at a time. */

typedef float lanes __attribute__((vector_size(16), aligned(4), may_alias));

#define SAMPLES 4096
#define TAPS 32
#define VECTOR_ROUNDS 5

static float samples[SAMPLES + TAPS], filtered[SAMPLES], taps[TAPS];

static void vector_setup(void)
{
	for (int i = 0; i < SAMPLES + TAPS; i++)
		samples[i] = i % 23 - 11;
	for (int i = 0; i < TAPS; i++)
		taps[i] = i % 5 - 2;
}

NOINLINE static void filter(void)
{
	for (int i = 0; i < SAMPLES; i += 8) {
		lanes low = { 0 }, high = { 0 };

		for (int t = 0; t < TAPS; t++) {
			low += *(const lanes *)&samples[i + t] * taps[t];
			high += *(const lanes *)&samples[i + t + 4] * taps[t];
		}
		*(lanes *)&filtered[i] = low;
		*(lanes *)&filtered[i + 4] = high;
	}
}

static uint64_t vector(void)
{
	uint64_t sum = 0;

	for (int i = 0; i < VECTOR_ROUNDS; i++)
		filter();
	for (int i = 0; i < SAMPLES; i += 64)
		sum = fold(sum, (int64_t)filtered[i]);
	return sum;
}

const struct row floating_rows[] = {
	{ "matmul", "operations", 2.0 * N * N * N, matmul, matmul_setup, NULL },
	{ "nbody", "steps", NBODY_STEPS, nbody, NULL, NULL },
	{ "libm", "calls", 6.0 * LIBM_CALLS, libm, NULL, NULL },
	{ "mandelbrot", "points", MANDELBROT_SIZE * MANDELBROT_SIZE, mandelbrot, NULL, NULL },
	{ "vector", "operations", VECTOR_ROUNDS * 2.0 * SAMPLES * TAPS, vector, vector_setup, NULL },
	{ 0 },
};
