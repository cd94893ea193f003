"""What is known of a network besides itself: its classes, how its images are made ready, what it was trained on.

It lies on the network, as frozen data, and goes into the folders that :func:`dcafy.save` writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import nn

from dcafy.display import Brief
from dcafy.errors import InputError
from dcafy.graph.rewritten import original_class
from dcafy.images.pictures import opened
from dcafy.images.preparation import Preparation, Prepared, preparation
from dcafy.records import Wrong
from dcafy.wording import printable
from dcafy.zoos.specs import blueprint_of

_ABOUT = "dcafy_about"
"""The attribute of a network that holds it."""


def _fraction(value: Any, where: str) -> Any:
    if not 0 < value < 1:
        raise Wrong(where, "a number above 0 and below 1", value)
    return value


@dataclass(frozen=True, repr=False)
class Trained(Brief):
    """What a network was trained on, and what was then measured on the validation images (accuracies are fractions).

    ``val_fraction``: the part of the images that was held out, where the data has no part of its own to validate on.
    """

    data: str
    epochs: int
    metrics: Mapping[str, float]
    val_fraction: Annotated[float, _fraction] = 0.2

    @property
    def opened_unasked(self) -> bool:
        """Whether the data may be opened because a folder names it: pictures and numbers may, and no pickles."""
        return self.data.partition(":")[0] in ("imagefolder", "coco", "digits", "fashion-mnist")


def _agreeing(value: Any, where: str) -> Any:
    if value is not None and len(value.mean) != len(value.std):
        raise Wrong(f"{where}.std", f"a number for each of {len(value.mean)} channels, as mean has", list(value.std))
    return value


@dataclass(frozen=True, repr=False)
class About(Brief):
    """What is known of a network besides itself.

    ``task``         what it gives: scores of classes, or boxes; ``None`` for something else
    ``classes``      the name of each of its outputs; a detector's first is its background; empty where unknown
    ``preparation``  how pictures are made ready for it; a detector does that itself
    ``trained``      by dcafy, on what, and how good it was
    ``random``       whether it has the weights that it was made with, so that what it gives says nothing
    """

    task: Literal["classification", "detection"] | None = "classification"
    classes: tuple[str, ...] = ()
    preparation: Annotated[Preparation | None, _agreeing] = None
    trained: Trained | None = None
    random: bool = False

    def name_of(self, number: int) -> str:
        """The name of a class, or its number."""
        return self.classes[number] if number < len(self.classes) else str(number)


def about(model: nn.Module) -> About:
    """What is known of ``model``: what its folder said, or else what its zoo says.

    >>> import torchvision
    >>> about(torchvision.models.mobilenet_v3_small()).preparation.size
    (224, 224)
    """
    found = known(model)
    if found is None:
        found = About(_task(model), _names(model))
    if found.preparation is None and found.task != "detection":
        found = dataclasses.replace(found, preparation=preparation(model, ""))
    return found


def preparation_of(model: nn.Module, spec: str = "", image_size: int | None = None) -> Preparation:
    """How pictures are made ready for ``model``: as its folder says, else as :func:`preparation` finds out.

    ``spec``: what the user called the model. ``image_size``: another side, in pixels.
    """
    found = known(model)
    if found is None or found.preparation is None:
        return preparation(model, spec, image_size)
    return found.preparation if image_size is None else found.preparation.resized(image_size)


def known(model: nn.Module) -> About | None:
    """What was put onto ``model``; ``None`` where nothing was."""
    found = vars(model).get(_ABOUT)
    return found if isinstance(found, About) else None


def put_about(model: nn.Module, what: About) -> None:
    """Puts onto ``model``, in the place of what lay there, what is known of it."""
    model.__dict__[_ABOUT] = what


def _task(model: nn.Module) -> Literal["classification", "detection"] | None:
    home = original_class(model).__module__
    if home.startswith("torchvision.models.detection."):
        return "detection"
    others = ("segmentation", "video", "optical_flow")
    return None if home.startswith(tuple(f"torchvision.models.{kind}." for kind in others)) else "classification"


class Transforms:
    """picture -> tensor ``[C, H, W]``, as a network's images are made ready; see :func:`transforms`."""

    def __init__(self, what: About) -> None:
        self.about = what
        self._steps = _Scaled() if what.preparation is None else Prepared(what.preparation)

    def __call__(self, picture: Any) -> Any:
        """The tensor of a ``PIL.Image``, or of the picture in a file that is named."""
        image, _ = self._steps(opened(picture) if isinstance(picture, str) or hasattr(picture, "__fspath__") else
                               picture, 0)  # fmt: skip
        return image

    def __repr__(self) -> str:
        return f"Transforms({self.about.preparation or 'values from 0 to 1'})"


class _Scaled:
    """(picture, label) -> (tensor ``[3, H, W]`` of values from 0 to 1, label), for detectors."""

    def __call__(self, picture: Any, label: Any) -> tuple[Any, Any]:
        import torch
        from torchvision.transforms.v2 import functional as F

        from dcafy.images.pictures import with_channels

        return F.to_dtype(F.pil_to_tensor(with_channels(picture, 3)), torch.float32, scale=True), label


def transforms(model: nn.Module) -> Callable[[Any], Any]:
    """What makes a picture (``PIL.Image``, or a path) ready for ``model``: a tensor ``[C, H, W]``.

    It is the preprocessing of the validation images in the training of the folder that ``model`` is from; else that of
    the weights' own library, equal to it bit for bit. For a detector it is the values from 0 to 1.

    Raises ``InputError`` for what is no network.

    >>> import dcafy, torchvision
    >>> from PIL import Image
    >>> dcafy.transforms(torchvision.models.mobilenet_v3_small())(Image.new("RGB", (300, 200))).shape
    torch.Size([3, 224, 224])
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"A torch.nn.Module is needed, not {type(model).__name__}: transforms(dcafy.load(FOLDER)).")
    return Transforms(about(model))


def _names(model: nn.Module) -> tuple[str, ...]:
    """The classes of the pretrained weights that a network of a zoo was built with."""
    built = blueprint_of(model)
    if built is None or built.weights is None or "num_classes" in built.settings:
        return ()
    if built.zoo == "torchvision":
        from torchvision import models

        weights: Any = models.get_model_weights(built.name)[built.weights]
        return tuple(map(printable, weights.meta.get("categories", ())))
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if subset is None:
        return ()
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(info.num_classes()))  # type: ignore[no-untyped-call]
