// The operators' CUDA kernels: the same walk through the layers, on the caller's stream. Products
// go through at::mm, so that torch's own settings (TF32, reduced precision, its workspaces under
// graph capture) hold for them, too. Nothing here waits for the device.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <mutex>

#include "../cuda/engine.h"
#include "layers.h"

namespace rnn_ext {
namespace {

// Limits as the driver reports them. Asked for once a device: a query takes microseconds.
cuda::Device query_device(int index) {
  const auto get = [&](cudaDeviceAttr attribute) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, index));
    return value;
  };
  cuda::Device device;
  device.capability =
      10 * get(cudaDevAttrComputeCapabilityMajor) + get(cudaDevAttrComputeCapabilityMinor);
  device.sms = get(cudaDevAttrMultiProcessorCount);
  device.shared_per_block = get(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.shared_per_sm = get(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  device.registers_per_sm = get(cudaDevAttrMaxRegistersPerMultiprocessor);
  device.threads_per_sm = get(cudaDevAttrMaxThreadsPerMultiProcessor);
  device.l2_bytes = get(cudaDevAttrL2CacheSize);
  device.clock = 1e3 * get(cudaDevAttrClockRate);
  device.cooperative = get(cudaDevAttrCooperativeLaunch) != 0;
  device.max_cluster = get(cudaDevAttrClusterLaunch) != 0 ? cuda::kMaxCluster : 0;
  return cuda::with_rates(device);
}

const cuda::Device& device_at(int index) {
  static std::mutex mutex;
  static std::array<std::optional<cuda::Device>, C10_COMPILE_TIME_MAX_GPUS> devices;
  const std::lock_guard<std::mutex> lock(mutex);
  std::optional<cuda::Device>& device = devices.at(size_t(index));
  if (!device) device = query_device(index);
  return *device;
}

at::ScalarType scalar_type(cuda::DType type) {
  switch (type) {
    case cuda::DType::kFloat32:
      return at::kFloat;
    case cuda::DType::kFloat64:
      return at::kDouble;
    case cuda::DType::kFloat16:
      return at::kHalf;
    case cuda::DType::kBFloat16:
      return at::kBFloat16;
  }
  TORCH_INTERNAL_ASSERT(false);
}

// torch's setting for products, which at::mm follows as well.
bool allow_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

// The engine's products: views of its memory, multiplied in place. Torch's errors are C++
// exceptions and pass through the engine, which holds nothing that would leak.
cuda::Status multiply(void* context, const cuda::Gemm& g, cuda::Stream /*torch's current one*/) {
  const at::Device device = *static_cast<const at::Device*>(context);
  const at::ScalarType type = scalar_type(g.type);
  const auto matrix = [&](const void* data, int64_t rows, int64_t columns, int64_t stride,
                          bool transpose, at::ScalarType scalar) {
    const std::array<int64_t, 2> sizes = {rows, columns};
    const std::array<int64_t, 2> strides = {transpose ? 1 : stride, transpose ? stride : 1};
    return at::for_blob(const_cast<void*>(data), sizes)
        .strides(strides)
        .options(at::TensorOptions(scalar).device(device))
        .target_device(device)
        .make_tensor();
  };
  const at::Tensor a = matrix(g.a, g.m, g.k, g.lda, g.transpose_a, type);
  const at::Tensor b = matrix(g.b, g.k, g.n, g.ldb, g.transpose_b, type);
  at::Tensor c = matrix(g.c, g.m, g.n, g.ldc, false, g.wide ? at::toOpMathType(type) : type);
  if (g.accumulate)
    at::addmm_out(c, c, a, b);
  else if (c.scalar_type() != type)
    at::mm_out(c, a, b, c.scalar_type());
  else
    at::mm_out(c, a, b);
  return cudaSuccess;
}

template <class T>
class CudaBackend {
 public:
  using Element = T;
  using Saved = cuda::Compute<T>;

  static at::ScalarType element_type(at::ScalarType dtype) { return dtype; }
  static at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
    return at::empty(sizes, options);
  }

  CudaBackend(const Problem&, at::ScalarType)
      : stream_(c10::cuda::getCurrentCUDAStream()), device_(stream_.device()) {}

  void run(const ForwardCall<T, Saved>& call) { run_call(call); }
  void run(const BackwardCall<T, Saved>& call) { run_call(call); }
  void finish() {}

 private:
  template <class Call>
  void run_call(const Call& call) {
    cuda::PlanInput input = cuda::plan_input<T>(call, device_at(device_.index()));
    input.allow_tf32 = allow_tf32();
    const cuda::Plan plan = cuda::make_plan(input);
    // Modules go to torch.nn then.
    TORCH_CHECK_NOT_IMPLEMENTED(plan.method != cuda::Method::kRefused,
                                "rnn_ext does not run on this GPU: ", plan.reason);
    // Freed in stream order: the allocator hands it to nobody who is not behind us on this stream.
    const at::Tensor workspace =
        at::empty({plan.workspace_bytes}, at::TensorOptions(at::kByte).device(device_));
    C10_CUDA_CHECK(cudaError_t(cuda::run<T>(call, input, plan, workspace.mutable_data_ptr(),
                                            {multiply, &device_}, stream_.stream())));
  }

  c10::cuda::CUDAStream stream_;
  at::Device device_;
};

// Calls f(T{}) with the engine's type for a dtype.
template <class F>
auto with_type(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kDouble:
      return f(double{});
    case at::kHalf:
      return f(cuda::Float16{});
    case at::kBFloat16:
      return f(cuda::BFloat16{});
    default:
      return f(float{});  // Problem has let no other type pass
  }
}

ForwardResult recurrent_cuda(const Inputs& inputs, const Options& options, bool save_reserve) {
  const c10::cuda::CUDAGuard guard(inputs.input.device());
  const auto run = [&](const Inputs& one, const ForwardResult* into) {
    const Problem problem(one, options);
    return with_type(one.input.scalar_type(), [&](auto type) {
      return forward_layers<CudaBackend<decltype(type)>>(problem, one, save_reserve, into);
    });
  };
  if (!has_members(inputs)) return run(inputs, nullptr);
  return members_forward(inputs, options, save_reserve,
                         [&](const Inputs& one, const ForwardResult& into) { run(one, &into); });
}

std::vector<at::Tensor> recurrent_backward_cuda(const Gradients& grads, const Inputs& inputs,
                                                const at::Tensor& output, const at::Tensor& reserve,
                                                const Options& options,
                                                const c10::List<bool>& output_mask) {
  const c10::cuda::CUDAGuard guard(inputs.input.device());
  const auto run = [&](const Gradients& own, const Inputs& one, const at::Tensor& y,
                       const at::Tensor& kept, const std::vector<at::Tensor>* into) {
    const Problem problem(one, options);
    const BackwardArguments arguments(problem, one, y, kept, own, output_mask);
    return with_type(one.input.scalar_type(), [&](auto type) {
      return backward_layers<CudaBackend<decltype(type)>>(problem, one, y, kept, arguments, into);
    });
  };
  if (!has_members(inputs)) return run(grads, inputs, output, reserve, nullptr);
  return members_backward(
      grads, inputs, output, reserve, options, output_mask,
      [&](const Gradients& own, const Inputs& one, const at::Tensor& y, const at::Tensor& kept,
          const std::vector<at::Tensor>& into) { run(own, one, y, kept, &into); });
}

}  // namespace

TORCH_LIBRARY_IMPL(rnn_ext, CUDA, m) {
  m.impl("recurrent", recurrent_operator<recurrent_cuda>);
  m.impl("recurrent_backward", recurrent_backward_operator<recurrent_backward_cuda>);
}

}  // namespace rnn_ext
