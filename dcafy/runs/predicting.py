"""Pictures -> what a network sees in them."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dcafy.amounts import fixed, percent
from dcafy.display import Brief
from dcafy.errors import InputError, UsageError
from dcafy.images.about import About, Transforms, preparation_of
from dcafy.images.order import UnreadableImage
from dcafy.images.pictures import leads_out, lies_in, opened, pictures_in
from dcafy.runs.options import PredictOptions
from dcafy.runs.using import fitting_names, require_task
from dcafy.text import cell
from dcafy.wording import counted, one_line, printable, quoted

log = logging.getLogger("dcafy")

CLASSES, BOXES = 5, 100
"""How many classes and boxes are told of each picture where nothing else is asked for."""


@dataclass(frozen=True, repr=False)
class Prediction(Brief):
    """One picture: its most probable classes with their probabilities, or its boxes, the surest first.

    ``box``: ``(x1, y1, x2, y2)`` in pixels of the picture; ``None`` from a classifier.
    """

    file: str
    classes: tuple[str, ...]
    scores: tuple[float, ...]
    boxes: tuple[tuple[float, ...], ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The picture as JSON-ready data."""
        if self.boxes is None:
            told = zip(self.classes, self.scores, strict=True)
            return {"file": self.file, "top": [{"class": name, "probability": score} for name, score in told]}
        found = zip(self.classes, self.scores, self.boxes, strict=True)
        return {
            "file": self.file,
            "boxes": [{"class": name, "score": score, "box": list(box)} for name, score, box in found],
        }


@dataclass(frozen=True)
class Unreadable:
    """A file that is no picture, and why."""

    file: str
    reason: str


def files_in(paths: Sequence[str], *, follow_links: bool = False) -> list[str]:
    """The files that are named, and the pictures in the folders that are, with their subfolders, by folder and name.

    ``follow_links``: also those in a folder to which links lead outside of it.

    Raises ``UsageError`` for a path that is not there, and for a folder without pictures.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            root = None if follow_links else Path(path)
            listing = pictures_in(Path(path), IMG_EXTENSIONS, root)
            inside = [file for file in listing.files if root is None or lies_in(file, root)]
            outside = [(file, leads_out(Path(path))) for file in listing.files if file not in inside]
            for place, reason in (*listing.passed_over, *outside):
                log.warning("%s was passed over: %s", printable(place), printable(reason))
            if not inside:
                kinds = ", ".join(suffix[1:] for suffix in IMG_EXTENSIONS)
                raise UsageError(f"There are no pictures ({kinds}) in the folder {quoted(path, 200)}.")
            found += inside
        elif os.path.lexists(path):
            found.append(path)
        else:
            raise UsageError(f"There is no file or folder {quoted(path, 200)}. Name pictures, or folders of them.")
    return found


class _Files(Dataset["tuple[str, Tensor | str]"]):
    """Each file with its tensor, or with the reason why it has none."""

    def __init__(self, files: Sequence[str], transforms: Transforms) -> None:
        self.files, self.transforms = files, transforms

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, Tensor | str]:
        file = self.files[index]
        try:
            return file, self.transforms(opened(file))
        except UnreadableImage as error:
            return file, str(error).removeprefix(f"{printable(file)}: ")


@torch.no_grad()
def predictions(
    model: nn.Module, files: Sequence[str], options: PredictOptions, *, spec: str = "the model"
) -> Iterator[Prediction | Unreadable]:
    """What ``model`` sees in each of the files, in their order; a file that is no picture is named in its place.

    ``model``: in eval mode on its device (:func:`dcafy.runs.using.ready_for_use`). ``spec``: what messages call it.

    Raises ``InputError`` where the network does not run on such pictures, or gives what are no numbers.
    """
    what = require_task(model, spec)
    if what.task == "detection" and options.image_size is not None:
        raise UsageError("--image-size is for classifiers; a detector resizes its images itself. Leave it out.")
    if what.task == "classification":
        what = About(what.task, what.classes, preparation_of(model, spec, options.image_size))
    tell = _classes if what.task == "classification" else _boxes
    asked = _Asked(model, what, options, spec, functools.cache(lambda outputs: fitting_names(what, outputs, spec)))
    loader = DataLoader(
        _Files(files, Transforms(what)),
        batch_size=options.batch_size,
        collate_fn=list,
        num_workers=options.workers,
        multiprocessing_context="spawn" if options.workers else None,
        generator=torch.Generator(),  # else it draws a seed for its workers from the global one
    )
    device = next(model.parameters()).device
    for rows in loader:
        images = [(file, image.to(device)) for file, image in rows if isinstance(image, Tensor)]
        seen = iter(tell(asked, images) if images else ())
        for file, image in rows:
            yield next(seen) if isinstance(image, Tensor) else Unreadable(file, image)


@dataclass(frozen=True)
class _Asked:
    """Who is asked, and how it is told; ``names``: number of outputs -> the names of the classes."""

    model: nn.Module
    what: About
    options: PredictOptions
    spec: str
    names: Callable[[int], tuple[str, ...]]

    def run(self, images: Any) -> Any:
        try:
            return self.model(images)
        except (RuntimeError, TypeError, ValueError) as error:
            shape = list((images if isinstance(images, Tensor) else images[0]).shape)
            raise InputError(
                f"{self.spec!r} does not run on pictures of shape {shape}: {one_line(error)[:200]}. Choose their size "
                "with --image-size, or a smaller --batch-size where memory is short."
            ) from error


def _classes(asked: _Asked, images: list[tuple[str, Tensor]]) -> Iterator[Prediction]:
    outputs = asked.run(torch.stack([image for _, image in images]))
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        raise InputError(f"{asked.spec!r} is no classifier: it gives no tensor [N, classes].")
    names = asked.names(outputs.shape[1])
    best = outputs.float().softmax(1).topk(min(asked.options.top or CLASSES, outputs.shape[1]))
    for (file, _), scores, numbers in zip(images, best.values.tolist(), best.indices.tolist(), strict=True):
        yield Prediction(file, tuple(names[n] for n in numbers), _finite(scores, file, asked.spec))


def _boxes(asked: _Asked, images: list[tuple[str, Tensor]]) -> Iterator[Prediction]:
    found = asked.run([image for _, image in images])
    for (file, _), of in zip(images, found, strict=True):
        kept = (of["scores"] >= asked.options.threshold).nonzero()[:, 0][: asked.options.top or BOXES]
        scores, labels, boxes = (of[name][kept].tolist() for name in ("scores", "labels", "boxes"))
        told = tuple(asked.what.name_of(label) for label in labels)
        yield Prediction(file, told, _finite(scores, file, asked.spec), tuple(map(tuple, boxes)))


def _finite(scores: Sequence[float], file: str, spec: str) -> tuple[float, ...]:
    if not all(map(math.isfinite, scores)):
        raise InputError(f"{spec!r} gives no numbers for {printable(file)}: its weights or its outputs are broken.")
    return tuple(scores)


def in_words(seen: Prediction) -> str:
    """What is seen in a picture."""
    names = [f"{name} {percent(score)}" for name, score in zip(seen.classes, seen.scores, strict=True)]
    if seen.boxes is not None:
        names = [
            f"{name} at {' '.join(fixed(side, 0) for side in box)}" for name, box in zip(names, seen.boxes, strict=True)
        ]
    return ", ".join(names) or "nothing"


def as_csv(seen: Prediction) -> list[list[object]]:
    """A picture as rows of a table, names as text; :func:`csv_head` names the columns."""
    rows = enumerate(zip(seen.classes, seen.scores, seen.boxes or [()] * len(seen.classes), strict=True), start=1)
    return [[cell(seen.file), rank, cell(name), score, *box] for rank, (name, score, box) in rows]


def csv_head(task: str | None) -> list[str]:
    """The columns of :func:`as_csv`."""
    first = ["file", "rank", "class"]
    return [*first, "score", "x1", "y1", "x2", "y2"] if task == "detection" else [*first, "probability"]


def none_read(unreadable: Sequence[Unreadable]) -> InputError:
    """The error where not one file was a picture."""
    first = unreadable[0]
    return InputError(
        f"None of {counted(len(unreadable), 'file')} is a picture that can be read; the first, "
        f"{printable(first.file)}: {printable(first.reason)}."
    )
