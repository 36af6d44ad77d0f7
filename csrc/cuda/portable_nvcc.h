// The half of portable.h for nvcc.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

#define RNN_EXT_KERNEL __global__
#define RNN_EXT_DEVICE __device__ __forceinline__
#define RNN_EXT_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define RNN_EXT_GRID_CONSTANT __grid_constant__
#define RNN_EXT_SHARED(Type, name) __shared__ Type name

// What an instruction needs at least. The host's pass of nvcc reads device functions too.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define RNN_EXT_SM80 0
#else
#define RNN_EXT_SM80 1
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define RNN_EXT_SM90 0
#else
#define RNN_EXT_SM90 1
#endif

namespace rnn_ext::cuda {

using Stream = cudaStream_t;
using Error = cudaError_t;
inline constexpr Error kSuccess = cudaSuccess;

struct LaunchConfig {
  unsigned blocks = 1;
  unsigned threads = 1;  // a block; a multiple of 32
  size_t shared_bytes = 0;
  Stream stream = nullptr;
  bool cooperative = false;  // all blocks resident at once, or an error
  unsigned cluster = 0;      // blocks of a thread-block cluster, which divides `blocks`; 0: none
};

template <class... Parameters>
Error launch(const LaunchConfig& config, void (*kernel)(Parameters...),
             std::type_identity_t<Parameters>... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  constexpr size_t kWithoutAsking = 48 << 10;
  if (config.shared_bytes > kWithoutAsking) {
    const Error error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             int(config.shared_bytes));
    if (error != kSuccess) return error;
  }
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))..., nullptr};
  const dim3 grid(config.blocks), block(config.threads);
  if (config.cluster > 0) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = config.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t clustered = {};
    clustered.gridDim = grid;
    clustered.blockDim = block;
    clustered.dynamicSmemBytes = config.shared_bytes;
    clustered.stream = config.stream;
    clustered.attrs = &attribute;
    clustered.numAttrs = 1;
    return cudaLaunchKernelExC(&clustered, function, pointers);
  }
  return config.cooperative ? cudaLaunchCooperativeKernel(function, grid, block, pointers,
                                                          config.shared_bytes, config.stream)
                            : cudaLaunchKernel(function, grid, block, pointers, config.shared_bytes,
                                               config.stream);
}

RNN_EXT_DEVICE int thread_index() { return int(threadIdx.x); }
RNN_EXT_DEVICE int block_size() { return int(blockDim.x); }
RNN_EXT_DEVICE int block_index() { return int(blockIdx.x); }
RNN_EXT_DEVICE int grid_size() { return int(gridDim.x); }
RNN_EXT_DEVICE int lane_index() { return int(threadIdx.x) % kWarpSize; }
RNN_EXT_DEVICE int warp_index() { return int(threadIdx.x) / kWarpSize; }

template <class T>
RNN_EXT_DEVICE T* dynamic_shared(size_t byte_offset = 0) {
  extern __shared__ __align__(128) unsigned char rnn_ext_dynamic_shared[];
  return reinterpret_cast<T*>(rnn_ext_dynamic_shared + byte_offset);
}

// --- Barriers and warps --------------------------------------------------------------------------

inline constexpr unsigned kAllLanes = 0xffffffffu;

RNN_EXT_DEVICE void block_barrier() { __syncthreads(); }
RNN_EXT_DEVICE void warp_barrier() { __syncwarp(); }
template <class T>
RNN_EXT_DEVICE T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(kAllLanes, v, mask);
}

// --- Thread-block clusters -----------------------------------------------------------------------
// Ranks are block_index() modulo the cluster's size: launches are one-dimensional.

inline constexpr bool kHasClusters = RNN_EXT_SM90;

// Not .aligned: lanes of a warp may come one after the other, the hardware counts threads.
RNN_EXT_DEVICE void cluster_arrive() {
#if RNN_EXT_SM90
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#else
  __trap();
#endif
}
RNN_EXT_DEVICE void cluster_wait() {
#if RNN_EXT_SM90
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}

// --- Signals in global memory --------------------------------------------------------------------

RNN_EXT_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(v)
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return v;
}
RNN_EXT_DEVICE void add_release(uint32_t* p, uint32_t v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(v)
               : "memory");
}
// --- Wide and asynchronous access ----------------------------------------------------------------

template <class T, int N>
RNN_EXT_DEVICE Vector<T, N> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}
template <class T, int N>
RNN_EXT_DEVICE void store_vector(T* p, const Vector<T, N>& v) {
  *reinterpret_cast<Vector<T, N>*>(p) = v;
}

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

// From L2, past L1: for what other blocks have just written.
template <class T, int N>
RNN_EXT_DEVICE Vector<T, N> load_vector_l2(const T* p) {
  using W = typename Word<int(sizeof(T)) * N>::Type;
  const W word = __ldcg(reinterpret_cast<const W*>(p));
  return *reinterpret_cast<const Vector<T, N>*>(&word);
}

// Where p, in this block's shared memory, is in that of another block of the cluster.
template <class T, int N>
RNN_EXT_DEVICE void store_to_block(T* p, int rank, const Vector<T, N>& v) {
  static_assert(sizeof(v) == 16);
#if RNN_EXT_SM90
  const uint4 word = *reinterpret_cast<const uint4*>(&v);
  unsigned to;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(to)
      : "r"(unsigned(__cvta_generic_to_shared(p))), "r"(rank));
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(word.x),
               "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
#else
  __trap();
#endif
}

template <int kBytes>
RNN_EXT_DEVICE void copy_async(void* shared, const void* global, int bytes) {
#if RNN_EXT_SM80
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  const size_t from = __cvta_generic_to_global(global);
  if constexpr (kBytes == 16)  // .cg, past L1, exists for 16 bytes only
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(from), "r"(bytes),
                 "n"(kBytes)
                 : "memory");
#else
  using W = typename Word<kBytes>::Type;
  W word = {};
  if (bytes == kBytes) {
    word = *static_cast<const W*>(global);
  } else {
    for (int i = 0; i < bytes; ++i)
      reinterpret_cast<char*>(&word)[i] = static_cast<const char*>(global)[i];
  }
  *static_cast<W*>(shared) = word;
#endif
}
template <int kBytes>
RNN_EXT_DEVICE void copy_async(void* shared, const void* global) {
  copy_async<kBytes>(shared, global, kBytes);
}
RNN_EXT_DEVICE void copy_async_commit() {
#if RNN_EXT_SM80
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kNewest>
RNN_EXT_DEVICE void copy_async_wait() {
#if RNN_EXT_SM80
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
#endif
}

// --- Narrow types --------------------------------------------------------------------------------

RNN_EXT_DEVICE float float_of(Float16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}
RNN_EXT_DEVICE float float_of(BFloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
RNN_EXT_DEVICE void round_into(float& r, float v) { r = v; }
RNN_EXT_DEVICE void round_into(double& r, double v) { r = v; }
RNN_EXT_DEVICE void round_into(Float16& r, float v) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
}
RNN_EXT_DEVICE void round_into(BFloat16& r, float v) {
#if RNN_EXT_SM80
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
#else
  const uint32_t bits = __float_as_uint(v);
  r.bits = v == v ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t(0x7fff);
#endif
}
// The upper 19 bits, rounded to nearest (ties away): what a tf32 product reads.
RNN_EXT_DEVICE uint32_t to_tf32(float v) {
#if RNN_EXT_SM80
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
#else
  return __float_as_uint(v);
#endif
}

// a / b of moderate size, b normal: a reciprocal estimate, improved once, and the quotient
// corrected by its remainder. `/` would branch for what does not occur.
RNN_EXT_DEVICE float quotient(float a, float b) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
  r = fmaf(r, fmaf(-b, r, 1.0f), r);
  const float q = a * r;
  return fmaf(fmaf(-b, q, a), r, q);
}
RNN_EXT_DEVICE double quotient(double a, double b) { return a / b; }
RNN_EXT_DEVICE float exponential(float x) { return ::expf(x); }
RNN_EXT_DEVICE double exponential(double x) { return ::exp(x); }
RNN_EXT_DEVICE float hyperbolic_tangent(float x) { return ::tanhf(x); }
RNN_EXT_DEVICE double hyperbolic_tangent(double x) { return ::tanh(x); }

// The device that this pass compiles for has all products below.
inline constexpr bool kHasTensorCores = RNN_EXT_SM80;

// How many registers ptxas finds for a kernel of the same text differs: for 10.0, 8 spill in one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
inline constexpr int kFloatLoads = 4;
#else
inline constexpr int kFloatLoads = 8;
#endif

// --- Matrix fragments ----------------------------------------------------------------------------
// With g = lane / 4, t = lane % 4, a register of two narrow values holding the lower index in its
// low half:
//   m16n8k16  a[0] (g, 2t..)  a[1] (g+8, 2t..)  a[2] (g, 2t+8..)  a[3] (g+8, 2t+8..)
//             b[0] (2t.., g)  b[1] (2t+8.., g)
//   m16n8k8   a[0] (g, t)  a[1] (g+8, t)  a[2] (g, t+4)  a[3] (g+8, t+4)   b[0] (t, g)  b[1] (t+4,
//   g) both      acc[0..1] (g, 2t..)  acc[2..3] (g+8, 2t..)

template <class T>
RNN_EXT_DEVICE void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if RNN_EXT_SM80
  if constexpr (std::is_same_v<T, Float16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

RNN_EXT_DEVICE void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
#if RNN_EXT_SM80
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

}  // namespace rnn_ext::cuda
