"""The base held still while the connections train alone."""

from __future__ import annotations

from types import TracebackType

from torch import nn

from dcafy.converted import freeze_base
from dcafy.emit.dca import is_connected
from dcafy.graph.modes import stays_in_eval

__all__ = ["FrozenBase"]


class FrozenBase:
    """Inside it only connections and ``new_layers`` are trained, and the base's batch norms stay in eval mode.

    Afterwards what was trainable before is so again. A model without connections is frozen but for ``new_layers``.
    """

    def __init__(self, model: nn.Module, new_layers: tuple[str, ...] = ()) -> None:
        self.model = model
        self.new = [model.get_submodule(path) for path in new_layers]

    def __enter__(self) -> None:
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.kept = {id(module) for module in self.model.modules() if stays_in_eval(module)}
        if is_connected(self.model):
            freeze_base(self.model)
        else:
            self.model.requires_grad_(False)
        for layer in self.new:
            layer.requires_grad_(True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for parameter in self.trained:
            parameter.requires_grad_(True)
        for module in self.model.modules():
            if stays_in_eval(module) and id(module) not in self.kept:
                del module.__dict__["train"]
