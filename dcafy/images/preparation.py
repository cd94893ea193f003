"""How pictures are made ready for a network: the way its weights' own transforms do it, where they are known."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dcafy.emit.dca import recipes
from dcafy.errors import UsageError
from dcafy.images.options import DataOptions
from dcafy.images.pictures import with_channels
from dcafy.trace.inputs import guesses

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Preparation:
    """``size``: (height, width) in pixels that the network sees; ``resize``: the shorter side before the centre is cut.

    ``mean`` and ``std`` are per channel, of values from 0 to 1.
    """

    size: tuple[int, int]
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    @property
    def channels(self) -> int:
        """Channels of the network's input."""
        return len(self.mean)


def preparation(
    model: nn.Module, spec: str, image_size: int | None = None, *, resize: int | None = None
) -> Preparation:
    """What the weights of ``model`` were trained with: torchvision's presets and timm's configuration.

    ``spec``: the ``torchvision:`` or ``timm:`` name of the model where it has one. For other models the first guess at
    their input gives the size. ``image_size``: another side, in pixels, with the resize in proportion; ``resize``:
    another shorter side. Raises ``UsageError`` where less is left than is to be cut out.
    """
    # A folder that was loaded by name knows that name.
    names = [spec, *(recipe.model or "" for _, recipe in recipes(model))]
    named = (_of_torchvision(name) for name in names)
    found = next(filter(None, named), None) or _of_timm(model) or _guessed(model)
    channels = _channels(model, found.channels)
    if found.channels != channels:
        mean, std = (sum(values) / len(values) for values in (found.mean, found.std))
        found = dataclasses.replace(found, mean=(mean,) * channels, std=(std,) * channels)
    if image_size is not None:
        ratio = found.resize / min(found.size)
        found = dataclasses.replace(found, size=(image_size, image_size), resize=round(image_size * ratio))
    if resize is None:
        return found
    if resize < max(found.size):
        raise UsageError(
            f"--val-resize {resize} leaves less than the {found.size[0]} x {found.size[1]} pixels that are cut out of "
            "the centre. Choose a larger one, or a smaller --image-size."
        )
    return dataclasses.replace(found, resize=resize)


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
    _, height, width = known["input_size"]
    resize = round(min(height, width) / known["crop_pct"])
    return Preparation((height, width), resize, tuple(known["mean"]), tuple(known["std"]), known["interpolation"])


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

        filter_of = {mode.value: mode for mode in InterpolationMode}
        smooth = filter_of.get(how.interpolation, InterpolationMode.BILINEAR)
        whole = [v2.Resize(how.resize, smooth), v2.CenterCrop(how.size)]
        random_crop = [
            v2.RandomResizedCrop(how.size, scale=(scale, 1.0), ratio=(1 / ratio, ratio), interpolation=smooth),
            v2.RandomHorizontalFlip(),
        ]
        margin = [max(side // 8, 1) for side in how.size]
        ways: dict[str, list[Any]] = {
            "none": whole,
            "shift": [*whole, v2.RandomCrop(how.size, padding=[margin[1], margin[0]])],
            "standard": random_crop,
            "trivial": [*random_crop, v2.TrivialAugmentWide()],
        }
        self.channels = how.channels
        steps = [*ways[augment], v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(how.mean, how.std)]
        self.steps = v2.Compose(steps)

    def __call__(self, picture: Any, label: Any) -> tuple[Any, Any]:
        image = self.steps(with_channels(picture, self.channels))
        return image.as_subclass(torch.Tensor), label


def augmentation(options: DataOptions, *, drawn: bool) -> str:
    """The way of varying training images that ``options`` choose."""
    if options.augment != "auto":
        return options.augment
    return "shift" if drawn else "standard"
