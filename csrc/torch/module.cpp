// rnn_ext._C: what was built, what this machine offers, and which way a call would take. Importing
// it registers the operators.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>

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
  return names;
}

void set_cpu_isa(const std::string& name, const char* what) {
  if (!select_isa(name))
    throw py::value_error(std::string(what) + "='" + name +
                          "' is not available on this machine; choose from: " +
                          joined(available_isas()));
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
  return info;
}

py::dict cpu_info() {
  py::dict info;
  info["isa"] = current_kernels().name;
  info["available"] = available_isas();
  info["num_threads"] = at::get_num_threads();
  return info;
}

py::dict plan(const std::string& cell, int64_t steps, int64_t batch, int64_t input_size,
              int64_t hidden_size, int64_t proj_size, int directions, const std::string& dtype,
              bool backward, int threads) {
  if (steps < 1 || batch < 1 || input_size < 1 || hidden_size < 1 || proj_size < 0 ||
      directions < 1 || directions > kMaxDirections)
    throw py::value_error("sizes must be positive, directions 1 or 2");
  if (dtype != "float32" && dtype != "float64")
    throw py::value_error("dtype must be float32 or float64, got '" + dtype + "'");
  SequenceShape shape;
  shape.cell = cell_kind(cell);
  shape.steps = steps;
  shape.batch = batch;
  shape.input_size = input_size;
  shape.hidden_size = hidden_size;
  shape.proj_size = proj_size;
  shape.directions = directions;
  if (threads < 1) threads = at::get_num_threads();
  const Plan p = dtype == "float64" ? plan_call<double>(shape, backward, threads)
                                    : plan_call<float>(shape, backward, threads);
  py::dict info;
  info["isa"] = current_kernels().name;
  info["vector_width"] = current_kernels().vector_bytes / (dtype == "float64" ? 8 : 4);
  info["threads"] = p.threads;
  info["packed_weights"] = p.packed_weights;
  info["chunk_steps"] = p.chunk_steps;
  info["row_block"] = p.row_block;
  info["predicted_step_us"] = p.step_seconds * 1e6;
  info["reason"] = p.reason;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build and machine information of rnn_ext; importing it registers torch.ops.rnn_ext.";
  m.def("build_info", &build_info);
  m.def("cpu_info", &cpu_info);
  m.def(
      "set_cpu_isa", [](const std::string& name) { set_cpu_isa(name, "isa"); }, py::arg("name"));
  m.def("plan", &plan, py::arg("cell"), py::arg("steps"), py::arg("batch"), py::arg("input_size"),
        py::arg("hidden_size"), py::arg("proj_size") = 0, py::arg("directions") = 1,
        py::arg("dtype") = "float32", py::arg("backward") = false, py::arg("threads") = 0);
  m.def("linear_activations", &linear_activations);
  m.def("set_linear_activations", &set_linear_activations, py::arg("linear"));
  if (const char* isa = std::getenv("RNN_EXT_CPU_ISA"); isa && *isa)
    set_cpu_isa(isa, "RNN_EXT_CPU_ISA");
}

}  // namespace rnn_ext
