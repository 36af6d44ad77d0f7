"""onnxruntime and OpenVINO: both run the same ONNX graph, made here from torch.nn's weights.

Each as somebody would use it who cares for its speed: the graph is optimized and weights are packed
once, before any time is taken; inputs and outputs are bound to buffers that are there already, so a
call copies and allocates nothing of ours. Both are told the number of threads, and OpenVINO to
compute in float32: left alone it takes bfloat16 where the processor has it.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from onnx_weights import onnx_weights
from rnn_ext._bench import Case, Workload

# Old enough for both engines, new enough to hold all that torch.nn computes.
OPSET = 14
IR_VERSION = 8


def states_of(case: Case) -> tuple[str, ...]:
    return ("h", "c") if case.cell == "LSTM" else ("h",)


def build_graph(case: Case, module: nn.RNNBase) -> bytes:
    """One LSTM, GRU or RNN operator a layer.

    States are an input and an output a layer: a slice of torch.nn's h_0 and h_n is contiguous and
    can be bound as it is.
    """
    sequence, hidden = [case.steps, case.batch], case.hidden_size
    state_shape = [1, case.batch, hidden]

    def value(name: str, shape: list[int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes, weights = [], []
    inputs = [value("input", [*sequence, case.input_size])]
    outputs = [value("output", [case.steps, 1, case.batch, hidden])]
    source = "input"
    if case.num_layers > 1:
        weights.append(numpy_helper.from_array(np.array([1], dtype=np.int64), "directions"))
    for layer in range(case.num_layers):
        arrays = onnx_weights(case.cell, module, layer)
        weights += [
            numpy_helper.from_array(array, f"{name}_{layer}") for name, array in arrays.items()
        ]
        initial = [f"{state}_0_{layer}" for state in states_of(case)] if case.given_state else []
        final = [f"{state}_n_{layer}" for state in states_of(case)]
        inputs += [value(name, state_shape) for name in initial]
        outputs += [value(name, state_shape) for name in final]
        last = layer == case.num_layers - 1
        produced = "output" if last else f"output_{layer}"
        no_lengths = ""
        nodes.append(
            helper.make_node(
                case.cell,
                [source, *(f"{name}_{layer}" for name in arrays), no_lengths, *initial],
                [produced, *final],
                hidden_size=hidden,
                # torch.nn applies W_hn and b_hn first and the reset gate to their sum.
                **({"linear_before_reset": 1} if case.cell == "GRU" else {}),
            )
        )
        if not last:
            source = f"sequence_{layer + 1}"
            nodes.append(helper.make_node("Squeeze", [produced, "directions"], [source]))
    model = helper.make_model(
        helper.make_graph(nodes, case.label, inputs, outputs, weights),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(model)
    return model.SerializeToString()


class OnnxWorkload(Workload):
    """The inputs of a case, the buffers that hold its results, and how they are bound by name."""

    def __init__(self, case: Case, reference: nn.RNNBase) -> None:
        super().__init__(case, reference)
        layers = (case.num_layers, case.batch, case.hidden_size)
        self.output = torch.empty(case.steps, case.batch, case.hidden_size)
        self.final = tuple(torch.empty(layers) for _ in states_of(case))
        self.bound_inputs: dict[str, Tensor] = {"input": self.input}
        self.bound_outputs: dict[str, Tensor] = {"output": self.output.unsqueeze(1)}
        for layer in range(case.num_layers):
            for position, state in enumerate(states_of(case)):
                row = slice(layer, layer + 1)
                self.bound_outputs[f"{state}_n_{layer}"] = self.final[position][row]
                if case.given_state:
                    initial = self.initial_state[position][row]
                    self.bound_inputs[f"{state}_0_{layer}"] = initial

    def _forward(self) -> tuple[Tensor, ...]:
        self.run()
        return (self.output, *self.final)

    def run(self) -> None:
        raise NotImplementedError


class OnnxRuntime(OnnxWorkload):
    def __init__(self, case: Case, reference: nn.RNNBase) -> None:
        import onnxruntime

        super().__init__(case, reference)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # Its default, and its best time. The threads also spin for some 40 ms after a call: the
        # next side's sample waits for that (health.wait_for_idle_threads).
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        self.session = onnxruntime.InferenceSession(
            build_graph(case, reference), options, providers=["CPUExecutionProvider"]
        )
        self.binding = self.session.io_binding()
        for bind, tensors in (
            (self.binding.bind_input, self.bound_inputs),
            (self.binding.bind_output, self.bound_outputs),
        ):
            for name, tensor in tensors.items():
                bind(name, "cpu", 0, np.float32, list(tensor.shape), tensor.data_ptr())

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)


class OpenVino(OnnxWorkload):
    def __init__(self, case: Case, reference: nn.RNNBase) -> None:
        import openvino

        super().__init__(case, reference)
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(build_graph(case, reference)),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "INFERENCE_PRECISION_HINT": "f32",
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
            },
        )
        self.request = compiled.create_infer_request()
        for tensors in (self.bound_inputs, self.bound_outputs):
            for name, tensor in tensors.items():
                shared = openvino.Tensor(tensor.numpy(), shared_memory=True)
                self.request.set_tensor(name, shared)

    def run(self) -> None:
        self.request.infer(share_outputs=True)
