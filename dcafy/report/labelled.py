"""Labelled images on which connections are cut: some of a data set's validation images, made ready once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dcafy.errors import InputError
from dcafy.images.options import DataOptions
from dcafy.images.order import UnreadableImage
from dcafy.images.preparation import Preparation, Prepared
from dcafy.images.sources import open_data
from dcafy.wording import printable

__all__ = ["MOST_LABELLED", "Labelled", "labelled"]

MOST_LABELLED = 512
"""Images that are looked at: each connection costs a pass over them."""


@dataclass(frozen=True)
class Labelled:
    """``batches`` of (images, labels), and the names of the ``classes``."""

    batches: list[tuple[Tensor, Tensor]]
    classes: tuple[str, ...]


def labelled(spec: str, how: Preparation, options: DataOptions, *, batch_size: int = 32) -> Labelled:
    """Up to 512 validation images of ``--data``, evenly spread over them, in batches.

    Images that cannot be read are left out. Raises what :func:`dcafy.images.sources.open_data` raises.
    """
    data = open_data(spec, options)
    source = data.val
    prepare = Prepared(how)
    count = min(len(source), MOST_LABELLED)
    images, labels = [], []
    unread = ""
    for index in (i * len(source) // count for i in range(count)):
        try:
            picture, label = source[index]
        except UnreadableImage as error:
            unread = str(error)
            continue
        images.append(prepare(picture, label)[0])
        labels.append(int(label))
    if not images:
        raise InputError(f"None of the {count} images of --data {spec!r} can be read; the last: {printable(unread)}")
    together = torch.split(torch.stack(images), batch_size)
    batches = list(zip(together, torch.split(torch.tensor(labels), batch_size), strict=True))
    return Labelled(batches, data.classes)
