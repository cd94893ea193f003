"""What paired trainings show: a difference, its 95% interval over seeds and validation images, and a verdict.

Two things are drawn by chance: the seeds, of which there are few, and the images that both networks are measured on,
of which there are many. Both belong into the interval. With the differences as a table of seeds by images, the
variance of their mean is that of the seeds' means over their number, plus what the images differ by whatever the
seed (the two-way analysis of variance behind a bootstrap over both; Owen, 2007, arXiv 0711.4194). The quantile lies
between Student's t, where seeds make the variance, and the normal one, where images do::

    half² = (A + B)·(z² + w^1.75 (t² - z²))    A of seeds, B of images, w = A / (A + B), t with seeds - 1 degrees

With an exponent of 1 the interval is too wide where both matter, with more than 2 too narrow; between, three seeds keep
within a point of 95% whatever w is. ``benchmarks/coverage.py`` measures how often intervals cover the truth.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dcafy.analysis.student import student

LOSSES = ("loss",)
"""Metrics of which less is better; they have no bounds, as fractions have."""

LEAST_SEEDS = 3
"""With fewer there is no verdict: two seeds say next to nothing of how much seeds differ."""

_Z = 1.959964
_EXPONENT = 1.75


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences; ``low`` and ``high`` bound its 95% interval, ``None`` where there is none.

    ``images``: over how many images the interval goes besides the seeds; 0 for seeds alone. ``lower_is_better``: as of
    a loss.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int
    images: int = 0
    lower_is_better: bool = False

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` only where three seeds or more give an interval that excludes zero."""
        if not math.isfinite(self.mean):
            return "a value that is no finite number, with which nothing can be compared"
        if self.seeds == 1:
            return "one seed says nothing about chance: run more with --seeds"
        if self.seeds < LEAST_SEEDS:
            return f"{self.seeds} seeds say next to nothing about chance: run {LEAST_SEEDS} or more with --seeds"
        if self.low is None or self.high is None:
            return "every seed gave the very same, which says nothing about chance"
        if self.low <= 0 <= self.high:
            return "no difference that the seeds could show"
        return "better" if (self.low > 0) != self.lower_is_better else "worse"


def paired_difference(
    one: Sequence[float], other: Sequence[float], *, of: int = 0, lower_is_better: bool = False
) -> Difference:
    """Mean and 95% interval of ``one`` minus ``other``, a value for each seed, over seeds alone (Student's t).

    For what is not measured image by image, such as average precision. ``of``: how many images each value is a fraction
    of; the interval is at least as wide as two more make it, one for each side. Where that is not known, seeds that all
    give the same difference say nothing about chance, and get no interval.

    >>> found = paired_difference([0.5, 0.75, 0.75], [0.25, 0.5, 0.25])
    >>> round(found.mean, 3), round(found.low, 3), found.verdict
    (0.333, -0.025, 'no difference that the seeds could show')
    """
    differences = [a - b for a, b in zip(one, other, strict=True)]
    mean, seeds = statistics.fmean(differences), len(differences)
    if seeds < 2 or not math.isfinite(mean):
        return Difference(mean, None, None, seeds, 0, lower_is_better)
    half = student(seeds - 1) * statistics.stdev(differences) / math.sqrt(seeds)
    half = max(half, _Z * math.sqrt(2) / of if of else 0.0)
    if not half:
        return Difference(mean, None, None, seeds, 0, lower_is_better)
    return Difference(mean, mean - half, mean + half, seeds, 0, lower_is_better)


def over_images(one: Sequence[float], other: Sequence[float], *, lower_is_better: bool = False) -> Difference:
    """Mean and 95% interval of ``one`` minus ``other``, a value for each image, of one network each (Student's t).

    It says nothing of other trainings, so there is no verdict.

    >>> found = over_images([1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0])
    >>> found.mean, found.images, found.verdict
    (0.25, 4, 'one seed says nothing about chance: run more with --seeds')
    """
    found = paired_difference(one, other, lower_is_better=lower_is_better)
    return dataclasses.replace(found, seeds=1, images=found.seeds)


def crossed_difference(
    one: Tensor, other: Tensor, *, unit: float | None = 1.0, lower_is_better: bool = False
) -> Difference:
    """Mean and 95% interval of ``one`` minus ``other``, over seeds and images.

    ``one``, ``other``: what each seed's network makes of each image, ``[seeds, images]``: 1 or 0 for right or wrong,
    or a loss. ``unit``: what one image can make; default: what it makes of a fraction; ``None``: what the images make
    on average. The interval is at least as wide as two images more make it, one for each side: networks that agree on
    all of so many images may differ on the next.

    >>> same = torch.ones(3, 100)
    >>> found = crossed_difference(same, same)
    >>> found.mean, round(found.high, 3), found.verdict
    (0.0, 0.028, 'no difference that the seeds could show')
    """
    differences = one.double() - other.double()
    seeds, images = differences.shape
    mean = float(differences.mean())
    if seeds < 2 or not math.isfinite(mean):
        return Difference(mean, None, None, seeds, images, lower_is_better)
    if unit is None:
        unit = _size(differences) or _size(torch.stack([one, other])) or 1.0
    by_seed, by_image = differences.mean(1, keepdim=True), differences.mean(0, keepdim=True)
    rest = differences - by_seed - by_image + mean
    of_seeds = float(by_seed.var()) / seeds
    of_images = 2 * unit**2 / images**2
    if images > 1:
        residual = float(rest.square().sum()) / ((seeds - 1) * (images - 1))
        of_images = max((float(by_image.var()) - residual / seeds) / images, of_images)
    variance = of_seeds + of_images
    share = of_seeds / variance
    half = math.sqrt(variance * (_Z**2 + share**_EXPONENT * (student(seeds - 1) ** 2 - _Z**2)))
    return Difference(mean, mean - half, mean + half, seeds, images, lower_is_better)


def _size(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
