"""``--data coco:IMAGES:ANNOTATIONS.json``: pictures with boxes, checked before the first step."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from dcafy.detection.outlines import drawn, wrong
from dcafy.disk import content, regular
from dcafy.errors import InputError, UsageError
from dcafy.images.data import Data, split
from dcafy.images.options import DataOptions
from dcafy.images.order import UnreadableImage
from dcafy.images.pictures import named, opened, size_of, with_channels
from dcafy.records import Wrong, short
from dcafy.wording import needing, printable, quoted, refused

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
    """A file of annotations, checked: pictures with their sizes, their boxes, the categories, and what was amiss.

    ``within``: the folder that pictures have to lie in, if any.
    """

    root: Path
    within: Path | None
    pictures: Mapping[Any, Mapping[str, Any]]
    boxes: Mapping[Any, tuple[Box, ...]]
    categories: Mapping[int, str]
    amiss: tuple[str, ...]


class CocoImages(Dataset[tuple[Image.Image, dict[str, Any]]]):
    """(picture, target) with the boxes, labels, areas and crowd flags of every object in the picture.

    ``target["boxes"]`` is a ``tv_tensors.BoundingBoxes`` ``[N, 4]`` (XYXY, pixels), ``labels`` is ``[N]``. Label of a
    category: ``label_of``, by default 1 for the first, as torchvision's detectors count (0 is their background).
    ``crowds``: whether boxes of crowds are among them, to measure with. ``masks``: give outlines too, ``[N, H, W]``.
    """

    def __init__(self, known: _Annotations, ids: Sequence[Any], *, crowds: bool) -> None:
        self.known, self.ids, self.crowds = known, list(ids), crowds
        self.label_of: dict[int, int] = {category: n for n, category in enumerate(sorted(known.categories), start=1)}
        self.masks = False

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        from torchvision import tv_tensors

        entry = _sized(self.known.root, dict(self.known.pictures[self.ids[index]]), self.known.within)
        path = self.known.root / entry["file_name"]
        picture = with_channels(opened(path, self.known.within), 3)
        if picture.size != (entry["width"], entry["height"]):
            raise UnreadableImage(
                f"{named(path)}: it has {picture.size[0]} x {picture.size[1]} pixels, and its annotations are "
                f"for {entry['width']} x {entry['height']}"
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
            if any(box.outline is None for box in found):
                raise UnreadableImage(f"{named(path)}: an object in it has no outline")
            target["masks"] = tv_tensors.Mask(drawn([box.outline for box in found], height, width))
        return picture, target


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
        raise UsageError(
            f"--data {quoted(spec, 200)} names no pictures with boxes. With --task detection it is {_FORM}."
        )
    with needing("Training detectors", "detection", "pycocotools"):
        import pycocotools  # noqa: F401
    pairs = [(Path(images), Path(file)) for images, file in zip(parts[::2], parts[1::2], strict=True)]
    sets = [_annotations(root, file, None if options.follow_links else root) for root, file in pairs]
    train, val = sets[0], sets[-1]
    if train.categories != val.categories:
        raise InputError(f"{parts[1]} and {parts[3]} have other categories. Both need the same, with the same ids.")
    amiss = train.amiss if val is train else train.amiss + val.amiss
    if amiss and options.strict:
        raise InputError(f"{amiss[0]}, and --strict was given. Mend the annotations.")
    shown, held_out = (sorted(part.pictures, key=lambda one: (isinstance(one, str), one)) for part in (train, val))
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


def _annotations(root: Path, file: Path, within: Path | None) -> _Annotations:
    """The annotations in ``file``, checked, of the pictures in ``root``."""
    if not os.path.isdir(root):
        raise InputError(f"There is no folder {quoted(str(root), 200)} with images. --data is {_FORM}.")
    if not os.path.isfile(file):
        raise InputError(f"There is no file {quoted(str(file), 200)} with annotations. --data is {_FORM}.")
    try:
        return _checked(_document(file), root, file, within)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{quoted(str(file), 200)} is no file of annotations in COCO's format ({refused(error)}). Export it anew."
        ) from error


_LARGEST = 2**32
"""Bytes that a file of annotations may have; those of COCO's training images are 450 million."""


def _document(file: Path) -> dict[str, Any]:
    """The object in a file of JSON."""
    with regular(file) as stream:
        if stream.read(1000).lstrip()[:1] != b"{":  # whatever else it is, it is not read whole
            raise ValueError("it is no JSON object")
    try:
        document: dict[str, Any] = json.loads(content(file, _LARGEST))
    except RecursionError as error:
        raise ValueError("lists in lists without end") from error
    return document


def _checked(document: dict[str, Any], root: Path, file: Path, within: Path | None) -> _Annotations:
    categories: dict[int, str] = {}
    for where, row in _rows(document, "categories", ("id", "name")):
        number = _number(row["id"], f"{where}.id")
        _once(categories, number, where)
        categories[number] = _text(row["name"], f"{where}.name")
    pictures: dict[Any, dict[str, Any]] = {}
    for where, row in _rows(document, "images", ("id", "file_name")):
        _once(pictures, _name(row["id"], f"{where}.id"), where)
        sides: dict[str, Any] = {
            side: _number(row[side], f"{where}.{side}", least=1) for side in ("width", "height") if side in row
        }
        pictures[row["id"]] = {"file_name": _text(row["file_name"], f"{where}.file_name"), **sides}
    _require_files(root, file, pictures)
    amiss: list[str] = []
    boxes: dict[Any, list[Box]] = {}
    for where, row in _rows(document, "annotations", ("id", "image_id", "category_id", "bbox")):
        image, category = (
            _name(row["image_id"], f"{where}.image_id"),
            _number(row["category_id"], f"{where}.category_id"),
        )
        for name, known, kind in ((image, pictures, "image"), (category, categories, "category")):
            if name not in known:
                raise InputError(
                    f"{quoted(str(file), 200)}: annotation {short(row['id'])} is of {kind} {short(name)}, which the "
                    "file does not list. Its images, annotations and categories do not belong together."
                )
        if row.get("iscrowd") not in (None, 0, 1):
            raise Wrong(f"{where}.iscrowd", "0 or 1", row["iscrowd"])
        picture = _sized(root, pictures[row["image_id"]], within)
        box, said = _box(row, picture)
        if said:
            what = f"{printable(file.name)}: annotation {short(row['id'])} in {printable(picture['file_name'])[:200]}"
            amiss += (f"{what}: {part}" for part in said)
        if box is not None:
            boxes.setdefault(row["image_id"], []).append(box)
    return _Annotations(
        root, within, pictures, {key: tuple(row) for key, row in boxes.items()}, categories, tuple(amiss)
    )


# --- what an entry has to be ----------------------------------------------------------------------------


def _rows(document: Any, part: str, names: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row of a part stands, and it; it has what is needed."""
    if not isinstance(document, dict) or part not in document:
        raise ValueError(f"it has no {part!r}")
    if not isinstance(document[part], list):
        raise Wrong(part, "a list", document[part])
    for number, row in enumerate(document[part]):
        if not isinstance(row, dict):
            raise Wrong(f"{part}[{number}]", "an object", row)
        missing = [name for name in names if name not in row]
        if missing:
            raise ValueError(f"{part}[{number}] has no {missing[0]!r}")
        yield f"{part}[{number}]", row


def _number(value: Any, where: str, least: int = 0) -> int:
    # Some tools write 1.0; True is equal to 1, and no number.
    if type(value) not in (int, float) or not least <= value < 2**31 or value != int(value):
        raise Wrong(where, f"a whole number of at least {least}", value)
    return int(value)


def _name(value: Any, where: str) -> int | str:
    if type(value) not in (int, float, str) or value != value:
        raise Wrong(where, "a whole number or text", value)
    return value  # type: ignore[no-any-return]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise Wrong(where, "text", value)
    return value


def _once(known: Collection[Any], name: Any, where: str) -> None:
    if name in known:
        raise ValueError(f"{where} has the id {short(name)}, as another has")


def _require_files(root: Path, file: Path, pictures: Mapping[Any, Mapping[str, Any]]) -> None:
    """Some of the pictures are there: a few that are missing are skipped as unreadable ones are."""
    names = [row["file_name"] for row in pictures.values()]
    if not any(os.path.isfile(os.path.join(root, name)) for name in names):
        example = f", such as {quoted(names[0])}" if names else ""
        raise InputError(
            f"None of the {len(names)} images of {quoted(str(file), 200)} is in {quoted(str(root), 200)}{example}. "
            "Name their folder."
        )


def _sized(root: Path, picture: dict[str, Any], within: Path | None) -> Mapping[str, Any]:
    """The entry with width and height, from the head of the file where the annotations do not tell them."""
    if "width" not in picture or "height" not in picture:
        try:
            picture["width"], picture["height"] = size_of(root / picture["file_name"], within)
        except UnreadableImage:
            picture["width"] = picture["height"] = 0  # it is named when it is read
    return picture


def _box(row: Mapping[str, Any], picture: Mapping[str, Any]) -> tuple[Box | None, tuple[str, ...]]:
    """The box of an annotation, cut off at the picture's border, and what was amiss with it and with its outline."""
    given = row["bbox"]
    if not isinstance(given, list) or len(given) != 4 or not all(map(_is_number, given)):
        return None, (f"the box is {short(given)}, not [x, y, width, height]: left out",)
    x, y, width, height = map(float, given)
    if width <= 0 or height <= 0:
        return None, (f"the box has no area ({width:g} x {height:g}): left out",)
    right, bottom = picture["width"], picture["height"]
    corners = max(x, 0.0), max(y, 0.0), min(x + width, right), min(y + height, bottom)
    size = f"({right} x {bottom})"
    if corners[2] <= corners[0] or corners[3] <= corners[1]:
        return None, (f"the box lies outside the image {size}: left out",)
    over = max(-x, -y, x + width - right, y + height - bottom)
    said = [f"the box reaches over the border of the image {size}: cut off there"] if over > _ROUNDING else []
    area: Any = row.get("area")
    is_area = _is_number(area) and 0 < area <= right * bottom
    measured = float(area) if is_area else (corners[2] - corners[0]) * (corners[3] - corners[1])
    outline = row.get("segmentation") or None
    reason = wrong(outline, bottom, right) if outline is not None else ""
    if reason:
        outline, said = None, [*said, f"the outline {reason}: left out"]
    return Box(corners, int(row["category_id"]), measured, bool(row.get("iscrowd")), outline), tuple(said)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15  # which what is no number is not


def objects(images: CocoImages) -> Iterator[Box]:
    """Every box in these pictures."""
    for number in images.ids:
        yield from images.known.boxes.get(number, ())
