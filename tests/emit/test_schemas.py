"""Schemas, matches, dimensions and topologies: against equations 2 to 4 written a second time, and by the rules.

Nothing of the package computes the expected values here.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CBAM, SCSE, Classifier, SELinear, with_attention
from torch import Tensor, nn
from trained import images, seeded, trained

import dcafy
from dcafy import Connection
from dcafy.conversion import appraise
from dcafy.emit.connection import JoinedConnection
from dcafy.emit.matching import channel_match, spatial_match
from dcafy.errors import PlanError, UsageError

EXACT = ("direct", "weighted")
SCHEMAS = (*EXACT, "softmax")


# The equations, a second time --------------------------------------------------------------------------


def equation(schema: str, a: Tensor, b: Tensor) -> Tensor:
    """Eq. 3, eq. 4, and the softmax form, of a = αG and b = βT̃."""
    if schema == "direct":
        return a + b
    if schema == "weighted":
        return (a**2 + b**2) / (a + b)
    weights = torch.stack(torch.broadcast_tensors(a, b)).softmax(0)  # a map of one channel goes to all of G's
    return weights[0] * a + weights[1] * b


def fc(layers: list[nn.Module], x: Tensor) -> Tensor:
    """Linear, LayerNorm, ReLU, written out."""
    linear, norm, _ = layers
    x = x @ linear.weight.T + linear.bias
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred**2).mean(-1, keepdim=True) + norm.eps
    return (centred / spread.sqrt() * norm.weight + norm.bias).clamp(min=0)


def matched(match: nn.Module, x: Tensor) -> Tensor:
    """The channel match of paper 3.3."""
    layers = list(match) if isinstance(match, nn.Sequential) else []
    for i in range(0, len(layers), 3):
        x = fc(layers[i : i + 3], x)
    return x


def randomise(module: nn.Module, seed: int) -> None:
    with seeded(seed), torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@settings(max_examples=25, deadline=None)
@given(
    schema=st.sampled_from(SCHEMAS),
    kind=st.sampled_from(["fc1", "fc2"]),
    widths=st.tuples(st.integers(2, 24), st.integers(2, 24)),
    batch=st.integers(1, 4),
    layouts=st.tuples(*[st.sampled_from(["nc", "nc11", "n1c"])] * 2),
    bounded=st.booleans(),
    factors=st.tuples(st.floats(0.25, 2), st.floats(0.25, 2)),
    seed=st.integers(0, 1000),
)
def test_channel_connection(
    schema: str,
    kind: str,
    widths: tuple[int, int],
    batch: int,
    layouts: tuple[str, str],
    bounded: bool,
    factors: tuple[float, float],
    seed: int,
) -> None:
    """f(αG, β·match(T̃)) for every layout of vectors; all positive, and thus away from the weighted schema's pole."""
    here, there = widths
    match = channel_match(kind, there, here, reduction=2, min_hidden=2)
    connection = Connection("channel", match, schema=schema, bounded=bounded).double()
    randomise(connection.match, seed)
    with seeded(seed):
        g, t, g_prev = (torch.rand(batch, n, dtype=torch.float64) + 0.5 for n in (here, there, there))
    with torch.no_grad():
        connection.alpha.fill_(factors[0])
        connection.beta.fill_(factors[1])
        shape = {"nc": lambda x: x, "nc11": lambda x: x[..., None, None], "n1c": lambda x: x[:, None]}
        actual = connection(shape[layouts[0]](g), shape[layouts[1]](t), shape[layouts[1]](g_prev))
        carried = matched(connection.match, t * g_prev if bounded else t)
        close(actual, shape[layouts[0]](equation(schema, factors[0] * g, factors[1] * carried)))


@settings(max_examples=25, deadline=None)
@given(
    schema=st.sampled_from(SCHEMAS),
    ratio=st.integers(1, 4),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    channels=st.sampled_from([(1, 1), (2, 2), (1, 2), (2, 1), (2, 3)]),
    kind=st.sampled_from(["avg", "max"]),
    factors=st.tuples(st.floats(0.25, 2), st.floats(0.25, 2)),
)
def test_spatial_connection(
    schema: str, ratio: int, size: tuple[int, int], channels: tuple[int, int], kind: str, factors: tuple[float, float]
) -> None:
    """Maps that are a whole number of times larger; where the channels differ, their mean is broadcast."""
    theirs, ours = channels
    larger = (size[0] * ratio, size[1] * ratio)
    averages = theirs not in (1, ours)
    connection = Connection("spatial", spatial_match(kind, larger, size), schema=schema, averages=averages).double()
    with seeded(1):
        g = torch.rand(2, ours, *size, dtype=torch.float64) + 0.5
        t, g_prev = (torch.rand(2, theirs, *larger, dtype=torch.float64) + 0.5 for _ in range(2))
    with torch.no_grad():
        connection.alpha.fill_(factors[0])
        connection.beta.fill_(factors[1])
        carried = t * g_prev
        if averages:
            carried = carried.mean(1, keepdim=True)
        windows = carried.unflatten(3, (-1, ratio)).unflatten(2, (-1, ratio))
        carried = windows.mean((3, 5)) if kind == "avg" else windows.amax((3, 5))
        close(connection(g, t, g_prev), equation(schema, factors[0] * g, factors[1] * carried))


@pytest.mark.parametrize("kind", ["avg", "max", "conv"])
@pytest.mark.parametrize(("size", "target"), [((8, 8), (4, 4)), ((7, 9), (4, 5)), ((9, 9), (4, 4)), ((4, 4), (8, 8))])
def test_every_size_is_matched(kind: str, size: tuple[int, int], target: tuple[int, int]) -> None:
    connection = Connection("spatial", spatial_match(kind, size, target, channels=2))
    with torch.no_grad():
        connection.beta.fill_(1.0)
    for extra in (0, 3):  # also at another image size than the one it was made for
        g = torch.rand(2, 2, *(n + extra for n in target))
        t = torch.rand(2, 2, *(n + 2 * extra for n in size))
        output = connection(g, t, t)
        assert output.shape == g.shape
        assert not torch.equal(output, g)
    assert (sum(p.numel() for p in connection.match.parameters()) > 0) == (kind == "conv" and size in ((8, 8), (7, 9)))


# The pole, and the start -------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schema", EXACT)
def test_exactly_g_at_the_start(schema: str, dtype: torch.dtype) -> None:
    connection = Connection("channel", schema=schema, dtype=dtype)
    with seeded(0):
        g = (torch.randn(16, 64) * torch.logspace(-6, 4, 64)).to(dtype)
        g[0] = 0
        t = torch.randn(16, 64).to(dtype)
    assert torch.equal(connection(g, t, t), g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weighted_is_finite_at_its_pole(dtype: torch.dtype) -> None:
    """Where αG = -βT̃, and where both are 0: finite values and gradients."""
    values = torch.tensor([0.0, 1e-6, 1e-3, 0.5, 1.0, 30.0, 3e3, 3e4], dtype=torch.float64)
    near = [values, -values, values * (1 + 1e-3), values * (1 - 1e-7)]
    for b in near:
        g = values.to(dtype)[None].clone().requires_grad_()
        t = -b.to(dtype)[None].clone()
        t.requires_grad_()
        connection = Connection("channel", schema="weighted", bounded=False, dtype=dtype)
        with torch.no_grad():
            connection.beta.fill_(1.0)
        output = connection(g, t)
        assert output.dtype == dtype
        assert output.isfinite().all(), output
        if dtype in (torch.float64, torch.float32):
            output.sum().backward()
            for tensor in (g, t, connection.alpha, connection.beta):
                assert tensor.grad is not None
                assert tensor.grad.isfinite().all()


def test_weighted_is_the_formula_away_from_the_pole_only() -> None:
    a, b = torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([[-1.0 + 1e-6]], dtype=torch.float64)
    connection = Connection("channel", schema="weighted", bounded=False).double()
    with torch.no_grad():
        connection.beta.fill_(1.0)
    assert float(connection(a, b).detach()) < 1100 < float(equation("weighted", a, b))


def test_softmax_is_no_identity() -> None:
    connection = Connection("channel", schema="softmax").double()
    g = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    expected = g * g.exp() / (g.exp() + 1)  # the other term is 0
    close(connection(g, g, g).detach(), expected)


# Several earlier blocks --------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", SCHEMAS)
def test_joined(schema: str) -> None:
    """The matched T̃ are summed, each with its own β, into the one second term; α is one."""
    widths = (6, 6, 4)
    matches = [channel_match("fc1", width, 8) for width in (6, 4)]
    parts = [Connection("channel", matches[i], schema=schema) for i in (0, 0, 1)]
    joined = JoinedConnection(parts).double()
    randomise(joined, 2)
    with seeded(3), torch.no_grad():
        g = torch.rand(2, 8, dtype=torch.float64) + 0.5
        passed = [torch.rand(2, w, dtype=torch.float64) for w in widths for _ in range(2)]
        total = torch.zeros_like(g)
        for i, part in enumerate(parts):
            total += part.beta * matched(part.match, passed[2 * i] * passed[2 * i + 1])
        close(joined(g, *passed), equation(schema, parts[0].alpha * g, total))
    assert len({id(part.alpha) for part in parts}) == 1
    assert len({id(part.beta) for part in parts}) == 3
    assert len([name for name, _ in joined.named_parameters()]) == 1 + 3 + 2 * 4


# Networks ----------------------------------------------------------------------------------------------

WIDTHS = (16, 16, 24, 32)


def network(attention: Callable[[int], nn.Module]) -> Classifier:
    return trained(lambda: with_attention(attention, WIDTHS), images(8, 48))


def quietly(model: nn.Module, **options: Any) -> torch.fx.GraphModule:
    # With weights of its own for each run, a + b would come near 0 in one of thirty, where dcafy bounds the quotient.
    with warnings.catch_warnings(), seeded(1):
        warnings.filterwarnings("ignore", message="The schema 'softmax' is not the identity")
        return dcafy.convert(model, example_inputs=images(size=48), **options)


def restated(model: Classifier, connections: dict[str, Any], sources: dict[int, list[int]], x: Tensor) -> Tensor:
    """The connected squeeze-excitation network, written out: ``sources``: block -> the blocks that it hears."""
    carried: dict[int, Tensor] = {}
    x = model.stem(x)
    for i, block in enumerate(model.blocks):
        y = block.conv2(F.relu(block.conv1(x)))
        g = connected = y.mean((2, 3))
        name = f"blocks.{i}.attention"
        total = torch.zeros_like(g)
        for j in sources.get(i, []):
            one = connections[name if name in connections else f"{name}<-blocks.{j}.attention"]
            total = total + one.beta * matched(one.match, carried[j])
            connected = equation(one.schema, one.alpha * g, total)
        first, _, last, _ = block.attention.excite
        z = F.relu(F.linear(connected, first.weight, first.bias))
        t = torch.sigmoid(F.linear(z, last.weight, last.bias))
        carried[i] = t * g
        x = F.relu(y * t[:, :, None, None] + block.shortcut(x))
    return model.head(model.pool(x).flatten(1))


CHAIN = {i: [i - 1] for i in range(1, len(WIDTHS))}
DENSE = {i: list(range(i)) for i in range(1, len(WIDTHS))}


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize(("topology", "sources"), [("chain", CHAIN), ("dense", DENSE)])
def test_whole_network(schema: str, topology: str, sources: dict[int, list[int]]) -> None:
    model = network(SELinear)
    converted = quietly(model, schema=schema, topology=topology).double().eval()
    model = model.double().eval()
    connections = dcafy.connections(converted)
    assert len(connections) == sum(map(len, sources.values()))
    for i, connection in enumerate(connections.values()):
        randomise(connection.match, i)
        with torch.no_grad():
            connection.alpha.fill_(0.8)
            connection.beta.fill_(0.3 + 0.1 * i)
    x = images(3, 56, seed=4).double()
    with torch.no_grad():
        expected = restated(model, connections, sources, x)
        close(converted(x), expected)
        assert (expected - model(x)).abs().max() > 1e-4 * expected.abs().max()


SUITE = [
    *itertools.product(["channel", "spatial", "all"], ["chain", "dense"], EXACT, ["fc2"], ["avg"]),
    *itertools.product(["all"], ["chain", "dense"], ["direct"], ["fc1"], ["max", "conv"]),
]


@pytest.mark.parametrize(
    ("dimension", "topology", "schema", "channel", "spatial"), SUITE, ids=["-".join(row) for row in SUITE]
)
@pytest.mark.parametrize("attention", [CBAM, SCSE], ids=["cbam", "scse"])
def test_rules(
    attention: Callable[[int], nn.Module], dimension: str, topology: str, schema: str, channel: str, spatial: str
) -> None:
    """Identity, liveness, keys, survival and the way back, for every combination."""
    model = network(attention)
    converted = quietly(
        model, dimension=dimension, topology=topology, schema=schema, channel_match=channel, spatial_match=spatial
    )
    for x in (images(size=48), images(3, 40, seed=2)):
        with torch.no_grad():
            assert torch.equal(model(x), converted(x))
    blocks = len(WIDTHS)
    per_dimension = blocks - 1 if topology == "chain" else math.comb(blocks, 2)
    connections = dcafy.connections(converted)
    assert len(connections) == per_dimension * (2 if dimension == "all" else 1)
    assert all(c.dimension == dimension for c in connections.values()) or dimension == "all"
    output = converted(images(size=48)).detach()
    for name, connection in connections.items():
        with torch.no_grad():
            connection.beta.fill_(0.5)
            moved = converted(images(size=48))
            assert moved.isfinite().all()
            assert not torch.equal(moved, output), f"the beta of {name} does nothing"
            connection.beta.zero_()
    source = model.state_dict()
    assert list(source) == [key for key in converted.state_dict() if "dca" not in key.split(".")]
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(twin(images(size=48)), output)
    assert torch.equal(dcafy.revert(converted)(images(size=48)), output)
    assert_learns(converted)


def assert_learns(converted: nn.Module) -> None:
    own = {name: p for name, p in converted.named_parameters() if "dca" in name.split(".")}
    assert {id(p) for p in own.values()} == {
        id(p) for connection in dcafy.connections(converted).values() for p in connection.parameters()
    }
    optimizer = torch.optim.Adam(own.values(), lr=0.05)
    converted.train()
    with seeded(5):
        target = torch.randn(4, 10)
    for _ in range(2):
        optimizer.zero_grad()
        with seeded(6):
            (converted(images(4, 48)) - target).square().mean().backward()
        assert [name for name, p in own.items() if p.grad is None] == []
        optimizer.step()
    assert [name for name, p in own.items() if not p.grad.any()] == []  # type: ignore[union-attr]
    assert [name for name, p in own.items() if not p.any()] == []


@pytest.mark.parametrize("dimension", ["channel", "spatial"])
def test_what_is_left_out_by_dimension_is_listed(dimension: str) -> None:
    plan = dcafy.convert(network(CBAM), example_inputs=images(size=48), dimension=dimension).dca.recipe.plan
    assert {plan.block(link.target).dimension for link in plan.links} == {dimension}
    skipped = [item for item in plan.skipped if "was asked for" in item.reason]
    assert len(skipped) == len(WIDTHS) - 1
    assert all(plan.block(item.name).dimension != dimension for item in skipped)


def test_softmax_tells_its_drift() -> None:
    model = network(SELinear)
    with pytest.warns(UserWarning, match="'softmax' is not the identity") as caught:
        converted = dcafy.convert(model, example_inputs=images(size=48), schema="softmax")
    with torch.no_grad():
        drift = float((model(images(size=48)) - converted(images(size=48))).abs().max())
    assert drift > 0
    assert f"by up to {drift:.3g} on the example" in str(caught[0].message)


def test_one_link_with_a_schema_of_its_own() -> None:
    model = network(SELinear)
    plan = dcafy.inspect(model, example_inputs=images(size=48))
    second, third = plan.links[1:3]
    plan = plan.replace_link(second.source, second.target, schema="weighted", channel_match="fc1")
    converted = dcafy.convert(model, example_inputs=images(size=48), plan=plan)
    connections = dcafy.connections(converted)
    assert [connections[link.target].schema for link in (second, third)] == ["weighted", "direct"]
    assert [len(connections[link.target].match) for link in (second, third)] == [3, 6]
    plan = plan.replace_link(third.source, third.target, schema="softmax")
    with pytest.warns(UserWarning, match="'softmax' is not the identity"):
        dcafy.convert(model, example_inputs=images(size=48), plan=plan)


def test_links_into_one_block_share_a_schema() -> None:
    model = network(SELinear)
    plan = dcafy.convert(model, example_inputs=images(size=48), topology="dense").dca.recipe.plan
    link = plan.links[-1]
    with pytest.raises(PlanError, match="need the same one"):
        dcafy.convert(
            model, example_inputs=images(size=48), plan=plan.replace_link(link.source, link.target, schema="weighted")
        )
    again = dcafy.convert(model, example_inputs=images(size=48), plan=plan)
    assert list(dcafy.connections(again)) == list(
        dcafy.connections(dcafy.convert(model, example_inputs=images(size=48), plan=plan))
    )
    shorter = plan.without("blocks.1.attention")
    assert [(link.source[7], link.target[7]) for link in shorter.links] == [("0", "2"), ("0", "3"), ("2", "3")]


def test_dense_shares_one_matcher_per_earlier_width() -> None:
    converted = dcafy.convert(network(SELinear), example_inputs=images(size=48), topology="dense")
    connections = dcafy.connections(converted)
    last = [connections[f"blocks.3.attention<-blocks.{i}.attention"] for i in range(3)]
    assert last[0].match is last[1].match
    assert last[0].match is not last[2].match
    assert isinstance(connections["blocks.1.attention"].match, nn.Identity)
    assert len({id(connection.alpha) for connection in last}) == 1


def test_costs_are_those_of_the_conversion() -> None:
    model = network(CBAM)
    costs = {cost.topology: cost for cost in appraise(model, example_inputs=images(size=48)).costs}
    base = sum(p.numel() for p in model.parameters())
    for topology, cost in costs.items():
        converted = dcafy.convert(model, example_inputs=images(size=48), topology=topology)
        assert cost.connections == len(dcafy.connections(converted))
        assert cost.parameters == sum(p.numel() for p in converted.parameters()) - base
    assert costs["dense"].parameters > costs["chain"].parameters
    plan = appraise(model, example_inputs=images(size=48))
    assert dcafy.Plan.from_dict(plan.to_dict()) == plan
    assert f"{costs['dense'].parameters:,}" in str(plan)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("schema", "mean"),
        ("spatial_match", "none"),
        ("channel_match", "fc3"),
        ("dimension", "both"),
        ("topology", "ring"),
    ],
)
def test_unknown_options(option: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{option}='{value}'"):
        dcafy.convert(network(SELinear), example_inputs=images(size=48), **{option: value})
