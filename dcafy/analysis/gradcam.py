"""Grad-CAM by stage: where a network looks (paper Fig. 1, top, and Fig. 4), as captum computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcafy.analysis.tapped import Tapped, tapped
from dcafy.analysis.values import check_images
from dcafy.errors import InputError, NoAttentionError, UsageError
from dcafy.wording import needing


@dataclass(frozen=True)
class StageMaps:
    """One stage: ``name`` of the module it ends with, and its Grad-CAM ``maps``, ``[N, h, w]``, none negative."""

    name: str
    maps: Tensor


@dataclass(frozen=True)
class GradCam:
    """``targets``: the class that was looked for in each image, ``[N]``; ``stages``: the maps of each stage."""

    targets: Tensor
    stages: tuple[StageMaps, ...]


def grad_cam(
    model: nn.Module,
    images: Tensor,
    *,
    target: int | Tensor | None = None,
    stages: Sequence[str] | None = None,
) -> GradCam:
    """Grad-CAM maps of every stage of ``model`` for ``images``, computed by captum's ``LayerGradCam``.

    ``images``: ``[N, C, H, W]``, prepared as the model wants them. ``target``: a class, or one for each image; the
    predicted ones where absent. ``stages``: paths of modules to look behind, such as ``("layer3", "layer4")``. Where
    absent, one for each size of the feature maps, from the first attention block on: the last outermost module that
    yields maps of this size (``layer1`` to ``layer4`` of a ResNet). In a connected network, which computes inside
    such a module without calling it, the hook point is put behind the module's output in a copy.

    Raises ``InputError`` where the model is no classifier, ``UsageError`` for a class or a module that it does not
    have, ``NoAttentionError`` for a network without attention unless stages are given.

    >>> import dcafy.analysis, torch, torchvision
    >>> cams = dcafy.analysis.grad_cam(torchvision.models.mobilenet_v3_small(), torch.rand(1, 3, 96, 96))
    >>> [stage.name for stage in cams.stages]
    ['features.1', 'features.3', 'features.8', 'features.12']
    """
    check_images(images)
    return cams_of(tapped(model, images[:2]), images, target=target, stages=stages)


def cams_of(
    copy: Tapped, images: Tensor, *, target: int | Tensor | None = None, stages: Sequence[str] | None = None
) -> GradCam:
    """:func:`grad_cam` of a tapped copy."""
    with needing("Grad-CAM", "report"):
        from captum.attr import LayerGradCam
    chosen = tuple(copy.points) if stages is None else tuple(stages)
    if not chosen:
        raise NoAttentionError(
            "The model has no attention, so dcafy knows none of its stages. Name the modules to look behind: "
            "stages=('layer3', 'layer4')."
        )
    points = {name: _point(copy, name) for name in chosen}
    targets = _targets(copy.model, images, target)
    made = []
    for name, point in points.items():
        inputs = images.detach().clone().requires_grad_()  # else captum sets it, and warns
        with torch.enable_grad():
            maps = LayerGradCam(copy.model, point).attribute(inputs, target=targets, relu_attributions=True)
        made.append(StageMaps(name, maps.detach()[:, 0]))
    return GradCam(targets.cpu(), tuple(made))


def _point(copy: Tapped, name: str) -> nn.Module:
    if name in copy.points:
        return copy.points[name]
    try:
        return copy.model.get_submodule(name)
    except AttributeError as error:
        raise UsageError(f"The model has no module {name!r} for Grad-CAM to look behind.") from error


def _targets(model: nn.Module, images: Tensor, target: int | Tensor | None) -> Tensor:
    """One class for each image; ``UsageError`` or ``InputError`` where the model's output has none such."""
    with torch.no_grad():
        scores = model(images)
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        what = f"a tensor {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise InputError(f"Grad-CAM asks for a class, and the model yields {what}, not scores [N, classes].")
    if target is None:
        return scores.argmax(dim=1)
    wanted = torch.as_tensor(target, device=scores.device).expand(len(images))
    if wanted.min() < 0 or wanted.max() >= scores.shape[1]:
        raise UsageError(f"There is no class {target}: the model tells the classes 0 to {scores.shape[1] - 1} apart.")
    return wanted
