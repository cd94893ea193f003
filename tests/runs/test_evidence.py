"""The verdict of a comparison: what an interval covers, and when there is a word for it."""

from __future__ import annotations

import math
import random

import pytest
import torch

from dcafy.analysis.student import student
from dcafy.runs.evidence import Difference, crossed_difference, paired_difference


@pytest.mark.parametrize(
    ("one", "other", "verdict"),
    [
        ([0.9, 0.8, 0.85], [0.5, 0.45, 0.44], "better"),
        ([0.5, 0.45, 0.44], [0.9, 0.8, 0.85], "worse"),
        ([0.9, 0.4, 0.7], [0.5, 0.8, 0.6], "no difference that the seeds could show"),
        ([0.9], [0.1], "one seed says nothing about chance: run more with --seeds"),
        ([0.9, 0.91], [0.1, 0.11], "2 seeds say next to nothing about chance: run 3 or more with --seeds"),
        ([0.9, 0.9, 0.9], [0.8, 0.8, 0.8], "every seed gave the very same, which says nothing about chance"),
    ],
)
def test_the_word_better_needs_three_seeds_and_an_interval_that_excludes_zero(one, other, verdict) -> None:
    assert paired_difference(one, other).verdict == verdict


def test_of_a_loss_less_is_better() -> None:
    assert paired_difference([0.5, 0.45, 0.44], [0.9, 0.8, 0.85], lower_is_better=True).verdict == "better"
    less = torch.rand(4, 50, generator=torch.Generator().manual_seed(0))
    assert crossed_difference(less, less + 1 + 0.1 * less, unit=None, lower_is_better=True).verdict == "better"
    assert crossed_difference(less + 1 + 0.1 * less, less, unit=None, lower_is_better=True).verdict == "worse"


def test_the_interval_over_seeds_alone_is_students() -> None:
    found = paired_difference([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0])
    half = 3.182 * (5 / 3) ** 0.5 / 2  # t with 3 degrees of freedom, times the standard error
    assert found.mean == 2.5
    assert found.low == pytest.approx(2.5 - half, abs=1e-3)
    assert found.high == pytest.approx(2.5 + half, abs=1e-3)


def test_seeds_that_all_give_the_same_may_differ_by_an_image() -> None:
    found = paired_difference([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], of=100)
    assert halves(found) == pytest.approx((0.0277, 0.0277), abs=1e-4)
    assert found.verdict == "no difference that the seeds could show"
    apart = ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert paired_difference(*apart, of=100) == paired_difference(*apart)


@pytest.mark.parametrize(("freedom", "point"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (19, 2.0930), (200, 1.9719)])
def test_students_quantiles(freedom: int, point: float) -> None:
    assert student(freedom) == pytest.approx(point, abs=2e-4)


def halves(difference: Difference) -> tuple[float, float]:
    assert difference.low is not None
    assert difference.high is not None
    return difference.mean - difference.low, difference.high - difference.mean


def test_where_images_are_alike_the_interval_is_that_of_the_seeds() -> None:
    by_seed = torch.tensor([0.1, 0.5, 0.3, 0.2])
    found = crossed_difference(by_seed[:, None].expand(4, 100_000), torch.zeros(4, 100_000))
    expected = halves(paired_difference(by_seed.tolist(), [0.0] * 4))
    assert halves(found) == pytest.approx(expected, rel=1e-3)


def test_where_seeds_are_alike_the_interval_is_that_of_the_images() -> None:
    by_image = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    found = crossed_difference(by_image.expand(3, 2000), torch.zeros(3, 2000))
    assert halves(found)[0] == pytest.approx(1.96 * by_image.std().item() / math.sqrt(2000), rel=1e-3)


def test_it_is_wider_than_seeds_or_images_alone_would_make_it() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(5, 1, generator=generator) / 20 + torch.randn(400, generator=generator)
    both = halves(crossed_difference(rows, torch.zeros(5, 400)))[0]
    seeds = halves(paired_difference(rows.mean(1).tolist(), [0.0] * 5))[0]
    assert both > max(seeds, 1.96 * rows.mean(0).std().item() / 20)


@pytest.mark.parametrize("unit", [1.0, None])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.25])
@pytest.mark.parametrize("images", [1, 2, 50])
def test_no_interval_has_no_width(images: int, value: float, unit: float | None) -> None:
    same = torch.full((3, images), value)
    for other in (same, same + 0.5):
        found = crossed_difference(other, same, unit=unit)
        assert min(halves(found)) > 0


def test_one_seed_has_no_interval() -> None:
    found = crossed_difference(torch.rand(1, 40), torch.rand(1, 40))
    assert found.low is found.high is None
    assert "one seed" in found.verdict


@pytest.mark.parametrize("seeds", [3, 5, 10, 20])
def test_95_of_100_intervals_cover_the_truth(seeds: int) -> None:
    """``benchmarks/coverage.py`` in small: 2000 comparisons of a random world; a standard error is half a point."""
    generator = torch.Generator().manual_seed(seeds)
    trials, images, truth = 2000, 100, 0.3
    spread = random.Random(seeds).choice([0.02, 0.05, 0.1])  # of seeds; images make a standard error of 0.1
    covered = 0
    for _ in range(trials):
        rows = truth + torch.randn(images, generator=generator)
        rows = rows + spread * torch.randn(seeds, 1, generator=generator)
        rows = rows + torch.randn(seeds, images, generator=generator)
        found = crossed_difference(rows, torch.zeros(seeds, images), unit=None)
        covered += found.mean - halves(found)[0] <= truth <= found.mean + halves(found)[1]
    assert 0.935 < covered / trials < 0.97
