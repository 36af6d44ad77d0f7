// rnn_ext._C: what was built, what this machine offers, and which way a call would take. Importing
// it registers the operators.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/python_arg_parser.h>

#include <array>
#include <cstdlib>

#include "../cuda/plan.h"
#include "memory.h"
#include "ops.h"

namespace py = pybind11;

namespace rnn_ext {
namespace {

std::string joined(const std::vector<std::string>& names) {
  std::string all;
  for (const std::string& name : names) all += (all.empty() ? "" : ", ") + name;
  return all;
}

std::vector<std::string> built_isas() {
  std::vector<std::string> names = {"scalar"};
#if defined(RNN_EXT_HAVE_AVX2)
  names.emplace_back("avx2");
#endif
#if defined(RNN_EXT_HAVE_AVX512)
  names.emplace_back("avx512");
#endif
#if defined(RNN_EXT_HAVE_AVX512_BF16)
  names.emplace_back("avx512_bf16");
#endif
#if defined(RNN_EXT_HAVE_AMX)
  names.emplace_back("amx");
#endif
  return names;
}

void set_cpu_isa(const std::string& name, const char* what) {
  if (!select_isa(name))
    throw py::value_error(
        std::string(what) + "='" + name +
        "' is not available on this machine; choose from: " + joined(available_isas()));
}

CellKind cell_kind(const std::string& name) {
  if (name == "rnn_tanh" || name == "rnn") return CellKind::kRnnTanh;
  if (name == "rnn_relu") return CellKind::kRnnRelu;
  if (name == "lstm") return CellKind::kLstm;
  if (name == "gru") return CellKind::kGru;
  throw py::value_error("cell must be rnn_tanh, rnn_relu, lstm or gru, got '" + name + "'");
}

py::dict build_info() {
  py::dict info;
  info["version"] = RNN_EXT_VERSION;
  info["torch_version"] = RNN_EXT_TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["isas"] = built_isas();
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(RNN_EXT_CUDA_VERSION)
  info["cuda"] = RNN_EXT_CUDA_VERSION;
  info["cuda_architectures"] = RNN_EXT_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

py::dict cpu_info() {
  py::dict info;
  info["isa"] = current_kernels().name;
  info["available"] = available_isas();
  info["bf16_products"] = current_kernels().bf16_products != nullptr;
  info["bf16_products_rows"] = current_kernels().bf16_products_rows;
  info["num_threads"] = at::get_num_threads();
  return info;
}

py::dict plan(const std::string& cell, int64_t steps, int64_t batch, int64_t input_size,
              int64_t hidden_size, int64_t proj_size, int directions, const std::string& dtype,
              bool backward, int threads) {
  if (steps < 1 || batch < 1 || input_size < 1 || hidden_size < 1 || proj_size < 0 ||
      directions < 1 || directions > kMaxDirections)
    throw py::value_error("sizes must be positive, directions 1 or 2");
  if (dtype != "float32" && dtype != "float64" && dtype != "bfloat16")
    throw py::value_error("dtype must be float32, float64 or bfloat16, got '" + dtype + "'");
  SequenceShape shape;
  shape.cell = cell_kind(cell);
  shape.steps = steps;
  shape.batch = batch;
  shape.input_size = input_size;
  shape.hidden_size = hidden_size;
  shape.proj_size = proj_size;
  shape.directions = directions;
  if (threads < 1) threads = at::get_num_threads();
  const Plan p = dtype == "float64"
                     ? plan_call<double>(shape, backward, threads)
                     : plan_call<float>(shape, backward, threads, dtype == "bfloat16");
  py::dict info;
  info["isa"] = current_kernels().name;
  info["vector_width"] = current_kernels().vector_bytes / (dtype == "float64" ? 8 : 4);
  info["threads"] = p.threads;
  info["packed_weights"] = p.packed_weights;
  info["packed_recurrent"] = p.packed_recurrent;
  info["chunk_steps"] = p.chunk_steps;
  info["row_block"] = p.row_block;
  info["shares"] = p.shares;
  info["own_weights"] = p.own_weights;
  info["groups"] = p.groups;
  info["project_in_step"] = p.project_in_step_rows <= shape.batch;
  info["directions_in_turn"] = p.directions_in_turn;
  info["predicted_step_us"] = p.step_seconds * 1e6;
  info["reason"] = p.reason;
  return info;
}

std::vector<std::string> cuda_devices() {
  int count = 0;
  const cuda::Device* devices = cuda::known_devices(count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(devices[i].name);
  return names;
}

cuda::DType cuda_dtype(const std::string& name) {
  if (name == "float32") return cuda::DType::kFloat32;
  if (name == "float64") return cuda::DType::kFloat64;
  if (name == "float16") return cuda::DType::kFloat16;
  if (name == "bfloat16") return cuda::DType::kBFloat16;
  throw py::value_error("dtype must be float32, float64, float16 or bfloat16, got '" + name + "'");
}

// In the order of cuda::Method. To refuse is not a choice: there it is the engine's own.
constexpr std::array<const char*, 4> kCudaMethods = {"refused", "stepwise", "persistent",
                                                     "cluster"};

void set_cuda_method(const std::string& name) {
  if (name == "auto") return cuda::set_method(cuda::Method::kRefused);
  for (size_t i = 1; i < kCudaMethods.size(); ++i)
    if (name == kCudaMethods[i]) return cuda::set_method(cuda::Method(i));
  throw py::value_error("method must be auto, stepwise, persistent or cluster, not '" + name + "'");
}

// What the CUDA engine would do on a device of the tables, predicted. No GPU is asked.
py::dict cuda_plan(const std::string& cell, int64_t steps, int64_t batch, int64_t input_size,
                   int64_t hidden_size, int64_t proj_size, int directions, const std::string& dtype,
                   bool backward, bool training, const std::string& device, bool allow_tf32) {
  if (steps < 1 || batch < 1 || input_size < 1 || hidden_size < 1 || proj_size < 0 ||
      directions < 1 || directions > kMaxDirections)
    throw py::value_error("sizes must be positive, directions 1 or 2");
  const cuda::Device* const model = cuda::find_device(device.c_str());
  if (!model)
    throw py::value_error("no device model '" + device +
                          "'; choose from: " + joined(cuda_devices()));
  cuda::PlanInput input;
  input.shape.cell = cell_kind(cell);
  input.shape.steps = steps;
  input.shape.batch = batch;
  input.shape.input_size = input_size;
  input.shape.hidden_size = hidden_size;
  input.shape.proj_size = proj_size;
  input.shape.directions = directions;
  input.dtype = cuda_dtype(dtype);
  input.backward = backward;
  input.save_reserve = training;
  input.allow_tf32 = allow_tf32;
  input.device = *model;
  const cuda::Plan p = cuda::make_plan(input);
  py::dict info;
  info["method"] = kCudaMethods.at(size_t(p.method));
  info["reason"] = p.reason;
  info["tensor_cores"] = p.cut != cuda::Cut::kLanes;
  info["units_per_block"] = p.units;
  info["cluster_blocks"] = p.method == cuda::Method::kCluster ? p.unit_blocks : 0;
  info["groups"] = p.groups;
  info["group_rows"] = p.group_rows;
  info["directions_at_once"] = p.directions_at_once;
  info["grid"] = p.grid;
  info["shared_bytes"] = p.shared_bytes;
  info["chunk_steps"] = p.chunk_steps;
  info["workspace_bytes"] = p.workspace_bytes;
  py::dict seconds;
  seconds["products"] = p.costs.products;
  seconds["start"] = p.costs.start;
  seconds["exchange"] = p.costs.exchange;
  seconds["barrier"] = p.costs.barrier;
  seconds["multiply"] = p.costs.multiply;
  seconds["cell"] = p.costs.cell;
  info["seconds"] = seconds;
  info["total_seconds"] = p.costs.total();
  info["floor_seconds"] = p.floor_seconds;
  return info;
}

std::optional<at::Tensor> optional_tensor(PyObject* object) {
  if (object == Py_None) return std::nullopt;
  return THPVariable_Unpack(object);
}

// Is somebody to see the call who looks at Python objects or at the boxed operator?
bool is_watched() {
  return at::impl::torch_function_mode_enabled() || torch::jit::tracer::isTracing();
}

using Tensors = c10::SmallVector<at::Tensor, 16>;

// False if the list holds anything but tensors.
bool unpack_list(PyObject* list, Tensors& tensors) {
  if (!PyList_Check(list)) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    PyObject* const item = PyList_GET_ITEM(list, i);
    if (!THPVariable_Check(item)) return false;
    tensors.push_back(THPVariable_Unpack(item));
  }
  return true;
}

constexpr Py_ssize_t kNumOptions = 7;

// cell, has_biases, num_layers, bidirectional, batch_first, dropout, training
Options unpack_options(PyObject* const* args) {
  constexpr std::array<std::pair<int, const char*>, 4> kFlags = {
      {{1, "has_biases"}, {3, "bidirectional"}, {4, "batch_first"}, {6, "training"}}};
  for (const auto& [i, name] : kFlags)
    TORCH_CHECK_TYPE(PyBool_Check(args[i]), "recurrent: ", name, " must be bool, not ",
                     Py_TYPE(args[i])->tp_name);
  return {CellKind(THPUtils_unpackLong(args[0])),
          args[1] == Py_True,
          THPUtils_unpackLong(args[2]),
          args[3] == Py_True,
          args[4] == Py_True,
          THPUtils_unpackDouble(args[5]),
          args[6] == Py_True};
}

ForwardResult call_without_gil(const Inputs& inputs, const Options& options) {
  pybind11::gil_scoped_release no_gil;
  return call_recurrent(inputs, options, false);
}

PyObject* tuple_of(std::initializer_list<PyObject*> items) {  // takes the references
  THPObjectPtr tuple(PyTuple_New(Py_ssize_t(items.size())));
  if (!tuple) throw python_error();
  Py_ssize_t i = 0;
  for (PyObject* item : items) PyTuple_SET_ITEM(tuple.get(), i++, item);
  return tuple.release();
}

// recurrent(input, batch_sizes, h_0, c_0, params, *options) -> (output, h_n, c_n):
// torch.ops.rnn_ext.recurrent without the conversion of every argument to and from a boxed value,
// which takes longer than a small step. Returns NotImplemented where that conversion is the point:
// under a tracer, a function mode, or with an argument that is not a tensor where one belongs.
PyObject* recurrent(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr Py_ssize_t kCount = 5 + kNumOptions;
  TORCH_CHECK_TYPE(count == kCount, "recurrent takes ", kCount, " arguments, got ", count);
  bool direct = !is_watched() && THPVariable_Check(args[0]);
  for (int i = 1; i < 4; ++i) direct = direct && (args[i] == Py_None || THPVariable_Check(args[i]));
  Tensors params;
  if (!direct || !unpack_list(args[4], params)) Py_RETURN_NOTIMPLEMENTED;
  const Options options = unpack_options(args + 5);
  const Inputs inputs{THPVariable_Unpack(args[0]), optional_tensor(args[1]),
                      optional_tensor(args[2]), optional_tensor(args[3]), params};
  auto [output, h_n, c_n, reserve] = call_without_gil(inputs, options);
  return tuple_of({THPVariable_Wrap(std::move(output)), THPVariable_Wrap(std::move(h_n)),
                   THPVariable_Wrap(std::move(c_n))});
  END_HANDLE_TH_ERRORS
}

bool is_plain(PyObject* object) {
  return THPVariable_CheckExact(object) && THPVariable_Unpack(object).is_cpu();
}
bool is_plain_state(PyObject* object) {
  return is_plain(object) && THPVariable_Unpack(object).dim() == 3;
}

// module_forward(input, hx, params, *options): what a module returns, (output, h_n) or
// (output, (h_n, c_n)), for the usual arguments: plain tensors on the CPU, a batched sequence.
// NotImplemented for all others. A step of a small layer takes as long as a few lines of Python.
PyObject* module_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr Py_ssize_t kCount = 3 + kNumOptions;
  TORCH_CHECK_TYPE(count == kCount, "module_forward takes ", kCount, " arguments, got ", count);
  Tensors params;
  if (is_watched() || !is_plain_state(args[0]) || !unpack_list(args[2], params) || params.empty() ||
      !is_plain(PyList_GET_ITEM(args[2], 0)))
    Py_RETURN_NOTIMPLEMENTED;
  const Options options = unpack_options(args + 3);
  PyObject *h_0 = args[1], *c_0 = Py_None;
  if (h_0 != Py_None && options.is_lstm()) {
    if (!PyTuple_CheckExact(h_0) || PyTuple_GET_SIZE(h_0) != 2) Py_RETURN_NOTIMPLEMENTED;
    c_0 = PyTuple_GET_ITEM(args[1], 1);
    h_0 = PyTuple_GET_ITEM(args[1], 0);
    if (!is_plain_state(c_0)) Py_RETURN_NOTIMPLEMENTED;
  }
  if (h_0 != Py_None && !is_plain_state(h_0)) Py_RETURN_NOTIMPLEMENTED;
  const Inputs inputs{THPVariable_Unpack(args[0]), std::nullopt, optional_tensor(h_0),
                      optional_tensor(c_0), params};
  auto [output, h_n, c_n, reserve] = call_without_gil(inputs, options);
  PyObject* state = THPVariable_Wrap(std::move(h_n));
  if (options.is_lstm()) state = tuple_of({state, THPVariable_Wrap(std::move(c_n))});
  return tuple_of({THPVariable_Wrap(std::move(output)), state});
  END_HANDLE_TH_ERRORS
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_FASTCALL, doc};
}

PyMethodDef recurrent_method = method<recurrent>("recurrent",
                                                 "torch.ops.rnn_ext.recurrent by the short way; "
                                                 "NotImplemented where only the long way will do.");
PyMethodDef module_forward_method = method<module_forward>(
    "module_forward", "A module's forward for the usual arguments; NotImplemented for others.");

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build and machine information of rnn_ext; importing it registers torch.ops.rnn_ext.";
  m.add_object("recurrent",
               py::reinterpret_steal<py::object>(PyCFunction_New(&recurrent_method, nullptr)));
  m.add_object("module_forward",
               py::reinterpret_steal<py::object>(PyCFunction_New(&module_forward_method, nullptr)));
  m.def("build_info", &build_info);
  m.def("cpu_info", &cpu_info);
  m.def("set_cpu_isa", [](const std::string& name) { set_cpu_isa(name, "isa"); }, py::arg("name"));
  m.def("plan", &plan, py::arg("cell"), py::arg("steps"), py::arg("batch"), py::arg("input_size"),
        py::arg("hidden_size"), py::arg("proj_size") = 0, py::arg("directions") = 1,
        py::arg("dtype") = "float32", py::arg("backward") = false, py::arg("threads") = 0);
  m.def("cuda_devices", &cuda_devices);
  m.def("set_cuda_method", &set_cuda_method, py::arg("name"));
  m.def("cuda_plan", &cuda_plan, py::arg("cell"), py::arg("steps"), py::arg("batch"),
        py::arg("input_size"), py::arg("hidden_size"), py::arg("proj_size") = 0,
        py::arg("directions") = 1, py::arg("dtype") = "float32", py::arg("backward") = false,
        py::arg("training") = false, py::arg("device") = "h100", py::arg("allow_tf32") = false);
  m.def("empty_pool", &empty_pool);
  m.def("pool_bytes", &pool_bytes);
  m.def("linear_activations", &linear_activations);
  m.def("set_linear_activations", &set_linear_activations, py::arg("linear"));
  if (const char* isa = std::getenv("RNN_EXT_CPU_ISA"); isa && *isa)
    set_cpu_isa(isa, "RNN_EXT_CPU_ISA");
}

}  // namespace rnn_ext
