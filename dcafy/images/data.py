"""Training and validation images with labels, whatever they come from; how they are held out and read."""

from __future__ import annotations

import contextlib
import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

from dcafy.disk import regular
from dcafy.errors import InputError
from dcafy.images.order import derived_seed
from dcafy.images.pictures import decoded, opened

Images = Sequence[tuple[Image.Image, int]]


@dataclass(frozen=True)
class Data:
    """Training and validation images, each a sequence of (picture, label), and the names of the classes.

    ``drawn``: whether the pictures are small drawings (digits, clothes) which a flip would turn into others. ``amiss``:
    what was found wrong with the labels and folders, and what was done about it.
    """

    spec: str
    train: Any
    val: Any
    classes: tuple[str, ...]
    drawn: bool = False
    amiss: tuple[str, ...] = ()


class FileImages(Dataset[tuple[Image.Image, int]]):
    """Pictures in files, read when they are asked for; ``root``: the folder that they have to lie in, if any."""

    def __init__(self, files: Sequence[tuple[str, int]], root: Path | None = None) -> None:
        self.files, self.root = list(files), root

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.files[index]
        return opened(path, self.root), label


class IndexedImages(Dataset[tuple[Image.Image, int]]):
    """Some of the pictures of another data set, arrays of ``[N, H, W]`` included."""

    def __init__(self, images: Any, labels: Sequence[int], indices: Sequence[int]) -> None:
        self.images, self.labels, self.indices = images, labels, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        place = self.indices[index]
        image = decoded(lambda: self.images[place], f"image {place}")
        if isinstance(image, tuple):  # a torchvision data set: (picture, label)
            image = image[0]
        return image if isinstance(image, Image.Image) else Image.fromarray(image), int(self.labels[place])


def known_labels(data: Any) -> list[int] | None:
    """The class of each sample, from a list that the data set has, so that no picture is decoded; ``None``: unknown."""
    if isinstance(data, Subset):
        inner = known_labels(data.dataset)
        return None if inner is None else [inner[index] for index in data.indices]
    if isinstance(data, FileImages):
        return [label for _, label in data.files]
    if isinstance(data, IndexedImages):
        return [int(data.labels[index]) for index in data.indices]
    if hasattr(data, "transform_sample") and hasattr(data, "pictures"):
        return known_labels(data.pictures)
    if isinstance(data, TensorDataset) and len(data.tensors) == 2:
        return [int(label) for label in data.tensors[1]]
    if getattr(data, "target_transform", None) is not None:  # the list is of what the labels are made of
        return None
    for name in ("targets", "labels", "_labels", "y"):
        found = getattr(data, name, None)
        if found is not None and hasattr(found, "__len__") and len(found) == len(data):
            with contextlib.suppress(TypeError, ValueError, LookupError):  # a list of something else
                # QMNIST has the class first, and then who wrote it.
                return [int(label[0] if getattr(label, "ndim", 0) else label) for label in found]
    return None


def split(labels: Sequence[int], fraction: float) -> tuple[list[int], list[int]]:
    """Indices to train and to validate on: of each class the same part, always the same, at least one to train."""
    held_out: set[int] = set()
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    for label, indices in sorted(by_class.items()):
        generator = torch.Generator().manual_seed(derived_seed(label))
        order = torch.randperm(len(indices), generator=generator).tolist()
        take = min(round(len(indices) * fraction), len(indices) - 1)
        held_out.update(indices[i] for i in order[:take])
    return [i for i in range(len(labels)) if i not in held_out], sorted(held_out)


_IDX_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}

_LARGEST_ARRAY = 2**28
"""Bytes of an array in an idx file; the images of Fashion-MNIST are 47 million."""


def read_idx(path: Path) -> np.ndarray[Any, Any]:
    """The array in an idx file, packed with gzip or not; ``InputError`` where it is none, is cut short or too large."""
    try:
        with regular(path) as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            with gzip.GzipFile(fileobj=file) if packed else file as stream:
                zero, kind, rank = struct.unpack(">HBB", stream.read(4))
                shape = struct.unpack(f">{rank}I", stream.read(4 * rank))
                dtype = np.dtype(_IDX_DTYPES[kind])
                size = math.prod(shape) * dtype.itemsize
                if zero != 0:
                    raise ValueError("it does not begin as one")
                if size > _LARGEST_ARRAY:
                    raise ValueError(f"its array is larger than {_LARGEST_ARRAY:,} bytes")
                values = np.frombuffer(stream.read(size + 1), dtype)
        return values.reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, KeyError, ValueError) as error:
        raise InputError(f"{path} is no whole idx file ({error}). Fetch it again.") from error
