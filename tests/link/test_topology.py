"""Plans of the user's own: what they link is linked, or refused with the reason; never left out in silence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from networks import SELinear, with_attention
from torch import Tensor, nn
from trained import seeded, trained_like

import dcafy
from dcafy.errors import PlanError

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(8, 3, 32, 32, generator=GENERATOR) + 2 * torch.randn(8, 3, 1, 1, generator=GENERATOR)


class Sides(nn.Module):
    """A stem, and two branches that do not reach one another before they are added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right, self.last = (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), SELinear(8)) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.last(self.left(x) + self.right(x)).mean((2, 3)))


def seeded_sides() -> nn.Module:
    with seeded(0):
        return Sides()


def model() -> nn.Module:
    return trained_like(seeded_sides(), IMAGES)


def with_link(plan: dcafy.Plan, source: str, target: str) -> dcafy.Plan:
    """The plan with one more link, in one chain with all others."""
    names = tuple(block.name for block in plan.blocks)
    links = (dcafy.Link(source, target), *plan.links)
    return dataclasses.replace(plan, chains=(dcafy.Chain(plan.blocks[0].dimension, names, links),))


def made(connected: Any) -> list[tuple[str, str]]:
    return [(link.source, link.target) for link in connected.dca.recipe.plan.links]


@pytest.mark.parametrize("topology", ["chain", "dense"])
def test_a_planned_link_between_branches_is_made(topology: str, tmp_path: Path) -> None:
    original = model()
    plan = dcafy.inspect(original, example_inputs=IMAGES)
    assert [link.target for link in plan.links] == ["last.1"]
    connected = dcafy.convert(
        original, example_inputs=IMAGES, plan=with_link(plan, "left.1", "right.1"), topology=topology
    ).eval()
    assert ("left.1", "right.1") in made(connected)
    with torch.no_grad():
        assert torch.equal(connected(IMAGES), original(IMAGES))
        for connection in dcafy.connections(connected).values():
            connection.beta.fill_(0.5)
        assert not torch.equal(connected(IMAGES), original(IMAGES))
    dcafy.save(connected, tmp_path / "model")
    loaded = dcafy.load(tmp_path / "model", model()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), connected(IMAGES))


def test_a_planned_link_across_dimensions_is_refused() -> None:
    network = trained_like(with_attention(networks.CBAM, (8, 8)), IMAGES)
    plan = dcafy.inspect(network, example_inputs=IMAGES)
    channel, spatial = (next(b.name for b in plan.blocks if b.dimension == d) for d in ("channel", "spatial"))
    with pytest.raises(PlanError, match=f"{spatial} cannot hear {channel}|varies over"):
        dcafy.convert(network, example_inputs=IMAGES, plan=with_link(plan, channel, spatial))


def test_links_of_a_dense_plan_stand_in_the_order_of_the_data() -> None:
    network = trained_like(with_attention(SELinear, (8, 8, 8)), IMAGES)
    dense = dcafy.convert(network, example_inputs=IMAGES, topology="dense").dca.recipe.plan
    turned = dataclasses.replace(
        dense, chains=tuple(dataclasses.replace(chain, links=chain.links[::-1]) for chain in dense.chains)
    )
    again = dcafy.convert(network, example_inputs=IMAGES, plan=turned, topology="dense")
    assert again.dca.recipe.plan.links == dense.links
    followed = dcafy.convert(network, example_inputs=IMAGES, plan=turned)
    assert followed.dca.recipe.plan.links == turned.links
