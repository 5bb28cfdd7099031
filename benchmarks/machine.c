// Measures the peak rates of this machine: memory copies and float32 multiply-adds.
//
//   cc -O3 -march=native -pthread machine.c -o machine && ./machine THREADS
//
// Prints the best of several rounds: bytes read and written per second, and multiply-adds per second.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ROUNDS = 15, CHAINS = 12, STEPS = 4000000, MAX_THREADS = 1024 };

// Far larger than any cache.
static const size_t kBytes = (size_t)512 << 20;

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));

static int threads;
static char *from, *to;
static volatile float sink;
static pthread_barrier_t barrier;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void copy(long thread) {
  const size_t part = kBytes / threads;
  memcpy(to + thread * part, from + thread * part, part);
}

// Twelve independent chains keep every multiplier busy.
static void multiply_add(long thread) {
  Vector sums[CHAINS], factor, term;
  for (int lane = 0; lane < LANES; ++lane) {
    factor[lane] = 0.999f;
    term[lane] = 0.001f * (thread + 1);
    for (int chain = 0; chain < CHAINS; ++chain) sums[chain][lane] = chain;
  }
  for (long step = 0; step < STEPS; ++step)
    for (int chain = 0; chain < CHAINS; ++chain) sums[chain] = sums[chain] * factor + term;
  for (int chain = 1; chain < CHAINS; ++chain) sums[0] += sums[chain];
  sink = sums[0][0];
}

static double best_copy = 1e9, best_multiply_add = 1e9;

// All threads start together; the time ends with the last one.
static void time_rounds(long thread, void (*work)(long), double* best) {
  for (int round = 0; round < ROUNDS; ++round) {
    pthread_barrier_wait(&barrier);
    const double start = now();
    work(thread);
    pthread_barrier_wait(&barrier);
    const double seconds = now() - start;
    if (thread == 0 && seconds < *best) *best = seconds;
  }
}

static void* run(void* argument) {
  const long thread = (long)argument;
  time_rounds(thread, copy, &best_copy);
  time_rounds(thread, multiply_add, &best_multiply_add);
  return NULL;
}

int main(int argc, char** argv) {
  threads = argc == 2 ? atoi(argv[1]) : 0;
  if (threads < 1 || threads > MAX_THREADS) {
    fprintf(stderr, "usage: machine THREADS\n");
    return 2;
  }
  from = malloc(kBytes);
  to = malloc(kBytes);
  if (!from || !to) {
    fprintf(stderr, "machine: not enough memory\n");
    return 1;
  }
  memset(from, 1, kBytes);
  memset(to, 2, kBytes);
  pthread_barrier_init(&barrier, NULL, threads);
  static pthread_t handles[MAX_THREADS];
  for (long thread = 1; thread < threads; ++thread)
    if (pthread_create(&handles[thread], NULL, run, (void*)thread)) return 1;
  run((void*)0);
  for (long thread = 1; thread < threads; ++thread) pthread_join(handles[thread], NULL);
  printf("{\"copy_bytes_per_second\": %.4g, \"multiply_adds_per_second\": %.4g}\n", 2.0 * kBytes / best_copy,
         (double)threads * STEPS * CHAINS * LANES / best_multiply_add);
  return 0;
}
