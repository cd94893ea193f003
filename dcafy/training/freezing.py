"""The base held still while the connections train alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from dcafy.converted import freeze_base, has_new
from dcafy.graph.modes import stays_in_eval


@contextmanager
def frozen_base(model: nn.Module, new_layers: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Inside it only connections, inserted attention and ``new_layers`` are trained; batch norms stay in eval.

    Afterwards what was trainable before is so again. A model where nothing is connected is frozen but for the others.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = {id(module) for module in model.modules() if stays_in_eval(module)}
    if has_new(model):
        freeze_base(model)
    else:
        model.requires_grad_(False)
    for layer in new_layers:
        layer.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in model.modules():
            if stays_in_eval(module) and id(module) not in kept:
                del module.__dict__["train"]
