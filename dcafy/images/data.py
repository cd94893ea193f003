"""Training and validation images with labels, whatever they come from; how they are held out and read."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dcafy.errors import InputError
from dcafy.images.order import derived_seed
from dcafy.images.pictures import decoded, opened

Images = Sequence[tuple[Image.Image, int]]


@dataclass(frozen=True)
class Data:
    """Training and validation images, each a sequence of (picture, label), and the names of the classes.

    ``drawn``: whether the pictures are small drawings (digits, clothes) which a flip would turn into others. ``amiss``:
    what was found wrong with the labels, and what was done about it.
    """

    spec: str
    train: Any
    val: Any
    classes: tuple[str, ...]
    drawn: bool = False
    amiss: tuple[str, ...] = ()


class FileImages(Dataset[tuple[Image.Image, int]]):
    """Pictures in files, read when they are asked for."""

    def __init__(self, files: Sequence[tuple[str, int]]) -> None:
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.files[index]
        return opened(path), label


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


def read_idx(path: Path) -> np.ndarray[Any, Any]:
    """The array in an idx file, packed with gzip or not; ``InputError`` where it is none or is cut short."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        zero, kind, rank = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
        if zero != 0:
            raise ValueError("it does not begin as one")
        values = np.frombuffer(content, _IDX_DTYPES[kind], offset=4 + 4 * rank)
        return values.reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, KeyError, ValueError) as error:
        raise InputError(f"{path} is no whole idx file ({error}). Fetch it again.") from error
