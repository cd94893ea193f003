"""The interval of a difference of average precisions: COCO's own precisions, and how they vary over the images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trained import seeded

from dcafy.detection import resampling
from dcafy.detection.resampling import Matched, paired_precisions
from dcafy.detection.task import AveragePrecision
from dcafy.runs.evaluating import Evaluation, paired
from dcafy.training.tasks import Batch


def drawn(images: int, *, noise: float, seed: int = 0) -> dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Objects of all sizes and two classes, some of them crowds, and what a detector that is off by so much finds."""
    with seeded(5):
        corners = [torch.rand(4, 2) * 100 for _ in range(images)]
        sides = [torch.tensor([12.0, 40.0, 60.0, 130.0])[:, None] + 8 * torch.rand(4, 2) for _ in range(images)]
        labels = [torch.randint(1, 3, (4,)) for _ in range(images)]
    with seeded(seed):
        seen = {}
        for index, (corner, side, label) in enumerate(zip(corners, sides, labels, strict=True)):
            boxes = torch.cat([corner, corner + side], 1)
            target = {"boxes": boxes, "labels": label, "area": side.prod(1), "iscrowd": torch.tensor([0, 0, 1, 0])}
            moved = boxes + noise * torch.randn(4, 4)
            more = torch.cat([moved, torch.rand(3, 2).repeat(1, 2) * 90 + torch.tensor([0, 0, 30, 30])])
            found = {"boxes": more, "labels": torch.cat([label, label[:3]]), "scores": torch.rand(7)}
            seen[index] = (found, target) if index else ({name: value[:0] for name, value in found.items()}, target)
    return seen


def by_torchmetrics(seen: Any, times: Any) -> dict[str, float]:
    """What training measures, with each image as often as that."""
    pytest.importorskip("torchmetrics")
    pytest.importorskip("accelerate")
    meter = AveragePrecision()
    rows = [seen[index] for index, count in enumerate(times) for _ in range(int(count))]
    for number, (found, target) in enumerate(rows):
        meter.update(lambda _, found=found: [found], Batch([None], [target], torch.tensor([number]), ()))  # type: ignore[misc]
    from types import SimpleNamespace

    found = meter.result(SimpleNamespace(device=torch.device("cpu"), num_processes=1))  # type: ignore[arg-type]
    return {name: value for name, value in found.items() if name != "images"}


@pytest.mark.parametrize("times", [(1,) * 6, (0, 3, 1, 0, 1, 1), (0, 0, 0, 6, 0, 0), (6, 0, 0, 0, 0, 0)])
def test_precisions_are_cocos_of_images_drawn_so_often(times: tuple[int, ...]) -> None:
    seen = drawn(6, noise=6.0)
    expected = by_torchmetrics(seen, times)
    measured = Matched(seen).precisions(np.array(times, dtype=float))
    assert measured == pytest.approx(expected, abs=1e-6), "torchmetrics has them in float32"
    assert len(measured) == 6 or 0 in times


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "RESAMPLES", 100)


def test_the_interval_is_paired() -> None:
    """Far narrower than those of the two networks on their own, where both err on the same images."""
    good, bad = drawn(24, noise=2.0), drawn(24, noise=5.0)
    mean, low, high, images = paired_precisions(good, bad)["AP"]
    assert low is not None
    assert high is not None
    assert images == 24
    assert 0 < low < mean < high
    whole = np.ones(24)
    assert mean == pytest.approx(Matched(good).precisions(whole)["AP"] - Matched(bad).precisions(whole)["AP"])
    assert paired_precisions(good, bad)["AP"] == (mean, low, high, images), "the same draws at every call"
    reversed_ = paired_precisions(bad, good)["AP"]
    assert reversed_[:1] == (-mean,)
    assert paired_precisions(good, good)["AP"] == (0.0, None, None, 24), "it says nothing of chance"


def test_only_images_that_both_could_read_count() -> None:
    good, bad = drawn(12, noise=2.0), drawn(12, noise=5.0)
    some = {index: pair for index, pair in bad.items() if index not in (3, 7)}
    one, other = (Evaluation({}, (), seen=seen) for seen in (good, some))
    difference = paired(one, other)["AP"]
    kept = paired_precisions({index: good[index] for index in some}, some)["AP"]
    assert (difference.mean, difference.low, difference.high, difference.images) == kept
    assert difference.images == 10
    assert paired_precisions(good, {}) == {}
