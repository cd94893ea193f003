"""Spatial attention in units of few channels: G is what was pooled, however it is written, and no layer's output."""

from __future__ import annotations

from collections.abc import Callable

import einops
import pytest
import torch
import torch.nn.functional as F
from networks import with_attention
from torch import Tensor, nn
from trained import seeded

import dcafy

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

WRITINGS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "max and mean": (lambda x: torch.cat([torch.max(x, 1)[0].unsqueeze(1), x.mean(1).unsqueeze(1)], 1), 2),
    "amax and mean": (lambda x: torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), 1), 2),
    "stack": (lambda x: torch.stack([x.amax(1), x.mean(1)], 1), 2),
    "mean by hand": (lambda x: torch.cat([x.amax(1, True), x.sum(1, True) / x.shape[1]], 1), 2),
    "three statistics": (lambda x: torch.cat([x.amax(1, True), x.mean(1, True), x.std(1, keepdim=True)], 1), 3),
    "mean alone": (lambda x: x.mean(1, keepdim=True), 1),
    "einops": (
        lambda x: torch.cat([einops.reduce(x, "n c h w -> n 1 h w", how) for how in ("max", "mean")], 1),
        2,
    ),
    "channels last": (
        lambda x: torch.cat(
            [x.permute(0, 2, 3, 1).amax(-1, True), x.permute(0, 2, 3, 1).mean(-1, keepdim=True)], -1
        ).permute(0, 3, 1, 2),
        2,
    ),
}


class Spatial(nn.Module):
    """A gate per place, computed by a 7x7 convolution of what was pooled over the channels."""

    def __init__(self, writing: str) -> None:
        super().__init__()
        self.pooled, statistics = WRITINGS[writing]
        self.conv = nn.Conv2d(statistics, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(self.pooled(x)))


@pytest.mark.parametrize("width", [2, 6, 15])
@pytest.mark.parametrize("writing", WRITINGS)
def test_what_is_pooled_over_few_channels_is_the_context(writing: str, width: int) -> None:
    with seeded(1):
        model = with_attention(lambda _: Spatial(writing), (width, width)).eval()
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    expected = ("spatial", WRITINGS[writing][1], (16, 16))
    assert [(block.dimension, block.channels, block.size) for block in plan.blocks] == [expected, expected]
    assert not any("conv" in name for block in plan.blocks for name in block.extraction), plan.blocks[0].extraction
    assert len(plan.links) == 1


class Groups(nn.Module):
    """Spatial group-wise enhance: each place of a group is weighted by how alike it is to the group's mean."""

    def __init__(self, width: int, members: int) -> None:
        super().__init__()
        self.groups = width // members
        self.weight = nn.Parameter(torch.ones(1, self.groups, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.view(n * self.groups, -1, h, w)
        t = (x * F.adaptive_avg_pool2d(x, 1)).sum(1, keepdim=True)
        t = F.group_norm(t.view(n, self.groups, h, w), self.groups) * self.weight
        return (x * torch.sigmoid(t.view(n * self.groups, 1, h, w))).view(n, c, h, w)


class GroupsByEinsum(Groups):
    """The same with the groups as an axis of their own, and the alikeness as one sum of products."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.view(n, self.groups, -1, h, w)
        t = F.group_norm(torch.einsum("ngdhw,ngd->nghw", y, y.mean((3, 4))), self.groups) * self.weight
        return (y * torch.sigmoid(t)[:, :, None]).view(n, c, h, w)


@pytest.mark.parametrize("members", [2, 3, 4])
@pytest.mark.parametrize("attention", [Groups, GroupsByEinsum])
def test_groups_of_few_channels(attention: type[Groups], members: int) -> None:
    with seeded(2):
        model = with_attention(lambda width: attention(width, members), (12, 12)).eval()
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    assert [block.dimension for block in plan.blocks] == ["spatial", "spatial"]
    assert len(plan.links) == 1
