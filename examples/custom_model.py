"""A network of your own: dcafy finds its attention by what it computes, whatever its classes are called.

python examples/custom_model.py
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dcafy


class Gate(nn.Module):
    """Squeeze-and-excitation as somebody may write it: no module for the pooling, and a product by einsum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, channels // 4), nn.Linear(channels // 4, channels)

    def forward(self, x: Tensor) -> Tensor:
        context = x.mean(dim=(2, 3))
        weights = torch.sigmoid(self.up(torch.relu(self.down(context))))
        return torch.einsum("nchw,nc->nchw", x, weights)


class MyNetwork(nn.Module):
    """Three convolutions with a gate behind each."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 32)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), Gate(o))
            for i, o in itertools.pairwise(widths)
        )
        self.classify = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.classify(x.mean(dim=(2, 3)))


def main(arguments: Sequence[str] | None = None) -> nn.Module:
    """The connected network, trained for some steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = MyNetwork().eval()
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)

    print(dcafy.inspect(model, example_inputs=images[:2]))
    connected = dcafy.convert(model, example_inputs=images[:2])
    assert torch.equal(connected(images[:8]), model(images[:8]))  # exactly what it was

    optimizer = torch.optim.AdamW(dcafy.parameter_groups(connected, lr=2e-3, connection_lr=2e-2))
    connected.train()
    for _ in range(options.steps):
        batch = torch.randint(len(labels), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(connected(images[batch]), labels[batch]).backward()
        optimizer.step()
    connected.eval()
    used = dcafy.usage(connected, [(images[:500], labels[:500])])
    print(f"accuracy {used.accuracy:.1%}; with all connections cut {used.accuracy + used.accuracy_change:.1%}")
    return connected


if __name__ == "__main__":
    main()
