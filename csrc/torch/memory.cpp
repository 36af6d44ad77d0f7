#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <limits>
#include <mutex>
#include <new>
#include <vector>

namespace rnn_ext {
namespace {

constexpr size_t kSmall = 128 << 10;  // malloc keeps blocks below this size by itself
constexpr size_t kMostIdle = 256u << 20;

// Stands in front of the memory that is handed out, which keeps its alignment.
struct alignas(64) Block {
  c10::DataPtr memory;  // this block's own, the header included
  size_t bytes;         // behind the header

  void* data() { return this + 1; }
  static Block* of(void* data) { return static_cast<Block*>(data) - 1; }

  static Block* allocate(size_t bytes) {
    c10::DataPtr memory = c10::GetCPUAllocator()->allocate(sizeof(Block) + bytes);
    prefer_huge_pages(memory.get(), bytes);
    return new (memory.get()) Block{std::move(memory), bytes};
  }
  void free() {
    const c10::DataPtr last = std::move(memory);
    this->~Block();
  }

  // From the first to the last whole huge page, if there is one for sure.
  static void prefer_huge_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = 2 << 20;
    const uintptr_t from = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
    const uintptr_t to = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
    if (bytes >= 2 * kPage) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
  }
};

enum class Use { kTensor, kWorkspace };

class Pool {
 public:
  Block* take(size_t bytes, Use use) {
    // A tensor may be kept: it gets hardly more than it needs. Likewise, what it pushes out is of
    // its own size, as when lengths vary; tensors that pile up must not drive out all the rest.
    const bool tensor = use == Use::kTensor;
    const size_t most = tensor ? bytes + bytes / 8 : std::numeric_limits<size_t>::max();
    std::vector<Block*> released;
    {
      const std::lock_guard lock(mutex);
      auto best = idle_.end();  // the smallest that will do
      for (auto it = idle_.begin(); it != idle_.end(); ++it)
        if ((*it)->bytes >= bytes && (*it)->bytes <= most &&
            (best == idle_.end() || (*it)->bytes < (*best)->bytes))
          best = it;
      if (best != idle_.end()) {
        Block* const block = *best;
        idle_.erase(best);
        idle_bytes_ -= block->bytes;
        return block;
      }
      // Idle blocks make room for the new one, so that peak memory does not grow with the pool.
      released = oldest(bytes, tensor ? bytes / 2 : 0, tensor ? 2 * bytes : most);
    }
    for (Block* block : released) block->free();
    return Block::allocate(bytes);
  }

  void give_back(Block* block) {
    if (block->bytes > kMostIdle) return block->free();
    std::vector<Block*> released;
    {
      const std::lock_guard lock(mutex);
      idle_bytes_ += block->bytes;
      idle_.push_back(block);
      if (idle_bytes_ > kMostIdle) released = oldest(idle_bytes_ - kMostIdle);
    }
    for (Block* old : released) old->free();
  }

  void empty() {
    std::vector<Block*> released;
    {
      const std::lock_guard lock(mutex);
      released = oldest(idle_bytes_);
    }
    for (Block* block : released) block->free();
  }

  size_t idle_bytes() {
    const std::lock_guard lock(mutex);
    return idle_bytes_;
  }

  std::mutex mutex;

 private:
  // Takes out the oldest blocks of a size in [least, most] until they have `bytes` together.
  std::vector<Block*> oldest(size_t bytes, size_t least = 0,
                             size_t most = std::numeric_limits<size_t>::max()) {
    std::vector<Block*> out, rest;
    size_t found = 0;
    for (Block* block : idle_) {
      const bool taken = found < bytes && block->bytes >= least && block->bytes <= most;
      (taken ? out : rest).push_back(block);
      if (taken) found += block->bytes;
    }
    idle_.swap(rest);
    idle_bytes_ -= found;
    return out;
  }

  std::vector<Block*> idle_;  // oldest first
  size_t idle_bytes_ = 0;
};

// Never destroyed: tensors may outlive static objects. No other thread may hold the lock while the
// process forks, or the child would wait for it for ever.
Pool& pool() {
  static Pool* const pool = new Pool;
  static const int at_fork = pthread_atfork(
      [] { pool->mutex.lock(); }, [] { pool->mutex.unlock(); }, [] { pool->mutex.unlock(); });
  (void)at_fork;
  return *pool;
}

void give_back(void* data) { pool().give_back(Block::of(data)); }

c10::DataPtr handed_out(Block* block) {
  return {block->data(), block->data(), give_back, c10::Device(c10::kCPU)};
}

class PoolAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    return handed_out(pool().take(bytes, Use::kTensor));
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

at::Tensor pooled_empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  static PoolAllocator& allocator = *new PoolAllocator;
  const bool small =
      at::detail::computeStorageNbytesContiguous(sizes, c10::elementSize(dtype)) < kSmall;
  return at::detail::empty_generic(sizes, small ? c10::GetCPUAllocator() : &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
}

c10::DataPtr pooled_workspace(size_t bytes) {
  if (bytes < kSmall) return c10::GetCPUAllocator()->allocate(bytes);
  return handed_out(pool().take(bytes, Use::kWorkspace));
}

void empty_pool() { pool().empty(); }
size_t pool_bytes() { return pool().idle_bytes(); }

}  // namespace rnn_ext
