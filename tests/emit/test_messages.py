"""What of a message is heard, from whom, and the published form of f: written out a second time in float64.

Nothing of the package computes the expected values here.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CBAM, SELinear, with_attention
from restated import Chain, again
from torch import Tensor, nn
from trained import images, seeded, trained

import dcafy
from dcafy.emit.dca import connected_hosts
from dcafy.errors import PlanError

pytestmark = [
    pytest.mark.filterwarnings("ignore:The schema 'normalised' is not the identity"),
    pytest.mark.filterwarnings("ignore:The TorchScript type system"),
]

WIDTHS = (8, 8, 12, 8, 8, 12, 12, 8)
X = images(5, 12, seed=4)

Sources = Mapping[int, Sequence[int]]

CHAIN: Sources = {n: [n - 1] for n in range(1, 8)}
DENSE: Sources = {n: range(n) for n in range(1, 8)}
OWN: Sources = {n: [n] for n in range(8)}
TREE: Sources = {1: [0], 2: [1], 3: [1, 2], 4: [3], 5: [3, 4], 6: [5], 7: [3, 5, 6]}
"""From 0; from 1 the 8th hears 4, 6 and 7."""

SOURCES = {"chain": CHAIN, "dense": DENSE, "tree": TREE, "own": OWN}


def network() -> Chain:
    return trained(lambda: Chain(*WIDTHS), images(8, 12))


def connected(**options: Any) -> Any:
    """The connected network in float64, with α, β and layers as if they had trained, and statistics of some batches."""
    with warnings.catch_warnings(), seeded(1):
        warnings.filterwarnings("ignore", message="The schema 'normalised' is not the identity")
        d: Any = dcafy.convert(network(), example_inputs=X, **options)
    d = d.double()
    with seeded(2), torch.no_grad():
        for host in (module.dca for _, module, _ in connected_hosts(d)):
            for parameter in host.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        for _ in range(3):
            d.train()(images(6, 12, seed=5).double())
    return d.eval()


def normed(x: Tensor, axis: int, eps: float) -> Tensor:
    centred = x - x.mean(axis, keepdim=True)
    return centred / ((centred**2).mean(axis, keepdim=True) + eps).sqrt()


def match(layers: Sequence[nn.Module], x: Tensor, *, last: bool) -> Tensor:
    """Linear, LayerNorm and ReLU, twice; without the ``last`` ReLU in front of the centring."""
    if not layers:
        return x
    (one, first, _, two, second), rest = layers[:5], layers[5:]
    assert len(rest) == last
    x = (normed(x @ one.weight.T + one.bias, 1, 1e-5) * first.weight + first.bias).clamp(min=0)
    x = normed(x @ two.weight.T + two.bias, 1, 1e-5) * second.weight + second.bias
    return x.clamp(min=0) if last else x


def written_out(d: Any, sources: Sources, x: Tensor, *, centred: bool = False, normalised: bool = False) -> Tensor:
    connections = dcafy.connections(d)
    told: dict[int, Tensor] = {}
    x = d.stem(x)
    for n, block in enumerate(d.blocks):
        y = block.conv(x)
        G = f = y.mean((2, 3))
        name, total = f"blocks.{n}.se", torch.zeros_like(G)
        for m in sources.get(n, ()):
            one = connections[name if name in connections else f"{name}<-blocks.{m}.se"]
            layers = list(one.match) if isinstance(one.match, nn.Sequential) else []
            message = match(layers, G if m == n else told[m], last=not centred)
            if centred and d.training:
                message = normed(message, 0, 1e-5)
            elif centred:
                message = (message - one.centre.running_mean) / (one.centre.running_var + 1e-5).sqrt()
            total = total + one.beta * message
            f = one.alpha * G + total
            if normalised:
                first = connections[name if name in connections else f"{name}<-blocks.{sources[n][0]}.se"]
                f = (normed(f, 1, 1e-5) * first.norm[0].weight + first.norm[0].bias).clamp(min=0)
        T = block.se.transform(f)
        told[n] = T * G
        x = torch.relu(block.shortcut(x) + y * T[:, :, None, None])
    return d.head(x.mean((2, 3)))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("topology", "options"),
    [
        ("chain", {"message": "centred"}),
        ("dense", {"message": "centred"}),
        ("chain", {"schema": "normalised"}),
        ("dense", {"schema": "normalised"}),
        ("tree", {}),
        ("tree", {"message": "centred", "schema": "normalised"}),
        ("own", {}),
    ],
    ids=str,
)
def test_written_out(topology: str, options: dict[str, Any], training: bool) -> None:
    d = connected(topology=topology, **options)
    sources, x = SOURCES[topology], X.double()
    assert len(dcafy.connections(d)) == sum(map(len, sources.values()))
    d.train(training)
    centred = options.get("message") == "centred" or topology == "own"
    with torch.no_grad():
        expected = written_out(d, sources, x, centred=centred, normalised="schema" in options)
        close(d(x), expected)
        for connection in dcafy.connections(d).values():
            connection.beta.zero_()
        assert (d(x) - expected).abs().max() > 1e-4 * expected.abs().max()


def test_eleven_links_for_eight_blocks() -> None:
    plan = dcafy.convert(network(), example_inputs=X, topology="tree").dca.recipe.plan
    heard = [(int(link.target.split(".")[1]), int(link.source.split(".")[1])) for link in plan.links]
    assert heard == [(n, m) for n, sources in TREE.items() for m in sources]
    assert len(heard) == 11


def test_blocks_of_a_tree_are_counted_without_those_that_were_left_out() -> None:
    model = network()
    plan = dcafy.inspect(model, example_inputs=X).without("blocks.1.se")
    links = dcafy.convert(model, example_inputs=X, plan=plan, topology="tree").dca.recipe.plan.links
    assert [link.source for link in links if link.target == "blocks.4.se"] == ["blocks.2.se", "blocks.3.se"]  # the 4th


# Exact at the start, and without a batch ----------------------------------------------------------------

EXACT = {
    "centred": {"message": "centred"},
    "centred, dense": {"message": "centred", "topology": "dense"},
    "tree": {"topology": "tree"},
    "own": {"topology": "own"},
}


@pytest.mark.parametrize("attention", [SELinear, CBAM])
@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_exact_at_the_start(attention: Callable[[int], nn.Module], options: dict[str, Any]) -> None:
    """Fresh from the conversion, and when the statistics are there; also on one image, and in half precision."""
    model = trained(lambda: with_attention(attention, (8, 8, 12)), images(8, 32))
    d = dcafy.convert(model, example_inputs=images(2, 32), **options).eval()
    with torch.no_grad():
        for x in (images(3, 40), images(1, 32)):
            assert torch.equal(d(x), model(x))
        d.train()(images(4, 32))
        centres = [c.centre for c in dcafy.connections(d).values() if c.centre is not None]
        assert all(float(centre.running_mean.abs().max()) > 0 for centre in centres)
        assert bool(centres) == ("tree" not in str(options))
        d.eval()
        d.load_state_dict({**d.state_dict(), **model.state_dict()})
        assert torch.equal(d(images(3, 40)), model(images(3, 40)))
        half, original = copy.deepcopy(d).bfloat16(), copy.deepcopy(model).bfloat16()
        assert torch.equal(half(images(2, 32).bfloat16()), original(images(2, 32).bfloat16()))


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_one_image_is_heard_alone_as_among_others(options: dict[str, Any]) -> None:
    """In eval as itself; in training by the statistics there are, which it leaves as they are."""
    d = connected(**options)
    with torch.no_grad():
        close(d(X[:1].double()), d(X.double())[:1])
        expected = d(X[:1].double())
        before = {key: value.clone() for key, value in d.named_buffers()}
        close(d.train()(X[:1].double()), expected)
    assert all(torch.equal(value, before[key]) for key, value in d.named_buffers())


@pytest.mark.slow
@pytest.mark.parametrize("attention", [SELinear, CBAM])
@pytest.mark.parametrize(
    "options", [*EXACT.values(), {"schema": "normalised"}, {"message": "centred", "schema": "normalised"}], ids=str
)
def test_survives(attention: Callable[[int], nn.Module], options: dict[str, Any], tmp_path: Path) -> None:
    model = trained(lambda: with_attention(attention, (8, 8, 12)), images(8, 32))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The schema 'normalised' is not the identity")
        d = dcafy.convert(model, example_inputs=images(2, 32), **options)
        with torch.no_grad():
            for connection in dcafy.connections(d).values():
                connection.beta.fill_(0.4)
            d.train()(images(4, 32))
        x, d = images(3, 32, seed=7), d.eval()
        expected = d(x).detach()
        dcafy.save(d, tmp_path / "model")
        dcafy.save(d, tmp_path / "light", base=False)
        loaded = [dcafy.load(tmp_path / "model", model), dcafy.load(tmp_path / "light", dcafy.revert(d))]
    flat = dcafy.flat(d)
    for twin in (copy.deepcopy(d), pickle.loads(pickle.dumps(d)), flat, *loaded):
        assert torch.allclose(twin.eval()(x), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.jit.script(flat)(x), flat(x))
    d.train()(x).square().mean().backward()
    missing = [k for k, p in d.named_parameters() if "dca" in k.split(".") and (p.grad is None or not p.grad.any())]
    assert missing == []


@pytest.mark.parametrize("attention", [SELinear, CBAM])
@pytest.mark.parametrize("options", [{"message": "centred"}, {"topology": "own"}, {"schema": "normalised"}], ids=str)
@pytest.mark.slow
def test_exported_and_compiled(attention: Callable[[int], nn.Module], options: dict[str, Any]) -> None:
    model = trained(lambda: with_attention(attention, (8, 8, 12)), images(8, 32))
    d = dcafy.convert(model, example_inputs=images(2, 32), verify=False, **options).eval()
    with torch.no_grad():
        for connection in dcafy.connections(d).values():
            connection.beta.fill_(0.4)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(d, (images(2, 32),), dynamic_shapes=({0: batch},)).module()
        for count in (1, 3):
            assert torch.allclose(program(images(count, 32)), d(images(count, 32)), atol=1e-5)
        compiled = torch.compile(d, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(images(3, 32)), d(images(3, 32)), atol=1e-5)


def test_a_checkpoint_runs_a_block_that_hears_itself_again() -> None:
    """Its own G is that of the run, with its gradient, not what was kept."""
    d = connected(topology="own").train()
    for connection in dcafy.connections(d).values():
        connection.centre.momentum = 0.0
    gradients = []
    for route in (None, again):
        d.zero_grad()
        x = d.stem(X.double())
        for block in d.blocks:
            x = block(x) if route is None else route(block, x)
        d.head(x.mean((2, 3))).square().sum().backward()
        gradients.append({key: parameter.grad.clone() for key, parameter in d.named_parameters()})
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])
    d.zero_grad()
    written_out(d, OWN, X.double(), centred=True).square().sum().backward()
    for key, parameter in d.named_parameters():
        close(gradients[0][key], parameter.grad)


# Whom it is asked of ------------------------------------------------------------------------------------


def test_a_block_alone_may_hear_itself() -> None:
    model = trained(lambda: with_attention(SELinear, (8,)), images(8, 32))
    d = dcafy.convert(model, example_inputs=images(2, 32), topology="own").eval()
    assert list(dcafy.connections(d)) == ["blocks.0.attention"]
    with torch.no_grad():
        dcafy.connections(d)["blocks.0.attention"].beta.fill_(1.0)
        assert not torch.equal(d(images(2, 32)), model(images(2, 32)))


@pytest.mark.parametrize("dimension", ["channel", "spatial"])
def test_only_blocks_of_the_dimension_hear_themselves(dimension: str) -> None:
    model = with_attention(CBAM, (8, 8, 12))
    d = dcafy.convert(model, example_inputs=images(2, 32), topology="own", dimension=dimension)
    assert {link.target.rpartition(".")[2] for link in d.dca.recipe.plan.links} == {dimension}
    assert len(d.dca.recipe.plan.links) == 3


def test_a_plan_by_hand_may_have_a_block_hear_itself_and_others() -> None:
    model = network()
    plan = dcafy.inspect(model, example_inputs=X)
    links = (dcafy.Link("blocks.3.se", "blocks.3.se"), *plan.links)
    plan = dataclasses.replace(plan, chains=(dataclasses.replace(plan.chains[0], links=links),))
    assert dcafy.Plan.from_dict(plan.to_dict()) == plan
    d = dcafy.convert(model, example_inputs=X, plan=plan)
    assert "blocks.3.se<-blocks.3.se" in dcafy.connections(d)
    assert len(plan.without("blocks.3.se").links) == 6
    with torch.no_grad():
        dcafy.connections(d)["blocks.3.se<-blocks.3.se"].beta.fill_(1.0)
        assert not torch.equal(d.eval()(X), model(X))
    with pytest.raises(PlanError, match="G once more"):
        dcafy.convert(model, example_inputs=X, plan=plan.replace_link("blocks.3.se", "blocks.3.se", message="plain"))


def test_links_of_one_block_may_differ_in_their_message() -> None:
    model = network()
    plan = dcafy.convert(model, example_inputs=X, topology="dense").dca.recipe.plan
    plan = plan.replace_link("blocks.2.se", "blocks.5.se", message="centred")
    connections = dcafy.connections(dcafy.convert(model, example_inputs=X, plan=plan))
    assert [name for name, one in connections.items() if one.centre is not None] == ["blocks.5.se<-blocks.2.se"]


def test_normalised_says_how_far_it_is_from_the_identity() -> None:
    with pytest.warns(UserWarning, match=r"'normalised' is not the identity .* by up to \d"):
        dcafy.convert(network(), example_inputs=X, schema="normalised")


def batch_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase))


def test_statistics_of_messages_go_on_where_the_base_is_frozen() -> None:
    """And those of the base do not: what is centred in training is centred in eval."""
    model = trained(lambda: with_attention(SELinear, (8, 8, 12)), images(8, 32))
    d = dcafy.freeze_base(dcafy.convert(model, example_inputs=images(2, 32), message="centred"))
    before = {key: value.clone() for key, value in d.named_buffers()}
    d.train()(images(4, 32))
    moved = {key for key, value in d.named_buffers() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if "dca" in key.split(".")}
    assert {path for path, norm in batch_norms(d) if norm.training} == {
        path for path, _ in batch_norms(d) if "dca" in path.split(".")
    }


def test_each_extraction_output_is_centred_by_its_own_statistics() -> None:
    """The mean and the maximum of a channel differ: what is centred by both would be off in eval."""
    model = trained(lambda: with_attention(CBAM, (8, 8)), images(8, 32))
    d = dcafy.convert(model, example_inputs=images(2, 32), message="centred", dimension="channel")
    mean, largest = (dcafy.connections(d)[f"blocks.1.attention.channel[{i}]"] for i in (0, 1))
    with torch.no_grad():
        for _ in range(3):
            d.train()(images(6, 32))
    assert (mean.centre.running_mean - largest.centre.running_mean).abs().max() > 1e-2
