"""``--data``: a spec -> training and validation images with labels, checked before the first step."""

from __future__ import annotations

import gzip
import inspect
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dcafy.errors import InputError, UsageError
from dcafy.images.options import DataOptions
from dcafy.images.order import derived_seed
from dcafy.images.pictures import decoded, opened
from dcafy.wording import nearest, printable

__all__ = ["Data", "FileImages", "IndexedImages", "open_data", "read_idx"]

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


def open_data(spec: str, options: DataOptions) -> Data:
    """The data of a spec: ``imagefolder:PATH``, ``torchvision:NAME:ROOT``, ``digits`` or ``fashion-mnist[:PATH]``.

    Raises ``UsageError`` for a spec that is not known, ``InputError`` for data that no classifier can be trained on:
    nothing there, a class without images, one class only, no validation images, other classes to validate on.

    >>> data = open_data("digits", DataOptions(val_fraction=0.25))
    >>> len(data.train), len(data.val), len(data.classes)
    (1347, 450, 10)
    """
    kind, _, rest = spec.partition(":")
    if kind not in _SOURCES:
        raise UsageError(
            f"--data {spec!r} is not known.{nearest(kind, list(_SOURCES))} It is imagefolder:PATH, "
            "torchvision:NAME:ROOT, digits, or fashion-mnist[:PATH]."
        )
    data = _SOURCES[kind](spec, rest, options)
    if len(data.classes) < 2:
        raise InputError(
            f"{spec!r} has one class only ({printable(', '.join(data.classes))}). A classifier needs two or more: "
            "one folder for each class."
        )
    if not len(data.train):
        raise InputError(f"{spec!r} has no training images.")
    if not len(data.val):
        raise InputError(f"{spec!r} has no validation images. Raise --val-fraction, or put some into {rest}/val.")
    return data


# --- folders of pictures --------------------------------------------------------------------------------


def _image_folder(spec: str, path: str, options: DataOptions) -> Data:
    root = Path(path)
    if not path or not root.is_dir():
        raise UsageError(
            f"There is no folder {path!r}. --data imagefolder:PATH names one with a folder for each class."
        )
    val = next((root / name for name in ("val", "valid", "validation") if (root / name).is_dir()), None)
    if (root / "train").is_dir() and val is None:
        raise InputError(f"{root} has a folder train and no folder val. Add {root / 'val'}, with the same classes.")
    if val is None or not (root / "train").is_dir():
        classes, files = _class_folders(root)
        labels = [label for _, label in files]
        train, held_out = split(labels, options.val_fraction)
        return Data(spec, FileImages([files[i] for i in train]), FileImages([files[i] for i in held_out]), classes)
    classes, files = _class_folders(root / "train")
    others, val_files = _class_folders(val)
    if classes != others:
        only = [f"{name} only in {side}" for names, side in ((set(classes) - set(others), "train"),
                (set(others) - set(classes), val.name)) for name in sorted(names)]  # fmt: skip
        raise InputError(
            f"The classes of {root / 'train'} and {val} differ: {printable(', '.join(only[:6]))}. Both need a folder "
            "for each class."
        )
    return Data(spec, FileImages(files), FileImages(val_files), classes)


_PARTS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


def _class_folders(root: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """The names of the classes, and (file, label) of every picture."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    classes = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if not classes:
        raise InputError(f"{root} has no folders in it. Put the images of each class into a folder of its own.")
    if all(name.lower() in _PARTS for name in classes):
        raise InputError(
            f"The folders in {root} are no classes: {printable(', '.join(classes))}. Name them train and val, with a "
            "folder for each class in both."
        )
    numbers = {name: number for number, name in enumerate(classes)}
    files = make_dataset(str(root), numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
    filled = {label for _, label in files}
    empty = [name for name in classes if numbers[name] not in filled]
    if empty:
        raise InputError(
            f"{printable(', '.join(empty[:5]))} in {root} has no images. Remove the empty folder, or put images "
            f"({', '.join(IMG_EXTENSIONS)}) into it."
        )
    return classes, files


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


# --- torchvision's data sets ----------------------------------------------------------------------------

_SPLITS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    **dict.fromkeys(
        ("MNIST", "FashionMNIST", "KMNIST", "QMNIST", "CIFAR10", "CIFAR100", "USPS"),
        ({"train": True}, {"train": False}),
    ),
    "EMNIST": ({"train": True, "split": "balanced"}, {"train": False, "split": "balanced"}),
    **dict.fromkeys(
        ("SVHN", "STL10", "Food101", "StanfordCars", "GTSRB", "FER2013"), ({"split": "train"}, {"split": "test"})
    ),
    **dict.fromkeys(
        ("Flowers102", "DTD", "FGVCAircraft", "PCAM", "Imagenette", "ImageNet", "RenderedSST2"),
        ({"split": "train"}, {"split": "val"}),
    ),
    "OxfordIIITPet": ({"split": "trainval"}, {"split": "test"}),
    "Country211": ({"split": "train"}, {"split": "valid"}),
    "Places365": ({"split": "train-standard"}, {"split": "val"}),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "SEMEION", "SUN397"), ({}, None)),
}
"""torchvision's classification data sets -> the arguments for training and for validation images."""

_DRAWN = frozenset({"MNIST", "FashionMNIST", "KMNIST", "QMNIST", "EMNIST", "USPS", "SVHN", "SEMEION", "GTSRB"})


def _torchvision(spec: str, rest: str, options: DataOptions) -> Data:
    from torchvision import datasets

    name, _, root = rest.partition(":")
    if name not in _SPLITS:
        raise UsageError(
            f"--data {spec!r}: torchvision has no classification data set {name!r} that is known here."
            f"{nearest(name, list(_SPLITS))} Known: {', '.join(sorted(_SPLITS))}."
        )
    if not root:
        raise UsageError(f"--data {spec!r} names no folder. Write torchvision:{name}:ROOT, where ROOT holds the data.")
    builder = getattr(datasets, name)
    accepts = inspect.signature(builder).parameters
    fetch = {"download": options.download} if "download" in accepts else {}
    try:
        made = [builder(root, **arguments, **fetch) for arguments in _SPLITS[name] if arguments is not None]
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"{spec!r} cannot be opened: {' '.join(str(error).split())[:200]} If it is not there yet, --download "
            "fetches it."
        ) from error
    labels = [_labels(dataset) for dataset in made]
    numbers = sorted({label for part in labels for label in part})
    classes = tuple(str(c) for c in getattr(made[0], "classes", None) or getattr(made[0], "categories", ()) or numbers)
    parts = [(made[0], labels[0], range(len(made[0])))]
    if len(made) == 2:
        parts.append((made[1], labels[1], range(len(made[1]))))
    else:
        train, held_out = split(labels[0], options.val_fraction)
        parts = [(made[0], labels[0], train), (made[0], labels[0], held_out)]  # type: ignore[list-item]
    return Data(spec, IndexedImages(*parts[0]), IndexedImages(*parts[1]), classes, drawn=name in _DRAWN)


def _labels(dataset: Any) -> list[int]:
    """All labels; from the data set's own list where it has one, so that no picture is decoded."""
    for name in ("targets", "labels", "_labels", "y"):
        found = getattr(dataset, name, None)
        if found is not None and len(found) == len(dataset):
            # QMNIST has the class first, and then who wrote it.
            return [int(label[0] if getattr(label, "ndim", 0) else label) for label in found]
    return [int(label) for _, label in dataset]


# --- digits and clothes ---------------------------------------------------------------------------------


def _digits(spec: str, rest: str, options: DataOptions) -> Data:
    if rest:
        raise UsageError(f"--data {spec!r}: digits ships with scikit-learn and takes no path. Write --data digits.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("--data digits needs scikit-learn: pip install -e '.[examples]'.") from error
    loaded = load_digits()
    images = (loaded.images * (255 / 16)).round().astype(np.uint8)
    labels = [int(label) for label in loaded.target]
    train, held_out = split(labels, options.val_fraction)
    names = tuple(str(number) for number in range(10))
    parts = [IndexedImages(images, labels, part) for part in (train, held_out)]
    return Data(spec, parts[0], parts[1], names, drawn=True)


_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

_IDX_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def _fashion_mnist(spec: str, rest: str, options: DataOptions) -> Data:
    places = (
        [Path(rest)] if rest else [Path(p, "share/datasets/fashion-mnist") for p in ("/usr", "/usr/local", sys.prefix)]
    )
    root = next((place for place in places if place.is_dir()), None)
    if root is None:
        raise InputError(
            f"There is no Fashion-MNIST in {' or '.join(map(str, places))}. On Debian: apt install "
            "dataset-fashion-mnist; elsewhere name the folder with its four idx files: --data fashion-mnist:PATH."
        )
    parts = []
    for prefix in ("train", "t10k"):
        images, labels = (_idx_named(root, f"{prefix}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or labels.max(initial=0) > 9:
            raise InputError(f"The {prefix} files in {root} do not belong together: {images.shape}, {labels.shape}.")
        parts.append(IndexedImages(images, labels.tolist(), range(len(labels))))
    return Data(spec, parts[0], parts[1], _CLOTHES, drawn=True)


def _idx_named(root: Path, name: str) -> np.ndarray[Any, Any]:
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return read_idx(path)
    raise InputError(f"{root} has no {name} (or {name}.gz), one of the four files of Fashion-MNIST.")


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


_SOURCES: dict[str, Callable[[str, str, DataOptions], Data]] = {
    "imagefolder": _image_folder,
    "torchvision": _torchvision,
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
}
"""The first word of a spec -> what opens it."""
