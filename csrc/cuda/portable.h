// The thin layer through which one kernel text compiles under nvcc for a GPU and under a plain C++
// compiler for the host executor (tests/cuda_host), which runs every thread of every block and
// reports what hardware punishes: races, missing barriers and waits, reads of what nobody wrote.
//
// Kernels use these names only, and all of them are used; nothing outside this file and its two
// halves asks which compiler reads it. What both halves define:
//
//   RNN_EXT_KERNEL, RNN_EXT_DEVICE          in front of a kernel, of a device function
//   RNN_EXT_LAUNCH_BOUNDS(threads, blocks)  after RNN_EXT_KERNEL; blocks: at least, of an SM
//   const RNN_EXT_GRID_CONSTANT Params p    a kernel's parameter, read in place
//   RNN_EXT_SHARED(Type, name);             a static shared variable; name an array type first
//   dynamic_shared<T>(byte_offset)          the launch's shared memory, aligned to 128 bytes
//
//   thread_index() block_size() block_index() grid_size()     one-dimensional throughout
//   lane_index() warp_index()
//
//   block_barrier()                         all threads of the block, from the same line
//   warp_barrier()                          all 32 lanes
//   shuffle_xor(v, mask)                    all 32 lanes; 4- or 8-byte v; orders no memory
//
//   cluster_arrive() cluster_wait()         all threads of the cluster: releases, acquires
//   store_to_block<T, N>(p, rank, v)        store_vector to where p is in that block of the cluster
//   kHasClusters                            whether this compilation has them
//
//   load_acquire(p) add_release(p, v)       uint32_t in global memory, device scope
//
//   load_vector<T, N>(p) store_vector(p, v) one access of N * sizeof(T) = 4, 8 or 16 bytes, aligned
//   load_vector_l2<T, N>(p)                 past L1: for what other blocks have just written
//   copy_async<16 | 8 | 4>(shared, global)  also (shared, global, bytes): the rest is zeros
//   copy_async_commit() copy_async_wait<N>()    own copies only: a barrier makes others' visible
//
//   mma_m16n8k16<Float16 | BFloat16>(acc, a, b)  mma_m16n8k8_tf32(acc, a, b)    acc += a b
//   kHasTensorCores                         whether this compilation has both
//   kFloatLoads                             of 16 bytes, that it has registers for in flight
//
//   launch(config, kernel, arguments...)    an Error, kSuccess or not: nothing throws or waits
#pragma once

#include <cstddef>
#include <cstdint>

#include "../cells/cell.h"
#include "types.h"

namespace rnn_ext::cuda {

inline constexpr int kWarpSize = 32;

// N values moved by one instruction.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(sizeof(T) * N == 2 || sizeof(T) * N == 4 || sizeof(T) * N == 8 ||
                sizeof(T) * N == 16);
  T v[N];
};

template <class T>
inline constexpr int kVectorLength = 16 / int(sizeof(T));

}  // namespace rnn_ext::cuda

// Each half defines LaunchConfig's Stream (cudaStream_t on either side), Error and the names above.
#if defined(__CUDACC__)
#include "portable_nvcc.h"
#else
#include "portable_host.h"
#endif

namespace rnn_ext::cuda {

RNN_EXT_DEVICE float to_compute(float v) { return v; }
RNN_EXT_DEVICE double to_compute(double v) { return v; }
RNN_EXT_DEVICE float to_compute(Float16 v) { return float_of(v); }
RNN_EXT_DEVICE float to_compute(BFloat16 v) { return float_of(v); }

// Rounds to nearest, ties to even.
template <class T>
RNN_EXT_DEVICE T from_compute(Compute<T> v) {
  T result;
  round_into(result, v);
  return result;
}

// The math policy of csrc/cells for one thread. `linear` replaces the saturating functions by their
// tangents at 0, as in the CPU engine's activations.h; for tests. No approximate instructions: the
// error of a step is fed back a thousand times.
template <class V>
struct ThreadMath {
  bool linear = false;

  RNN_EXT_DEVICE V zero() const { return V(0); }
  RNN_EXT_DEVICE V one() const { return V(1); }
  // Through exp(-|x|), so that nothing overflows and the tails keep their relative accuracy.
  RNN_EXT_DEVICE V sigmoid(V x) const {
    if (linear) return x * V(0.25) + V(0.5);
    const V e = exponential(x < V(0) ? x : -x);
    return quotient(x < V(0) ? e : V(1), V(1) + e);
  }
  RNN_EXT_DEVICE V tanh(V x) const { return linear ? x : hyperbolic_tangent(x); }
  // Not rounded apart: here the compiler may still fuse it with the sum.
  RNN_EXT_DEVICE V rounded(V product) const { return product; }
  RNN_EXT_DEVICE V sigmoid_grad(V s) const { return linear ? V(0.25) : s * (V(1) - s); }
  RNN_EXT_DEVICE V tanh_grad(V y) const { return linear ? V(1) : V(1) - y * y; }
  // NaN passes through both, as in torch.
  RNN_EXT_DEVICE V relu(V x) const { return x < V(0) ? V(0) : x; }
  RNN_EXT_DEVICE V relu_grad(V y, V dy) const { return y <= V(0) ? V(0) : dy; }
};

// A barrier over the resident blocks that share `counter`, in two halves, so that work which needs
// nothing of the other blocks fits between them.
//
// Every member adds 1 except the first, which adds what makes the sum of one round 2^31: a round
// ends when the top bit turns over, and the low bits are 0 again. So the counter needs to be zero
// before its first use only: not between rounds, launches or replays of a graph. Nobody waits for
// the sum that it has made: `turned` is the top bit of the round before, which each knows.
//
// arrive() makes everything that the block has written visible to whoever returns from the wait()
// of the same round: the block's barrier orders it before the signalling thread's release. That
// thread is one of the last warp, which has fewer pairs to finish than the others, or none.
struct GridBarrier {
  static constexpr uint32_t kTurn = 0x80000000u;

  uint32_t* counter;
  uint32_t members;
  bool first;       // exactly one member's
  uint32_t turned;  // kTurn after an odd number of rounds, else 0

  static RNN_EXT_DEVICE bool signals() { return thread_index() == block_size() - 1; }
  RNN_EXT_DEVICE void arrive() {
    block_barrier();
    if (signals()) add_release(counter, first ? kTurn - (members - 1) : 1u);
  }
  RNN_EXT_DEVICE void wait() {
    if (signals())
      while (((load_acquire(counter) ^ turned) & kTurn) == 0) {
      }
    turned ^= kTurn;
    block_barrier();
  }
};

// The same over the blocks of a thread-block cluster, which the hardware counts. What a thread has
// stored before arrive(), in its own block or another, is visible to all behind wait().
struct ClusterBarrier {
  RNN_EXT_DEVICE void arrive() { cluster_arrive(); }
  RNN_EXT_DEVICE void wait() { cluster_wait(); }
};

}  // namespace rnn_ext::cuda
