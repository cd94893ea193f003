"""The connected network computed a second way: by hooks on the original, without the package's graph.

Squeeze-excitation networks only: there the pooled context and the gate are modules that hooks can reach.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import networks
import pytest
import torch
from torch import Tensor, nn
from trained import seeded
from zoo import Network, attention_network, channel_chain, one_chain, timm_network, torchvision_network

import dcafy


@dataclass
class HookedChain:
    """f = α·G + β·match(T ⊙ G) along one chain of squeeze-excitations, put into the original by hooks.

    ``context``  submodule of each block that receives G as its input (``before``) or returns it
    ``gate``     submodule of each block that returns T
    """

    model: nn.Module
    blocks: tuple[str, ...]
    settings: dict[str, tuple[Tensor, Tensor, nn.Module]]
    context: str
    before: bool
    gate: str
    carried: Tensor | None = None
    raw: Tensor | None = None
    handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> HookedChain:
        for name in self.blocks:
            block = self.model.get_submodule(name)
            context, gate = block.get_submodule(self.context), block.get_submodule(self.gate)
            if self.before:
                self.handles.append(context.register_forward_pre_hook(self.entering(name)))
            else:
                self.handles.append(context.register_forward_hook(self.leaving(name)))
            self.handles.append(gate.register_forward_hook(self.gated))
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

    def gated(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert self.raw is not None
        self.carried = output.reshape(self.raw.shape) * self.raw


CASES = (
    (torchvision_network("mobilenet_v3_small", "SqueezeExcitation"), "avgpool", False, "scale_activation"),
    (torchvision_network("regnet_y_400mf", "SqueezeExcitation"), "avgpool", False, "scale_activation"),
    (timm_network("legacy_seresnet18", "SEModule"), "fc1", True, "sigmoid"),
    (timm_network("seresnet18", "SEModule"), "fc1", True, "gate"),
    (attention_network("se_linear", networks.SELinear, channel="attention"), "excite.0", True, "excite.3"),
)


@dataclass
class Connected:
    """An original and its conversion in float64, with random α and β and match layers as if they had trained."""

    network: Network
    original: nn.Module
    converted: torch.fx.GraphModule
    chain: HookedChain


@pytest.fixture(scope="module", params=CASES, ids=[case[0].name for case in CASES])
def connected(request: pytest.FixtureRequest) -> Connected:
    network, context, before, gate = request.param
    original = network.trained()
    converted = dcafy.convert(original, example_inputs=network.images()).double().eval()
    original = original.double().eval()
    settings = {}
    with seeded(21), torch.no_grad():
        for name, connection in dcafy.connections(converted).items():
            for parameter in connection.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            connection.alpha.copy_(torch.rand(1) + 0.5)
            connection.beta.copy_(torch.rand(1) - 1.0)
            match = copy.deepcopy(connection.match)
            settings[name] = (connection.alpha.detach().clone(), connection.beta.detach().clone(), match)
    blocks = network.expected(original).channel
    return Connected(network, original, converted, HookedChain(original, blocks, settings, context, before, gate))


@pytest.mark.parametrize(("batch", "size"), [(2, None), (3, 96)], ids=["example", "other-size"])
def test_outputs_are_those_of_hooks_on_the_original(connected: Connected, batch: int, size: int | None) -> None:
    images = connected.network.images(batch, size, seed=22).double()
    assert set(connected.chain.settings) == set(connected.chain.blocks[1:])
    with torch.no_grad():
        plain = connected.original(images)
        with connected.chain:
            expected = connected.chain.model(images)
        assert torch.equal(connected.original(images), plain), "the hooks are still there"
        output = connected.converted(images)
    scale = expected.abs().max()
    assert (expected - plain).abs().max() > 1e-4 * scale, "the connections do nothing: nothing is shown"
    assert (output - expected).abs().max() <= 1e-9 * scale


def test_gradients_are_those_of_hooks_on_the_original(connected: Connected) -> None:
    images = connected.network.images(2, seed=23).double()
    with connected.chain:
        connected.chain.model(images).square().sum().backward()
    connected.converted(images).square().sum().backward()
    result = dict(connected.converted.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in connected.original.parameters() if p.grad is not None)
    for name, parameter in connected.original.named_parameters():
        torch.testing.assert_close(result[name].grad, parameter.grad, rtol=1e-7, atol=1e-9 * largest, msg=name)


def test_the_oracle_notices_a_wrong_wire(connected: Connected) -> None:
    """What the comparison is worth: the plain T instead of T ⊙ G is far from the converted model."""
    images = connected.network.images(2, seed=24).double()
    chain = copy.copy(connected.chain)
    chain.handles = []

    def plain_map(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert chain.raw is not None
        chain.carried = output.reshape(chain.raw.shape)

    chain.gated = plain_map  # type: ignore[method-assign]
    with torch.no_grad(), chain:
        wrong = chain.model(images)
    with torch.no_grad():
        output = connected.converted(images)
    assert (output - wrong).abs().max() > 1e-6 * output.abs().max()


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
