"""The connected network computed a second way: by hooks on the original, without the package's graph.

On networks in which hooks can reach G, and T or the fused output, as inputs and outputs of modules.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import networks
import pytest
import torch
from subjects import case, subject
from torch import Tensor, nn
from trained import seeded
from zoo import Network, both_chains, channel_chain, in_blocks, one_chain

import dcafy
import dcafy.attention

Settings = dict[str, tuple[Tensor, Tensor, nn.Module]]
"""Block -> α, β and the match layers of the connection that it receives."""
Carry = Callable[[Tensor, Tensor], Tensor]
"""T̃ from a block's G and the output of the module that shows T, or the fused output."""


def gated(context: Tensor, gate: Tensor) -> Tensor:
    """T ⊙ G: T is bounded."""
    return gate.reshape(context.shape) * context


def unbounded(_context: Tensor, transformed: Tensor) -> Tensor:
    """T alone."""
    return transformed


def pooled(_context: Tensor, fused: Tensor) -> Tensor:
    """The extraction, once more, on the fused output: the maps of the branches sum to one."""
    return fused.mean((2, 3))


def context_alone(context: Tensor, _shown: Tensor) -> Tensor:
    """G without T: wrong, and of a size that fits wherever G's does."""
    return context


@dataclass(frozen=True)
class Sites:
    """Where hooks reach a kind of attention block; paths are relative to the block, ``..`` is its parent.

    ``context``  the module that returns G, or receives it as its input (``before``)
    ``shows``    the module that returns T, or the fused output
    """

    context: str
    before: bool
    shows: str
    carry: Carry = gated

    def module(self, model: nn.Module, block: str, path: str) -> nn.Module:
        home = block.rpartition(".")[0] if path == ".." else f"{block}.{path}".rstrip(".")
        return model.get_submodule(home)


@dataclass
class HookedChain:
    """f = α·G + β·match(T̃) along one chain of channel attention, put into the original by hooks."""

    model: nn.Module
    blocks: tuple[str, ...]
    settings: Settings
    sites: Sites
    carried: Tensor | None = None
    raw: Tensor | None = None
    handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> HookedChain:
        for name in self.blocks:
            context = self.sites.module(self.model, name, self.sites.context)
            if self.sites.before:
                self.handles.append(context.register_forward_pre_hook(self.entering(name)))
            else:
                self.handles.append(context.register_forward_hook(self.leaving(name)))
            self.handles.append(self.sites.module(self.model, name, self.sites.shows).register_forward_hook(self.shown))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def connected(self, name: str, context: Tensor) -> Tensor:
        self.raw = context
        if name not in self.settings:
            return context
        alpha, beta, match = self.settings[name]
        assert self.carried is not None
        return alpha * context + beta * match(self.carried.flatten(1)).view_as(context)

    def entering(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
        return lambda _module, inputs: self.connected(name, inputs[0])

    def leaving(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda _module, _inputs, output: self.connected(name, output)

    def shown(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert self.raw is not None
        self.carried = self.sites.carry(self.raw, output)


TORCHVISION_SE = Sites("avgpool", before=False, shows="scale_activation")
SITES = {
    "torchvision:mobilenet_v3_small": TORCHVISION_SE,
    "torchvision:regnet_y_400mf": TORCHVISION_SE,
    "timm:legacy_seresnet18": Sites("fc1", before=True, shows="sigmoid"),
    "timm:seresnet18": Sites("fc1", before=True, shows="gate"),
    "timm:skresnet18": Sites("fc_reduce", before=True, shows="..", carry=pooled),
    "timm:resnest14d": Sites("fc1", before=True, shows="", carry=pooled),
    "se_linear": Sites("excite.0", before=True, shows="excite.3"),
    "global_context_add": Sites("transform.0", before=True, shows="transform.3", carry=unbounded),
}


@dataclass
class Connected:
    """An original and its conversion in float64, with random α and β and match layers as if they had trained."""

    network: Network
    original: nn.Module
    converted: torch.fx.GraphModule
    chain: HookedChain


def as_trained(converted: torch.fx.GraphModule) -> Settings:
    """Random α, β and match layers for every connection, and copies of them."""
    settings = {}
    with seeded(21), torch.no_grad():
        for name, connection in dcafy.connections(converted).items():
            for parameter in connection.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            connection.alpha.copy_(torch.rand(1) + 0.5)
            connection.beta.copy_(torch.rand(1) - 1.0)
            match = copy.deepcopy(connection.match)
            settings[name] = (connection.alpha.detach().clone(), connection.beta.detach().clone(), match)
    return settings


@pytest.fixture(scope="module", params=[case(name) for name in SITES])
def hooked(request: pytest.FixtureRequest) -> Connected:
    name: str = request.param
    network = subject(name).network
    original, converted = (one.double() for one in subject(name).pair())
    chain = HookedChain(original, network.expected(original).channel, as_trained(converted), SITES[name])
    return Connected(network, original, converted, chain)


@pytest.mark.parametrize(("batch", "size"), [(2, None), (3, 96)], ids=["example", "other-size"])
def test_outputs_are_those_of_hooks_on_the_original(hooked: Connected, batch: int, size: int | None) -> None:
    images = hooked.network.images(batch, size, seed=22).double()
    assert set(hooked.chain.settings) == set(hooked.chain.blocks[1:])
    with torch.no_grad():
        plain = hooked.original(images)
        with hooked.chain:
            expected = hooked.chain.model(images)
        assert torch.equal(hooked.original(images), plain), "the hooks are still there"
        output = hooked.converted(images)
    scale = expected.abs().max()
    assert (expected - plain).abs().max() > 1e-4 * scale, "the connections do nothing: nothing is shown"
    assert (output - expected).abs().max() <= 1e-9 * scale


def test_gradients_are_those_of_hooks_on_the_original(hooked: Connected) -> None:
    images = hooked.network.images(2, seed=23).double()
    with hooked.chain:
        hooked.chain.model(images).square().sum().backward()
    hooked.converted(images).square().sum().backward()
    result = dict(hooked.converted.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in hooked.original.parameters() if p.grad is not None)
    for name, parameter in hooked.original.named_parameters():
        torch.testing.assert_close(result[name].grad, parameter.grad, rtol=1e-7, atol=1e-9 * largest, msg=name)


@pytest.mark.parametrize("wrong", [gated, unbounded])
def test_the_oracle_notices_a_wrong_wire(hooked: Connected, wrong: Carry) -> None:
    """What the comparison is worth: with another T̃ the outputs are far from the converted model's."""
    sites = hooked.chain.sites
    if sites.carry is wrong or sites.carry is pooled:
        wrong = context_alone
    images = hooked.network.images(2, seed=24).double()
    chain = HookedChain(
        hooked.original, hooked.chain.blocks, hooked.chain.settings, dataclasses.replace(sites, carry=wrong)
    )
    with torch.no_grad(), chain:
        expected = chain.model(images)
    with torch.no_grad():
        output = hooked.converted(images)
    assert (output - expected).abs().max() > 1e-6 * output.abs().max()


@dataclass
class HookedCBAM:
    """Both chains of a CBAM network: each of two poolings hears the same pooling; each map hears the map before."""

    model: nn.Module
    settings: Settings
    blocks: int = 4
    contexts: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    channel: list[Tensor] = field(default_factory=list)
    spatial: Tensor | None = None
    handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> HookedCBAM:
        for i in range(self.blocks):
            name = f"blocks.{i}.attention"
            block = self.model.get_submodule(name)
            if any(row.endswith("channel") for row in self.settings):
                self.handles += (
                    block.channel.mlp.register_forward_pre_hook(self.pooled(f"{name}.channel")),
                    block.channel.mlp.register_forward_hook(self.transformed),
                )
            rows = (
                block.spatial.conv.register_forward_pre_hook(self.stacked(f"{name}.spatial")),
                block.spatial.norm.register_forward_hook(self.mapped(getattr(block.spatial, "gate", torch.sigmoid))),
            )
            self.handles += rows
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def pooled(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
        def enter(_module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            (context,) = inputs
            index = len(self.contexts)
            self.contexts.append(context)
            if name not in self.settings:
                return context
            alpha, beta, match = self.settings[name]
            return alpha * context + beta * match(self.channel[index].flatten(1)).view_as(context)

        return enter

    def transformed(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.outputs.append(output)
        if len(self.outputs) == 2:
            gate = torch.sigmoid(self.outputs[0] + self.outputs[1])
            self.channel = [gated(context, gate) for context in self.contexts]
            self.contexts, self.outputs = [], []

    def stacked(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
        def enter(_module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            (context,) = inputs
            self.contexts.append(context)
            if name not in self.settings:
                return context
            alpha, beta, match = self.settings[name]
            assert self.spatial is not None
            return alpha * context + beta * match(self.spatial)

        return enter

    def mapped(self, gate: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        def leave(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.spatial = gate(output) * self.contexts.pop()

        return leave


@pytest.mark.xdist_group("cbam")
def test_channel_and_spatial_attention_together() -> None:
    """CBAM in float64: two chains at once, two extraction outputs under one map, maps that shrink on the way."""
    network = subject("cbam").network
    original, converted = (one.double() for one in subject("cbam").pair())
    settings = as_trained(converted)
    assert len(settings) == 6
    images = network.images(3, seed=25).double()
    with torch.no_grad():
        plain = original(images)
        with HookedCBAM(original, settings):
            expected = original(images)
        output = converted(images)
        without_spatial = {name: row for name, row in settings.items() if name.endswith("channel")}
        with HookedCBAM(original, without_spatial):
            assert (original(images) - expected).abs().max() > 1e-5 * expected.abs().max()
    scale = expected.abs().max()
    assert (expected - plain).abs().max() > 1e-4 * scale
    assert (output - expected).abs().max() <= 1e-9 * scale


@pytest.mark.parametrize("width", [2, 4, 8, 12, 15, 16, 17])
@pytest.mark.parametrize("attention", [networks.CBAM, dcafy.attention.CBAM], ids=["by hand", "inserted"])
def test_spatial_attention_in_narrow_units(attention: Callable[[int], nn.Module], width: int) -> None:
    """CBAM's spatial part as eq. 3 has it, however few channels there are: G is maximum and mean, T a gate on them."""
    build = functools.partial(networks.with_attention, attention, (width, width, width))
    network = Network("narrow", build, both_chains((), in_blocks("attention.spatial", 3)), image=32, other=None)
    original = network.trained().double()
    converted = dcafy.convert(original, example_inputs=network.images().double(), dimension="spatial").eval()
    settings = as_trained(converted)
    assert set(settings) == {f"blocks.{i}.attention.spatial" for i in (1, 2)}
    images = network.images(2, seed=26).double()
    with torch.no_grad():
        plain = original(images)
        with HookedCBAM(original, settings, blocks=3):
            expected = original(images)
        output = converted(images)
    scale = expected.abs().max()
    assert (expected - plain).abs().max() > 1e-5 * scale
    assert (output - expected).abs().max() <= 1e-9 * scale


def test_match_layers_are_those_of_the_paper() -> None:
    """fc2: Linear, LayerNorm, ReLU, twice, through max(C // reduction, min_hidden); nothing where sizes agree."""
    network = Network("se", lambda: networks.with_attention(networks.SELinear, (16, 16, 48)), one_chain("SELinear"))
    model = network.trained()

    def layers(**options: Any) -> list[list[tuple[str, tuple[int, ...]]]]:
        converted = dcafy.convert(model, example_inputs=network.images(), **options)
        return [
            [(type(layer).__name__, tuple(next(iter(layer.parameters()), torch.empty(0)).shape)) for layer in match]
            if isinstance(match, nn.Sequential)
            else [(type(match).__name__, (0,))]
            for match in (connection.match for connection in dcafy.connections(converted).values())
        ]

    def steps(*widths: tuple[int, int]) -> list[tuple[str, tuple[int, ...]]]:
        rows = [
            [("Linear", (outputs, inputs)), ("LayerNorm", (outputs,)), ("ReLU", (0,))] for inputs, outputs in widths
        ]
        return [layer for row in rows for layer in row]

    assert layers() == [[("Identity", (0,))], steps((16, 8), (8, 48))]
    assert layers(reduction=4) == [[("Identity", (0,))], steps((16, 12), (12, 48))]
    assert layers(reduction=16, min_hidden=2) == [[("Identity", (0,))], steps((16, 3), (3, 48))]
    assert layers(channel_match="fc1") == [[("Identity", (0,))], steps((16, 48))]


def test_a_connection_starts_as_the_identity() -> None:
    network = Network("se", networks.inline_network, channel_chain())
    converted = dcafy.convert(network.trained(), example_inputs=network.images())
    for connection in dcafy.connections(converted).values():
        assert connection.alpha.shape == (1,)
        assert connection.beta.shape == (1,)
        assert connection.alpha.item() == 1.0
        assert connection.beta.item() == 0.0
        assert float(connection.contribution()) == 0.0
        with torch.no_grad():
            connection.alpha.fill_(-1.0)
            connection.beta.fill_(3.0)
        assert float(connection.contribution()) == pytest.approx(0.75)
