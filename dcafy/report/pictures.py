"""A folder of images, as the network sees them and as the report shows them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dcafy.errors import UsageError
from dcafy.images.order import UnreadableImage
from dcafy.images.pictures import named, opened, pictures_in
from dcafy.images.preparation import Preparation, Prepared
from dcafy.plan.blocks import Skipped
from dcafy.report.labelled import Labelled
from dcafy.wording import printable, quoted

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class Pictures:
    """Images, and what became of the folder's other files.

    ``names``     of the files
    ``tensor``    what the network is given, ``[N, C, H, W]``
    ``shown``     the same, before it was normalised, with eight bits a channel
    ``skipped``   files that are no images, with reasons
    ``left_out``  how many more images the folder has than were asked for
    ``truth``     the number of the class that each is of, where that is known
    """

    names: tuple[str, ...]
    tensor: Tensor
    shown: tuple[Image.Image, ...]
    skipped: tuple[Skipped, ...] = ()
    left_out: int = 0
    truth: tuple[int | None, ...] = ()

    def __len__(self) -> int:
        return len(self.names)


def read_pictures(
    folder: Path, how: Preparation, *, most: int, follow_links: bool = False, classes: Sequence[str] = ()
) -> Pictures:
    """The first ``most`` images in ``folder`` and the folders in it, in the order of their names.

    ``follow_links``: read also what links lead to outside of the folder. ``classes``: names; an image in a folder of
    such a name is of that class. Raises ``UsageError`` where there are none;
    one that cannot be read is skipped and named.
    """
    if not os.path.isdir(folder):
        raise UsageError(f"--images {quoted(str(folder), 200)} is no folder. Name one with images in it.")
    within = None if follow_links else folder
    listing = pictures_in(folder, SUFFIXES, within)
    files = sorted(map(Path, listing.files))
    if not files:
        kinds = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise UsageError(f"--images {str(folder)!r} has no images in it ({kinds}).")
    prepare = Prepared(how)
    names, tensors, truth = [], [], []
    skipped = [Skipped(printable(os.path.relpath(path, folder)), reason) for path, reason in listing.passed_over]
    rest = iter(files)
    for path in rest:
        name = printable(str(path.relative_to(folder)))
        try:
            picture = opened(path, within)
        except UnreadableImage as error:
            skipped.append(Skipped(name, str(error).removeprefix(f"{named(path)}: ")))
            continue
        names.append(name)
        tensors.append(prepare(picture, 0)[0])
        truth.append(_class_of(path, folder, classes))
        if len(names) == most:
            break
    if not names:
        raise UsageError(
            f"None of the {len(skipped)} images in {str(folder)!r} can be read; {skipped[0].name}: {skipped[0].reason}"
        )
    stack = torch.stack(tensors)
    left_out = sum(1 for _ in rest)
    return Pictures(tuple(names), stack, _shown(stack, how), tuple(skipped), left_out, tuple(truth))


def _class_of(path: Path, folder: Path, classes: Sequence[str]) -> int | None:
    """The class whose name the folder of a file has, inside the folder that was named."""
    name = printable(path.parent.name)
    return classes.index(name) if path.parent != folder and name in classes else None


def as_pictures(images: Tensor, how: Preparation) -> Pictures:
    """Images that are prepared already, numbered from 1."""
    return Pictures(tuple(f"image {i + 1}" for i in range(len(images))), images, _shown(images, how))


def labelled_pictures(found: Labelled, how: Preparation, most: int) -> Pictures:
    """The first ``most`` of labelled images, as pictures whose class is known."""
    images = found.images[:most]
    truth = tuple(map(int, found.labels[:most]))
    return Pictures(found.names[:most], images, _shown(images, how), left_out=found.of - len(images), truth=truth)


def _shown(images: Tensor, how: Preparation) -> tuple[Image.Image, ...]:
    mean, std = (torch.tensor(values)[None, :, None, None] for values in (how.mean, how.std))
    values = ((images.detach().cpu().float() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    colours = values[:, :3] if values.shape[1] >= 3 else values[:, :1].expand(-1, 3, -1, -1)
    return tuple(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in colours)
