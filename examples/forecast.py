"""Many to one: a year of weekly CO2 measurements in, the value a quarter of a year later out.

The series is the weekly mean of carbon dioxide in the air over Mauna Loa, 1958 to 2001, as the
package statsmodels carries it; 59 weeks without a measurement are interpolated. The LSTM learns
from the weeks before 1990 and is tested on those after. What it has to say is the change against
the last value it saw.

    python examples/forecast.py            under a minute
    python examples/forecast.py --quick    a few seconds

Claims: the error (root mean square, ppm) on the weeks after 1990 is below half of that of either
naive forecast: the last value, and the value of the same week a year before.
"""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

import common
import rnn_ext

WINDOW = 52
AHEAD = 13
SPLIT = 1990.0


def load_series() -> tuple[np.ndarray, np.ndarray]:
    """The dates in years and the CO2 in ppm, one value a week."""
    rows = csv.reader(io.StringIO(common.read_packaged(common.CO2).decode()))
    next(rows)  # date,co2
    years, values = [], []
    for date, value in rows:
        day = datetime.strptime(date, "%Y%m%d").timetuple()
        years.append(day.tm_year + (day.tm_yday - 1) / 365.25)
        values.append(float(value) if value else np.nan)
    series = np.array(values)
    missing = np.isnan(series)
    weeks = np.arange(len(series))
    series[missing] = np.interp(weeks[missing], weeks[~missing], series[~missing])
    return np.array(years), series


@dataclass
class Windows:
    """Windows of the series and what follows them; row n of each belongs together."""

    inputs: Tensor  # (N, 52, 1), against the last value of the window
    changes: Tensor  # (N), from the last value to the value to forecast
    last: Tensor  # (N)
    year_before: Tensor  # (N), the value a year before the one to forecast
    years: Tensor  # (N), when the value to forecast was measured

    def __getitem__(self, rows: Tensor) -> Windows:
        return Windows(**{name: values[rows] for name, values in vars(self).items()})


def make_windows(years: np.ndarray, series: np.ndarray) -> Windows:
    values = torch.from_numpy(series).float()
    stretches = values.unfold(0, WINDOW + AHEAD, 1)
    last = stretches[:, WINDOW - 1]
    return Windows(
        inputs=(stretches[:, :WINDOW] - last[:, None])[..., None],
        changes=stretches[:, -1] - last,
        last=last,
        year_before=stretches[:, -1 - 52],
        years=torch.from_numpy(years[WINDOW + AHEAD - 1 :]),
    )


class Forecaster(nn.Module):
    """Windows (B, T, 1) to changes (B), both in units of `scale`."""

    def __init__(self, hidden: int, scale: float) -> None:
        super().__init__()
        self.lstm = rnn_ext.LSTM(1, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)
        self.scale = scale

    def forward(self, inputs: Tensor) -> Tensor:
        _, (h_n, _) = self.lstm(inputs / self.scale)
        return self.head(h_n[-1])[:, 0] * self.scale


def root_mean_square(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


@dataclass
class Result:
    losses: list[float]
    test: Windows
    forecast: Tensor  # (N)
    errors: dict[str, float]


def train(hidden: int, epochs: int, batch: int, learning_rate: float) -> Result:
    windows = make_windows(*load_series())
    # Nothing that a training window sees or forecasts lies after the split.
    learn, test = windows[windows.years < SPLIT], windows[windows.years >= SPLIT]
    print(f"{len(learn.last):,} windows to learn from, {len(test.last):,} to test")
    scale = learn.changes.std().item()
    model = Forecaster(hidden, scale)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    losses = []
    bar = trange(epochs, unit="epoch")
    for _ in bar:
        total = 0.0
        for rows in torch.randperm(len(learn.last)).split(batch):
            loss = F.mse_loss(model(learn.inputs[rows]), learn.changes[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(rows)
        schedule.step()
        losses.append((total / len(learn.last)) ** 0.5)
        bar.set_postfix_str(f"off by {losses[-1]:.3f} ppm", refresh=False)
    with torch.inference_mode():
        forecast = test.last + model(test.inputs)
    measured = test.last + test.changes
    errors = {
        "LSTM": root_mean_square(forecast - measured),
        "last value": root_mean_square(test.last - measured),
        "a year before": root_mean_square(test.year_before - measured),
    }
    return Result(losses, test, forecast, errors)


def claims(errors: dict[str, float]) -> dict[str, bool]:
    ours = errors["LSTM"]
    return {
        f"LSTM off by {ours:.3f} ppm, below half of {error:.3f} ({name})": ours < error / 2
        for name, error in errors.items()
        if name != "LSTM"
    }


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__file__, __doc__)
    add = parser.add_argument
    add("--epochs", type=int, default=40, help="(default: %(default)s; quick: 10)")
    add("--hidden", type=int, default=32, help="hidden units (default: %(default)s)")
    add("--batch", type=int, default=32, help="windows in a batch (default: %(default)s)")
    add("--learning-rate", type=float, default=5e-3, help="of Adam (default: %(default)s)")
    arguments = common.parse(parser, argv, epochs=10)
    result = train(arguments.hidden, arguments.epochs, arguments.batch, arguments.learning_rate)
    for name, error in result.errors.items():
        print(f"{name:>14}: off by {error:.3f} ppm")
    test = result.test
    with common.picture(arguments.plot, columns=3, width=14, width_ratios=[1, 2.2, 1]) as panels:
        losses, forecast, errors = panels
        losses.semilogy(result.losses)
        losses.set(xlabel="epoch", ylabel="training error, ppm")
        shown = test.years < SPLIT + 4
        measured = test.last + test.changes
        forecast.plot(test.years[shown], measured[shown], "k", linewidth=1, label="measured")
        forecast.plot(
            test.years[shown], test.last[shown], color="tab:gray", linestyle=":", label="last value"
        )
        forecast.plot(
            test.years[shown],
            result.forecast[shown],
            color="tab:blue",
            label="LSTM, 13 weeks ahead",
        )
        forecast.set(xlabel="year", ylabel="CO2, ppm", title="the first four years of the test")
        forecast.legend()
        bars = errors.bar(list(result.errors), list(result.errors.values()))
        errors.bar_label(bars, fmt="%.2f", padding=2)
        errors.margins(y=0.12)
        errors.set(ylabel="test error, ppm")
    return common.report(claims(result.errors))


if __name__ == "__main__":
    sys.exit(main())
