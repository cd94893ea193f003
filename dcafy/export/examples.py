"""Pictures on which an exported network is compared with the network itself."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dcafy.detection.coco import open_coco
from dcafy.errors import DcafyError, UsageError
from dcafy.images.about import About, Transforms
from dcafy.images.options import DataOptions
from dcafy.images.order import Spread, UnreadableImage
from dcafy.images.pictures import lies_in, opened, pictures_in
from dcafy.images.sources import open_data
from dcafy.wording import printable, quoted

log = logging.getLogger("dcafy")

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_MOST = 4
"""Pictures that are looked at."""


def examples(what: About, folder: Path | None) -> tuple[list[Tensor], str]:
    """Up to four pictures, made ready as ``what`` says, and where they are from.

    From ``folder`` where one is named; else from what the network was trained on; else from scikit-learn's photographs;
    else drawn, which is told. Raises ``UsageError`` for a folder without pictures that can be read.
    """
    make = Transforms(what)
    if folder is not None:
        found = _read(_files(folder), make)
        if not found:
            raise UsageError(f"--images {str(folder)!r} has no pictures that can be read. Name a folder with some.")
        return found, printable(str(folder))
    sources: list[Callable[[], tuple[list[Tensor], str]]] = [
        lambda: _trained_on(what, make),
        lambda: _photographs(make),
    ]
    for source in sources:
        pictures, named = source()
        if pictures:
            return pictures, named
    log.warning("no real pictures to check on: drawn ones are taken. Name some with --images FOLDER.")
    return [make(picture) for picture in _drawn()], "drawn pictures"


def _files(folder: Path) -> list[str]:
    if not folder.exists():
        raise UsageError(f"There is no file or folder {quoted(str(folder), 200)}. --images names pictures to check on.")
    if not folder.is_dir():
        return [str(folder)]
    return [file for file in pictures_in(folder, SUFFIXES, folder).files if lies_in(file, folder)]


def _read(files: Sequence[str], make: Transforms) -> list[Tensor]:
    found: list[Tensor] = []
    for file in files:
        if len(found) == _MOST:
            break
        try:
            found.append(make(opened(file)))
        except UnreadableImage:
            continue
    return found


def _trained_on(what: About, make: Transforms) -> tuple[list[Tensor], str]:
    """Validation images of the data that the network was trained on, where it is still there."""
    if what.trained is None or not what.trained.opened_unasked:
        return [], ""
    try:
        data = (open_data if what.task == "classification" else open_coco)(what.trained.data, DataOptions())
    except (DcafyError, OSError) as error:
        log.info("%s cannot be opened here to check on: %s", printable(what.trained.data), printable(str(error)))
        return [], ""
    shown = Spread(data.val, 4 * _MOST)
    pictures: list[Tensor] = []
    for index in range(len(shown)):
        with contextlib.suppress(UnreadableImage):
            pictures.append(make(shown[index][0]))
        if len(pictures) == _MOST:
            break
    return pictures, printable(what.trained.data)


def _photographs(make: Transforms) -> tuple[list[Tensor], str]:
    """The two photographs that come with scikit-learn, where that is installed."""
    try:
        import sklearn.datasets
    except ImportError:
        return [], ""
    folder = Path(os.path.dirname(sklearn.datasets.__file__)) / "images"
    return _read(sorted(map(str, folder.glob("*.jpg"))), make), "scikit-learn's photographs"


def _drawn() -> list[Image.Image]:
    """Smooth pictures of two kinds."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 320), torch.linspace(0, 1, 400), indexing="ij")
    waves = [torch.stack([rows, columns, (rows + columns) / 2]), torch.stack([torch.sin(9 * rows * c) ** 2 for c in
             (columns, rows, columns + rows)])]  # fmt: skip
    return [Image.fromarray((wave * 255).to(torch.uint8).permute(1, 2, 0).numpy()) for wave in waves]
