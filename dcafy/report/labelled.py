"""Labelled images on which connections are cut: some of a data set's validation images, made ready once."""

from __future__ import annotations

import torch
from torch import Tensor

from dcafy.errors import InputError
from dcafy.tables import printable
from dcafy.training.config import DataOptions
from dcafy.training.data import open_data
from dcafy.training.order import UnreadableImage
from dcafy.training.preparation import Preparation, Prepared

__all__ = ["MOST_LABELLED", "labelled_batches"]

MOST_LABELLED = 512
"""Images that are looked at: each connection costs a pass over them."""


def labelled_batches(
    spec: str, how: Preparation, options: DataOptions, *, batch_size: int = 32
) -> list[tuple[Tensor, Tensor]]:
    """Up to 512 validation images of ``--data``, evenly spread over them, in batches of (images, labels).

    Images that cannot be read are left out. Raises what :func:`dcafy.training.data.open_data` raises.
    """
    source = open_data(spec, options).val
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
    return list(zip(together, torch.split(torch.tensor(labels), batch_size), strict=True))
