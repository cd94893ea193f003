"""A small synthetic detection set in COCO's format: textured shapes on textured ground.

It is made so that detectors can be trained, tested and timed where there is no real data. Whatever is measured on it
says nothing about photographs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, Any]

SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 1,
    "triangle": lambda x, y: (abs(x) <= (y + 1) / 2) & (y <= 1),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.35) & (np.maximum(abs(x), abs(y)) <= 1),
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.3),
}
"""Category -> whether a place belongs to the shape, which reaches from -1 to 1 in x and y."""


@dataclass(frozen=True)
class Synthetic:
    """Where the set is: ``--data`` takes ``spec``."""

    images: Path
    annotations: Path

    @property
    def spec(self) -> str:
        """The set as ``dcafy finetune --data`` takes it."""
        return f"coco:{self.images}:{self.annotations}"


def write_shapes(
    directory: Path | str,
    images: int = 200,
    *,
    side: int = 160,
    most: int = 4,
    sizes: tuple[float, float] = (0.1, 0.5),
    empty: float = 0.05,
    seed: int = 0,
) -> Synthetic:
    """A set of ``images`` PNG files with shapes, and their annotations, written into ``directory``.

    ``side``: the larger side of every image in pixels; the other is between 3/4 of it and the same. ``most``: the
    largest number of shapes in an image; a part ``empty`` of the images has none. ``sizes``: of the smallest and the
    largest shapes, as parts of the side (at most 0.75). Every shape is of a random category, size, colour and texture,
    and may lie over another, of which then a part is hidden. The same ``seed`` gives the same set.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = write_shapes(folder, 3, side=48)
    ...     sorted(path.name for path in made.images.iterdir())
    ['000001.png', '000002.png', '000003.png']
    """
    directory = Path(directory)
    made = Synthetic(directory / "images", directory / "annotations.json")
    made.images.mkdir(parents=True, exist_ok=True)
    pictures: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, images + 1):
        draw = np.random.default_rng((seed, number))
        width, height = side, int(draw.integers(side * 3 // 4, side + 1))
        if draw.random() < 0.5:
            width, height = height, width
        canvas = _texture(draw, height, width)
        count = 0 if draw.random() < empty else int(draw.integers(1, most + 1))
        masks = [_placed(draw, canvas, (sizes[0] * side, sizes[1] * side)) for _ in range(count)]
        for place, (category, mask) in enumerate(masks):
            hidden = np.any([later for _, later in masks[place + 1 :]], axis=0)
            row = _annotation(mask & ~hidden)
            if row is not None:
                known = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 0}
                annotations.append({**known, **row})
        name = f"{number:06}.png"
        Image.fromarray((canvas * 255).round().astype(np.uint8)).save(made.images / name)
        pictures.append({"id": number, "file_name": name, "width": width, "height": height})
    content = {
        "info": {"description": f"synthetic: textured shapes, {images} images of {side} pixels, seed {seed}"},
        "images": pictures,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(SHAPES, start=1)],
    }
    made.annotations.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return made


def _texture(draw: np.random.Generator, height: int, width: int) -> Array:
    """``[height, width, 3]``: a wave of random direction, length and colours, with noise."""
    y, x = np.mgrid[:height, :width]
    angle, length = draw.uniform(0, np.pi), draw.uniform(4, 24)
    wave = (np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / length) + 1) / 2
    first, second = draw.uniform(0, 1, (2, 3))
    colours = wave[..., None] * first + (1 - wave[..., None]) * second
    return np.clip(colours + draw.normal(0, 0.06, (height, width, 3)), 0, 1)  # type: ignore[no-any-return]


def _placed(draw: np.random.Generator, canvas: Array, sizes: tuple[float, float]) -> tuple[int, Array]:
    """(category, mask ``[height, width]``) of a new shape of such a size in pixels, drawn on ``canvas``."""
    height, width = canvas.shape[:2]
    category = int(draw.integers(len(SHAPES)))
    radius = draw.uniform(*sizes) / 2
    x0, y0 = draw.uniform(radius, width - radius), draw.uniform(radius, height - radius)
    y, x = np.mgrid[:height, :width] + 0.5
    mask = list(SHAPES.values())[category]((x - x0) / radius, (y - y0) / radius)
    canvas[mask] = _texture(draw, height, width)[mask]
    return category + 1, mask


def _annotation(mask: Array) -> dict[str, Any] | None:
    """Box, area and runs (COCO's uncompressed RLE, column by column) of what is seen of a shape."""
    ys, xs = np.nonzero(mask)
    if not len(xs):
        return None
    box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
    flat = np.concatenate([[False], mask.ravel(order="F")])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    runs = {"size": list(mask.shape), "counts": counts}
    return {"bbox": box, "area": int(mask.sum()), "segmentation": runs}
