"""What is made in every call of one part (Siamese networks, heads of several maps) has one connection for all calls."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CBAM, SELinear
from torch import Tensor, nn
from torch.nn import functional as F
from trained import moved, seeded

import dcafy
from dcafy.conversion import appraise
from dcafy.errors import PlanError

X, Y = (torch.randn(4, 3, 20, 20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


class Backbone(nn.Module):
    def __init__(self, attention: Callable[[int], nn.Module] = SELinear) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two, self.three = (attention(8) for _ in range(3))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.conv(self.two(self.conv(self.one(self.stem(x))))))


class Pair(nn.Module):
    """Two images through one backbone, and a block behind both."""

    def __init__(self, attention: Callable[[int], nn.Module] = SELinear) -> None:
        super().__init__()
        self.net, self.last, self.fc = Backbone(attention), attention(8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(self.last(self.net(x) - self.net(y)).mean((2, 3)))


class Pyramid(Pair):
    """A head that is called on maps of two sizes, three times, by one part that is called twice."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        maps = [self.net(x), self.net(y[..., ::2, ::2]), self.net(x[..., :12, :12])]
        return sum(self.fc(one.mean((2, 3))) for one in maps)  # type: ignore[return-value]


class InTurn(nn.Module):
    """One unit, over and over."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)
        self.unit = nn.Sequential(nn.Conv2d(8, 8, 1), SELinear(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.unit(x)
        return self.fc(x.mean((2, 3)))


def network(kind: Callable[[], nn.Module] = Pair) -> nn.Module:
    with seeded(0):
        return kind().eval()


def shares(plan: dcafy.Plan) -> dict[str, str]:
    return {link.target: link.shares for link in plan.links if link.shares}


def sides(model: Any, x: Tensor = X) -> list[Tensor]:
    """What the backbone gives in each of its calls on a pair of one image."""
    seen: list[Tensor] = []
    hook = model.net.register_forward_hook(lambda *call: seen.append(call[2]))
    model(x, x)
    hook.remove()
    return seen


WAYS: dict[str, dict[str, Any]] = {
    "chain": {},
    "dense": {"topology": "dense"},
    "tree": {"topology": "tree"},
    "depth": {"topology": "depth"},
    "hub": {"topology": "hub"},
    "own": {"topology": "own", "message": "centred"},
    "centred": {"message": "centred"},
    "normalised": {"schema": "normalised"},
}


@pytest.mark.filterwarnings("ignore:The schema 'normalised' is not the identity")
@pytest.mark.parametrize("way", WAYS)
def test_both_sides_stay_alike_whatever_is_learned(way: str, tmp_path: Path) -> None:
    model = network()
    connected = dcafy.convert(model, example_inputs=(X, Y), **WAYS[way]).eval()
    inside = [key for key in connected.state_dict() if key.startswith("net.") and "dca" in key.split(".")]
    assert inside
    moved(connected)
    with torch.no_grad():
        one, other = sides(connected)
        assert torch.equal(one, other)
        assert torch.equal(connected.net(X), one), "the part by itself is what it is in the whole"
        assert not torch.equal(one, model.net(X))
        expected = connected(X, Y)
        dcafy.save(connected, tmp_path)
        for again in (dcafy.load(tmp_path, Pair()), copy.deepcopy(connected), dcafy.flat(connected)):
            assert torch.equal(again.eval()(X, Y), expected)
    connected.train()(X, Y).sum().backward()
    assert all(p.grad is not None for c in dcafy.connections(connected).values() for p in c.parameters())


def test_it_is_in_the_plan_and_is_one_connection() -> None:
    model = network()
    plan = dcafy.inspect(model, example_inputs=(X, Y))
    assert shares(plan) == {"net.two#2": "net.two", "net.three#2": "net.three"}
    assert re.search(r"^6  net\.three#2 .* net\.two#2 +net\.three *$", str(plan), re.MULTILINE)
    assert dcafy.Plan.from_dict(plan.to_dict()) == plan
    connected = dcafy.convert(model, example_inputs=(X, Y), plan=plan)
    assert list(dcafy.connections(connected)) == ["net.two", "net.three", "last"]
    added = sum(p.numel() for p in connected.parameters()) - sum(p.numel() for p in model.parameters())
    (chain,) = [one for one in appraise(model, example_inputs=(X, Y)).costs if one.topology == "chain"]
    assert chain.parameters == added == 6


def unshared(plan: dcafy.Plan) -> dcafy.Plan:
    return plan.with_links(lambda link: dataclasses.replace(link, shares=None))


def test_a_plan_may_say_otherwise() -> None:
    """As plans do that were written before there was sharing, whatever is then asked for."""
    model = network()
    plan = unshared(dcafy.inspect(model, example_inputs=(X, Y)))
    for topology in ("chain", "dense"):
        connected = dcafy.convert(model, example_inputs=(X, Y), plan=plan, topology=topology)
        assert {name.partition("<-")[0] for name in dcafy.connections(connected)} >= {"net.three", "net.three#2"}
        assert not shares(connected.dca.recipe.plan)


def test_units_in_turn_have_a_connection_for_each_call() -> None:
    plan = dcafy.inspect(network(InTurn), example_inputs=X)
    assert len(plan.links) == 2
    assert not shares(plan)


def test_what_is_left_out_of_one_call_is_told_where_the_connection_does_not_fit() -> None:
    model = network()
    plan = dcafy.inspect(model, example_inputs=(X, Y))
    both = plan.without("net.two", "net.two#2")
    assert shares(both) == {"net.three#2": "net.three"}
    assert list(dcafy.connections(dcafy.convert(model, example_inputs=(X, Y), plan=both))) == ["net.three", "last"]
    first = plan.without("net.three")  # whose connection there is none of
    assert "net.three#2" in dcafy.connections(dcafy.convert(model, example_inputs=(X, Y), plan=first))
    other = plan.replace_link("net.two#2", "net.three#2", schema="softmax")
    with pytest.raises(PlanError, match=r"net\.three#2 cannot share the connection of net\.three.*shares=None"):
        dcafy.convert(model, example_inputs=(X, Y), plan=other)


@pytest.mark.parametrize(("attention", "alike"), [(SELinear, True), (CBAM, False)])
def test_maps_of_other_sizes(attention: Callable[[int], nn.Module], alike: bool) -> None:
    """Channels are as many in a map of any size; what spatial attention hears is of one size."""
    model = network(functools.partial(Pyramid, attention))
    plan = dcafy.inspect(model, example_inputs=(X, Y))
    of_channels = {link.target for link in plan.links if plan.block(link.target).dimension == "channel"}
    assert len(of_channels) == 6
    assert shares(plan).keys() == {name for name in of_channels if "#" in name and name in shares(plan)}
    assert len([name for name in shares(plan) if name in of_channels]) == 4
    assert all(plan.block(name).dimension == "channel" for name in shares(plan))
    connected = dcafy.convert(model, example_inputs=(X, Y)).eval()
    assert torch.equal(connected(X, Y), model(X, Y))
    spatial = [name for name in dcafy.connections(connected) if plan.block(name).dimension == "spatial"]
    assert bool(spatial) is not alike


@pytest.mark.parametrize("way", ["chain", "own", "depth", "normalised"])
@pytest.mark.filterwarnings("ignore:The schema 'normalised' is not the identity")
def test_dropped_for_all_calls(way: str) -> None:
    connected = moved(dcafy.convert(network(), example_inputs=(X, Y), **WAYS[way]).eval())
    name = next(name for name in dcafy.connections(connected) if name.startswith("net.two"))
    fewer = dcafy.drop(connected, name)
    assert name not in dcafy.connections(fewer)
    with torch.no_grad():
        dcafy.connections(connected)[name].beta.zero_()
        assert torch.equal(fewer(X, Y), connected(X, Y))
        assert torch.equal(*sides(fewer))


class OneImage(Pair):
    """An image and its mirror image."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x.flip(3) + 0.5 * x)


def test_usage_changes_what_is_heard_in_every_call() -> None:
    connected = moved(dcafy.convert(network(OneImage), example_inputs=X).eval())
    with torch.no_grad():
        connected.fc.weight.mul_(1000)
    labels = torch.tensor([0, 1, 2, 0])
    found = dcafy.usage(connected, [(X, labels)])
    row = next(row for row in found.connections if row.name == "net.three")
    with torch.no_grad():
        before = F.cross_entropy(connected(X), labels)
        dcafy.connections(connected)["net.three"].beta.zero_()
        after = F.cross_entropy(connected(X), labels)
    assert row.cut.loss == pytest.approx((after - before).item(), abs=1e-6)
    assert row.cut.loss != 0
