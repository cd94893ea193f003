"""How pictures are made ready for a network: the way its weights' own transforms do it, where they are known."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from dcafy.emit.dca import recipes
from dcafy.errors import UsageError
from dcafy.images.options import DataOptions
from dcafy.images.order import UnreadableImage
from dcafy.images.pictures import MODES, with_channels
from dcafy.images.pictures import MOST_PIXELS as LARGEST
from dcafy.records import ReadBy, Wrong, within
from dcafy.trace.inputs import guesses
from dcafy.wording import short
from dcafy.zoos.specs import blueprint_of

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


Sides = int | tuple[int, int]
"""A length in pixels, or (height, width)."""

_SIDE = within(1, 2**12)

MOST_PIXELS = 2**22
"""Pixels of what a network sees, 2048 x 2048: what a folder says is believed up to there, for memory is made for it."""


def _sides(value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        return _SIDE(value, where)
    if len(value) != 2:
        raise Wrong(where, "a height and a width in pixels", value)
    return _SIDE(value[0], f"{where}[0]"), _SIDE(value[1], f"{where}[1]")


def _size(value: Any, where: str) -> Any:
    sides = _sides(value, where)
    if isinstance(sides, int) or math.prod(sides) > MOST_PIXELS:
        raise Wrong(where, f"a height and a width in pixels, {MOST_PIXELS:,} in all", value)
    return sides


def _per_channel(value: Any, where: str) -> Any:
    """One finite number for each of 1 to 4 channels."""
    numbers = isinstance(value, list | tuple) and all(type(n) in (int, float) and math.isfinite(n) for n in value)
    if not numbers or len(value) not in MODES:
        raise Wrong(where, "a number for each channel", value)
    return tuple(map(float, value))


def _deviations(value: Any, where: str) -> Any:
    numbers = _per_channel(value, where)
    if min(numbers) <= 0:
        raise Wrong(where, "a deviation above 0 for each channel", value)
    return numbers


@dataclass(frozen=True)
class Preparation:
    """How a picture becomes a tensor ``[C, H, W]``.

    ``size``           (height, width) in pixels that the network sees
    ``resize``         the shorter side before the centre is cut; or (height, width), which ``crop`` says how to fill
    ``mean``, ``std``  of each channel, of values from 0 to 1
    ``crop``           ``center``: both sides fill ``resize``, proportions kept; ``squash``: it is ``resize``, whatever
                       the proportions; ``border``: all of it fits into ``resize``, and a border fills what is left
    """

    size: Annotated[tuple[int, int], ReadBy(_size)]
    resize: Annotated[Sides, ReadBy(_sides)]
    mean: Annotated[tuple[float, ...], ReadBy(_per_channel)]
    std: Annotated[tuple[float, ...], ReadBy(_deviations)]
    interpolation: Literal["nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos"] = "bilinear"
    crop: Literal["center", "squash", "border"] = "center"

    @property
    def channels(self) -> int:
        """Channels of the network's input."""
        return len(self.mean)

    def resized(self, side: int) -> Preparation:
        """The same for images of ``side`` pixels, with the resize in proportion; ``UsageError`` for too many."""
        if side**2 > MOST_PIXELS:
            raise UsageError(
                f"--image-size {short(str(side))} is more than {math.isqrt(MOST_PIXELS):,} pixels. Name fewer."
            )
        ratio = side / min(self.size)
        sides = (self.resize,) if isinstance(self.resize, int) else self.resize
        scaled: tuple[int, ...] = tuple(max(round(of * ratio), 1) for of in sides)
        if len(set(scaled)) == 1 and self.crop == "center":
            return dataclasses.replace(self, size=(side, side), resize=scaled[0])
        return dataclasses.replace(self, size=(side, side), resize=(max(scaled), max(scaled)))


def with_resize(how: Preparation, shorter: int) -> Preparation:
    """The same with another shorter side before the centre is cut; ``UsageError`` where less than that is left."""
    if shorter < max(how.size):
        raise UsageError(
            f"--val-resize {shorter} leaves less than the {how.size[0]} x {how.size[1]} pixels that are cut out of the "
            "centre. Choose a larger one, or a smaller --image-size."
        )
    return dataclasses.replace(how, resize=shorter, crop="center")


def preparation(model: nn.Module, spec: str, image_size: int | None = None) -> Preparation:
    """What the weights of ``model`` were trained with: torchvision's presets and timm's configuration.

    ``spec``: the ``torchvision:`` or ``timm:`` name of the model where it has one. For other models the first guess at
    their input gives the size. ``image_size``: another side, in pixels, with the resize in proportion.
    """
    # A folder that was loaded by name knows that name.
    own = blueprint_of(model)
    names = [spec, own.spec if own else "", *(recipe.model or "" for _, recipe in recipes(model))]
    named = (_of_torchvision(name) for name in names)
    found = next(filter(None, named), None) or _of_timm(model) or _guessed(model)
    channels = _channels(model, found.channels)
    if found.channels != channels:
        mean, std = (sum(values) / len(values) for values in (found.mean, found.std))
        found = dataclasses.replace(found, mean=(mean,) * channels, std=(std,) * channels)
    return found if image_size is None else found.resized(image_size)


def _of_torchvision(spec: str) -> Preparation | None:
    zoo, _, name = spec.partition(":")
    if zoo != "torchvision":
        return None
    from torchvision import models

    name, _, wanted = name.partition("@")
    known = models.get_model_weights(name)
    if not len(known):
        return None
    weights: Any = known[wanted] if wanted and wanted != "DEFAULT" else known.DEFAULT  # type: ignore[attr-defined]
    preset = weights.transforms()
    if not hasattr(preset, "crop_size"):  # of a detector or segmenter
        return None
    side = preset.crop_size[0]
    return Preparation(
        (side, side), preset.resize_size[0], tuple(preset.mean), tuple(preset.std), preset.interpolation.value
    )


def _of_timm(model: nn.Module) -> Preparation | None:
    if not isinstance(getattr(model, "pretrained_cfg", None), dict):
        return None
    from timm.data import resolve_model_data_config

    known: Any = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    _, *size = known["input_size"]
    crop: Any = known["crop_mode"] if known["crop_mode"] in ("squash", "border") else "center"
    height, width = (math.floor(side / known["crop_pct"]) for side in size)
    resize: Sides = height if crop == "center" and height == width else (height, width)
    mean, std = tuple(known["mean"]), tuple(known["std"])
    return Preparation((size[0], size[1]), resize, mean, std, known["interpolation"], crop)


def _guessed(model: nn.Module) -> Preparation:
    shape = next((tuple(inputs[0].shape) for inputs in guesses(model) if inputs[0].ndim == 4), (2, 3, 224, 224))
    mean, std = _IMAGENET if shape[1] == 3 else ((0.5,) * shape[1], (0.5,) * shape[1])
    return Preparation((shape[2], shape[3]), min(shape[2:]), mean, std)


def _channels(model: nn.Module, default: int) -> int:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return default if first is None or first.in_channels not in (1, 3, 4) else first.in_channels


class Prepared:
    """(picture, label) -> (tensor ``[C, H, W]``, label); ``augment`` as in ``DataOptions``, ``none`` to validate.

    ``scale``: the least part of a picture's area that a random crop has; ``ratio``: the largest ratio of its sides.
    """

    def __init__(self, how: Preparation, augment: str = "none", *, scale: float = 0.35, ratio: float = 4 / 3) -> None:
        from torchvision.transforms import InterpolationMode, v2

        smooth = InterpolationMode(how.interpolation)
        random_crop = [
            v2.RandomResizedCrop(how.size, scale=(scale, 1.0), ratio=(1 / ratio, ratio), interpolation=smooth),
            v2.RandomHorizontalFlip(),
        ]
        margin = [max(side // 8, 1) for side in how.size]
        ways: dict[str, list[Any]] = {
            "none": [],
            "shift": [v2.RandomCrop(how.size, padding=[margin[1], margin[0]])],
            "standard": random_crop,
            "trivial": [*random_crop, v2.TrivialAugmentWide()],
        }
        self.how, self.augment = how, augment
        self.whole = _CROPS[how.crop] if augment in ("none", "shift") else None
        self.varied = v2.Compose(ways[augment]) if ways[augment] else None

    def __call__(self, picture: Any, label: Any) -> tuple[Any, Any]:
        image = with_channels(picture, self.how.channels)
        if self.whole is not None:
            image = self.whole(image, self.how)
        if self.varied is not None:
            image = self.varied(image)
        return _tensor(image, self.how), label


def _tensor(image: Image.Image, how: Preparation) -> Tensor:
    """The values as torchvision's presets and timm compute them, to the bit."""
    from torchvision.transforms.v2 import functional as F

    values = F.pil_to_tensor(image).to(torch.float32).div(255)
    mean, std = (torch.tensor(of, dtype=torch.float32)[:, None, None] for of in (how.mean, how.std))
    return values.sub_(mean).div_(std)


def _centre(image: Any, how: Preparation) -> Any:
    from torchvision.transforms.v2 import functional as F

    if isinstance(how.resize, int):
        _require_room(image, how.resize / min(image.size))
        resized: Any = F.resize(image, [how.resize], _mode(how))
    else:
        resized = _in_proportion(image, how, min)
    return F.center_crop(resized, list(how.size))


def _require_room(image: Any, times: float) -> None:
    """Nothing where the picture may be made so many times as large; ``UnreadableImage`` where that is too large."""
    if times**2 * image.width * image.height > LARGEST:
        raise UnreadableImage(
            f"it has {image.width} x {image.height} pixels, and as large as the network wants it more than {LARGEST:,}"
        )


def _squash(image: Any, how: Preparation) -> Any:
    from torchvision.transforms.v2 import functional as F

    return F.center_crop(F.resize(image, _pair(how.resize), _mode(how)), list(how.size))


def _border(image: Any, how: Preparation) -> Any:
    from torchvision.transforms.v2 import functional as F

    resized = _in_proportion(image, how, max)
    missing = [max(side - have, 0) for side, have in zip(how.size, (resized.height, resized.width), strict=True)]
    padding = [missing[1] // 2, missing[0] // 2, (missing[1] + 1) // 2, (missing[0] + 1) // 2]
    padded = F.pad(resized, padding, fill=[round(255 * value) for value in how.mean])
    return F.center_crop(padded, list(how.size))


def _in_proportion(image: Any, how: Preparation, ratio: Callable[[float, float], float]) -> Any:
    from torchvision.transforms.v2 import functional as F

    height, width = _pair(how.resize)
    times = ratio(image.height / height, image.width / width)
    _require_room(image, 1 / times)
    return F.resize(image, [round(image.height / times), round(image.width / times)], _mode(how))


def _pair(sides: Sides) -> list[int]:
    return [sides, sides] if isinstance(sides, int) else list(sides)


def _mode(how: Preparation) -> Any:
    from torchvision.transforms import InterpolationMode

    return InterpolationMode(how.interpolation)


_CROPS: dict[str, Callable[[Any, Preparation], Any]] = {
    "center": _centre, "squash": _squash, "border": _border,
}  # fmt: skip
"""How a picture is brought to the size that the network sees."""


def augmentation(options: DataOptions, *, drawn: bool) -> str:
    """The way of varying training images that ``options`` choose."""
    if options.augment != "auto":
        return options.augment
    return "shift" if drawn else "standard"
