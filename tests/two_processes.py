"""A training run in two processes, in a module that imports little: each process imports it anew."""

from __future__ import annotations

import torch
import torch.distributed as dist
from networks import CBAM, with_attention
from torch.nn.parallel import DistributedDataParallel
from trained import seeded, trained_like

import dcafy


def images(seed: int, batch: int = 4, size: int = 64) -> torch.Tensor:
    with seeded(seed):
        return torch.randn(batch, 3, size, size)


def connected() -> torch.fx.GraphModule:
    """A small network with both kinds of attention, its connections moved away from the start."""
    with seeded(0):
        model = trained_like(with_attention(CBAM, (16, 16, 24)), images(seed=1))
    converted = dcafy.convert(model, example_inputs=images(seed=2))
    with torch.no_grad():
        for connection in dcafy.connections(converted).values():
            connection.beta.fill_(0.3)
    return converted


def train(rank: int, folder: str) -> None:
    """Three steps of one of the two processes on its own images; leaves its parameters in ``folder``."""
    torch.set_num_threads(1)
    model = connected().train()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    optimizer = torch.optim.Adam(parallel.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        parallel(images(seed=100 + 2 * step + rank)).square().mean().backward()
        assert all(parameter.grad is not None for parameter in parallel.parameters())
        optimizer.step()
    torch.save({name: p.detach() for name, p in parallel.module.named_parameters()}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
