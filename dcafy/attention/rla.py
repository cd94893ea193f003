"""Recurrent layer aggregation (Zhao et al., 2021, arXiv 2110.11852): a small map goes along the units."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from dcafy.attention.order import Order
from dcafy.attention.units import Reads, Unit
from dcafy.emit.matching import to_size
from dcafy.emit.relay import Calls, Relay
from dcafy.errors import InputError
from dcafy.graph.nodes import node_value
from dcafy.plan.options import Init

CHANNELS = 32
"""Of the recurrent map h, in every network of the paper."""


class Entrance(nn.Module):
    """``conv(x) + W·h``: what the unit's first convolution makes of x and h, side by side (eq. 3 of the paper).

    W has the form of that convolution, but for one that sees each channel apart, beside which it is 1x1. h is brought
    to the size of what it is beside by average pooling, as between the paper's stages. ``grows``: whether it is the
    smaller one there. ``silent``: W is zero.
    """

    def __init__(self, relay: Relay, beside: nn.Conv2d, *, grows: bool, silent: bool) -> None:
        super().__init__()
        self.relay = relay
        self.grows = grows
        self.strided = _is_plain(beside)
        form: dict[str, Any] = {"kernel_size": 1}
        if self.strided:
            form = {name: getattr(beside, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        self.conv = nn.Conv2d(CHANNELS, beside.out_channels, bias=False, **form)
        _drawn(self.conv)
        if silent:
            nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor, made: Tensor) -> Tensor:
        """``x``: what the convolution sees; ``made``: what it makes of that."""
        like = x if self.strided else made
        added: Tensor = self.conv(to_size(self.relay.heard(x), like.shape[2:], self.grows))
        return made + added


class RLA(nn.Module):
    """``y`` as it is; h goes on: ``recurrent(tanh(norm(h + out(y))))`` (eqs. 4 and 5 of the paper, RLA-v6).

    ``y``: what the main branch makes, before the addition. ``out`` and ``recurrent`` are those of the stage, ``norm``
    is the unit's own. Without anybody behind it there is nothing to hand on, and the unit only has its ``enter``.
    ``grows``: whether the h that it hears is smaller than y.
    """

    def __init__(
        self, relay: Relay, enter: Entrance | None, stage: tuple[nn.Conv2d, nn.Conv2d] | None, *, grows: bool
    ) -> None:
        super().__init__()
        self.relay = relay
        self.grows = grows
        if enter is not None:
            self.enter = enter
        if stage is not None:
            self.out, self.recurrent = stage
            self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, y: Tensor) -> Tensor:
        """``y``, which the unit may go on to add to in place."""
        h = to_size(self.relay.heard(y, self.relay.ears - 1), y.shape[2:], self.grows)
        self.relay.tell(self.recurrent(_normed(self.norm, h + self.out(y)).tanh()))
        return y.clone()


class Head(nn.Module):
    """``fc(x) + W·mean(ReLU(norm(h)))``: what a classifier makes of x and of the last h, side by side.

    ``silent``: W is zero.
    """

    def __init__(self, classes: int, *, silent: bool) -> None:
        super().__init__()
        self.relay = Relay(CHANNELS)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.fc = nn.Linear(CHANNELS, classes, bias=False)
        if silent:
            nn.init.zeros_(self.fc.weight)

    def forward(self, made: Tensor) -> Tensor:
        """``made``: what the classifier makes of x, ``[N, classes]``."""
        h = _normed(self.norm, self.relay.heard(made[:, :, None, None]))
        added: Tensor = self.fc(F.relu(h).mean((2, 3)))
        return made + added


def _normed(norm: nn.BatchNorm2d, h: Tensor) -> Tensor:
    """One value of each channel says nothing of others, so that it goes by what is known of them, in training, too."""
    if isinstance(h, Tensor) and h.numel() == h.shape[1]:
        return F.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    normed: Tensor = norm(h)
    return normed


def _is_plain(convolution: nn.Conv2d) -> bool:
    """Whether a convolution of h may stand beside it, of the same form."""
    return type(convolution) is nn.Conv2d and convolution.groups == 1


def _drawn(convolution: nn.Conv2d) -> nn.Conv2d:
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


def along(
    units: tuple[Unit, ...], order: Order, reduction: int, init: Init
) -> tuple[dict[str, nn.Module], dict[str, Calls]]:
    """One 1x1 and one 3x3 convolution for the units of a stage; h goes from unit to unit, also between stages."""
    size = {unit.path: unit.size for unit in units}
    heard = {source[0] for calls in order.nearest.values() for source in calls.hears if source is not None}
    stages: dict[int, tuple[nn.Conv2d, nn.Conv2d]] = {}
    made: dict[str, nn.Module] = {}
    for unit in units:
        sources = [source[0] for source in order.nearest[unit.path].hears if source is not None]
        if not sources and unit.path not in heard:
            continue
        relay = Relay(CHANNELS, ears=1 + bool(sources))
        theirs = size[sources[0]] if sources else unit.size
        enter = _entrance(unit, relay, theirs, silent=init == "identity") if sources else None
        number = order.stages[unit.path]
        if unit.path in heard and number not in stages:
            out = nn.Conv2d(unit.channels, CHANNELS, 1, bias=False)
            recurrent = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
            stages[number] = _drawn(out), _drawn(recurrent)
        stage = stages[number] if unit.path in heard else None
        made[unit.path] = RLA(relay, enter, stage, grows=_grows(theirs, unit.size))
    if order.classifier is not None and any(order.nearest[order.classifier].hears):
        made[order.classifier] = Head(order.classes, silent=init == "identity")
    return made, order.nearest


def _entrance(unit: Unit, relay: Relay, theirs: tuple[int, ...], *, silent: bool) -> Entrance:
    first = unit.first
    if first is None:
        raise InputError(
            f"{unit.path} has no convolution layer that could see h beside its input. Leave it out with where=, or use "
            "another attention."
        )
    beside = unit.recording.modules[str(first.target)]
    assert isinstance(beside, nn.Conv2d)
    seen = first.all_input_nodes[0] if _is_plain(beside) else first
    return Entrance(relay, beside, grows=_grows(theirs, tuple(node_value(seen).shape[2:])), silent=silent)


def _grows(size: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return any(a < b for a, b in zip(size, target, strict=True))


def reads(unit: Unit, module: nn.Module) -> Reads:
    """The unit's first convolution, with what it sees, and the end of its main branch."""
    parts: dict[str, tuple[fx.Node, ...]] = {}
    if hasattr(module, "enter") and unit.first is not None:
        parts["enter"] = (unit.first.all_input_nodes[0], unit.first)
    if hasattr(module, "out"):
        parts[""] = (unit.end,)
    return parts
