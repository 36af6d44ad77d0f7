/* Counts the bytes this process holds on the heap, now and at the peak. Loaded with LD_PRELOAD in
 * front of glibc's allocator, so it sees every allocation of torch, of the libraries inside it and
 * of rnn_ext, and gives the same figure in every run. Memory that a library maps by itself is not
 * seen.
 */
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

extern void* __libc_malloc(size_t size);
extern void* __libc_calloc(size_t count, size_t size);
extern void* __libc_realloc(void* pointer, size_t size);
extern void* __libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void* pointer);

static atomic_long current;
static atomic_long peak;

static void* taken(void* pointer) {
  if (pointer) {
    const long size = (long)malloc_usable_size(pointer);
    const long total = atomic_fetch_add(&current, size) + size;
    long highest = atomic_load(&peak);
    while (total > highest && !atomic_compare_exchange_weak(&peak, &highest, total)) {
    }
  }
  return pointer;
}

void* malloc(size_t size) { return taken(__libc_malloc(size)); }
void* calloc(size_t count, size_t size) { return taken(__libc_calloc(count, size)); }
void* memalign(size_t alignment, size_t size) { return taken(__libc_memalign(alignment, size)); }
void* aligned_alloc(size_t alignment, size_t size) {
  return taken(__libc_memalign(alignment, size));
}

int posix_memalign(void** pointer, size_t alignment, size_t size) {
  *pointer = taken(__libc_memalign(alignment, size));
  return *pointer ? 0 : ENOMEM;
}

void* realloc(void* pointer, size_t size) {
  const long before = pointer ? (long)malloc_usable_size(pointer) : 0;
  void* moved = __libc_realloc(pointer, size);
  if (moved || size == 0) atomic_fetch_sub(&current, before);
  return taken(moved);
}

void free(void* pointer) {
  if (pointer) atomic_fetch_sub(&current, (long)malloc_usable_size(pointer));
  __libc_free(pointer);
}

/* For the process itself, through ctypes. */
long heap_current(void) { return atomic_load(&current); }
long heap_peak(void) { return atomic_load(&peak); }
void heap_reset_peak(void) { atomic_store(&peak, atomic_load(&current)); }
