"""Labelled images on which connections are cut: some of a data set's validation images, made ready once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dcafy.errors import InputError
from dcafy.images.options import DataOptions
from dcafy.images.order import Spread, UnreadableImage
from dcafy.images.preparation import Preparation, Prepared
from dcafy.images.sources import open_data
from dcafy.wording import printable

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
    source = Spread(data.val, MOST_LABELLED)
    prepare = Prepared(how)
    images, labels = [], []
    unread = ""
    for index in range(len(source)):
        try:
            picture, label = source[index]
        except UnreadableImage as error:
            unread = str(error)
            continue
        images.append(prepare(picture, label)[0])
        labels.append(int(label))
    if not images:
        raise InputError(
            f"None of the {len(source)} images of --data {spec!r} can be read; the last: {printable(unread)}"
        )
    together = torch.split(torch.stack(images), batch_size)
    batches = list(zip(together, torch.split(torch.tensor(labels), batch_size), strict=True))
    return Labelled(batches, data.classes)
