// One storage type of the engine: compiled once for each, with RNN_EXT_CUDA_TYPE naming it.
#include "engine_run.h"

namespace rnn_ext::cuda {

using T = RNN_EXT_CUDA_TYPE;

template PlanInput plan_input<T>(const Forward<T>&, const Device&);
template PlanInput plan_input<T>(const Backward<T>&, const Device&);
template Status run<T>(const Forward<T>&, const PlanInput&, const Plan&, void*, const Multiplier&,
                       Stream);
template Status run<T>(const Backward<T>&, const PlanInput&, const Plan&, void*, const Multiplier&,
                       Stream);

}  // namespace rnn_ext::cuda
