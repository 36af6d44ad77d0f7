// The half of portable.h for the host executor: every name forwards to tests/cuda_host, which
// defines what is declared here in rnn_ext::cuda::host. All are called from inline functions, so
// that a call's return address is the kernel's line.
#pragma once

#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>

#define RNN_EXT_KERNEL
#define RNN_EXT_DEVICE inline __attribute__((always_inline))
#define RNN_EXT_LAUNCH_BOUNDS(threads, blocks)
#define RNN_EXT_GRID_CONSTANT
#define RNN_EXT_SHARED(Type, name)                                       \
  Type& name = *static_cast<Type*>(::rnn_ext::cuda::host::static_shared( \
      [] {                                                               \
        static const char tag = 0;                                       \
        return static_cast<const void*>(&tag);                           \
      }(),                                                               \
      sizeof(Type), alignof(Type)))

struct CUstream_st;

namespace rnn_ext::cuda {

using Stream = CUstream_st*;
using Error = int;
inline constexpr Error kSuccess = 0;

struct LaunchConfig {
  unsigned blocks = 1;
  unsigned threads = 1;
  size_t shared_bytes = 0;
  Stream stream = nullptr;
  bool cooperative = false;
  unsigned cluster = 0;
};

namespace host {

struct ThreadPlace {
  int thread, block_size, block, grid_size;
};
extern ThreadPlace place;  // of the thread that is running

void* static_shared(const void* tag, size_t bytes, size_t alignment);
void* dynamic_shared(size_t byte_offset);

void block_barrier();
void warp_barrier();
enum class Shuffle { kIndex, kXor, kDown };
uint64_t shuffle(Shuffle kind, uint64_t bits, int argument);

void cluster_arrive(bool release);
void cluster_wait();
// Where p, in the running block's dynamic shared memory, is in that of a block of the cluster.
void* in_block(void* p, int rank);

uint32_t atomic_load(const uint32_t* p, bool acquire);
uint32_t atomic_add(uint32_t* p, uint32_t v, bool release);

// What the compiler's instrumentation cannot tell: that the access is one, and aligned.
void wide_access(const void* p, size_t bytes);

void copy_async(void* shared, const void* global, int size, int bytes);
void copy_async_commit();
void copy_async_wait(int newest);

void mma_m16n8k16(float* acc, const uint32_t* a, const uint32_t* b, bool bfloat16);
void mma_m16n8k8_tf32(float* acc, const uint32_t* a, const uint32_t* b);

// Runs body(parameters) as every thread of every block.
Error launch(const LaunchConfig& config, void (*body)(const void* parameters),
             const void* parameters, size_t parameter_bytes);

}  // namespace host

template <class... Parameters>
Error launch(const LaunchConfig& config, void (*kernel)(Parameters...),
             std::type_identity_t<Parameters>... arguments) {
  using Packed = std::tuple<void (*)(Parameters...), Parameters...>;
  const Packed packed(kernel, arguments...);
  return host::launch(
      config,
      [](const void* parameters) {
        std::apply([](auto function, const auto&... values) { function(values...); },
                   *static_cast<const Packed*>(parameters));
      },
      &packed, sizeof packed);
}

RNN_EXT_DEVICE int thread_index() { return host::place.thread; }
RNN_EXT_DEVICE int block_size() { return host::place.block_size; }
RNN_EXT_DEVICE int block_index() { return host::place.block; }
RNN_EXT_DEVICE int grid_size() { return host::place.grid_size; }
RNN_EXT_DEVICE int lane_index() { return host::place.thread % kWarpSize; }
RNN_EXT_DEVICE int warp_index() { return host::place.thread / kWarpSize; }

template <class T>
RNN_EXT_DEVICE T* dynamic_shared(size_t byte_offset = 0) {
  return static_cast<T*>(host::dynamic_shared(byte_offset));
}

RNN_EXT_DEVICE void block_barrier() { host::block_barrier(); }
RNN_EXT_DEVICE void warp_barrier() { host::warp_barrier(); }

template <class T>
RNN_EXT_DEVICE T shuffle_as(host::Shuffle kind, T v, int argument) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  bits = host::shuffle(kind, bits, argument);
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
template <class T>
RNN_EXT_DEVICE T shuffle_xor(T v, int mask) {
  return shuffle_as(host::Shuffle::kXor, v, mask);
}

inline constexpr bool kHasClusters = true;
inline constexpr int kFloatLoads = 8;
RNN_EXT_DEVICE void cluster_arrive() { host::cluster_arrive(true); }
RNN_EXT_DEVICE void cluster_wait() { host::cluster_wait(); }

RNN_EXT_DEVICE uint32_t load_acquire(const uint32_t* p) { return host::atomic_load(p, true); }
RNN_EXT_DEVICE void add_release(uint32_t* p, uint32_t v) { host::atomic_add(p, v, true); }
template <class T, int N>
RNN_EXT_DEVICE Vector<T, N> load_vector(const T* p) {
  host::wide_access(p, sizeof(Vector<T, N>));
  return *reinterpret_cast<const Vector<T, N>*>(p);
}
template <class T, int N>
RNN_EXT_DEVICE void store_vector(T* p, const Vector<T, N>& v) {
  host::wide_access(p, sizeof(Vector<T, N>));
  *reinterpret_cast<Vector<T, N>*>(p) = v;
}
template <class T, int N>
RNN_EXT_DEVICE void store_to_block(T* p, int rank, const Vector<T, N>& v) {
  static_assert(sizeof(v) == 16);
  store_vector<T, N>(static_cast<T*>(host::in_block(p, rank)), v);
}
template <class T, int N>
RNN_EXT_DEVICE Vector<T, N> load_vector_l2(const T* p) {
  return load_vector<T, N>(p);
}

template <int kBytes>
RNN_EXT_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  host::copy_async(shared, global, kBytes, bytes);
}
template <int kBytes>
RNN_EXT_DEVICE void copy_async(void* shared, const void* global) {
  copy_async<kBytes>(shared, global, kBytes);
}
RNN_EXT_DEVICE void copy_async_commit() { host::copy_async_commit(); }
template <int kNewest>
RNN_EXT_DEVICE void copy_async_wait() {
  host::copy_async_wait(kNewest);
}

#if defined(__aarch64__)
using HostHalf = __fp16;  // GCC 12 has no _Float16 in C++ there
#else
using HostHalf = _Float16;
#endif

RNN_EXT_DEVICE float float_of(Float16 v) { return float(__builtin_bit_cast(HostHalf, v)); }
RNN_EXT_DEVICE float float_of(BFloat16 v) {
  return __builtin_bit_cast(float, uint32_t(v.bits) << 16);
}
RNN_EXT_DEVICE void round_into(float& r, float v) { r = v; }
RNN_EXT_DEVICE void round_into(double& r, double v) { r = v; }
RNN_EXT_DEVICE void round_into(Float16& r, float v) {
  r = __builtin_bit_cast(Float16, HostHalf(v));
}
RNN_EXT_DEVICE void round_into(BFloat16& r, float v) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  r.bits = v == v ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t(0x7fff);
}
RNN_EXT_DEVICE uint32_t to_tf32(float v) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  return v - v == 0 ? (bits + 0x1000) & ~0x1fffu : bits & ~0x1fffu;
}

template <class V>
RNN_EXT_DEVICE V quotient(V a, V b) {
  return a / b;
}
RNN_EXT_DEVICE float exponential(float x) { return std::exp(x); }
RNN_EXT_DEVICE double exponential(double x) { return std::exp(x); }
RNN_EXT_DEVICE float hyperbolic_tangent(float x) { return std::tanh(x); }
RNN_EXT_DEVICE double hyperbolic_tangent(double x) { return std::tanh(x); }

inline constexpr bool kHasTensorCores = true;
template <class T>
RNN_EXT_DEVICE void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, Float16> || std::is_same_v<T, BFloat16>);
  host::mma_m16n8k16(acc, a, b, std::is_same_v<T, BFloat16>);
}
RNN_EXT_DEVICE void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  host::mma_m16n8k8_tf32(acc, a, b);
}
}  // namespace rnn_ext::cuda
