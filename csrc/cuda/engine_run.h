// What engine.h declares, as templates. Included by engine.cu, which is compiled once for each
// storage type.
#pragma once

#include "backward_run.h"
#include "forward_run.h"

namespace rnn_ext::cuda {

template <class T>
PlanInput plan_input(const Forward<T>& call, const Device& device) {
  PlanInput in;
  in.shape = call.shape;
  in.dtype = dtype_of<T>();
  in.save_reserve = call.reserve[0] != nullptr;
  in.copy_x = !is_matrix(call.shape, call.x);
  in.device = device;
  return in;
}
template <class T>
PlanInput plan_input(const Backward<T>& call, const Device& device) {
  PlanInput in;
  in.shape = call.shape;
  in.dtype = dtype_of<T>();
  in.backward = true;
  in.copy_x = !is_matrix(call.shape, call.x);
  in.copy_dx = !is_matrix(call.shape, call.dx);
  in.device = device;
  return in;
}

template <class T>
Status run(const Forward<T>& call, const PlanInput& input, const Plan& plan, void* workspace,
           const Multiplier& multiplier, Stream stream) {
  return ForwardRun<T>(call, input, plan, workspace, multiplier, stream).run();
}
template <class T>
Status run(const Backward<T>& call, const PlanInput& input, const Plan& plan, void* workspace,
           const Multiplier& multiplier, Stream stream) {
  return BackwardRun<T>(call, input, plan, workspace, multiplier, stream).run();
}

}  // namespace rnn_ext::cuda
