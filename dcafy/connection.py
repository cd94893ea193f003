"""Connection: what takes the place of G in a block that hears an earlier one (paper 3.2 and 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcafy.blocks import Dimension
from dcafy.errors import UsageError

__all__ = ["CHANNEL_MATCHES", "SCHEMAS", "SPATIAL_MATCHES", "Connection", "channel_match", "spatial_match"]


def direct(alpha: Tensor, beta: Tensor, context: Tensor, message: Tensor) -> Tensor:
    """αG + βT̃ (paper eq. 3)."""
    return alpha * context + beta * message


SCHEMAS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {"direct": direct}
"""Name -> the form of f."""


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


def _avg(ratio: tuple[int, ...]) -> nn.Module:
    pool = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[len(ratio)]
    return pool(ratio, ratio, ceil_mode=True, count_include_pad=False)


SPATIAL_MATCHES: dict[str, Callable[[tuple[int, ...]], nn.Module]] = {"avg": _avg}
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
    return nn.Sequential(*_known(CHANNEL_MATCHES, kind, "channel_match")(inputs, outputs, reduction, min_hidden, **place))


def spatial_match(kind: str, size: tuple[int, ...], target: tuple[int, ...]) -> nn.Module:
    """The layer that brings a map of ``size`` near ``target``; ``nn.Identity`` where no whole ratio shrinks it.

    What is left (sizes that do not divide, an earlier map that is the smaller one, another image size)
    the connection evens out by adaptive average pooling or interpolation.
    """
    shrink = _known(SPATIAL_MATCHES, kind, "spatial_match")
    ratio = tuple(max(math.ceil(a / b), 1) for a, b in zip(size, target, strict=True))
    exact = all(math.ceil(a / r) == b for a, r, b in zip(size, ratio, target, strict=True))
    if size == target or not exact:
        return nn.Identity()
    return nn.Sequential(shrink(ratio))


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
        message = self.message(G, T_prev, G_prev)
        return self._combine(self.alpha.to(G.dtype), self.beta.to(G.dtype), G, message)

    def message(self, G: Tensor, T_prev: Tensor, G_prev: Tensor | None = None) -> Tensor:
        """``match(T̃)`` in the shape and dtype of G (spatial maps of one channel broadcast over G's)."""
        if self.dimension == "channel":
            carried = T_prev.flatten(1)
            if self.bounded and G_prev is not None:
                carried = carried * G_prev.flatten(1)
            return self.match(carried).reshape(G.shape).to(G.dtype)
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
        pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(size)]
        return pool(value, size)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    return F.interpolate(value, size=size, mode=mode, align_corners=False)
