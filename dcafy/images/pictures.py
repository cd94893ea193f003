"""Any picture file as eight bits a channel, in the channels that a network takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from dcafy.images.order import UnreadableImage

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Channels that a network takes -> the mode of such a picture."""

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What Pillow raises for files that are no whole picture (broken PNG files raise SyntaxError)."""


def opened(path: str | Path) -> Image.Image:
    """The picture in a file, decoded; ``UnreadableImage`` names the file and says why it is none."""

    def read() -> Image.Image:
        with Image.open(path) as image:
            image.load()
            return cast("Image.Image", image)

    return cast("Image.Image", decoded(read, str(path)))


def decoded(read: Callable[[], Any], name: str) -> Any:
    """What ``read`` gives; ``UnreadableImage`` says what is wrong with the picture ``name`` where it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return read()
    except _BROKEN as error:
        raise UnreadableImage(f"{name}: {' '.join(str(error).split())[:120]}") from error


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """The picture with that many channels; 16-bit values are scaled to eight bits, palettes and CMYK resolved."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        largest = 65535.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 255.0
        image = Image.fromarray((values.clip(0, largest) * (255.0 / largest)).round().astype(np.uint8))
    return image.convert(MODES[channels])
