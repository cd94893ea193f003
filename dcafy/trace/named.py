"""Functions that a graph cannot name by themselves."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Applied:
    """The ``apply`` of an ``autograd.Function``, with the name that fx writes a call down by."""

    function: Any

    @property
    def __name__(self) -> str:
        return str(self.function.__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)


@dataclass(frozen=True)
class Scripted:
    """A function that ``torch.jit.script`` compiled; pickled as the place where it is found, not as its code."""

    function: Any
    module: str
    name: str

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _scripted, (self.module, self.name)


def _scripted(module: str, name: str) -> Scripted:
    return Scripted(getattr(importlib.import_module(module), name), module, name)
