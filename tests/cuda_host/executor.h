// The host executor: runs kernels written against csrc/cuda/portable.h on the CPU, every thread of
// every block as a fiber, and reports what hardware punishes silently.
//
// Kernel units are compiled with -fsanitize=thread for the instrumentation alone: hooks.cpp answers
// the calls that the compiler inserts before every access to memory, so kernel text needs no
// wrappers. An access is then checked against
//   * the allocations: out of bounds, misaligned, host memory, another thread's local variables;
//   * shadow cells of what was written, by whom and when: reads of what nobody wrote, races;
// where "when" is a vector clock per thread, joined at barriers and through release and acquire
// (happens-before, as in FastTrack, Flanagan and Freund 2009). So a race is found in any schedule
// in which both accesses happen, not only when it changes a value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace rnn_ext::cuda::host {

enum class Order { kForward, kReverse, kRandom };

// kForward: lowest thread first, all in step. kReverse: highest first, each as far as it gets.
// kRandom: any, and taken off the processor every so many accesses to memory.
struct Schedule {
  Order order = Order::kForward;
  uint64_t seed = 0;
  int preempt_every = 40;   // accesses, on average
  int resident_blocks = 2;  // of a launch that is not cooperative
  // If not 0: of a launch that is not cooperative, run only so many blocks at either end.
  int sampled_blocks = 0;
};
void set_schedule(const Schedule& schedule);

enum class Fault {
  kRace,
  kUninitialized,
  kOutOfBounds,
  kMisaligned,
  kAsyncNotWaited,     // read or overwritten before the copy was waited for
  kStreamingNotConst,  // load_streaming of what this launch writes
  kDivergentBarrier,
  kDivergentWarp,
  kDeadlock,
  kReturned,  // a block's shared memory is used by another when it returns, or after that
  kLaunch,
};
const char* name_of(Fault fault);

struct Report {
  Fault fault;
  std::string text;  // with the kernel's lines
};
// What was found since the last call. A launch in which something was found also returns an error.
std::vector<Report> take_reports();

// Whether the kernels are instrumented. Not under AddressSanitizer, which sees other things.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || defined(RNN_EXT_HOST_PLAIN)
inline constexpr bool kInstrumented = false;
#else
inline constexpr bool kInstrumented = true;
#endif

// Device memory, of bytes that are NaN in every type. `granule` (a power of two, 2 or more): the
// smallest element that two threads may access independently of each other.
void* allocate(size_t bytes, size_t granule, const char* name);
void release(void* memory);
// Zeros without limit, as far as they are not touched: for sizes that no machine has. Its bounds
// are checked; who wrote what is not known.
void* allocate_virtual(size_t bytes, const char* name);
void release_virtual(void* memory);
// The host has written there (a copy to the device).
void mark_written(const void* memory, size_t bytes);

template <class T>
class Buffer {
 public:
  Buffer(size_t count, const char* name)  // never written
      : data_(static_cast<T*>(allocate(count * sizeof(T), granule(), name))), count_(count) {}
  Buffer(const std::vector<T>& values, const char* name) : Buffer(values.size(), name) {
    for (size_t i = 0; i < count_; ++i) data_[i] = values[i];
    mark_written(data_, count_ * sizeof(T));
  }
  ~Buffer() { release(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  size_t size() const { return count_; }
  std::vector<T> values() const { return std::vector<T>(data_, data_ + count_); }

 private:
  static constexpr size_t granule() { return sizeof(T) < 2 ? 2 : sizeof(T) > 8 ? 8 : sizeof(T); }
  T* data_;
  size_t count_;
};

}  // namespace rnn_ext::cuda::host
