"""What is extracted once more from a block's fused output has the axes of X, in the order of X."""

from __future__ import annotations

import pytest
import torch
from stages import IMAGES, Stages, same_and_alive
from torch import Tensor, nn
from trained import seeded, trained_like

import dcafy


class DynamicReLU(nn.Module):
    """Dynamic ReLU (DY-ReLU-B) as it is written: fused with samples and channels last, the larger of two pieces."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, 4 * width), nn.Sigmoid())
        self.register_buffer("scales", torch.tensor([1.0, 1.0, 0.5, 0.5]))
        self.register_buffer("start", torch.tensor([1.0, 0.0, 0.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        pieces = (2 * self.layers(x.mean((2, 3))) - 1).view(n, c, 4) * self.scales + self.start
        y = x.permute(2, 3, 0, 1).unsqueeze(-1) * pieces[:, :, :2] + pieces[:, :, 2:]
        return y.max(-1)[0].permute(2, 3, 0, 1)


class PiecesApart(nn.Module):
    """The same with a fusion for each piece."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.fc(x.mean((2, 3))).tanh().chunk(2, 1)
        y = x.permute(2, 3, 0, 1)
        return torch.maximum(y * one, y * two).permute(2, 3, 0, 1)


class GroupsBeside(nn.Module):
    """The groups stand in the batch where they are pooled, and beside it where they are fused: no G is in that."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width // 4, width // 4)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        t = self.fc(x.reshape(4 * n, -1, h, w).mean((2, 3))).view(n, 4, -1, 1, 1).sigmoid()
        return (x.view(n, 4, -1, h, w) * t).flatten(1, 2)


class MapsOfGroups(GroupsBeside):
    """The same with a map for each group."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        t = self.conv(x.reshape(4 * n, -1, h, w).mean(1, keepdim=True)).view(n, 4, 1, h, w).sigmoid()
        return (x.view(n, 4, -1, h, w) * t).flatten(1, 2)


def made(attention: type[nn.Module]) -> nn.Module:
    with seeded(4):
        return trained_like(Stages(attention, (16, 16, 32), (1, 1, 2)), IMAGES).eval()


@pytest.mark.parametrize("attention", [DynamicReLU, PiecesApart])
def test_it_is_that_of_each_sample(attention: type[nn.Module]) -> None:
    model = made(attention)
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    assert len(dcafy.connections(connected)) == 2
    same_and_alive(model, connected)
    for connection in dcafy.connections(connected).values():
        nn.init.constant_(connection.beta, 0.5)
    with seeded(5), torch.no_grad():
        images = torch.rand(32, 3, 64, 64)  # as many as there are rows in a map
        others = torch.cat([images[:1], torch.rand(31, 3, 64, 64)])
        assert torch.allclose(connected(images)[0], connected(others)[0], atol=1e-5)


@pytest.mark.parametrize("attention", [GroupsBeside, MapsOfGroups])
def test_nothing_else_is_passed_on(attention: type[nn.Module]) -> None:
    plan = dcafy.inspect(made(attention), example_inputs=IMAGES)
    assert len(plan.blocks) == 3
    assert plan.links == ()
    assert [item.name for item in plan.skipped if "other axes" in item.reason] == ["attention.1", "attention.2"]
