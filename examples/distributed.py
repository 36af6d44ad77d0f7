"""Train on two processes and get what one process gets: DistributedDataParallel and FSDP2.

    torchrun --nproc_per_node=2 examples/distributed.py --strategy ddp
    torchrun --nproc_per_node=2 examples/distributed.py --strategy fsdp
    python examples/distributed.py          # starts both of the above

Every process trains on its share of each batch; the strategies average the gradients. Process 0
trains the same model alone on the whole batches as well, and the weights are compared.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import rnn_ext

STEPS, BATCH, LENGTH, ALPHABET = 5, 8, 12, 17


class Tagger(nn.Module):
    """Names the character that follows each character."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(ALPHABET, 8)
        self.lstm = rnn_ext.LSTM(8, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, ALPHABET)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


def make_model() -> Tagger:
    torch.manual_seed(0)
    return Tagger().double()  # so that the order of a sum does not show


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, ALPHABET, (BATCH, LENGTH + 1), generator=generator)


def train(model: nn.Module, rank: int = 0, processes: int = 1) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(STEPS):
        mine = batch(step)[rank::processes]
        logits = model(mine[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train_together(strategy: str) -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    model = make_model()
    if strategy == "ddp":
        trained: nn.Module = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (processes,))
        fully_shard(model.lstm, mesh=mesh)
        trained = fully_shard(model, mesh=mesh)
    losses = train(trained, rank, processes)
    weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
    if rank == 0:
        alone = make_model()
        train(alone)
        difference = max((weights[n] - p).abs().max().item() for n, p in alone.named_parameters())
        moved = max(
            (p - q).abs().max().item()
            for p, q in zip(alone.parameters(), make_model().parameters(), strict=True)
        )
        print(f"{strategy}: {processes} processes, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
        print(
            f"{strategy}: weights moved by {moved:.1e}, differ from one process by {difference:.1e}"
        )
        if not difference < 1e-9 < moved:
            raise SystemExit(f"{strategy}: FAILED, the weights should be those of one process")
        print(f"ok {strategy}")


def main(strategy: str) -> None:
    dist.init_process_group("gloo")
    train_together(strategy)  # its wrappers are gone when the group goes
    dist.barrier()
    dist.destroy_process_group()


def start_both() -> None:
    for strategy in ("ddp", "fsdp"):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc_per_node=2", __file__, "--strategy", strategy]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", choices=("ddp", "fsdp"))
    arguments = parser.parse_args()
    if arguments.strategy is None:
        start_both()
    else:
        main(arguments.strategy)
