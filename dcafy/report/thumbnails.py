"""Pictures with a map laid over them, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dcafy.report.figures import heat_colours

SIDES = (336, 256, 192, 144, 112, 80, 56)
"""Pixels that a picture's longer side may have in a page: the first with which all of them are small enough."""

QUALITY = 78


def sized(picture: Image.Image, side: int = SIDES[0]) -> Image.Image:
    """The picture with its longer side at ``side`` pixels, larger or smaller than it was."""
    scale = side / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return picture.resize(size, Image.Resampling.BICUBIC)


def overlaid(
    picture: Image.Image, map_: Tensor, *, low: float = 0.0, high: float | None = None, side: int = SIDES[0]
) -> Image.Image:
    """The picture in grey under the colours of ``map_`` ``[h, w]``; ``low`` to ``high`` (its maximum) is the scale."""
    most = float(map_.max()) if high is None else high
    level = ((map_.float() - low) / (most - low) if most > low else torch.zeros_like(map_.float())).clamp(0, 1)
    return _under(sized(picture, side), level, lambda whole: 0.35 + 0.4 * whole, "inferno")


def differing(picture: Image.Image, difference: Tensor, *, side: int = SIDES[0]) -> Image.Image:
    """The picture in grey, and over it a difference ``[h, w]`` from -1 (blue) to 1 (red)."""
    level = (difference.float().clamp(-1, 1) + 1) / 2
    return _under(sized(picture, side), level, lambda whole: np.minimum(2 * np.abs(whole - 0.5), 1) * 0.8, "RdBu_r")


def _under(picture: Image.Image, level: Tensor, weight: Callable[[Any], Any], colours: str) -> Image.Image:
    """The picture in grey under the colours of ``level``, 0 to 1, each with its ``weight``."""
    below = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    whole = torch.nn.functional.interpolate(
        level[None, None], size=below.shape[:2], mode="bilinear", align_corners=False
    )[0, 0].numpy()
    above = heat_colours(colours)[(whole * 255).round().astype(np.uint8)]
    part = weight(whole)[..., None]
    return Image.fromarray((below * (1 - part) + above * part).round().astype(np.uint8))


def data_uri(picture: Image.Image) -> str:
    """The picture as a JPEG inside a URI."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
