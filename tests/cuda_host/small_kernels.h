// Small kernels, each right and with one bug planted: what the executor has to report, and where.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "executor.h"

struct SmallKernel {
  std::string name;
  bool passes;                       // else `fault` has to be reported,
  rnn_ext::cuda::host::Fault fault;  // at a line marked "// <- mark" in small_kernels.cpp
  std::string mark;                  // (empty: at none)
  bool needs_instrumentation;        // to be noticed
  std::function<bool()> run;         // launches; whether the results are right
};
std::vector<SmallKernel> small_kernels();

// Under any schedule: fragments, shuffles and votes against plain loops.
bool products_are_right();
bool shuffles_are_right();
