"""``--data``: a spec -> training and validation images with labels, checked before the first step.

What opens a source is imported where it is used: the command reads the forms of the specs from here.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcafy.errors import InputError, UsageError
from dcafy.images.options import DataOptions
from dcafy.wording import nearest, needing, one_line, printable, quoted, refused

if TYPE_CHECKING:
    import numpy as np

    from dcafy.images.data import Data


def open_data(spec: str | os.PathLike[str], options: DataOptions) -> Data:
    """The data of a spec: ``imagefolder:PATH``, ``torchvision:NAME:ROOT``, ``digits`` or ``fashion-mnist[:PATH]``.

    The path of a folder alone is that of a folder of images.

    Raises ``UsageError`` for a spec that is not known, ``InputError`` for data that no classifier can be trained on:
    nothing there, a class without images, one class only, no validation images, other classes to validate on.

    >>> data = open_data("digits", DataOptions(val_fraction=0.25))
    >>> len(data.train), len(data.val), len(data.classes)
    (1347, 450, 10)
    """
    spec = _in_full(os.fspath(spec))
    kind, _, rest = spec.partition(":")
    if kind not in SOURCES:
        nowhere = f"There is no folder {quoted(spec, 200)}, and it" if os.sep in spec else f"--data {quoted(spec)}"
        raise UsageError(f"{nowhere} is not known.{nearest(kind, list(SOURCES))} It is {forms()}.")
    data = SOURCES[kind].open(spec, rest, options)
    if data.amiss and options.strict:
        raise InputError(f"{data.amiss[0]}, and --strict was given. Mend it, or remove it.")
    if len(data.classes) < 2:
        raise InputError(
            f"{quoted(spec, 200)} has one class only ({printable(', '.join(data.classes))}). A classifier needs two or "
            "more: one folder for each class."
        )
    if not len(data.train):
        raise InputError(f"{quoted(spec, 200)} has no training images.")
    if not len(data.val):
        raise InputError(
            f"{quoted(spec, 200)} has no validation images. Raise --val-fraction, or put some into {rest}/val."
        )
    return data


def _in_full(spec: str) -> str:
    """The spec with its first word, which a folder of images can do without."""
    return f"imagefolder:{spec}" if spec.partition(":")[0] not in SOURCES and os.path.isdir(spec) else spec


# --- folders of pictures --------------------------------------------------------------------------------


def _folder(spec: str, path: str, options: DataOptions) -> Data:
    from dcafy.images.data import Data, FileImages, split

    if not os.path.isdir(path):
        raise UsageError(
            f"There is no folder {quoted(path, 200)}. --data FOLDER names one with a folder for each class."
        )
    root = Path(path)
    within = None if options.follow_links else root
    val = next((root / name for name in ("val", "valid", "validation") if (root / name).is_dir()), None)
    if (root / "train").is_dir() and val is None:
        raise InputError(f"{root} has a folder train and no folder val. Add {root / 'val'}, with the same classes.")
    if val is None or not (root / "train").is_dir():
        classes, files, amiss = _class_folders(root, within)
        labels = [label for _, label in files]
        shown, held_out = (FileImages([files[i] for i in part], within) for part in split(labels, options.val_fraction))
        return Data(spec, shown, held_out, classes, amiss=amiss)
    classes, files, amiss = _class_folders(root / "train", within)
    others, val_files, amiss_too = _class_folders(val, within)
    if classes != others:
        only = [f"{name} only in {side}" for names, side in ((set(classes) - set(others), "train"),
                (set(others) - set(classes), val.name)) for name in sorted(names)]  # fmt: skip
        raise InputError(
            f"The classes of {root / 'train'} and {val} differ: {printable(', '.join(only[:6]))}. Both need a folder "
            "for each class."
        )
    return Data(spec, FileImages(files, within), FileImages(val_files, within), classes, amiss=amiss + amiss_too)


_PARTS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


def _class_folders(place: Path, within: Path | None) -> tuple[tuple[str, ...], list[tuple[str, int]], tuple[str, ...]]:
    """The names of the classes, (file, label) of every picture, and the folders that are passed over, with reasons.

    ``within``: the folder that links may not lead out of. A class, or all of them, outside of it is an ``InputError``.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    from dcafy.images.pictures import leads_out, lies_in, pictures_in

    try:
        found = sorted(entry for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{quoted(str(place), 200)} cannot be read: {refused(error)}.") from error
    for folder in (place, *found):
        if within is not None and not lies_in(folder, within):
            raise InputError(f"{quoted(str(folder), 200)} is a link: {leads_out(within)}.")
    classes = tuple(folder.name for folder in found)
    if not classes:
        raise InputError(f"{place} has no folders in it. Put the images of each class into a folder of its own.")
    if all(name.lower() in _PARTS for name in classes):
        raise InputError(
            f"The folders in {place} are no classes: {printable(', '.join(classes))}. Name them train and val, with a "
            "folder for each class in both."
        )
    listings = [pictures_in(folder, IMG_EXTENSIONS, within) for folder in found]
    empty = [name for name, listing in zip(classes, listings, strict=True) if not listing.files]
    if empty:
        raise InputError(
            f"{printable(', '.join(empty[:5]))} in {place} has no images. Remove the empty folder, or put images "
            f"({', '.join(IMG_EXTENSIONS)}) into it."
        )
    files = [(file, label) for label, listing in enumerate(listings) for file in listing.files]
    amiss = (f"{printable(path)}: {reason}" for listing in listings for path, reason in listing.passed_over)
    return classes, files, tuple(amiss)


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

    from dcafy.images.data import Data, IndexedImages, split

    name, _, root = rest.partition(":")
    if name not in _SPLITS:
        raise UsageError(
            f"--data {quoted(spec, 200)}: torchvision has no classification data set {quoted(name)} that is known here."
            f"{nearest(name, list(_SPLITS))} Known: {', '.join(sorted(_SPLITS))}."
        )
    if not root:
        raise UsageError(
            f"--data {quoted(spec, 200)} names no folder. Write torchvision:{name}:ROOT, where ROOT holds the data."
        )
    builder = getattr(datasets, name)
    accepts = inspect.signature(builder).parameters
    fetch = {"download": options.download} if "download" in accepts else {}
    try:
        made = [builder(root, **arguments, **fetch) for arguments in _SPLITS[name] if arguments is not None]
        labels = [_labels(dataset) for dataset in made]
    except Exception as error:  # each of them reads files of its own kind, which may be damaged in any way
        raise InputError(
            f"{quoted(spec, 200)} cannot be opened: {printable(one_line(error)[:200])} If it is not there yet, "
            "--download fetches it."
        ) from error
    numbers = sorted({label for part in labels for label in part})
    classes = tuple(str(c) for c in getattr(made[0], "classes", None) or getattr(made[0], "categories", ()) or numbers)
    places: Sequence[Sequence[int]] = [range(len(part)) for part in labels]
    if len(made) == 1:
        made, labels, places = 2 * made, 2 * labels, split(labels[0], options.val_fraction)
    train, val = map(IndexedImages, made, labels, places)
    return Data(spec, train, val, classes, drawn=name in _DRAWN)


def _labels(dataset: Any) -> list[int]:
    """All labels; from the data set's own list where it has one, so that no picture is decoded."""
    from dcafy.images.data import known_labels

    known = known_labels(dataset)
    return [int(label) for _, label in dataset] if known is None else known


# --- digits and clothes ---------------------------------------------------------------------------------


def _digits(spec: str, rest: str, options: DataOptions) -> Data:
    if rest:
        raise UsageError(
            f"--data {quoted(spec, 200)}: digits ships with scikit-learn and takes no path. Write --data digits."
        )
    with needing("--data digits", "examples", "scikit-learn"):
        from sklearn.datasets import load_digits
    import numpy as np

    from dcafy.images.data import Data, IndexedImages, split

    loaded = load_digits()
    images = (loaded.images * (255 / 16)).round().astype(np.uint8)
    labels = [int(label) for label in loaded.target]
    train, val = (IndexedImages(images, labels, part) for part in split(labels, options.val_fraction))
    return Data(spec, train, val, tuple(map(str, range(10))), drawn=True)


_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def _fashion_mnist(spec: str, rest: str, options: DataOptions) -> Data:
    from dcafy.images.data import Data, IndexedImages

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
    from dcafy.images.data import read_idx

    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return read_idx(path)
    raise InputError(f"{root} has no {name} (or {name}.gz), one of the four files of Fashion-MNIST.")


# --- all of them ----------------------------------------------------------------------------------------


def _absolute(rest: str) -> str:
    return os.path.abspath(rest) if rest else rest


@dataclass(frozen=True)
class ImageSource:
    """One kind of ``--data``.

    ``form``      how a spec of it is written, and ``about`` what else the help says of that
    ``open``      (the spec, what stands behind its first word, options) -> the data
    ``anchored``  what stands behind the first word, with absolute paths
    """

    form: str
    open: Callable[[str, str, DataOptions], Data]
    about: str = ""
    anchored: Callable[[str], str] = _absolute


def _anchored_root(rest: str) -> str:
    name, colon, root = rest.partition(":")
    return f"{name}{colon}{_absolute(root)}"


SOURCES: dict[str, ImageSource] = {
    "imagefolder": ImageSource(
        "FOLDER or imagefolder:FOLDER", _folder, " (with train/ and val/, or one folder for each class)"
    ),
    "torchvision": ImageSource(
        "torchvision:NAME:ROOT", _torchvision, " such as torchvision:CIFAR10:data", anchored=_anchored_root
    ),
    "digits": ImageSource("digits", _digits, anchored=str),
    "fashion-mnist": ImageSource("fashion-mnist[:PATH]", _fashion_mnist),
}
"""The first word of a spec -> the source."""


def forms(*, explained: bool = False) -> str:
    """All forms of a spec, as a message or the help lists them."""
    *others, last = [source.form + (source.about if explained else "") for source in SOURCES.values()]
    return f"{', '.join(others)}, or {last}"


def anchored(spec: str) -> str:
    """The spec with absolute paths, so that it means the same in every folder."""
    spec = _in_full(spec)
    kind, colon, rest = spec.partition(":")
    if kind in SOURCES:
        return f"{kind}{colon}{SOURCES[kind].anchored(rest)}"
    return f"{kind}{colon}{':'.join(map(_absolute, rest.split(':')))}" if kind == "coco" else spec
