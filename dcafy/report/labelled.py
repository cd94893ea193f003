"""Labelled images on which networks are measured: some of a data set's validation images, made ready once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dcafy.errors import InputError
from dcafy.images.data import FileImages
from dcafy.images.options import DataOptions
from dcafy.images.order import Spread, UnreadableImage
from dcafy.images.preparation import Preparation, Prepared
from dcafy.images.sources import open_data
from dcafy.wording import few, printable

MOST_LABELLED = 512
"""Images that are looked at: each connection costs a pass over them."""


@dataclass(frozen=True)
class Labelled:
    """Images ``[N, C, H, W]`` made ready, their ``labels`` as the network numbers them, and their ``names``.

    ``spec``: where they are from; ``of``: how many validation images there are; ``classes``: names, by number.
    """

    spec: str
    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    classes: tuple[str, ...]
    of: int

    def batches(self, size: int = 32) -> list[tuple[Tensor, Tensor]]:
        """Batches of (images, labels), in mixed order."""
        return list(zip(torch.split(self.images, size), torch.split(self.labels, size), strict=True))


def labelled(spec: str, how: Preparation, options: DataOptions, *, known: Sequence[str] = ()) -> Labelled:
    """Up to 512 validation images of ``--data``, evenly spread over them, in mixed order.

    ``known``: the names of the network's classes, in its order; classes are matched by name where there are any.
    Images that cannot be read are left out. Raises what :func:`dcafy.images.sources.open_data` raises, and
    ``InputError`` for classes that the network does not know.
    """
    data = open_data(spec, options)
    classes = tuple(map(printable, data.classes))
    unknown = [name for name in classes if name not in known] if known else []
    if unknown:
        raise InputError(
            f"--data {spec!r} has classes that the network does not know: {few(unknown, 5)}. It knows "
            f"{few([*known], 8)}. Name the images that it was trained on."
        )
    numbers = [known.index(name) for name in classes] if known else range(len(classes))
    source = Spread(data.val, MOST_LABELLED, mixed=True)
    prepare = Prepared(how)
    images, labels, names = [], [], []
    unread = ""
    for index, place in enumerate(source.places):
        try:
            picture, label = source[index]
        except UnreadableImage as error:
            unread = str(error)
            continue
        images.append(prepare(picture, label)[0])
        labels.append(numbers[int(label)])
        is_file = isinstance(data.val, FileImages)
        names.append(
            printable("/".join(Path(data.val.files[place][0]).parts[-2:]) if is_file else f"image {place + 1}")
        )
    if not images:
        raise InputError(
            f"None of the {len(source)} images of --data {spec!r} can be read; the last: {printable(unread)}"
        )
    named = tuple(known) or classes
    return Labelled(spec, torch.stack(images), torch.tensor(labels), tuple(names), named, len(data.val))
