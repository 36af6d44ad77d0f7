/* What this machine can do, measured with as little in the way as possible. Compiled by probe.py
 * for the machine it runs on and never shipped, so -march=native is right here and nowhere else.
 *
 *   probe_fma        float or double multiply-adds a second from registers
 *   probe_read       bytes a second read from a buffer that fits a chosen level of the memory
 * hierarchy probe_handoff    seconds for a value written by one core to be seen by another
 */
#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <time.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

/* Enough independent chains to cover latency x issue width, few enough to stay in the registers. */
#if defined(__aarch64__)
#define CHAINS 16
#else
#define CHAINS 12
#endif

typedef float vector_f32 __attribute__((vector_size(VECTOR_BYTES)));
typedef double vector_f64 __attribute__((vector_size(VECTOR_BYTES)));

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Puts the calling thread on the index-th core it may use. A scheduler may leave a new thread
 * behind the one that made it for several time slices, with the next core free: what is asked here
 * is what the cores can do. */
typedef struct {
#if defined(__linux__)
  cpu_set_t allowed;
#else
  int none;
#endif
} Cores;

static Cores current_cores(void) {
  Cores cores = {0};
#if defined(__linux__)
  if (sched_getaffinity(0, sizeof cores.allowed, &cores.allowed)) CPU_ZERO(&cores.allowed);
#endif
  return cores;
}

static void move_to_core(const Cores* cores, int index) {
#if defined(__linux__)
  for (int core = 0; core < CPU_SETSIZE; ++core)
    if (CPU_ISSET(core, &cores->allowed) && index-- == 0) {
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(core, &one);
      sched_setaffinity(0, sizeof one, &one);
      return;
    }
#else
  (void)cores, (void)index;
#endif
}

static void move_back(const Cores* cores) {
#if defined(__linux__)
  sched_setaffinity(0, sizeof cores->allowed, &cores->allowed);
#else
  (void)cores;
#endif
}

typedef struct Job {
  double (*work)(const struct Job*); /* does one slice, returns how much it did */
  double seconds;
  size_t bytes;  /* probe_read: size of the buffer */
  float* buffer; /* probe_read: one per thread */
  pthread_barrier_t* start;
  const Cores* cores;
  int index;   /* of the thread */
  double rate; /* result: amount per second of this thread */
} Job;

static volatile double sink;

/* The numbers come from outside: of constants a compiler finds that some chains stay what they are,
 * and drops them (of 12 chains from i/4 with x/2 + 1/4 GCC 12 left 11 to do). */
static volatile double outside[] = {0.5, 0.25};

#define DEFINE_FMA(NAME, VECTOR, SCALAR)                                      \
  static double NAME(const Job* job) {                                        \
    (void)job;                                                                \
    enum { ROUNDS = 4096 };                                                   \
    VECTOR chain[CHAINS];                                                     \
    const VECTOR factor = (VECTOR){0} + (SCALAR)outside[0];                   \
    const VECTOR addend = (VECTOR){0} + (SCALAR)outside[1];                   \
    _Pragma("GCC unroll 16") for (int i = 0; i < CHAINS; ++i) chain[i] =      \
        (VECTOR){0} + (SCALAR)outside[1];                                     \
    for (int round = 0; round < ROUNDS; ++round)                              \
      _Pragma("GCC unroll 16") for (int i = 0; i < CHAINS; ++i) chain[i] =    \
          chain[i] * factor + addend;                                         \
    VECTOR total = chain[0];                                                  \
    for (int i = 1; i < CHAINS; ++i) total += chain[i];                       \
    sink = (double)total[0];                                                  \
    return 2.0 * ROUNDS * CHAINS * (double)(sizeof(VECTOR) / sizeof(SCALAR)); \
  }

DEFINE_FMA(fma_f32, vector_f32, float)
DEFINE_FMA(fma_f64, vector_f64, double)

static double read_buffer(const Job* job) {
  enum { LANES = 8 };
  const vector_f32* data = (const vector_f32*)job->buffer;
  const size_t vectors = job->bytes / sizeof(vector_f32) / LANES * LANES;
  /* Small buffers are read several times a slice, or the clock would be what is measured. */
  const size_t repeats = 1 + (256u << 10) / job->bytes;
  vector_f32 sum[LANES] = {{0}};
  for (size_t r = 0; r < repeats; ++r)
    for (size_t v = 0; v < vectors; v += LANES)
      _Pragma("GCC unroll 8") for (int i = 0; i < LANES; ++i) sum[i] += data[v + i];
  vector_f32 total = sum[0];
  for (int i = 1; i < LANES; ++i) total += sum[i];
  sink = (double)total[0];
  return (double)(repeats * vectors * sizeof(vector_f32));
}

static void* run_job(void* argument) {
  Job* job = argument;
  double done = 0.0, elapsed;
  move_to_core(job->cores, job->index);
  job->work(job); /* warm */
  pthread_barrier_wait(job->start);
  const double start = now();
  do {
    done += job->work(job);
    elapsed = now() - start;
  } while (elapsed < job->seconds);
  job->rate = done / elapsed;
  return NULL;
}

/* Sum of the rates of `threads` threads doing the same at the same time; negative if that could not
 * run. */
static double run_team(Job job, int threads) {
  pthread_t* handles = calloc((size_t)threads, sizeof *handles);
  Job* jobs = calloc((size_t)threads, sizeof *jobs);
  const Cores cores = current_cores();
  pthread_barrier_t start;
  double total = -1.0;
  int ready = handles && jobs && !pthread_barrier_init(&start, NULL, (unsigned)threads);
  for (int t = 0; ready && t < threads; ++t) {
    jobs[t] = job;
    jobs[t].start = &start;
    jobs[t].cores = &cores;
    jobs[t].index = t;
    if (job.bytes) {
      jobs[t].buffer = aligned_alloc(64, (job.bytes + 63) / 64 * 64);
      ready = jobs[t].buffer != NULL;
      for (size_t i = 0; ready && i < job.bytes / sizeof(float); ++i) jobs[t].buffer[i] = 0.0f;
    }
  }
  if (ready) {
    total = 0.0;
    for (int t = 1; t < threads; ++t)
      if (pthread_create(&handles[t], NULL, run_job, &jobs[t])) abort();
    run_job(&jobs[0]);
    move_back(&cores);
    for (int t = 1; t < threads; ++t) pthread_join(handles[t], NULL);
    for (int t = 0; t < threads; ++t) total += jobs[t].rate;
    pthread_barrier_destroy(&start);
  }
  for (int t = 0; jobs && t < threads; ++t) free(jobs[t].buffer);
  free(jobs);
  free(handles);
  return total;
}

double probe_fma(int threads, int element_bytes, double seconds) {
  return run_team((Job){.work = element_bytes == 8 ? fma_f64 : fma_f32, .seconds = seconds},
                  threads);
}

double probe_read(int threads, size_t bytes_per_thread, double seconds) {
  return run_team((Job){.work = read_buffer, .seconds = seconds, .bytes = bytes_per_thread},
                  threads);
}

typedef struct {
  _Alignas(128) atomic_long request;
  _Alignas(128) atomic_long answer;
  const Cores* cores;
} Mailbox;

static void* answer_requests(void* argument) {
  Mailbox* box = argument;
  move_to_core(box->cores, 1);
  for (long seen = 0; seen >= 0;) {
    const long request = atomic_load_explicit(&box->request, memory_order_acquire);
    if (request != seen) atomic_store_explicit(&box->answer, seen = request, memory_order_release);
  }
  return NULL;
}

static int by_size(const void* left, const void* right) {
  const double a = *(const double*)left, b = *(const double*)right;
  return (a > b) - (a < b);
}

double probe_handoff(double seconds) {
  enum { MOST_BATCHES = 1 << 14, ROUNDS = 16 };
  static Mailbox box;
  static double batches[MOST_BATCHES];
  pthread_t other;
  atomic_store(&box.request, 0);
  atomic_store(&box.answer, 0);
  const Cores cores = current_cores();
  box.cores = &cores;
  if (pthread_create(&other, NULL, answer_requests, &box)) return -1.0;
  move_to_core(&cores, 0);
  /* That the other thread has to start is no part of an answer. */
  long round = 1;
  atomic_store(&box.request, round);
  while (atomic_load(&box.answer) != round) sched_yield();
  int batch = 0;
  const double start = now();
  double last = start;
  do {
    for (int i = 0; i < ROUNDS; ++i) {
      atomic_store_explicit(&box.request, ++round, memory_order_release);
      while (atomic_load_explicit(&box.answer, memory_order_acquire) != round) {
      }
    }
    const double end = now();
    batches[batch++] = end - last;
    last = end;
  } while (last - start < seconds && batch < MOST_BATCHES);
  atomic_store(&box.request, -1); /* ends the other thread */
  pthread_join(other, NULL);
  move_back(&cores);
  /* The median by time: half of the time went into slower answers. By number, a core that is away
   * half of the time would hardly show: its few slow answers stand against ten thousand. */
  qsort(batches, (size_t)batch, sizeof *batches, by_size);
  double passed = 0.0;
  int middle = 0;
  while (middle < batch - 1 && (passed += batches[middle]) < (last - start) / 2) ++middle;
  return batches[middle] / ROUNDS / 2.0;
}
