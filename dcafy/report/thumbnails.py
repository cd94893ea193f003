"""Small pictures with a map laid over them, as data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dcafy.report.figures import heat_colours

SIDE = 168
"""Pixels of a thumbnail's longer side."""

QUALITY = 78


def small(picture: Image.Image, side: int = SIDE) -> Image.Image:
    """The picture with its longer side at ``side`` pixels, larger or smaller than it was."""
    scale = side / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return picture.resize(size, Image.Resampling.BICUBIC)


def overlaid(picture: Image.Image, map_: Tensor, *, low: float = 0.0, high: float | None = None) -> Image.Image:
    """The picture in grey under the colours of ``map_`` ``[h, w]``; ``low`` to ``high`` (its maximum) is the scale."""
    below = np.asarray(small(picture).convert("L").convert("RGB"), dtype=np.float32)
    most = float(map_.max()) if high is None else high
    level = ((map_.float() - low) / (most - low) if most > low else torch.zeros_like(map_.float())).clamp(0, 1)
    whole = torch.nn.functional.interpolate(
        level[None, None], size=below.shape[:2], mode="bilinear", align_corners=False
    )[0, 0].numpy()
    colours = heat_colours()[(whole * 255).round().astype(np.uint8)]
    weight = (0.35 + 0.4 * whole)[..., None]
    return Image.fromarray((below * (1 - weight) + colours * weight).round().astype(np.uint8))


def data_uri(picture: Image.Image) -> str:
    """The picture as a JPEG inside a URI."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
