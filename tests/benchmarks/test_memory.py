"""Peak memory."""

from __future__ import annotations

import pytest
import torch
from stand_ins import KB
from torch import nn

import memory
import peers
from rnn_ext._bench import Case


def test_memory_of_a_small_layer_is_measured_in_a_process_of_its_own():
    case = Case("GRU", 4, 6, 64, 64, "training")
    with memory.heap_counter() as counter:
        first, second = (memory.measure(case, peers.BASELINE, counter, threads=1) for _ in "ab")
    gradients = 4 * (2 * 3 * 64 * 64 + 2 * 3 * 64)
    assert first.heap > gradients
    assert first.resident > 0
    assert abs(first.heap - second.heap) < 64 * KB


def test_small_peaks_are_compared_by_heap_and_large_ones_by_both():
    small, large = memory.Peak(100, 50), memory.Peak(100 << 20, 50 << 20)
    assert memory.Peak(90, 1000).ratio(small) == pytest.approx(0.9)
    assert memory.Peak(90 << 20, 55 << 20).ratio(large) == pytest.approx(1.1)
    assert small.beside(30) == 70
    assert memory.Peak(10 << 20, 20 << 20).beside(5 << 20) == 15 << 20


def test_output_bytes():
    case = Case("LSTM", 2, 3, 4, 5, num_layers=2, bidirectional=True)
    module = case.build_module(nn)
    output, (h_n, c_n) = module(torch.zeros(3, 2, 4))
    assert memory.output_bytes(case) == sum(tensor.nbytes for tensor in (output, h_n, c_n))


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_inference_is_not_compared_with_torch_nn(monkeypatch, tmp_path, mode):
    peaks = {peers.OURS: memory.Peak(1000, 10), peers.BASELINE: memory.Peak(2000, 20)}
    monkeypatch.setattr(memory, "measure", lambda case, peer, *_: peaks[peer])
    case = Case("RNN", 2, 3, 4, 5, mode)
    measured = memory.compare_peaks(case, tmp_path, threads=1)
    assert measured.ours == (1000, 10)
    if mode == "training":
        assert (measured.theirs, measured.ratio) == ((2000, 20), 0.5)
    else:
        assert measured.beside_outputs == 1000 - 4 * 2 * 5 * (3 + 1)
        assert measured.theirs is None


def test_unknown_memory_field():
    with pytest.raises(OSError, match="does not report VmNothing"):
        memory.status("VmNothing")
