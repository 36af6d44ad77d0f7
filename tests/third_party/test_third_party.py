"""Published models, unmodified, with this package's modules in them: outputs and training agree.

Run by `make test-third-party`; times are printed (-s), never asserted.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rnn_ext

pytestmark = pytest.mark.filterwarnings("ignore")


def print_times(what: str, theirs: Callable[[], object], ours: Callable[[], object]) -> None:
    """Medians of alternating calls."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(7):
        for calls, kept in ((theirs, times[0]), (ours, times[1])):
            start = time.perf_counter()
            calls()
            kept.append(time.perf_counter() - start)
    before, after = (1e3 * statistics.median(t) for t in times)
    print(f"\n{what}: torch.nn {before:.2f} ms, rnn_ext {after:.2f} ms, {before / after:.2f}x")


def rebased(module: nn.Module) -> nn.Module:
    """Put our class in place of torch's among the bases of a class derived from both, as in
    pytorch-forecasting's `class LSTM(RNN, nn.LSTM)`; `convert` leaves derived classes alone."""
    model = copy.deepcopy(module)
    for part in model.modules():
        cls = type(part)
        swaps = {getattr(nn, n): getattr(rnn_ext, n) for n in ("RNN", "LSTM", "GRU")}
        if cls in swaps or not any(base in swaps for base in cls.__bases__):
            continue
        body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        part.__class__ = type(cls.__name__, tuple(swaps.get(b, b) for b in cls.__bases__), body)
    return model


# ----------------------------------------------------------------------------------- resemblyzer


def test_resemblyzer_speaker_encoder() -> None:
    from resemblyzer import VoiceEncoder

    encoder = VoiceEncoder("cpu", verbose=False)  # with the weights that it ships
    fused = rnn_ext.convert(encoder)
    assert type(fused.lstm) is rnn_ext.LSTM
    mels = torch.rand(4, 160, 40)
    with torch.no_grad():
        expected, found = encoder(mels), fused(mels)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        one = mels[:1]
        print_times("resemblyzer, one partial utterance", lambda: encoder(one), lambda: fused(one))
    seconds = np.random.default_rng(0).standard_normal(3 * 16000).astype(np.float32) / 10
    np.testing.assert_allclose(
        fused.embed_utterance(seconds), encoder.embed_utterance(seconds), atol=1e-5
    )


# ------------------------------------------------------------------------------------ silero-vad


class SileroNetwork(nn.Module):
    """The network of the weights that silero-vad ships for 16 kHz (its own code is a TorchScript
    archive, which no swap of classes can reach; the layers are those of its tinygrad model)."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, chunk: Tensor, state: tuple | None) -> tuple[Tensor, tuple]:
        x = nn.functional.pad(chunk, (0, 64), "reflect").unsqueeze(1)
        real, imaginary = self.stft_conv(x).chunk(2, 1)
        x = (real.square() + imaginary.square()).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = torch.relu(conv(x))
        state = self.lstm_cell(x.squeeze(-1), state)
        return torch.sigmoid(self.final_conv(torch.relu(state[0]).unsqueeze(-1))).flatten(1), state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    import json

    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "F32"
        begin, end = entry["data_offsets"]
        values = np.frombuffer(raw[8 + size + begin : 8 + size + end], np.float32)
        tensors[name] = torch.from_numpy(values.copy()).reshape(entry["shape"])
    return tensors


def test_silero_voice_activity() -> None:
    from importlib.metadata import files

    shipped = {f.name: f.locate() for f in files("silero-vad")}
    network = SileroNetwork().eval()
    network.load_state_dict(read_safetensors(Path(shipped["silero_vad_16k.safetensors"])))
    fused = rnn_ext.convert(network)
    assert type(fused.lstm_cell) is rnn_ext.LSTMCell
    audio = torch.randn(1, 40 * 512) / 5
    context = torch.zeros(1, 64)

    def speech(model: nn.Module) -> Tensor:
        state, found = None, []
        padded = torch.cat([context, audio], 1)
        for start in range(0, audio.size(1), 512):
            probability, state = model(padded[:, start : start + 512 + 64], state)
            found.append(probability)
        return torch.cat(found, 1)

    with torch.no_grad():
        expected = speech(network)
        assert expected.min() >= 0
        assert expected.std() > 0
        torch.testing.assert_close(speech(fused), expected, atol=1e-5, rtol=1e-4)
        print_times("silero-vad, 40 chunks", lambda: speech(network), lambda: speech(fused))


# ----------------------------------------------------------------------------------- sb3-contrib


def test_recurrent_ppo() -> None:
    from sb3_contrib import RecurrentPPO

    def agent() -> RecurrentPPO:
        return RecurrentPPO(
            "MlpLstmPolicy", "CartPole-v1", seed=0, n_steps=64, batch_size=32, n_epochs=2,
            device="cpu", policy_kwargs={"lstm_hidden_size": 32},
        )  # fmt: skip

    curves, learners = [], []
    for fused in (False, True):
        learner, losses = agent(), []  # making one seeds everything that it draws from
        if fused:
            rnn_ext.convert(learner.policy, inplace=True)
        for _ in range(3):
            learner.learn(64, reset_num_timesteps=False)
            losses.append(learner.logger.name_to_value["train/loss"])
        curves.append(losses)
        learners.append(learner)
    theirs, ours = learners
    assert type(ours.policy.lstm_actor) is rnn_ext.LSTM
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-3)
    for mine, other in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)
    print_times("RecurrentPPO, 64 steps", lambda: theirs.learn(64), lambda: ours.learn(64))


# --------------------------------------------------------------------------- pytorch-forecasting


def series() -> object:
    import pandas as pd
    from pytorch_forecasting import TimeSeriesDataSet

    rng = np.random.default_rng(0)
    frame = pd.concat(
        pd.DataFrame(
            {
                "time": np.arange(40),
                "value": np.sin(np.arange(40) / 3 + group) + rng.normal(0, 0.1, 40),
                "group": str(group),
            }
        )
        for group in range(4)
    ).reset_index(drop=True)
    return TimeSeriesDataSet(
        frame, time_idx="time", target="value", group_ids=["group"], min_encoder_length=4,
        max_encoder_length=12, max_prediction_length=4, time_varying_unknown_reals=["value"],
        static_categoricals=["group"],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["DeepAR-LSTM", "DeepAR-GRU", "TemporalFusionTransformer"])
def test_pytorch_forecasting(name: str) -> None:
    import pytorch_forecasting

    data = series()
    torch.manual_seed(0)
    if name.startswith("DeepAR"):
        model = pytorch_forecasting.DeepAR.from_dataset(
            data, cell_type=name.split("-")[1], hidden_size=16, rnn_layers=2, dropout=0.0
        )
    else:
        model = pytorch_forecasting.TemporalFusionTransformer.from_dataset(
            data, hidden_size=16, dropout=0.0
        )
    fused = rebased(model)
    names = [type(m).__mro__ for m in fused.modules() if isinstance(m, nn.RNNBase)]
    assert names
    assert all(any(c.__module__ == "rnn_ext.modules" for c in mro) for mro in names)
    batches = list(data.to_dataloader(train=False, batch_size=16))[:4]

    def train(trained: nn.Module) -> list[float]:
        trained.train()
        optimizer = torch.optim.Adam(trained.parameters(), lr=1e-3)
        losses = []
        for x, y in batches:
            loss = trained.loss(trained(x).prediction, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = copy.deepcopy(model), copy.deepcopy(fused)
        np.testing.assert_allclose(train(ours), train(theirs), rtol=1e-3)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-2)
        print_times(f"{name}, 4 training steps", lambda: train(theirs), lambda: train(ours))
