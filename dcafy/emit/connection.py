"""Connection: what takes the place of G in a block that hears an earlier one (paper 3.2 and 3.3)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcafy.errors import UsageError
from dcafy.plan.blocks import Dimension

__all__ = [
    "CHANNEL_MATCHES",
    "INEXACT_SCHEMAS",
    "SCHEMAS",
    "SPATIAL_MATCHES",
    "Connection",
    "JoinedConnection",
    "channel_match",
    "spatial_match",
]


def direct(a: Tensor, b: Tensor) -> Tensor:
    """``a + b`` for ``a = αG`` and ``b = βT̃`` (paper eq. 3)."""
    return a + b


POLE = 1e-3
"""How near to 0 the denominator of ``weighted`` may come, as a part of ``|a| + |b|``."""


def weighted(a: Tensor, b: Tensor) -> Tensor:
    """``(a² + b²) / (a + b)`` (paper eq. 4), finite everywhere.

    Written as ``a + b - 2ab/d`` it is exactly ``a`` where ``b`` is 0. ``d`` is ``a + b``, kept away from 0.
    """
    wide = a.float() if a.dtype in (torch.float16, torch.bfloat16) else a
    other = b.to(wide.dtype)
    total = wide + other
    # The smallest floor is for a = b = 0; its inverse is finite, and so are gradients.
    floor = (POLE * (wide.abs() + other.abs())).clamp_min(1e-30)
    divisor = torch.where(total < 0, -1.0, 1.0).to(wide.dtype) * torch.maximum(total.abs(), floor)
    result = total - 2 * wide * (other / divisor)
    if wide.dtype != a.dtype:  # near the pole it is a thousand times a, which half precision may not hold
        largest = torch.finfo(a.dtype).max
        return result.clamp(-largest, largest).to(a.dtype)
    return result


def softmax(a: Tensor, b: Tensor) -> Tensor:
    """``a`` and ``b``, weighed by a softmax over the two, element by element (paper 3.2)."""
    weight = torch.sigmoid(a - b)
    return weight * a + (1 - weight) * b


SCHEMAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"direct": direct, "softmax": softmax, "weighted": weighted}
"""Name -> the form of f, of ``a = αG`` and ``b = βT̃``."""

INEXACT_SCHEMAS = frozenset({"softmax"})
"""Schemas that are not G itself at α = 1, β = 0."""


def _fc(inputs: int, outputs: int, **place: Any) -> list[nn.Module]:
    """FC, LayerNorm, ReLU; a LayerNorm over one channel would replace it by its bias for good."""
    norm = [nn.LayerNorm(outputs, **place)] if outputs > 1 else []
    return [nn.Linear(inputs, outputs, **place), *norm, nn.ReLU()]


def _fc1(inputs: int, outputs: int, reduction: int, min_hidden: int, **place: Any) -> list[nn.Module]:
    return _fc(inputs, outputs, **place)


def _fc2(inputs: int, outputs: int, reduction: int, min_hidden: int, **place: Any) -> list[nn.Module]:
    hidden = max(outputs // reduction, min_hidden)
    return _fc(inputs, hidden, **place) + _fc(hidden, outputs, **place)


CHANNEL_MATCHES: dict[str, Callable[..., list[nn.Module]]] = {"fc1": _fc1, "fc2": _fc2}
"""Name -> the layers that bring a vector of another width to G's (paper 3.3)."""


def _avg(ratio: tuple[int, ...], channels: int, **place: Any) -> nn.Module:
    pools: dict[int, Callable[..., nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
    return pools[len(ratio)](ratio, ratio, ceil_mode=True, count_include_pad=False)


def _max(ratio: tuple[int, ...], channels: int, **place: Any) -> nn.Module:
    pools: dict[int, Callable[..., nn.Module]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
    return pools[len(ratio)](ratio, ratio, ceil_mode=True)


def _conv(ratio: tuple[int, ...], channels: int, **place: Any) -> nn.Module:
    """The learned alternative that the paper argues against; windows overlap, so that every size is covered."""
    layers: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    window, padding = tuple(2 * r - 1 for r in ratio), tuple(r - 1 for r in ratio)
    return layers[len(ratio)](channels, channels, window, stride=ratio, padding=padding, **place)


SPATIAL_MATCHES: dict[str, Callable[..., nn.Module]] = {"avg": _avg, "conv": _conv, "max": _max}
"""Name -> the layer that shrinks a map by a whole ratio (paper 3.3)."""


def channel_match(
    kind: str, inputs: int, outputs: int, *, reduction: int = 16, min_hidden: int = 8, **place: Any
) -> nn.Module:
    """The layers that bring ``[N, inputs]`` to ``[N, outputs]``; ``nn.Identity`` where nothing is to be done.

    ``fc1``: Linear, LayerNorm, ReLU. ``fc2``: twice that, through ``max(outputs // reduction, min_hidden)``
    channels. ``place``: device and dtype.

    >>> [type(layer).__name__ for layer in channel_match("fc1", 8, 16)]
    ['Linear', 'LayerNorm', 'ReLU']
    """
    if inputs == outputs:
        return nn.Identity()
    return nn.Sequential(
        *_known(CHANNEL_MATCHES, kind, "channel_match")(inputs, outputs, reduction, min_hidden, **place)
    )


def spatial_match(
    kind: str, size: tuple[int, ...], target: tuple[int, ...], *, channels: int = 1, **place: Any
) -> nn.Module:
    """The layer that brings a map of ``size`` near ``target``; ``nn.Identity`` where no whole ratio shrinks it.

    ``avg``: average pooling. ``max``: maximum pooling. ``conv``: a strided convolution of ``channels``. What is left
    (sizes that do not divide, an earlier map that is the smaller one, another image size) the connection
    evens out by adaptive average pooling or interpolation.
    """
    shrink = _known(SPATIAL_MATCHES, kind, "spatial_match")
    ratio = tuple(max(math.ceil(a / b), 1) for a, b in zip(size, target, strict=True))
    exact = all(math.ceil(a / r) == b for a, r, b in zip(size, ratio, target, strict=True))
    if size == target or not exact:
        return nn.Identity()
    return nn.Sequential(shrink(ratio, channels, **place))


def _known(table: dict[str, Any], name: str, option: str) -> Any:
    if name not in table:
        raise UsageError(f"{option}={name!r} is not known. Use one of: {', '.join(sorted(table))}.")
    return table[name]


class Connection(nn.Module):
    """``f(αG, β·match(T̃))``, in the shape and dtype of G; exactly G at the start (α = 1, β = 0).

    ``T̃`` is ``T ⊙ G_prev`` where ``bounded``, else ``T`` (paper 3.1). ``match`` is a chain of plain layers or
    ``nn.Identity``; it works on ``[N, C]`` for channel attention, on ``[N, k, *size]`` for spatial attention.

    ``target_axis``, ``source_axis``: where the maps of this block and of the earlier one have their channels
    (1, -1, or ``None`` for ``[N, H, W]``); channel attention ignores them: any layout of a vector will do.

    >>> connection = Connection("channel", match=channel_match("fc2", 64, 128))
    >>> g = torch.rand(2, 128, 1, 1)
    >>> torch.equal(connection(g, torch.rand(2, 64), torch.rand(2, 64)), g)
    True
    """

    is_connection = True

    def __init__(
        self,
        dimension: Dimension,
        match: nn.Module | None = None,
        *,
        schema: str = "direct",
        bounded: bool = True,
        source_axis: int | None = 1,
        target_axis: int | None = 1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dimension = dimension
        self.schema = schema
        self.bounded = bounded
        self.source_axis = source_axis
        self.target_axis = target_axis
        self._combine = _known(SCHEMAS, schema, "schema")
        # One element and not a scalar: FSDP refuses to shard tensors without a dimension.
        self.alpha = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
        self.match = nn.Identity() if match is None else match

    def forward(self, G: Tensor, T_prev: Tensor, G_prev: Tensor | None = None) -> Tensor:
        """G connected to the earlier block's T; ``G_prev`` is the earlier block's G, needed where T is bounded."""
        connected: Tensor = self._combine(self.alpha.to(G.dtype) * G, self.term(G, T_prev, G_prev))
        return connected

    def term(self, G: Tensor, T_prev: Tensor, G_prev: Tensor | None = None) -> Tensor:
        """``β·match(T̃)`` in the shape and dtype of G: the second term of f."""
        return self.beta.to(G.dtype) * self.message(G, T_prev, G_prev)

    def message(self, G: Tensor, T_prev: Tensor, G_prev: Tensor | None = None) -> Tensor:
        """``match(T̃)`` in the shape and dtype of G (spatial maps of one channel broadcast over G's)."""
        if self.dimension == "channel":
            carried = T_prev
            if self.bounded and G_prev is not None:
                carried = carried * _shaped(G_prev, carried.shape)
            if not isinstance(self.match, nn.Identity):
                carried = self.match(carried.flatten(1))
            return _shaped(carried, G.shape).to(G.dtype)
        target = _channels_first(G, self.target_axis)
        carried = _channels_first(T_prev, self.source_axis)
        if self.bounded and G_prev is not None:
            carried = carried * _channels_first(G_prev, self.source_axis)
        if carried.shape[1] not in (1, target.shape[1]):
            carried = carried.mean(1, keepdim=True)
        return _channels_back(_to_size(self.match(carried), target.shape[2:]), self.target_axis).to(G.dtype)

    def contribution(self) -> float:
        """``|β| / (|α| + |β|)``: the contribution ratio of paper 4.5 (absolute: both may turn negative)."""
        alpha, beta = abs(float(self.alpha.detach())), abs(float(self.beta.detach()))
        return beta / (alpha + beta) if alpha + beta else 0.0

    def extra_repr(self) -> str:
        return f"{self.dimension}, schema={self.schema}, bounded={self.bounded}"


class JoinedConnection(nn.Module):
    """``f(αG, Σ βᵢ·matchᵢ(T̃ᵢ))``: a block that hears several earlier ones (paper section 5).

    ``parts`` holds one :class:`Connection` per earlier block, each with its own β; they share α, and those of one
    earlier width share their matching layers.
    """

    is_connection = True

    def __init__(self, parts: list[Connection]) -> None:
        super().__init__()
        first, *others = parts
        for part in others:
            part.alpha = first.alpha
        self.parts = nn.ModuleList(parts)
        self._combine = SCHEMAS[first.schema]

    def forward(self, G: Tensor, *passed: Tensor | None) -> Tensor:
        """G connected to every earlier block; ``passed``: T and G (or ``None``) of each, one after the other."""
        terms = [
            part.term(G, T_prev, G_prev)  # type: ignore[operator]
            for part, T_prev, G_prev in zip(self.parts, passed[::2], passed[1::2], strict=True)
        ]
        alpha: Tensor = self.parts[0].alpha  # type: ignore[assignment]
        return self._combine(alpha.to(G.dtype) * G, functools.reduce(torch.add, terms))


def _shaped(value: Tensor, shape: torch.Size) -> Tensor:
    """``value.reshape(shape)``; itself where it has that shape: autograd pays for a view as for a product."""
    return value if value.shape == shape else value.reshape(shape)


def _channels_first(value: Tensor, axis: int | None) -> Tensor:
    """A map as ``[N, k, *size]``."""
    if axis is None:
        return value.unsqueeze(1)
    return value.movedim(-1, 1) if axis == -1 else value


def _channels_back(value: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return value.squeeze(1)
    return value.movedim(1, -1) if axis == -1 else value


def _to_size(value: Tensor, size: tuple[int, ...]) -> Tensor:
    """Average pooling that also handles sizes that do not divide; interpolation where the map has to grow."""
    if value.shape[2:] == size:
        return value
    if all(a >= b for a, b in zip(value.shape[2:], size, strict=True)):
        pools: dict[int, Callable[..., Tensor]] = {
            1: F.adaptive_avg_pool1d,
            2: F.adaptive_avg_pool2d,
            3: F.adaptive_avg_pool3d,
        }
        return pools[len(size)](value, size)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    return F.interpolate(value, size=size, mode=mode, align_corners=False)
