"""A detector for other classes: the layers that tell classes apart, in the form that torchvision's detectors have."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dcafy.detection.coco import CocoImages, objects
from dcafy.errors import InputError
from dcafy.graph.paths import holder, put
from dcafy.images.data import Data
from dcafy.training.head import widened
from dcafy.wording import printable


@dataclass(frozen=True)
class _Head:
    """Where a kind of detector tells classes apart.

    ``counted``  path of the number of classes that it has, the background among them where it has one
    ``layers``   paths of the layers with some outputs for each class; a path may be a list of them
    ``fresh``    gives a new layer the values that torchvision gives it, where those are not the layer's own
    """

    counted: str
    layers: tuple[str, ...]
    fresh: Callable[[Any], None] | None = None


@torch.no_grad()
def _rarely(layer: Any) -> None:
    """As Lin et al. (2017, arXiv 1708.02002, 4.1) start: every place is background with a probability of 0.99."""
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, -math.log((1 - 0.01) / 0.01))


@torch.no_grad()
def _without_bias(layer: Any) -> None:
    nn.init.normal_(layer.weight, std=0.03)
    nn.init.zeros_(layer.bias)


_HEADS = (
    _Head(
        "roi_heads.box_predictor.cls_score.out_features",
        (
            "roi_heads.box_predictor.cls_score",
            "roi_heads.box_predictor.bbox_pred",
            "roi_heads.mask_predictor.mask_fcn_logits",
        ),
    ),
    _Head("head.classification_head.num_classes", ("head.classification_head.cls_logits",), _rarely),
    _Head("head.classification_head.num_columns", ("head.classification_head.module_list",), _without_bias),
)
"""Only one kind of detector has the first of the layers."""


def _head(model: nn.Module) -> _Head:
    modules = dict(model.named_modules())
    found = next((head for head in _HEADS if head.layers[0] in modules), None)
    if found is None:
        raise InputError(
            f"{type(model).__name__} has none of the heads that torchvision's detectors have, so its classes cannot be "
            "counted. Build it for the classes of the data, and train it with dcafy.training.finetune(..., "
            "task=dcafy.detection.Detection(config))."
        )
    return found


def classes_of(model: nn.Module) -> int:
    """How many classes a detector of torchvision tells apart, its background included.

    >>> from torchvision.models import detection
    >>> classes_of(detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4))
    4
    """
    return _counted(model, _head(model))


def _counted(model: nn.Module, head: _Head) -> int:
    return int(operator.attrgetter(head.counted)(model))


def with_classes(model: nn.Module, classes: int) -> tuple[str, ...]:
    """The paths of the layers that were replaced, in place, so that ``model`` tells ``classes`` classes apart.

    ``classes`` counts the background. None are replaced where the number is right already. New values are drawn from
    the global generator, in the way torchvision starts them.
    """
    head = _head(model)
    present = _counted(model, head)
    if present == classes:
        return ()
    modules = dict(model.named_modules())
    changed = []
    for path in (part for layer in head.layers if layer in modules for part in _parts(modules, layer)):
        layer = widened(modules[path], classes, present)
        if head.fresh is not None:
            head.fresh(layer)
        put(model, path, layer)
        changed.append(path)
    parent, name = holder(model, head.counted)
    setattr(parent, name, classes)
    return tuple(changed)


def _parts(modules: dict[str, nn.Module], path: str) -> list[str]:
    """The layers that ``path`` stands for: itself, or the last convolution of each module in a list (SSD)."""
    if not isinstance(modules[path], nn.ModuleList):
        return [path]
    found = []
    for name, _ in modules[path].named_children():
        inside = [p for p, m in modules.items() if f"{p}.".startswith(f"{path}.{name}.") and isinstance(m, nn.Conv2d)]
        found.append(inside[-1])
    return found


def labels_for(model: nn.Module, data: Data) -> int:
    """How many classes ``model`` needs for ``data``, whose labels are set to those that it gives already.

    A detector that was trained on COCO has 91 outputs, named by torchvision: where it has all categories of the data,
    they keep their numbers there. Else the categories are counted from 1.
    """
    known = _coco()
    parts: tuple[CocoImages, CocoImages] = (data.train, data.val)
    if classes_of(model) == len(known) and set(data.classes) <= set(known):
        for part in parts:
            part.label_of = {category: known.index(name) for category, name in part.known.categories.items()}
        return len(known)
    return len(data.classes) + 1


def names_of_labels(data: Data) -> tuple[str, ...]:
    """The name of each label that a detector for ``data`` gives, the background's first.

    After :func:`labels_for`; a label that no category of the data has is named as torchvision names it.
    """
    part: CocoImages = data.train
    names = {label: printable(part.known.categories[category]) for category, label in part.label_of.items()}
    if sorted(names) != list(range(1, len(names) + 1)):
        names = dict(enumerate(_coco())) | names
    return tuple({0: "__background__", **dict(sorted(names.items()))}.values())


def _coco() -> list[str]:
    from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

    known: list[str] = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return known


def needs(model: nn.Module, data: Data) -> None:
    """``data`` with masks where ``model`` is trained on them; ``InputError`` for what it wants and the data has not."""
    modules = dict(model.named_modules())
    if "roi_heads.keypoint_predictor" in modules:
        raise InputError(
            f"{type(model).__name__} is trained on keypoints, which --task detection does not read. Name a detector of "
            "boxes or masks, such as torchvision:fasterrcnn_resnet50_fpn."
        )
    parts: tuple[CocoImages, CocoImages] = (data.train, data.val)
    if "roi_heads.mask_predictor" in modules:
        missing = sum(box.outline is None for part in parts for box in objects(part))
        if missing:
            raise InputError(
                f"{type(model).__name__} is trained on masks, and {missing} objects of {data.spec!r} have no "
                "segmentation. Add outlines, or name a detector of boxes such as torchvision:fasterrcnn_resnet50_fpn."
            )
        for part in parts:
            part.masks = True
