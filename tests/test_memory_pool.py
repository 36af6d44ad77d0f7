"""Blocks kept for the next calls: never shared with what is held, given back on demand."""

import threading

import pytest
import torch

import rnn_ext
from rnn_ext import _C

LIMIT = 256 << 20


@pytest.fixture(autouse=True)
def empty():
    rnn_ext.empty_cache()
    yield
    rnn_ext.empty_cache()


def step(lstm, x):
    output, _ = lstm(x)
    output.sum().backward()
    return output.detach()


def large():
    """Some 5 MB of reserve, 1 MB of output."""
    torch.manual_seed(0)
    return rnn_ext.LSTM(64, 128), torch.randn(64, 32, 64)


def test_blocks_are_kept_and_given_back():
    lstm, x = large()
    for _ in range(2):  # the second one accumulates gradients
        step(lstm, x)
    kept = _C.pool_bytes()
    assert kept > 5 << 20
    for _ in range(3):
        step(lstm, x)
    assert _C.pool_bytes() == kept
    rnn_ext.empty_cache()
    assert _C.pool_bytes() == 0


def test_small_calls_keep_nothing():
    rnn_ext.LSTM(8, 8)(torch.randn(3, 2, 8))
    assert _C.pool_bytes() == 0


def test_what_is_held_is_not_handed_out_again():
    lstm, x = large()
    outputs = [step(lstm, x) for _ in range(4)]
    copies = [y.clone() for y in outputs]
    gradients = [p.grad.clone() for p in lstm.parameters()]
    held = [p.grad for p in lstm.parameters()]
    for p in lstm.parameters():
        p.grad = None
    for _ in range(3):
        step(lstm, torch.randn_like(x))
    assert len({y.data_ptr() for y in outputs}) == 4
    for y, copy in zip(outputs, copies, strict=True):
        assert torch.equal(y, copy)
    for g, copy in zip(held, gradients, strict=True):
        assert torch.equal(g, copy)


def test_a_graph_keeps_its_reserve():
    lstm, x = large()
    x.requires_grad_()
    output, _ = lstm(x)
    (first,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
    for _ in range(3):
        step(lstm, torch.randn_like(x))
    (second,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(first, second)


def test_tensors_take_hardly_more_than_they_need():
    """A short output that somebody keeps must not hold the block of a long one."""
    lstm, x = large()
    for _ in range(2):
        step(lstm, x)
    kept = _C.pool_bytes()
    held = []
    for _ in range(20):
        with torch.inference_mode():
            held.append(lstm(x[:20])[0])  # 320 KB, while blocks of 1 and 5 MB are free
    assert _C.pool_bytes() >= kept - (1 << 20)


def test_varying_lengths_do_not_pile_up():
    lstm, x = large()
    most = 0
    for length in range(64, 8, -3):
        step(lstm, x[:length])
        most = max(most, _C.pool_bytes())
    # The longest step holds less than this at once: reserve, output, its gradient, workspaces.
    assert most < 20 << 20


def test_the_limit_holds():
    lstm = rnn_ext.LSTM(32, 256)
    x = torch.randn(400, 128, 32)  # 262 MB of reserve
    step(lstm, x)
    assert _C.pool_bytes() <= LIMIT


def test_outputs_resize_like_any_other_tensor():
    lstm, x = large()
    with torch.inference_mode():
        output, _ = lstm(x)
        before = output.clone()
        output.resize_(128, 32, 128)
        assert torch.equal(output[:64], before)


def test_from_many_threads():
    lstm, x = large()
    expected = lstm(x)[0].detach()
    wrong = []

    def work():
        for _ in range(10):
            if not torch.equal(lstm(x)[0].detach(), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
