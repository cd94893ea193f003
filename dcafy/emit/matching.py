"""What brings a message to the size of G (paper 3.3): one class for each dimension."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dcafy.errors import UsageError
from dcafy.find.layout import DIMENSIONS, Extent
from dcafy.plan.blocks import Link


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
    window, padding = tuple(2 * r - 1 for r in ratio), tuple(r - 1 for r in ratio)
    return _CONVOLUTIONS[len(ratio)](channels, channels, window, stride=ratio, padding=padding, **place)


_CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""Rank of a map -> the convolution over its places."""

_BATCH_NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
"""Rank of a map -> the batch norm over its places."""

SPATIAL_MATCHES: dict[str, Callable[..., nn.Module]] = {"avg": _avg, "conv": _conv, "max": _max}
"""Name -> the layer that shrinks a map by a whole ratio (paper 3.3)."""


def known(table: dict[str, Any], name: str, option: str) -> Any:
    if name not in table:
        raise UsageError(f"{option}={name!r} is not known. Use one of: {', '.join(sorted(table))}.")
    return table[name]


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
        *known(CHANNEL_MATCHES, kind, "channel_match")(inputs, outputs, reduction, min_hidden, **place)
    )


def spatial_match(
    kind: str, size: tuple[int, ...], target: tuple[int, ...], *, channels: int = 1, **place: Any
) -> nn.Module:
    """The layer that brings a map of ``size`` near ``target``; ``nn.Identity`` where no whole ratio shrinks it.

    ``avg``: average pooling. ``max``: maximum pooling. ``conv``: a strided convolution of ``channels``. What is left
    (sizes that do not divide, an earlier map that is the smaller one, another image size) the connection
    evens out by adaptive average pooling or interpolation.
    """
    shrink = known(SPATIAL_MATCHES, kind, "spatial_match")
    ratio = tuple(max(math.ceil(a / b), 1) for a, b in zip(size, target, strict=True))
    exact = all(math.ceil(a / r) == b for a, r, b in zip(size, ratio, target, strict=True))
    if size == target or not exact:
        return nn.Identity()
    return nn.Sequential(shrink(ratio, channels, **place))


def neighbours(channels: int) -> int:
    """How many channels see each other in a convolution along channels: odd, and more of more (ECA, eq. 9)."""
    near = int((math.log2(channels) + 1) / 2)
    return near + 1 - near % 2


HEAD = 32
"""Channels that are weighed together, about: as many as divide the width, and are nearest to this (MRLA)."""


def head(channels: int) -> int:
    """Channels of one head.

    >>> head(256), head(40), head(7)
    (32, 40, 7)
    """
    return min((n for n in range(1, channels + 1) if channels % n == 0), key=lambda n: abs(math.log(n / HEAD)))


class EachPlace(nn.Sequential):
    """Layers for vectors, applied to the channels ``[N, C, *size]`` of every place."""

    def forward(self, x: Tensor) -> Tensor:
        """The map of as many channels as the layers yield."""
        places = x.movedim(1, -1)
        for layer in self:
            places = layer(places)
        matched = places.movedim(-1, 1)
        # In another layout than x, its sum with G would be in that layout, too, and later layers take other kernels.
        return matched.contiguous() if _is_traced(x) or x.is_contiguous() else matched


class _Channel:
    options: tuple[str, ...] = ("channel_match",)
    norm_has_statistics = False

    def needs_layers(self, channels: int, own: int) -> bool:
        """Whether only layers bring maps of so many channels to G's."""
        return DIMENSIONS["channel"].needs_layers(channels, own)

    def layers(self, link: Link, message: Extent, own: Extent, place: dict[str, Any]) -> nn.Module:
        """The layers that a link with all its settings takes; ``place``: device and dtype."""
        sizes: dict[str, Any] = {"reduction": link.reduction, "min_hidden": link.min_hidden}
        match = channel_match(str(link.channel_match), message[0], own[0], **sizes, **place)
        if link.message == "centred" and isinstance(match, nn.Sequential):
            return match[:-1]  # a ReLU before the centring would cut off half of how messages differ
        return match

    def centre(self, message: Extent, own: Extent, place: dict[str, Any]) -> nn.Module:
        """What takes from a message what is the same for every image."""
        return nn.BatchNorm1d(own[0], affine=False, **place)

    def norm(self, own: Extent, place: dict[str, Any]) -> nn.Module:
        """What the schema ``normalised`` ends with: LayerNorm and ReLU, as in the published code."""
        channels = own[0]  # over one channel a LayerNorm would put its bias in the place of everything
        return nn.Sequential(*([nn.LayerNorm(channels, **place)] if channels > 1 else []), nn.ReLU())

    def normalised(self, connection: Any, value: Tensor) -> Tensor:
        """What :meth:`norm` makes of ``value``, which has the shape of G."""
        normed: Tensor = connection.norm(value.flatten(1))
        return _shaped(normed, value.shape)

    def convolution(self, own: Extent, place: dict[str, Any]) -> nn.Module:
        """A convolution in which neighbours see each other, for :meth:`groups`: channels, or places of a map."""
        size = neighbours(own[0])
        return nn.Conv1d(1, 1, size, padding=size // 2, bias=False, **place)

    def groups(self, connection: Any, value: Tensor, convolution: nn.Module) -> Tensor:
        """The groups of a value in the shape of G, as the convolution has them: ``[N, heads, channels]``."""
        flat = value.flatten(1)
        seen: Tensor = convolution(_even(flat, 1).unsqueeze(1))
        return torch.unflatten(seen.squeeze(1), 1, (-1, connection.group))

    def group(self, own: Extent) -> int:
        """How many numbers are in a group."""
        return head(own[0])

    def spread(self, connection: Any, weights: Tensor, G: Tensor) -> Tensor:
        """A number for each group, in a shape to be multiplied with what has the shape of G."""
        return _shaped(weights.unsqueeze(2).expand(-1, -1, connection.group).flatten(1), G.shape)

    def places(self, connection: Any, value: Tensor) -> Tensor:
        """What has the shape of G as ``[N, C, *size]``, over its root mean square; ``size`` is empty for vectors."""
        return _even(value.flatten(1), 1)

    def from_places(self, connection: Any, value: Tensor, G: Tensor) -> Tensor:
        """The way back from :meth:`places`, in the shape and dtype of G."""
        return _typed(_shaped(value, G.shape), G)

    def matched(self, connection: Any, G: Tensor, T_prev: Tensor, G_prev: Tensor | None) -> Tensor:
        """``match(T̃)`` of a connection, in the shape and dtype of G."""
        message = T_prev
        if connection.bounded and G_prev is not None:
            message = message * _shaped(G_prev, message.shape)
        if connection.centre is not None or not isinstance(connection.match, nn.Identity):
            flat = not _is_traced(message) and message.ndim == 2
            message = _centred(connection, connection.match(message if flat else message.flatten(1)))
        return _typed(_shaped(message, G.shape), G)


class _Spatial(_Channel):
    options = ("spatial_match", "channel_match")
    norm_has_statistics = True

    def needs_layers(self, channels: int, own: int) -> bool:
        return DIMENSIONS["spatial"].needs_layers(channels, own)

    def layers(self, link: Link, message: Extent, own: Extent, place: dict[str, Any]) -> nn.Module:
        """Places first, axis by axis; then the channels of each place, as channel attention's."""
        more = self.needs_layers(message[0], own[0])
        channels = message[0] if more or message[0] == own[0] else 1
        shrunk = spatial_match(str(link.spatial_match), message[1] or (), own[1] or (), channels=channels, **place)
        if not more:
            return shrunk
        layers = super().layers(link, message, own, place)
        assert isinstance(layers, nn.Sequential)
        return nn.Sequential(*(shrunk if isinstance(shrunk, nn.Sequential) else ()), EachPlace(*layers))

    def centre(self, message: Extent, own: Extent, place: dict[str, Any]) -> nn.Module:
        channels = own[0] if message[0] == own[0] or self.needs_layers(message[0], own[0]) else 1
        return _BATCH_NORMS[len(own[1] or ())](channels, affine=False, **place)

    def norm(self, own: Extent, place: dict[str, Any]) -> nn.Module:
        return nn.Sequential(_BATCH_NORMS[len(own[1] or ())](own[0], **place), nn.ReLU())

    def normalised(self, connection: Any, value: Tensor) -> Tensor:
        normed: Tensor = connection.norm(_channels_first(value, connection.target_axis))
        return _channels_back(normed, connection.target_axis)

    def convolution(self, own: Extent, place: dict[str, Any]) -> nn.Module:
        channels, size = own[0], own[1] or ()
        return _CONVOLUTIONS[len(size)](channels, channels, 3, padding=1, groups=channels, bias=False, **place)

    def groups(self, connection: Any, value: Tensor, convolution: nn.Module) -> Tensor:
        """Every place is a group: ``[N, *size, channels]``."""
        maps = _channels_first(value, connection.target_axis)
        seen: Tensor = convolution(_even(maps, tuple(range(1, maps.ndim))))
        return seen.movedim(1, -1)

    def group(self, own: Extent) -> int:
        return own[0]

    def spread(self, connection: Any, weights: Tensor, G: Tensor) -> Tensor:
        return _channels_back(weights.unsqueeze(1), connection.target_axis)

    def places(self, connection: Any, value: Tensor) -> Tensor:
        maps = _channels_first(value, connection.target_axis)
        return _even(maps, tuple(range(1, maps.ndim)))

    def from_places(self, connection: Any, value: Tensor, G: Tensor) -> Tensor:
        return _typed(_channels_back(value, connection.target_axis), G)

    def matched(self, connection: Any, G: Tensor, T_prev: Tensor, G_prev: Tensor | None) -> Tensor:
        target = _channels_first(G, connection.target_axis)
        message = _channels_first(T_prev, connection.map_axis)
        if connection.bounded and G_prev is not None:
            message = message * _channels_first(G_prev, connection.source_axis)
        if connection.averages:  # maps of one channel broadcast over G's
            message = message.mean(1, keepdim=True)
        for layer in connection.match if isinstance(connection.match, nn.Sequential) else ():
            if isinstance(layer, EachPlace):
                message = _to_size(message, target.shape[2:], connection.grows)
            if _takes(layer, message):
                message = layer(message)
        message = _centred(connection, _to_size(message, target.shape[2:], connection.grows))
        return _typed(_channels_back(message, connection.target_axis), G)


def _centred(connection: Any, message: Tensor) -> Tensor:
    """The message of a connection that centres without what is the same for every image; any other as it is.

    One image alone says nothing of others, so that it is centred by what is known of them, in training as well.
    """
    centre = connection.centre
    if centre is None:
        return message
    alone = not _is_traced(message) and centre.training and message.numel() == message.shape[1]
    if alone:
        return F.batch_norm(message, centre.running_mean, centre.running_var, eps=centre.eps)
    centred: Tensor = centre(message)
    return centred


def _even(value: Tensor, axes: int | tuple[int, ...]) -> Tensor:
    """The values of each image over their root mean square: contexts may be of any size, and a softmax not."""
    wide = value.float() if not _is_traced(value) and value.dtype in (torch.float16, torch.bfloat16) else value
    return _typed(wide * (wide.square().mean(axes, keepdim=True) + 1e-8).rsqrt(), value)


def _shaped(value: Tensor, shape: torch.Size) -> Tensor:
    """``value.reshape(shape)``; itself where it has that shape: autograd pays for a view as for a product."""
    return value.reshape(shape) if _is_traced(value) or value.shape != shape else value


def _is_traced(value: Tensor) -> bool:
    """Whether what is decided by sizes now would hold for ever."""
    return isinstance(value, fx.Proxy) or torch._C._get_tracing_state() is not None


def _typed(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype) if isinstance(value, fx.Proxy) or value.dtype != like.dtype else value


def _channels_first(value: Tensor, axis: int | None) -> Tensor:
    """A map as ``[N, k, *size]``."""
    if axis is None:
        return value.unsqueeze(1)
    return value if axis == 1 else value.movedim(axis, 1)


def _channels_back(value: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return value.squeeze(1)
    return value if axis == 1 else value.movedim(1, axis)


def _to_size(value: Tensor, size: tuple[int, ...], grows: bool) -> Tensor:
    """Average pooling that also handles sizes that do not divide; interpolation where the map has to grow.

    ``grows``: whether it has to in the example, for a trace, which knows no sizes; either keeps a map of that size.
    """
    if isinstance(value, fx.Proxy):
        return F.interpolate(value, size=size, mode="bilinear") if grows else F.adaptive_avg_pool2d(value, size)
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


def _takes(layer: nn.Module, message: Tensor) -> bool:
    """False where a map is less than the window: pooling of three axes refuses it, and that of two takes it whole."""
    if not isinstance(layer, nn.AvgPool3d | nn.MaxPool3d) or isinstance(message, fx.Proxy):
        return True
    window: Any = layer.kernel_size
    return all(a >= b for a, b in zip(message.shape[2:], window, strict=True))


to_size = _to_size
"""For what goes along units, which is no message."""

MATCHES: dict[str, _Channel] = {"channel": _Channel(), "spatial": _Spatial()}
"""Dimension -> how it brings a message to the size of G; ``options``: which of a link's settings say by what."""
