"""The ways to connect attention across depth (``docs/family.md``), and what a user may do with each.

A way is a row of :data:`WAYS`: a network of our own, how it is connected, and how it gets away from the start.
``tests/test_family.py`` asks the same of all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from networks import CBAM, SELinear, conv_norm, with_attention
from torch import Tensor, nn
from trained import images, moved, seeded, trained

import dcafy
from dcafy.attention import MRLA
from dcafy.emit.dca import own_modules

X = images(4, 24)


class Unit(nn.Module):
    """A residual unit; its shortcut is a convolution where it has to be."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_norm(inputs, outputs, 3, stride), nn.ReLU(), conv_norm(outputs, outputs))
        self.short = nn.Identity() if inputs == outputs and stride == 1 else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.body(x))


class Plain(nn.Module):
    """A network without attention: a stage of three units and one of two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 16, 3, 2)
        self.units = nn.Sequential(Unit(16, 16), Unit(16, 16), Unit(16, 16), Unit(16, 40, 2), Unit(40, 40))
        self.head = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(self.stem(x)).mean((2, 3)))


@dataclass(frozen=True)
class Way:
    """``network`` builds one that it is for, ``connect`` connects that; ``own``: in the paths of its new keys."""

    network: Callable[[], nn.Module]
    connect: Callable[..., Any]
    own: tuple[str, ...] = ("dca",)


WAYS: dict[str, Way] = {
    "depth": Way(
        lambda: with_attention(SELinear, (16, 16, 40, 40)), functools.partial(dcafy.convert, topology="depth")
    ),
    "depth, two dimensions": Way(
        lambda: with_attention(CBAM, (16, 16, 24)), functools.partial(dcafy.convert, topology="depth")
    ),
    "mrla": Way(Plain, lambda model, **given: dcafy.insert(model, "mrla", **given), ("dca", "mrla")),
}
"""Name -> the way; ``connect(network, example_inputs=x)``."""


@functools.cache
def original(name: str) -> nn.Module:
    """The network of a way, trained-like, in eval; nobody changes it."""
    return trained(WAYS[name].network, images(8, 24))


@functools.cache
def connected(name: str) -> Any:
    """The same, connected, at the start; nobody changes it."""
    return WAYS[name].connect(original(name), example_inputs=X).eval()


def under_way(model: Any) -> Any:
    """The connected model some way into training, what was inserted as well."""
    with seeded(7), torch.no_grad():
        for module in model.modules():
            if isinstance(module, MRLA):
                module.norm.weight.uniform_(0.2, 0.6)
    return moved(model)


def new_parameters(model: Any, name: str) -> dict[str, nn.Parameter]:
    """Those that the way has brought."""
    assert own_modules(model)
    own = set(WAYS[name].own)
    return {key: value for key, value in model.named_parameters() if own & set(key.split("."))}
