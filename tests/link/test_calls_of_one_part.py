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


class Triple(Pair):
    """Three calls, each a chain of its own."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        one, two, three = self.net(x), self.net(y), self.net(x + y)
        return self.fc((one + two * three).mean((2, 3)))


class Late(Pair):
    """The second call goes on from blocks that stand before the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), SELinear(8), nn.Conv2d(8, 3, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        before = self.front(x)
        return self.fc((self.net(y) - self.net(before)).mean((2, 3)))


class Scaled(nn.Module):
    """Attention whose map is as large as what it weighs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv(F.adaptive_avg_pool2d(x, 4))
        return x * F.interpolate(gate, size=x.shape[-2:]).relu()


class Odd(nn.Module):
    """What is not the same in each call of a part: ``again``, ``skips``, ``grows`` or ``in turn``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        unit = Scaled if kind == "grows" else lambda: SELinear(8)
        self.kind, self.stem = kind, nn.Conv2d(3, 8, 3, padding=1)
        self.units = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 8, 1), unit()) for _ in range(5)])
        self.turns, self.fc = InTurn(), nn.Linear(8, 3)

    def run(self, x: Tensor, fewer: bool = False) -> Tensor:
        for unit in self.units[1:] if fewer else self.units:
            x = unit(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "in turn":
            x = self.turns(x) - self.turns(x.flip(3))
        elif self.kind == "again":
            x = self.run(self.run(self.stem(x)))
        elif self.kind == "skips":
            x = self.run(self.stem(x)) - self.run(self.stem(x.flip(3)), fewer=True)
        else:
            x = self.stem(x)
            x = self.run(x) + F.interpolate(self.run(F.avg_pool2d(x, 2)), size=x.shape[-2:])
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class InTurn(nn.Module):
    """One unit, over and over."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 1), SELinear(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.unit(x)
        return x


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
    """As plans do that were written before there was sharing."""
    model = network()
    plan = unshared(dcafy.inspect(model, example_inputs=(X, Y)))
    connected = dcafy.convert(model, example_inputs=(X, Y), plan=plan)
    assert list(dcafy.connections(connected)) == ["net.two", "net.three", "net.two#2", "net.three#2", "last"]
    assert not shares(connected.dca.recipe.plan)


def test_units_in_turn_have_a_connection_for_each_call() -> None:
    plan = dcafy.inspect(network(InTurn), example_inputs=X)
    assert len(plan.links) == 2
    assert not shares(plan)


def test_what_is_left_out_or_changed_in_one_call() -> None:
    model = network()
    plan = dcafy.inspect(model, example_inputs=(X, Y))
    both = plan.without("net.two", "net.two#2")
    assert shares(both) == {"net.three#2": "net.three"}
    assert list(dcafy.connections(dcafy.convert(model, example_inputs=(X, Y), plan=both))) == ["net.three", "last"]
    first = plan.without("net.three")  # whose connection there is none of
    assert "net.three#2" in dcafy.connections(dcafy.convert(model, example_inputs=(X, Y), plan=first))
    changed = plan.replace_link("net.two#2", "net.three#2", message="centred")
    other = dcafy.convert(model, example_inputs=(X, Y), plan=changed)
    assert shares(other.dca.recipe.plan) == {"net.two#2": "net.two"}


def test_whose_connection_it_is_follows_the_order_of_the_data() -> None:
    """Whatever a plan calls it, and in whatever order its chains stand."""
    model = network(Triple)
    plan = dcafy.inspect(model, example_inputs=(X, Y))
    assert shares(plan) == {f"net.{name}#{i}": f"net.{name}" for i in (2, 3) for name in ("two", "three")}
    turned = dataclasses.replace(plan, chains=plan.chains[::-1])
    renamed = plan.with_links(
        lambda link: dataclasses.replace(link, shares="nowhere" if "two" in link.target else None)
    )
    without = plan.without("net.three")
    for given, wanted in (
        (turned, shares(plan)),
        (renamed, {"net.two#2": "net.two", "net.two#3": "net.two"}),
        (without, {"net.two#2": "net.two", "net.two#3": "net.two", "net.three#3": "net.three#2"}),
    ):
        connected = moved(dcafy.convert(model, example_inputs=(X, Y), plan=given).eval())
        assert shares(connected.dca.recipe.plan) == wanted
        names = [name for name in dcafy.connections(connected) if name.startswith("net.three")]
        fewer = dcafy.drop(connected, names)
        with torch.no_grad():
            for name in names:
                dcafy.connections(connected)[name].beta.zero_()
            assert torch.equal(fewer(X, Y), connected(X, Y))


def test_a_part_whose_later_call_is_what_data_meets_first_in_a_chain() -> None:
    model = network(Late)
    connected = moved(dcafy.convert(model, example_inputs=(X, Y)).eval())
    assert [name for name in dcafy.connections(connected) if "three" in name] == ["net.three"]
    fewer = dcafy.drop(connected, "net.two")
    with torch.no_grad():
        dcafy.connections(connected)["net.two"].beta.zero_()
        assert torch.equal(fewer(X, Y), connected(X, Y))


@pytest.mark.parametrize("topology", ["chain", "dense", "tree", "own", "depth", "hub"])
@pytest.mark.parametrize("kind", ["again", "skips", "grows", "in turn"])
def test_whatever_is_made_in_calls_of_one_part(kind: str, topology: str) -> None:
    """Some of it is not alike: it is connected, exact at the start, and dropped for good."""
    model = network(functools.partial(Odd, kind))
    message = {"message": "centred"} if topology == "own" else {}
    connected = dcafy.convert(model, example_inputs=X, topology=topology, **message).eval()
    with torch.no_grad():
        assert torch.equal(connected(X), model(X))
        moved(connected)
        name = list(dcafy.connections(connected))[-1].partition("<-")[0]
        of_it = [one for one in dcafy.connections(connected) if one.partition("<-")[0] == name]
        fewer = dcafy.drop(connected, of_it)
        for one in of_it:
            dcafy.connections(connected)[one].beta.zero_()
        assert torch.allclose(fewer(X), connected(X), atol=1e-6)
        if kind == "in turn" and topology != "hub":
            symmetric = X + X.flip(3)
            assert torch.equal(fewer(symmetric), fewer.fc(torch.zeros(len(X), 8)))
    assert len(appraise(model, example_inputs=X).costs) >= 4


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
