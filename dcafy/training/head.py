"""A classifier for another number of classes, in the place of the one that a network was trained with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dcafy.errors import InputError
from dcafy.graph.modes import evaluating
from dcafy.graph.paths import put


@torch.no_grad()
def outputs_of(model: nn.Module, images: Tensor) -> int:
    """The number of classes that ``model`` tells apart; ``InputError`` where it is no classifier of such images."""
    with evaluating(model):
        try:
            outputs = model(images)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"{type(model).__name__} does not run on images of shape {list(images.shape[1:])}: "
                f"{' '.join(str(error).split())[:200]} Choose another size with --image-size."
            ) from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        kind = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(f"{type(model).__name__} is no classifier: it gives {kind}, not a tensor [N, classes].")
    return int(outputs.shape[1])


def reheaded(model: nn.Module, classes: int, images: Tensor) -> tuple[str, ...]:
    """The paths of the layers that were replaced, in place, so that ``model`` tells ``classes`` classes apart.

    ``images``: a batch that the model takes. None are replaced where the number is right already. timm's networks
    replace their own head; in others it is the last linear layer or 1x1 convolution that gives one value for each
    class. New weights are drawn from the global generator.

    >>> import torchvision
    >>> reheaded(torchvision.models.mobilenet_v3_small(), 10, torch.zeros(1, 3, 64, 64))
    ('classifier.3',)
    """
    present = outputs_of(model, images)
    if present == classes:
        return ()
    before = dict(model.named_modules())
    if hasattr(model, "reset_classifier") and hasattr(model, "pretrained_cfg"):
        model.reset_classifier(classes)  # type: ignore[operator]
        changed = tuple(
            path
            for path, module in model.named_modules()
            if before.get(path) is not module and next(module.parameters(), None) is not None
        )
    else:
        path = _last_layer(model, present, images)
        put(model, path, widened(model.get_submodule(path), classes))
        changed = (path,)
    if outputs_of(model, images) != classes:
        raise InputError(
            f"The classifier of {type(model).__name__} for {present} classes could not be replaced. Build the network "
            f"with {classes} classes: --set num_classes={classes}."
        )
    return changed


def _last_layer(model: nn.Module, classes: int, images: Tensor) -> str:
    called: list[str] = []
    handles = []
    for path, module in model.named_modules():
        if (isinstance(module, nn.Linear) and module.out_features == classes) or (
            isinstance(module, nn.Conv2d) and module.out_channels == classes and module.kernel_size == (1, 1)
        ):
            handles.append(module.register_forward_hook(lambda *_, path=path: called.append(path)))
    try:
        outputs_of(model, images)
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise InputError(
            f"{type(model).__name__} has no linear layer or 1x1 convolution with {classes} outputs that could be "
            "replaced. Build it for the right number of classes, for instance with --set num_classes=..."
        )
    return called[-1]


def widened(layer: nn.Module, classes: int, present: int | None = None) -> nn.Module:
    """A new layer like ``layer``, a linear one or a convolution, for other ``classes``.

    ``present``: of how many classes ``layer`` is, where it has more outputs than one for each.
    """
    also: Any = {"device": layer.weight.device, "dtype": layer.weight.dtype, "bias": layer.bias is not None}
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features // (present or layer.out_features) * classes, **also)
    assert isinstance(layer, nn.Conv2d)
    outputs = layer.out_channels // (present or layer.out_channels) * classes
    window: Any = (layer.kernel_size, layer.stride, layer.padding)
    return nn.Conv2d(layer.in_channels, outputs, *window, **also)
