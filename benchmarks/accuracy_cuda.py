"""Training steps of small networks on a GPU, side by side: each is a graph of CUDA's, launched as one.

A step of such a network is some five hundred kernels of a few microseconds each, which Python launches more slowly than
a GPU runs them. Recorded once, they are launched together, and those of several networks at the same time.
"""

from __future__ import annotations

import torch
from accuracy import Trained, stepped
from torch import Tensor, nn

torch.backends.cudnn.allow_tf32 = False  # float32 is float32, as on a CPU

Stream = torch.cuda.Stream


class Recorded:
    """A step of one network, recorded; weights, statistics and momentum are as they were before."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        self.stream, self.graph = Stream(), torch.cuda.CUDAGraph()
        self.x, self.y = x.clone(), y.clone()
        self.rates = [group["lr"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = torch.tensor(rate, device=x.device)
        self.groups = optimizer.param_groups
        before = {name: value.clone() for name, value in network.state_dict().items()}
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):  # libraries choose their kernels and take their memory
                stepped(network, optimizer, self.x, self.y)
        torch.cuda.current_stream().wait_stream(self.stream)
        optimizer.zero_grad()
        with torch.cuda.graph(self.graph, stream=self.stream):
            stepped(network, optimizer, self.x, self.y)
        network.load_state_dict(before)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()

    def launch(self, x: Tensor, y: Tensor, part: float) -> None:
        with torch.cuda.stream(self.stream):
            self.x.copy_(x)
            self.y.copy_(y)
            for group, rate in zip(self.groups, self.rates, strict=True):
                group["lr"].fill_(part * rate)
            self.graph.replay()


class SideBySide:
    """A step of all networks at once."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.recorded: list[Recorded] = []

    def __call__(self, x: Tensor, y: Tensor, part: float) -> None:
        self.recorded = self.recorded or [Recorded(network, optimizer, x, y) for network, optimizer in self.trained]
        here = torch.cuda.current_stream()
        for recorded in self.recorded:
            recorded.stream.wait_stream(here)
        for recorded in self.recorded:
            recorded.launch(x, y, part)
        for recorded in self.recorded:
            here.wait_stream(recorded.stream)
