"""How sure a difference of average precisions is: a paired bootstrap over the images.

A precision belongs to all images together: no image has one of its own whose mean could be taken. So the images are
drawn anew, with replacement, as many as there are, and both networks are measured on the same draw (Efron and
Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13: percentiles). Boxes are matched once, by pycocotools:
that happens within an image, and a draw only changes how often each image counts.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcafy.detection.task import IOUS, RECALLS
from dcafy.wording import needing

RESAMPLES = 1000
"""How often the images are drawn anew."""

Numbers = Any
"""A ``numpy`` array."""

Seen = Mapping[int, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]
"""Index of the image -> (boxes, scores and labels that were found; boxes, labels, areas and crowds that there are)."""

_COLUMNS: Mapping[str, tuple[str, float | None]] = {
    "AP": ("all", None), "AP50": ("all", 0.5), "AP75": ("all", 0.75),
    "APS": ("small", None), "APM": ("medium", None), "APL": ("large", None),
}  # fmt: skip
"""Precision -> the sizes of objects and the one IoU threshold that it is of."""


@dataclass(frozen=True)
class _Class:
    """The objects of one class and size: each thing that was found, the surest first.

    ``images``   ``[D]``: in which image, by its place
    ``right``    ``[T, D]``: whether it is an object, at each IoU threshold
    ``wrong``    ``[T, D]``: whether it is none (what lies in a crowd or is of another size is neither)
    ``objects``  ``[I]``: how many there are in each image
    """

    images: Numbers
    right: Numbers
    wrong: Numbers
    objects: Numbers

    def precision(self, times: Numbers) -> Numbers | None:
        """``[T]``: the precision where each image counts so many times; ``None`` where there are no objects."""
        objects = float(times @ self.objects)
        if not objects:
            return None
        count = times[self.images]
        right, wrong = np.cumsum(self.right * count, axis=1), np.cumsum(self.wrong * count, axis=1)
        precision = right / np.maximum(right + wrong, np.spacing(1))
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # at this recall or a higher one
        means = np.zeros(len(best))
        for number, (reached, held) in enumerate(zip(right / objects, best, strict=True)):
            places = np.searchsorted(reached, RECALLS, side="left")
            means[number] = held[places[places < len(held)]].sum() / len(RECALLS)
        return means


class Matched:
    """What a detector found in the images, matched with what is in them; ``images``: their indices."""

    def __init__(self, seen: Seen) -> None:
        self.images = sorted(seen)
        evaluated = _evaluated([seen[index] for index in self.images])
        of = evaluated.params
        rows = iter(evaluated.evalImgs)
        self._classes: dict[str, list[_Class]] = {size: [] for size in of.areaRngLbl}
        for _ in of.catIds:
            for size in of.areaRngLbl:
                found = [next(rows) for _ in self.images]
                self._classes[size].append(_class(found))

    def precisions(self, times: Numbers) -> dict[str, float]:
        """COCO's precisions where each image counts so many times ``[I]``; those that mean nothing are left out."""
        means = {}
        for size, classes in self._classes.items():
            found = [precision for one in classes if (precision := one.precision(times)) is not None]
            means[size] = np.mean(found, axis=0) if found else None
        return {
            name: float(mean.mean() if at is None else mean[IOUS.index(at)])
            for name, (size, at) in _COLUMNS.items()
            if (mean := means[size]) is not None
        }


def paired_precisions(one: Seen, other: Seen) -> dict[str, tuple[float, float | None, float | None, int]]:
    """Precision -> ``one`` minus ``other``, the ends of its 95% interval, over how many images.

    Measured on the images that both have. The interval is that of :data:`RESAMPLES` draws of them, the same for both
    networks and at every call; there is none where every draw gives the same.
    """
    both = sorted(one.keys() & other.keys())
    if not both:
        return {}
    matched = [Matched({index: seen[index] for index in both}) for seen in (one, other)]
    whole = [found.precisions(np.ones(len(both))) for found in matched]
    draws = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {}
    for _ in range(RESAMPLES if len(both) > 1 else 0):
        times = np.bincount(draws.integers(len(both), size=len(both)), minlength=len(both)).astype(float)
        here, there = (found.precisions(times) for found in matched)
        for name in here.keys() & there.keys():
            drawn.setdefault(name, []).append(here[name] - there[name])
    differences: dict[str, tuple[float, float | None, float | None, int]] = {}
    for name in whole[0]:
        if name in whole[1]:
            low, high = (float(end) for end in np.percentile(drawn.get(name, [0.0]), (2.5, 97.5)))
            ends = (low, high) if low < high else (None, None)
            differences[name] = (whole[0][name] - whole[1][name], *ends, len(both))
    return differences


def _class(rows: list[Any]) -> _Class:
    """The rows of pycocotools, one for each image, as one class."""
    held = [(place, row) for place, row in enumerate(rows) if row is not None]
    scores = np.concatenate([row["dtScores"] for _, row in held]) if held else np.zeros(0)
    order = np.argsort(-scores, kind="mergesort")  # as pycocotools sorts, so that ties fall as they do there
    empty = [np.zeros((len(IOUS), 0))]
    matched, ignored = (
        np.concatenate([row[name] for _, row in held] or empty, axis=1)[:, order].astype(bool)
        for name in ("dtMatches", "dtIgnore")
    )
    objects = np.zeros(len(rows))
    for place, row in held:
        objects[place] = np.count_nonzero(np.asarray(row["gtIgnore"]) == 0)
    places = np.concatenate([np.full(len(row["dtScores"]), place) for place, row in held] or [np.zeros(0)])
    return _Class(places.astype(int)[order], matched & ~ignored, ~matched & ~ignored, objects)


def _evaluated(seen: list[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]) -> Any:
    """pycocotools' matches of what was found with what is there, by image, class and size."""
    with needing("Measuring detectors", "detection", "torchmetrics and pycocotools"):
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for place, (found, target) in enumerate(seen):
        for rows, of in zip(sides, (target, found), strict=True):
            boxes, labels = _with_sides(of["boxes"]), of["labels"].tolist()
            areas = of["area"].tolist() if "area" in of else [width * height for _, _, width, height in boxes]
            crowds = of["iscrowd"].tolist() if "iscrowd" in of else [0] * len(boxes)
            scores = of["scores"].tolist() if "scores" in of else [1.0] * len(boxes)
            for box, label, area, crowd, score in zip(boxes, labels, areas, crowds, scores, strict=True):
                rows.append({"id": len(rows) + 1, "image_id": place, "category_id": label, "bbox": box, "area": area,
                             "iscrowd": crowd, "score": score})  # fmt: skip
    labels = sorted({row["category_id"] for rows in sides for row in rows})
    made = []
    with contextlib.redirect_stdout(io.StringIO()):
        for rows in sides:
            coco = COCO()
            coco.dataset = {
                "images": [{"id": place} for place in range(len(seen))],
                "categories": [{"id": label} for label in labels],
                "annotations": rows,
            }
            coco.createIndex()
            made.append(coco)
        evaluated = COCOeval(*made, "bbox")
        evaluated.params.iouThrs = np.array(IOUS)
        evaluated.evaluate()
    return evaluated


def _with_sides(boxes: Tensor) -> list[list[float]]:
    """``(x1, y1, x2, y2)`` as ``(x, y, width, height)``."""
    corners = boxes.reshape(-1, 4)
    sides: list[list[float]] = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    return sides
