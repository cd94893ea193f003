"""COCO's outlines of objects: checked in Python before pycocotools' C code meets them, which trusts every number."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from dcafy.records import short

_LONGEST = 2**20
"""Pixels along the outline of one object; pycocotools takes a hundred bytes for each."""


def drawn(outlines: Sequence[Any], height: int, width: int) -> torch.Tensor:
    """The outlines (polygons, or runs of pixels) as pictures of 0 and 1, ``[N, height, width]``."""
    from pycocotools import mask

    made = []
    for outline in outlines:
        runs = mask.merge(mask.frPyObjects(outline, height, width)) if isinstance(outline, list) else outline
        if isinstance(outline, dict) and isinstance(outline["counts"], list):
            runs = mask.frPyObjects(outline, height, width)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools speaks numpy 1
            made.append(torch.from_numpy(mask.decode(runs)))
    return torch.stack(made) if made else torch.zeros(0, height, width, dtype=torch.uint8)


def wrong(outline: Any, height: int, width: int) -> str:
    """Why it is no outline of an object in a picture of that size; empty where it is one.

    >>> wrong([[1, 1, 9, 1, 9, 9]], 30, 40)
    ''
    >>> wrong({"size": [30, 40], "counts": [600, 601]}, 30, 40)
    'has runs of 1201 pixels in all, not 30 x 40'
    """
    if isinstance(outline, list):
        return _wrong_polygons(outline, height, width)
    if isinstance(outline, dict):
        return _wrong_runs(outline, height, width)
    return f"is {short(outline)}, not polygons or runs"


def _wrong_polygons(polygons: list[Any], height: int, width: int) -> str:
    side, length = max(height, width), 0.0
    for polygon in polygons:
        if not isinstance(polygon, list) or not {*map(type, polygon)} <= {int, float}:
            return f"has {short(polygon)}, not a list of numbers"
        if len(polygon) < 6 or len(polygon) % 2:
            return f"has a polygon of {len(polygon)} numbers, not of three points or more"
        lowest, highest = min(polygon), max(polygon)
        # The first comparisons are false for what is no number, if it stands first; elsewhere the sum is none.
        if not (lowest >= -side and highest <= 2 * side) or sum(polygon) != sum(polygon):
            return f"reaches far over the border of the image ({width} x {height})"
        most = (highest - lowest) * len(polygon) / 2
        length += most if most < _LONGEST else _length(polygon)
        if length > _LONGEST:
            return f"is more than {_LONGEST:,} pixels long"
    return ""


def _length(polygon: list[float]) -> float:
    """Pixels along a polygon, as pycocotools counts them."""
    xs, ys = polygon[::2], polygon[1::2]
    edges = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
    return sum(max(abs(x - x2), abs(y - y2)) for x, y, x2, y2 in edges)


def _wrong_runs(runs: dict[str, Any], height: int, width: int) -> str:
    if runs.get("size") != [height, width]:
        return f"has runs for a size of {short(runs.get('size'))}, not of [{height}, {width}]"
    counts = runs.get("counts")
    try:
        lengths = _lengths(counts) if isinstance(counts, str) else counts
    except ValueError:
        return "has runs that are damaged"
    if not isinstance(lengths, list) or not {*map(type, lengths)} <= {int} or min(lengths, default=0) < 0:
        return f"has runs of {short(counts)}, not a list of whole numbers"
    if sum(lengths) != height * width:
        return f"has runs of {short(sum(lengths))} pixels in all, not {height} x {width}"
    return ""


def _lengths(text: str) -> list[int]:
    """The runs in COCO's text: five bits a character, the lowest first; from the third on, less the one before last."""
    lengths: list[int] = []
    value = place = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or place > 35:
            raise ValueError("no such character, or a number without end")
        value |= (bits & 31) << place
        place += 5
        if bits & 32:
            continue
        if bits & 16:
            value |= -1 << place
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = place = 0
    if place:
        raise ValueError("the last number is cut off")
    return lengths
