// Device memory and what is known of every cell of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "clocks.h"
#include "executor.h"

namespace rnn_ext::cuda::host {

struct Access {
  uint32_t thread = 0;
  uint32_t time = 0;  // 0: none
  const void* site = nullptr;
};

struct Cell {
  uint32_t generation = 0;  // of all but `written`: an older launch is ordered before
  bool written = false;
  bool atomic = false;     // the last write was
  bool pending = false;    // destination of a copy that was not waited for
  bool streaming = false;  // load_streaming() has read it
  Access write;
  Access read;                                 // of those since the last write that are not
  std::unique_ptr<std::vector<Access>> reads;  // ordered before `read`
};

struct Allocation {
  char* begin = nullptr;
  size_t size = 0;
  size_t granule_shift = 1;
  int block = -1;  // whose shared memory, -1: global memory
  uint32_t generation = 0;
  std::string name;
  std::vector<Cell> cells;
};

// What the executor knows of the thread that makes an access.
struct Accessor {
  ThreadClock clock;
  int block = 0, thread = 0;            // thread of its block
  int first_block = 0, last_block = 0;  // whose shared memory it can reach: those of its cluster
};

enum class Kind { kRead, kWrite, kAtomicRead, kAtomicWrite, kAsyncRead, kAsyncWrite, kStreaming };

class Memory {
 public:
  Memory();

  Allocation* allocate(size_t bytes, size_t granule, const char* name, int block);
  void release(void* memory);
  void* allocate_virtual(size_t bytes, const char* name);
  void release_virtual(void* memory);
  void mark_written(const void* memory, size_t bytes);

  bool contains(const void* p) const {
    return size_t(static_cast<const char*>(p) - arena_) < kArena;
  }
  // Null if p is not inside an allocation.
  Allocation* find(const void* p) const {
    const size_t page = size_t(static_cast<const char*>(p) - arena_) / kPage;
    return page < kArena / kPage ? pages_[page] : virtual_.empty() ? nullptr : find_virtual(p);
  }

  void begin_launch(int block_size);
  // False: the access must not be made.
  bool check(const Accessor& by, const void* p, size_t bytes, Kind kind, const void* site);
  // A block returns: everything that others have done to its shared memory must be known to it.
  void check_return(const Allocation& a, const SharedClock& known);
  // The copy that wrote `pending` cells has arrived.
  void arrived(const Accessor& by, const void* p, size_t bytes, const void* site);

  std::string describe(const void* p) const;

 private:
  static constexpr size_t kArena = size_t(1) << 30, kPage = 4096;

  Allocation* find_virtual(const void* p) const;
  void read(const Accessor& by, Allocation& a, Cell& cell, const void* p, Kind kind,
            const void* site);
  void write(const Accessor& by, Allocation& a, Cell& cell, const void* p, Kind kind,
             const void* site);
  void race(const Accessor& by, const void* p, const char* verb, const void* site,
            const Access& other, const char* other_verb);

  char* arena_;
  std::vector<Allocation*> pages_;
  std::vector<std::unique_ptr<Allocation>> live_, virtual_;
  size_t used_ = 0;
  uint32_t generation_ = 0;
  int block_size_ = 1;
};

// Adds a report, once for each pair of lines.
void report(Fault fault, const std::string& text, const void* site, const void* other = nullptr);
bool found_anything();

// "csrc/cuda/x.cu:12 < csrc/cuda/x.cu:80": the line of a return address, and where that was
// inlined.
const std::string& line_of(const void* site);

std::string thread_name(int block, int thread);

}  // namespace rnn_ext::cuda::host
