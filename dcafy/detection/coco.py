"""``--data coco:IMAGES:ANNOTATIONS.json``: pictures with boxes, checked before the first step."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from dcafy.errors import InputError, UsageError
from dcafy.images.data import Data, split
from dcafy.images.options import DataOptions
from dcafy.images.order import UnreadableImage
from dcafy.images.pictures import opened, with_channels
from dcafy.wording import needing, printable

_FORM = "coco:IMAGES:ANNOTATIONS.json, or coco:IMAGES:TRAIN.json:VAL_IMAGES:VAL.json"

_ROUNDING = 1.0
"""Pixels by which annotation tools let boxes reach over the border; nothing is said of them."""


@dataclass(frozen=True)
class Box:
    """One annotated object: ``(x1, y1, x2, y2)`` in pixels inside the picture; ``area`` in pixels as annotated.

    ``crowd``: it stands for many objects, which are not told apart: no detector is trained on it, and finding it counts
    neither for nor against. ``outline``: COCO's segmentation, where there is one.
    """

    corners: tuple[float, float, float, float]
    category: int
    area: float
    crowd: bool = False
    outline: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class _Annotations:
    """A file of annotations, checked: pictures with their sizes, their boxes, the categories, and what was amiss."""

    root: Path
    pictures: Mapping[int, Mapping[str, Any]]
    boxes: Mapping[int, tuple[Box, ...]]
    categories: Mapping[int, str]
    amiss: tuple[str, ...]


class CocoImages(Dataset[tuple[Image.Image, dict[str, Any]]]):
    """(picture, target) with the boxes, labels, areas and crowd flags of every object in the picture.

    ``target["boxes"]`` is a ``tv_tensors.BoundingBoxes`` ``[N, 4]`` (XYXY, pixels), ``labels`` is ``[N]``. Label of a
    category: ``label_of``, by default 1 for the first, as torchvision's detectors count (0 is their background).
    ``crowds``: whether boxes of crowds are among them, to measure with. ``masks``: give outlines too, ``[N, H, W]``.
    """

    def __init__(self, known: _Annotations, ids: Sequence[int], *, crowds: bool) -> None:
        self.known, self.ids, self.crowds = known, list(ids), crowds
        self.label_of: dict[int, int] = {category: n for n, category in enumerate(sorted(known.categories), start=1)}
        self.masks = False

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        from torchvision import tv_tensors

        entry = self.known.pictures[self.ids[index]]
        path = self.known.root / entry["file_name"]
        picture = with_channels(opened(path), 3)
        if picture.size != (entry["width"], entry["height"]):
            raise UnreadableImage(
                f"{path}: it has {picture.size[0]} x {picture.size[1]} pixels, and its annotations are for "
                f"{entry['width']} x {entry['height']}"
            )
        found = [box for box in self.known.boxes.get(self.ids[index], ()) if self.crowds or not box.crowd]
        corners = torch.tensor([box.corners for box in found], dtype=torch.float32).reshape(-1, 4)
        height, width = entry["height"], entry["width"]
        target = {
            "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor([self.label_of[box.category] for box in found], dtype=torch.int64),
            "area": torch.tensor([box.area for box in found], dtype=torch.float32),
            "iscrowd": torch.tensor([box.crowd for box in found], dtype=torch.int64),
        }
        if self.masks:
            target["masks"] = tv_tensors.Mask(_masks([box.outline for box in found], height, width))
        return picture, target


def _masks(outlines: Sequence[Any], height: int, width: int) -> torch.Tensor:
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


# --- opening --------------------------------------------------------------------------------------------


def open_coco(spec: str, options: DataOptions) -> Data:
    """The pictures of ``coco:IMAGES:ANNOTATIONS.json``, split, or of ``coco:IMAGES:TRAIN.json:VAL_IMAGES:VAL.json``.

    Boxes without an area or outside their picture are left out, and those that reach over its border cut off at it;
    ``amiss`` names them. Pictures without boxes stay: a detector has to learn that there is nothing.

    Raises ``UsageError`` for a spec of another form, ``InputError`` for annotations that are damaged, of other
    pictures, or without boxes, for other categories to validate on, and with ``options.strict`` for whatever is amiss.
    """
    kind, _, rest = spec.partition(":")
    parts = rest.split(":")
    if kind != "coco" or len(parts) not in (2, 4) or not all(parts):
        raise UsageError(f"--data {spec!r} names no pictures with boxes. With --task detection it is {_FORM}.")
    train = _annotations(Path(parts[0]), Path(parts[1]))
    val = train if len(parts) == 2 else _annotations(Path(parts[2]), Path(parts[3]))
    if train.categories != val.categories:
        raise InputError(f"{parts[1]} and {parts[3]} have other categories. Both need the same, with the same ids.")
    amiss = train.amiss if val is train else train.amiss + val.amiss
    if amiss and options.strict:
        raise InputError(f"{printable(amiss[0])}, and --strict was given. Mend the annotations.")
    shown, held_out = sorted(train.pictures), sorted(val.pictures)
    if val is train:
        chosen, rest_of = split([0] * len(shown), options.val_fraction)
        shown, held_out = [held_out[i] for i in chosen], [held_out[i] for i in rest_of]
    made = CocoImages(train, shown, crowds=False), CocoImages(val, held_out, crowds=True)
    for part, what, more in zip(made, ("training", "validation"), ("lower", "raise"), strict=True):
        if all(box.crowd for box in objects(part)):
            raise InputError(
                f"None of the {len(part)} {what} images of {spec!r} has a box. Add annotations, or {more} "
                "--val-fraction."
            )
    names = tuple(train.categories[category] for category in sorted(train.categories))
    return Data(spec, *made, names, amiss=amiss)


def _annotations(root: Path, file: Path) -> _Annotations:
    content = _content(root, file)
    categories = {int(row["id"]): str(row["name"]) for row in content["categories"]}
    pictures = {row["id"]: _sized(root, row) for row in content["images"]}
    amiss: list[str] = []
    boxes: dict[int, list[Box]] = {}
    for row in content["annotations"]:
        for name, known, kind in (("image_id", pictures, "image"), ("category_id", categories, "category")):
            if row[name] not in known:
                raise InputError(
                    f"{file}: annotation {row['id']} is of {kind} {row[name]!r}, which the file does not list. Its "
                    "images, annotations and categories do not belong together."
                )
        box, said = _box(row, pictures[row["image_id"]])
        if said:
            name = pictures[row["image_id"]]["file_name"]
            amiss.append(f"{file.name}: the box of annotation {row['id']} in {name} {said}")
        if box is not None:
            boxes.setdefault(row["image_id"], []).append(box)
    return _Annotations(root, pictures, {key: tuple(row) for key, row in boxes.items()}, categories, tuple(amiss))


def _content(root: Path, file: Path) -> Mapping[str, Any]:
    """The annotations as torchvision's ``CocoDetection`` reads them, with every entry that is needed."""
    if not root.is_dir():
        raise InputError(f"There is no folder {str(root)!r} with images. --data is {_FORM}.")
    if not file.is_file():
        raise InputError(f"There is no file {str(file)!r} with annotations. --data is {_FORM}.")
    try:
        # pycocotools tells how long it took
        with needing("Training detectors", "detection", "pycocotools"), contextlib.redirect_stdout(io.StringIO()):
            from torchvision.datasets import CocoDetection

            content: Any = CocoDetection(str(root), str(file)).coco.dataset
        needed = {"images": ("id", "file_name"), "annotations": ("id", "image_id", "category_id", "bbox"),
                  "categories": ("id", "name")}  # fmt: skip
        for part, names in needed.items():
            for row in content[part]:
                for name in names:
                    row[name]
    except KeyError as error:
        raise InputError(
            f"{file} is no file of annotations in COCO's format: it has no {error}. Export it anew."
        ) from error
    except (OSError, ValueError, TypeError, AssertionError) as error:
        reason = printable(" ".join(str(error).split())[:120])
        raise InputError(f"{file} is no file of annotations in COCO's format ({reason}). Export it anew.") from error
    _require_files(root, file, content["images"])
    return content  # type: ignore[no-any-return]


def _require_files(root: Path, file: Path, images: Sequence[Mapping[str, Any]]) -> None:
    """Some of the pictures are there: a few that are missing are skipped as unreadable ones are."""
    missing = [row["file_name"] for row in images if not (root / row["file_name"]).is_file()]
    if len(missing) == len(images):
        example = f", such as {printable(missing[0])}" if missing else ""
        raise InputError(f"None of the {len(images)} images of {file} is in {root}{example}. Name their folder.")


def _sized(root: Path, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry with width and height, from the head of the file where the annotations do not tell them."""
    if "width" in row and "height" in row:
        return row
    try:
        with Image.open(root / row["file_name"]) as picture:
            width, height = picture.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        width = height = 0  # it is named when it is read
    return {**row, "width": width, "height": height}


def _box(row: Mapping[str, Any], picture: Mapping[str, Any]) -> tuple[Box | None, str]:
    """The box of an annotation, cut off at the picture's border, and what was amiss with it."""
    given = row["bbox"]
    if not isinstance(given, list) or len(given) != 4 or not all(_is_number(value) for value in given):
        return None, f"is {printable(str(given)[:40])}, not [x, y, width, height]: left out"
    x, y, width, height = map(float, given)
    if width <= 0 or height <= 0:
        return None, f"has no area ({width:g} x {height:g}): left out"
    right, bottom = picture["width"], picture["height"]
    corners = max(x, 0.0), max(y, 0.0), min(x + width, right), min(y + height, bottom)
    size = f"({right} x {bottom})"
    if corners[2] <= corners[0] or corners[3] <= corners[1]:
        return None, f"lies outside the image {size}: left out"
    over = max(-x, -y, x + width - right, y + height - bottom)
    area: Any = row.get("area")
    measured = float(area) if _is_number(area) and area > 0 else (corners[2] - corners[0]) * (corners[3] - corners[1])
    box = Box(corners, row["category_id"], measured, bool(row.get("iscrowd", 0)), row.get("segmentation") or None)
    return box, f"reaches over the border of the image {size}: cut off there" if over > _ROUNDING else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def objects(images: CocoImages) -> Iterator[Box]:
    """Every box in these pictures."""
    for number in images.ids:
        yield from images.known.boxes.get(number, ())
