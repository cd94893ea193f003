"""The attentions as modules: an exact no-op at the start, the paper's formula otherwise, found by dataflow alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import with_attention
from torch import Tensor, nn
from trained import seeded

import dcafy
from dcafy.attention import ATTENTIONS, BAM, CBAM, ECA, GC, SE, SGE, SK, GEPlain, GETheta
from dcafy.errors import UsageError

WIDTHS = (16, 16, 32, 48)
CHANNELS, SIDE = 32, 12


def image(seed: int = 0, channels: int = CHANNELS) -> Tensor:
    with seeded(seed):
        return torch.randn(2, channels, SIDE, SIDE, dtype=torch.float64)


def randomised(module: nn.Module) -> nn.Module:
    """The module in float64 and eval mode, with no parameter left at a special value."""
    module = module.double().eval()
    with seeded(3), torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return module


# Formulas, each written a second time straight from its paper -----------------------------------------


def se(m: SE, x: Tensor) -> Tensor:
    g = x.mean((2, 3))
    z = F.relu(g @ m.reduce.weight.flatten(1).T + m.reduce.bias)
    return x * torch.sigmoid(z @ m.expand.weight.flatten(1).T + m.expand.bias)[..., None, None]


def ge(m: GEPlain, x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x.mean((2, 3), keepdim=True)))


def cbam(m: CBAM, x: Tensor) -> Tensor:
    c = m.channel

    def mlp(v: Tensor) -> Tensor:
        return (
            F.linear(F.relu(F.linear(v, c.reduce.weight.flatten(1), c.reduce.bias)), c.expand.weight.flatten(1))
            + c.expand.bias
        )

    x = x * torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))[..., None, None]
    stacked = torch.stack((x.amax(1), x.mean(1)), 1)
    z = F.conv2d(stacked, m.spatial.conv.weight, padding=3)
    n = m.spatial.norm
    z = (z - n.running_mean) / (n.running_var + n.eps).sqrt() * n.weight + n.bias
    return x * torch.sigmoid(z)


def gc(m: GC, x: Tensor) -> Tensor:
    flat = x.flatten(2)
    scores = torch.einsum("oc,ncp->np", m.weigh.weight.flatten(1), flat) + m.weigh.bias
    g = torch.einsum("ncp,np->nc", flat, scores.softmax(1))
    b = m.bottleneck
    z = F.linear(g, b.reduce.weight.flatten(1), b.reduce.bias)
    z = F.layer_norm(z, z.shape[1:], b.norm.weight.flatten(), b.norm.bias.flatten())
    return x + F.linear(F.relu(z), b.expand.weight.flatten(1), b.expand.bias)[..., None, None]


def eca(m: ECA, x: Tensor) -> Tensor:
    g = x.mean((2, 3))
    kernel = m.conv.weight.flatten()
    padded = F.pad(g, (kernel.numel() // 2,) * 2)
    z = torch.stack([(padded[:, i : i + kernel.numel()] * kernel).sum(1) for i in range(g.shape[1])], 1)
    return x * torch.sigmoid(z)[..., None, None]


def sge(m: SGE, x: Tensor) -> Tensor:
    parts = []
    for i, group in enumerate(x.chunk(m.groups, 1)):
        similarity = (group * group.mean((2, 3), keepdim=True)).sum(1, keepdim=True)
        mean, spread = similarity.mean((2, 3), keepdim=True), similarity.var((2, 3), keepdim=True, unbiased=False)
        z = (similarity - mean) / (spread + m.norm.eps).sqrt() * m.norm.weight[i] + m.norm.bias[i]
        parts.append(group * torch.sigmoid(z))
    return torch.cat(parts, 1)


FORMULAS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "se": (lambda: SE(CHANNELS, 4, init="paper"), se),
    "ge": (GEPlain, ge),
    "cbam": (lambda: CBAM(CHANNELS, 4, init="paper"), cbam),
    "gc": (lambda: GC(CHANNELS, 4, init="paper"), gc),
    "eca": (lambda: ECA(CHANNELS, init="paper"), eca),
    "sge": (lambda: SGE(CHANNELS, init="paper"), sge),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name: str) -> None:
    build, formula = FORMULAS[name]
    module = randomised(build())
    torch.testing.assert_close(module(image()), formula(module, image()), rtol=1e-9, atol=1e-12)


def test_bam_formula() -> None:
    module = BAM(CHANNELS, 4, init="paper")
    module = randomised(module)
    channel = module.channel(image().mean((2, 3), keepdim=True))
    spatial = module.norm(module.squeeze(image()))
    torch.testing.assert_close(module(image()), image() * (1 + torch.sigmoid(channel + spatial)), rtol=1e-9, atol=0)


def test_selective_kernels_weigh_two_branches() -> None:
    second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=2, dilation=2, bias=False)
    module = randomised(SK(CHANNELS, second, 4))
    x, first = image(1), image(2)
    u = second(x)
    g = (first + u).mean((2, 3))
    n = module.norm
    z = F.linear(g, module.reduce.weight.flatten(1))
    z = F.relu((z - n.running_mean) / (n.running_var + n.eps).sqrt() * n.weight + n.bias)
    a, b = F.linear(z, module.expand.weight.flatten(1)).chunk(2, 1)
    share = torch.sigmoid(a - b)[..., None, None]
    torch.testing.assert_close(module(x, first), share * first + (1 - share) * u, rtol=1e-9, atol=1e-12)


def test_gather_theta_is_a_gate_on_strided_depthwise_convolutions() -> None:
    module = randomised(GETheta(CHANNELS, 2, init="paper"))
    convolutions = [layer for layer in module.gather if isinstance(layer, nn.Conv2d)]
    assert [(c.groups, c.stride) for c in convolutions] == [(CHANNELS, (2, 2))] * 2
    gathered = module.gather(image()).mean((2, 3), keepdim=True)
    torch.testing.assert_close(module(image()), image() * torch.sigmoid(gathered), rtol=1e-9, atol=1e-12)


# The start ---------------------------------------------------------------------------------------------

STARTING = [name for name, attention in ATTENTIONS.items() if attention.build and not attention.obstacle]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STARTING)
def test_identity_is_exact(name: str, dtype: torch.dtype, mode: str) -> None:
    module = ATTENTIONS[name].build(CHANNELS, 8, "identity", SIDE).to(dtype).train(mode == "train")
    x = image(4).to(dtype)
    assert torch.equal(module(x), x)


@pytest.mark.parametrize("name", STARTING)
def test_the_papers_form_is_no_identity(name: str) -> None:
    with seeded(0):
        module = ATTENTIONS[name].build(CHANNELS, 8, "paper", SIDE).double().eval()
    assert not torch.allclose(module(image()), image())


@pytest.mark.parametrize("name", STARTING)
def test_every_parameter_learns(name: str) -> None:
    """Behind a last layer of zeros nothing learns at first; once that has moved, everything does."""
    with seeded(1):
        module = ATTENTIONS[name].build(CHANNELS, 4, "identity", SIDE).double().train()
        target = torch.randn_like(image())
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        (module(image()) - target).square().mean().backward()
        optimizer.step()
    # A bias before a batch norm is subtracted again, and GC's mask bias drops out of its softmax.
    useless = {"bam": ("channel.expand.bias", "squeeze.project.bias"), "gc": ("weigh.bias",)}.get(name, ())
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None, key
        assert key in useless or parameter.grad.abs().max() > 1e-12, key


def test_simplified_non_local_is_global_context_without_a_bottleneck() -> None:
    module = GC(CHANNELS, None, init="paper")
    assert sum(p.numel() for p in module.parameters()) == (CHANNELS + 1) + (CHANNELS * CHANNELS + CHANNELS)


def test_unknown_init() -> None:
    with pytest.raises(UsageError, match="identity, paper"):
        SE(16, init="zero")  # type: ignore[arg-type]


# Found by dataflow -------------------------------------------------------------------------------------

ROLES = {
    "se": [("channel", "", "sigmoid", "mul")],
    "ge": [("channel", "", "sigmoid", "mul")],
    "ge-theta": [("channel", "", "sigmoid", "mul")],
    "cbam": [("channel", ".channel", "sigmoid", "mul"), ("spatial", ".spatial", "sigmoid", "mul")],
    "bam": [("channel", "", "sigmoid", "mul"), ("spatial", "#2", "sigmoid", "mul")],
    "gc": [("channel", "", "none", "add")],
    "sge": [("spatial", "", "sigmoid", "mul")],
    "eca": [("channel", "", "sigmoid", "mul")],
}
"""Attention -> what inspect says of each of its blocks: dimension, name below the module, gate, fusion."""


@pytest.mark.parametrize("init", ["identity", "paper"])
@pytest.mark.parametrize("name", ROLES)
def test_found_and_connected(name: str, init: str) -> None:
    with seeded(0):
        network = with_attention(lambda c: ATTENTIONS[name].build(c, 4, init, 32), WIDTHS)  # type: ignore[arg-type]
    plan = dcafy.inspect(network, example_inputs=torch.rand(2, 3, 64, 64))
    found = [(block.dimension, block.name, block.gate, block.fusion_kind) for block in plan.blocks]
    assert found == [
        (dimension, f"blocks.{i}.attention{suffix}", gate, kind)
        for i in range(len(WIDTHS))
        for dimension, suffix, gate, kind in ROLES[name]
    ]
    assert len(plan.links) == (len(WIDTHS) - 1) * len(ROLES[name])
    assert plan.skipped == ()
    x = torch.rand(2, 3, 64, 64)
    network = network.eval()
    converted = dcafy.convert(network, example_inputs=x)
    with torch.no_grad():
        assert torch.equal(network(x), converted(x))
