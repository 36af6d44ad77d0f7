// Random masks as a function of a seed: the same on any number of threads.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "../philox.h"
#include "cpu_backend.h"

namespace rnn_ext {
namespace {

constexpr int64_t kBlock = 4;  // numbers that one counter gives
constexpr int64_t kBlocksOfJob = 1024;
constexpr double kSecondsOfBlock = 10e-9;  // on one thread, order of magnitude

at::Tensor random_mask_cpu(const at::Tensor& seed, at::IntArrayRef size, double p,
                           at::ScalarType dtype) {
  TORCH_CHECK(seed.scalar_type() == at::kLong && seed.dim() == 0,
              "random_mask: seed must be an int64 tensor of shape (), got ", seed.scalar_type(),
              " of shape ", seed.sizes());
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "random_mask: p must be between 0 and 1, got ", p);
  at::Tensor mask = at::empty(size, seed.options().dtype(dtype));
  const uint64_t key = uint64_t(*seed.const_data_ptr<int64_t>());
  // A word is below the threshold with probability p, 0 and 1 included.
  const uint64_t threshold = uint64_t(std::llround(std::ldexp(p, 32)));
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, dtype, "random_mask", ([&] {
        scalar_t* const out = mask.mutable_data_ptr<scalar_t>();
        const int64_t count = mask.numel(), blocks = (count + kBlock - 1) / kBlock;
        const int64_t jobs = (blocks + kBlocksOfJob - 1) / kBlocksOfJob;
        share_out(jobs, kSecondsOfBlock * double(blocks), [&](int64_t job) {
          const int64_t end = std::min(blocks, (job + 1) * kBlocksOfJob);
          for (int64_t block = job * kBlocksOfJob; block < end; ++block) {
            const PhiloxBlock words = philox(uint64_t(block), key);
            const int64_t first = block * kBlock, here = std::min(kBlock, count - first);
            for (int64_t i = 0; i < here; ++i)
              out[first + i] = scalar_t(words[size_t(i)] < threshold ? 1 : 0);
          }
        });
      }));
  return mask;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rnn_ext, m) {
  // 1 with probability p, else 0. Element i is word i % 4 of Philox4x32-10 at counter i / 4, keyed
  // by seed (int64, shape ()); the same seed gives the same mask on any number of threads.
  m.def("random_mask(Tensor seed, SymInt[] size, float p, ScalarType dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(rnn_ext, CPU, m) { m.impl("random_mask", random_mask_cpu); }

}  // namespace rnn_ext
