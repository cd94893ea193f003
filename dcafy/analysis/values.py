"""Attention values: what T is over images (paper Fig. 1, bottom)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dcafy import plots
from dcafy.amounts import fixed, percent
from dcafy.analysis.tapped import Tapped, tapped
from dcafy.display import Brief, Shown
from dcafy.errors import InputError
from dcafy.plan.options import Dimension
from dcafy.tables import Column, Sheet
from dcafy.wording import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEAR = 0.05
"""How far from 0.5 an attention value may be to be near it."""


@dataclass(frozen=True, repr=False)
class Histogram(Brief):
    """``shares`` of the values in bins of equal width; bin i lies between ``edges[i]`` and ``edges[i + 1]``."""

    edges: tuple[float, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class AttentionValues(Shown):
    """The attention values of one block.

    ``name``       the block's name
    ``dimension``  what the map varies over
    ``bounded``    whether a gate bounds the values
    ``values``     T, one row for each image, in the shape that the network gives it: ``[N, C, 1, 1]``, ``[N, 1, H, W]``
    """

    name: str
    dimension: Dimension
    bounded: bool
    values: Tensor

    @property
    def spread(self) -> float:
        """The standard deviation of the values."""
        return float(self.values.float().std(unbiased=False))

    @property
    def mean(self) -> float:
        """The mean of the values."""
        return float(self.values.float().mean())

    @property
    def near_half(self) -> float:
        """The share of values within 0.05 of 0.5: attention that hardly tells features apart (paper section 1)."""
        return float(((self.values.float() - 0.5).abs() <= NEAR).float().mean())

    def histogram(self, low: float = 0.0, high: float = 1.0, bins: int = 40) -> Histogram:
        """The shares of the values between ``low`` and ``high``, which sum to 1 where all values lie there."""
        values = self.values.detach().float().flatten().cpu()
        counts = torch.histc(values, bins=bins, min=low, max=high)
        edges = [low + (high - low) * i / bins for i in range(bins + 1)]
        return Histogram(tuple(edges), tuple((counts / max(values.numel(), 1)).tolist()))

    def to_dict(self) -> dict[str, Any]:
        """The block as JSON-ready data, with the values of each image as lists in the shape of T."""
        plain = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {**plain, "values": self.values.tolist()}

    def plot(self, ax: Axes | None = None) -> Axes:
        """The histogram of the values, from 0 to 1 or as far as they lie (matplotlib)."""
        low, high, _ = common_axes((self,))
        made = self.histogram(low, high)
        return plots.histogram(plots.axes(ax, width=4.0, height=2.4), made.shares, made.edges, title=self.name)

    def _row(self) -> dict[str, Any]:
        shape = tuple(self.values.shape)
        about = {"block": self.name, "dimension": self.dimension, "bounded": self.bounded, "shape": shape}
        return {**about, "mean": self.mean, "spread": self.spread, "near_half": self.near_half}

    def _records(self) -> list[dict[str, Any]]:
        return [self._row()]

    def _headline(self) -> str:
        told = f"mean {fixed(self.mean, 3)}, spread {fixed(self.spread, 3)}, {percent(self.near_half)} near 0.5"
        return f"{self.name}, {self.dimension} attention {list(self.values.shape)}: {told}"

    def _parts(self) -> Iterator[Sheet]:
        yield _sheet((self,))


class ValuesOfBlocks(Shown, tuple[AttentionValues, ...]):
    """The attention values of several blocks, in the order data meets them: a tuple that shows itself."""

    def to_dict(self) -> dict[str, Any]:
        """Block -> its values, as JSON-ready data."""
        return {one.name: one.to_dict() for one in self}

    def plot(self) -> list[Axes]:
        """A histogram for each block, all on the same axes (matplotlib)."""
        low, high, top = common_axes(self)
        across = min(4, max(len(self), 1))
        made = plots.grid(-(-len(self) // across), across, width=2.6, height=1.9)
        for ax in made[len(self) :]:
            ax.set_axis_off()
        for ax, block in zip(made, self, strict=False):
            found = block.histogram(low, high)
            plots.histogram(ax, found.shares, found.edges, title=block.name).set(ylim=(0, 1.05 * top))
        return made[: len(self)]

    def _records(self) -> list[dict[str, Any]]:
        return [one._row() for one in self]

    def _headline(self) -> str:
        images = len(self[0].values) if self else 0
        return f"the attention values of {counted(len(self), 'block')} on {counted(images, 'image')}"

    def _parts(self) -> Iterator[Sheet]:
        yield _sheet(self)


def _sheet(blocks: tuple[AttentionValues, ...]) -> Sheet:
    rows = tuple(
        (one.name, one.dimension, "x".join(map(str, one.values.shape)), fixed(one.mean, 3), fixed(one.spread, 3),
         percent(one.near_half))
        for one in blocks
    )  # fmt: skip
    titles = ("mean", "spread", "near 0.5")
    columns = (Column("block", "name"), Column("dimension"), Column("shape"), *(Column(t, "number") for t in titles))
    return Sheet(columns, rows, "attention values", {one.name: number for number, one in enumerate(blocks, start=1)})


def attention_values(model: nn.Module, images: Tensor, *, batch_size: int = 8) -> ValuesOfBlocks:
    """The attention values T of every block of ``model`` on ``images``, in the order data meets the blocks.

    ``images``: ``[N, C, H, W]``, prepared as the model wants them. The model runs in eval mode, on a copy; it may be
    the original or a connected one. The values are exactly those of the network's own gates.

    Raises ``InputError`` for what are no images, and what :func:`dcafy.inspect` raises. A model without attention
    gives an empty tuple.

    >>> import dcafy.analysis, torch, torchvision
    >>> values = dcafy.analysis.attention_values(torchvision.models.mobilenet_v3_small(), torch.rand(2, 3, 96, 96))
    >>> len(values), values[0].values.shape
    (9, torch.Size([2, 16, 1, 1]))
    """
    check_images(images)
    return values_of(tapped(model, images[:2]), images, batch_size=batch_size)


def values_of(copy: Tapped, images: Tensor, *, batch_size: int = 8) -> ValuesOfBlocks:
    """:func:`attention_values` of a tapped copy."""
    seen: dict[str, list[Tensor]] = {name: [] for name in copy.maps}
    with torch.no_grad():
        for part in torch.split(images, batch_size) if seen else ():
            copy.model(part)
            for name, tap in copy.maps.items():
                if tap.seen is not None:
                    seen[name].append(tap.seen.cpu())
                    tap.seen = None
    blocks = [(copy.plan.block(name), torch.cat(parts)) for name, parts in seen.items() if parts]
    return ValuesOfBlocks(
        AttentionValues(block.name, block.dimension, block.bounded, values) for block, values in blocks
    )


def common_axes(values: tuple[AttentionValues, ...], bins: int = 40) -> tuple[float, float, float]:
    """One set of axes for the histograms of all these blocks: from 0 to 1, or further where values lie further; and the
    largest share in a bin.
    """
    low = min((float(block.values.min()) for block in values), default=0.0)
    high = max((float(block.values.max()) for block in values), default=1.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError("The attention values are not finite. Look at the images, and at the model's weights.")
    low, high = min(low, 0.0), max(high, 1.0)
    return low, high, max(max(block.histogram(low, high, bins).shares) for block in values)


def check_images(images: Tensor) -> None:
    """Nothing for ``[N, C, H, W]`` with at least one image; ``InputError`` says what else it is."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        what = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"Images are a tensor [N, C, H, W] with at least one image in it, not {what}.")
