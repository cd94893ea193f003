"""The equations of ``depth`` and of ``mrla``, restated in float64 without a line of what computes them."""

from __future__ import annotations

import copy
import math

import torch
from family import X, connected, original, under_way
from torch import Tensor
from torch.nn import functional as F
from trained import seeded

import dcafy
from dcafy.emit.connection import Connection
from dcafy.emit.depth import DepthConnection
from dcafy.emit.mixing import Mixed
from dcafy.plan.blocks import AttentionBlock


def connection_of(dimension: str, extent: tuple[int, tuple[int, ...] | None], count: int = 3) -> DepthConnection:
    """One whose messages have G's size, its layers and weights at random, in float64."""
    block = AttentionBlock("b", dimension, extent[0], extent[1], "sigmoid", "mul", (), (), ())  # type: ignore[arg-type]
    with seeded(1):
        parts = [Connection(dimension) for _ in range(count)]  # type: ignore[arg-type]
        made = DepthConnection(parts, Mixed(block, extent, {}, (), {})).double()
        with torch.no_grad():
            made.parts[0].alpha.fill_(0.7)
            made.parts[0].beta.fill_(-0.4)
    return made


def given(shape: tuple[int, ...], count: int = 3) -> tuple[Tensor, list[Tensor]]:
    with seeded(2):
        return torch.randn(shape).double(), [torch.rand(shape).double() for _ in range(2 * count)]


def normal(value: Tensor) -> Tensor:
    axes = tuple(range(1, value.ndim))
    return value / (value.square().mean(axes, keepdim=True) + 1e-8).sqrt()


def test_channels_are_weighed_head_by_head() -> None:
    made = connection_of("channel", (64, None))
    G, told = given((2, 64))
    messages = [told[2 * j] * told[2 * j + 1] for j in range(3)]

    def along(value: Tensor, weight: Tensor) -> Tensor:
        size = weight.numel()
        padded = F.pad(normal(value), (size // 2, size // 2))
        return sum(weight.flatten()[i] * padded[:, i : i + 64] for i in range(size))  # type: ignore[return-value]

    expected = 0.7 * G
    query = along(G, made.parts[0].query.weight)
    keys = [along(m, part.key.weight) for m, part in zip(messages, made.parts, strict=True)]
    for head in (slice(0, 32), slice(32, 64)):
        scores = [(query[:, head] * key[:, head]).sum(1) / math.sqrt(32) for key in keys]
        total = sum(score.exp() for score in scores)
        for score, message in zip(scores, messages, strict=True):
            expected[:, head] -= 0.4 * (score.exp() / total)[:, None] * message[:, head]
    torch.testing.assert_close(made(G, *told), expected, rtol=0, atol=1e-9)


def test_places_are_weighed_one_by_one() -> None:
    made = connection_of("spatial", (2, (5, 6)))
    G, told = given((2, 2, 5, 6))
    messages = [told[2 * j] * told[2 * j + 1] for j in range(3)]

    def seen(value: Tensor, weight: Tensor) -> Tensor:
        padded, n = F.pad(normal(value), (1, 1, 1, 1)), range(3)
        parts = (weight[:, 0, a, b].view(1, 2, 1, 1) * padded[:, :, a : a + 5, b : b + 6] for a in n for b in n)
        return sum(parts)  # type: ignore[return-value]

    query = seen(G, made.parts[0].query.weight)
    keys = [seen(m, part.key.weight) for m, part in zip(messages, made.parts, strict=True)]
    scores = [(query * key).sum(1, keepdim=True).div(math.sqrt(2)).exp() for key in keys]
    heard = sum(score / sum(scores) * message for score, message in zip(scores, messages, strict=True))
    torch.testing.assert_close(made(G, *told), 0.7 * G - 0.4 * heard, rtol=0, atol=1e-9)


def test_who_told_nothing_takes_no_part() -> None:
    made = connection_of("channel", (64, None))
    G, told = given((2, 64))
    two = copy.deepcopy(made)
    two.parts = two.parts[:2]
    torch.testing.assert_close(made(G, *told[:4], None, None), two(G, *told[:4]), rtol=0, atol=1e-12)
    one = 0.7 * G - 0.4 * told[2] * told[3]  # a softmax over one is 1
    torch.testing.assert_close(made(G, None, None, *told[2:4], None, None), one, rtol=0, atol=1e-12)
    assert torch.equal(made(G, *(None,) * 6), 0.7 * G)


def test_contexts_of_any_scale_leave_it_finite_and_exact() -> None:
    made = connection_of("channel", (64, None)).float()
    with torch.no_grad():
        made.parts[0].alpha.fill_(1)
        made.parts[0].beta.zero_()
    for scale in (0.0, 1e-20, 1e8, 1e15):
        G, told = given((2, 64))
        G, told = scale * G.float(), [scale * told[0].float(), *(value.float() for value in told[1:])]
        assert torch.equal(made(G, *told), G)


def test_mrla_as_its_equations_have_it() -> None:
    model = under_way(copy.deepcopy(connected("mrla"))).double()
    plain, before, size = original("mrla"), None, None
    assert type(plain) in type(model).__mro__
    x = model.stem(X.double())
    for path, unit in model.units.named_children():
        y = F.relu(unit.short(x) + unit.body(x))
        m = unit.mrla
        n, c = y.shape[:2]
        width = {16: 16, 40: 40}[c]
        means = y.mean((2, 3))[:, None]
        q, k = (F.conv1d(means, one.weight, padding=one.weight.shape[2] // 2)[:, 0] for one in (m.query, m.key))
        heads = (q * k).view(n, c // width, width).sum(2) / math.sqrt(width)
        weights = (1 / (1 + (-heads).exp()))[:, :, None].expand(-1, -1, width).reshape(n, c, 1, 1)
        o = weights * F.conv2d(y, m.value.weight, padding=1, groups=c)
        link = dcafy.connections(model).get(f"units.{path}.mrla")
        if link is not None:
            assert size == y.shape
            o = link.alpha * o + link.beta * link.match[0].weight.view(1, c, 1, 1) * before
        before, size = o, y.shape
        norm = m.norm
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        x = y + (o - norm.running_mean.view(1, c, 1, 1)) * scale.view(1, c, 1, 1) + norm.bias.view(1, c, 1, 1)
    expected = model.head(x.mean((2, 3)))
    torch.testing.assert_close(model(X.double()), expected, rtol=0, atol=1e-9)
    assert len(dcafy.connections(model)) == 3
