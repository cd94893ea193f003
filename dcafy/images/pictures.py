"""Which files of a folder are pictures, and any of them as eight bits a channel, in the channels that a network takes.

Pictures are strangers' files: only raster formats are decoded, up to a size, out of regular files inside the folder.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from PIL import EpsImagePlugin, Image, UnidentifiedImageError

from dcafy.disk import regular
from dcafy.errors import DcafyError
from dcafy.images.order import UnreadableImage
from dcafy.wording import one_line, printable, refused

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Channels that a network takes -> the mode of such a picture."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded, whatever the name of the file says. Pillow has more: PostScript is a program, and starts another."""

MOST_PIXELS = 89_478_485
"""Pixels of a picture: Pillow's own bound, 256 MiB of colours."""

MOST_SIDE = 65_535
"""Pixels of a side, which is JPEG's own bound."""

MOST_UNEQUAL = 100
"""One side over the other: the shorter one is scaled to what the network takes, and the other grows with it."""

# --- folders --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """``files``: the pictures of a folder, by folder and name; ``passed_over``: (path, reason) of folders that are not.

    A file is among the pictures by its name; what it is shows when it is opened.
    """

    files: tuple[str, ...]
    passed_over: tuple[tuple[str, str], ...]


def pictures_in(folder: Path, suffixes: Collection[str], root: Path | None) -> Listing:
    """Every file in ``folder`` and the folders in it whose name ends so; each folder once, however many links name it.

    ``root``: the folder that links may not lead out of; ``None`` where they may.
    """
    files: list[str] = []
    passed_over: list[tuple[str, str]] = []
    entered: set[tuple[int, int]] = set()
    pending, links = [str(folder)], list[str]()
    while pending or links:
        place = pending.pop() if pending else links.pop(0)  # what lies in a folder itself comes before links to it
        try:
            found = os.stat(place)
            with os.scandir(place) as entries:
                ordered = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            passed_over.append((place, refused(error)))
            continue
        if (found.st_dev, found.st_ino) in entered:
            continue
        entered.add((found.st_dev, found.st_ino))
        for entry in ordered:
            if entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
            elif not os.path.isdir(entry.path):
                if entry.name.lower().endswith(tuple(suffixes)):
                    files.append(entry.path)
            elif lies_in(folder, Path(entry.path)):
                passed_over.append((entry.path, "it is a link to a folder around it"))
            elif root is not None and not lies_in(entry.path, root):
                passed_over.append((entry.path, leads_out(root)))
            else:
                links.append(entry.path)
    return Listing(tuple(sorted(files, key=os.path.split)), tuple(sorted(passed_over)))


def lies_in(path: str | Path, root: Path) -> bool:
    """Whether ``path``, its links followed, is the folder ``root`` or lies in it."""
    real, outer = os.path.realpath(path), os.path.realpath(root)
    return real == outer or real.startswith(outer.rstrip(os.sep) + os.sep)


def leads_out(root: Path) -> str:
    """The reason why something is not read that does not lie in ``root``."""
    return f"it leads out of {printable(str(root)[-100:])}; --follow-links takes what lies elsewhere, too"


# --- files ----------------------------------------------------------------------------------------------


def opened(path: str | Path, root: Path | None = None) -> Image.Image:
    """The picture in a file, decoded; ``UnreadableImage`` names the file and says why it is none.

    ``root``: the folder that it has to lie in; ``None`` where any will do.
    """

    def read() -> Image.Image:
        with _head(path, root) as image:
            image.load()
            image.crop((0, 0, 1, 1)).convert("RGB")  # there are colours that Pillow cannot turn into others (LAB)
            return image

    return cast("Image.Image", decoded(read, str(path)))


def size_of(path: str | Path, root: Path | None = None) -> tuple[int, int]:
    """(width, height) of the picture in a file, of which no more than the head is read; else as :func:`opened`."""

    def read() -> tuple[int, int]:
        with _head(path, root) as image:
            return image.size

    return cast("tuple[int, int]", decoded(read, str(path)))


@contextlib.contextmanager
def _head(path: str | Path, root: Path | None) -> Iterator[Image.Image]:
    if root is not None and not lies_in(path, root):
        raise OSError(leads_out(root))
    with regular(path) as file, _recognised(file) as image:
        yield image


def _recognised(file: IO[bytes]) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise OSError(f"cannot identify it as one of {', '.join(FORMATS)}") from error
    width, height = image.size
    longer, shorter = max(width, height), min(width, height)
    most = MOST_PIXELS // 2 if image.format == "WEBP" else MOST_PIXELS  # whose decoder holds all of it several times
    if shorter < 1 or longer > MOST_SIDE or width * height > most or longer > MOST_UNEQUAL * shorter:
        image.close()
        raise OSError(
            f"it has {width} x {height} pixels; sides of 1 to {MOST_SIDE:,}, of which the longer is at most "
            f"{MOST_UNEQUAL} times the other, and {most:,} pixels in all are taken"
        )
    return image


def decoded(read: Callable[[], Any], name: str) -> Any:
    """What ``read`` gives; ``UnreadableImage`` says what is wrong with the picture ``name`` where it is none."""
    try:
        with warnings.catch_warnings(), _no_program():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return read()
    except DcafyError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(f"{named(name)}: it has more pixels than the {MOST_PIXELS:,} that are taken") from error
    except Exception as error:  # decoders raise whatever comes of wrong bytes
        reason = refused(error) if isinstance(error, OSError) else printable(one_line(error))
        raise UnreadableImage(f"{named(name)}: {reason[:250]}") from error


def named(path: str | Path) -> str:
    """A picture's path as messages and logs have it: printable, and its end where it is long."""
    text = printable(str(path))
    return text if len(text) <= 300 else f"...{text[-300:]}"


_decoding = threading.Lock()
_decoders, _ghostscript = 0, EpsImagePlugin.gs_binary


@contextlib.contextmanager
def _no_program() -> Iterator[None]:
    """Inside it Pillow starts no Ghostscript: torchvision's data sets open files in any of its formats."""
    global _decoders, _ghostscript
    with _decoding:
        if not _decoders:
            _ghostscript, EpsImagePlugin.gs_binary = EpsImagePlugin.gs_binary, False
        _decoders += 1
    try:
        yield
    finally:
        with _decoding:
            _decoders -= 1
            if not _decoders:
                EpsImagePlugin.gs_binary = _ghostscript


# --- colours --------------------------------------------------------------------------------------------


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """The picture with that many channels; 16-bit values are scaled to eight bits, palettes and CMYK resolved."""
    if image.mode.startswith(("I", "F")):
        deep = image.mode.startswith("I;16") or any(values.max(initial=0) > 255 for values in _strips(image))
        largest = 65535.0 if deep else 255.0
        strips = [(v.clip(0, largest) * (255.0 / largest)).round().astype(np.uint8) for v in _strips(image)]
        image = Image.fromarray(np.concatenate(strips))
    return image.convert(MODES[channels])


def _strips(image: Image.Image) -> Iterator[np.ndarray[Any, Any]]:
    """The values of a picture, some rows at a time: in double precision all of a large one take a gigabyte."""
    rows = max(2**20 // image.width, 1)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        yield np.nan_to_num(np.asarray(strip).astype(np.float64))
