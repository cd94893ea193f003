"""Model surgery for convolutional attention: connect the attention blocks of a trained network.

The names are resolved when they are first used (PEP 562), so that ``import dcafy`` costs nothing
and ``dcafy --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcafy.blocks import AttentionBlock, Chain, Link, Plan, Skipped
    from dcafy.checkpoint import load, save
    from dcafy.connection import Connection
    from dcafy.convert import convert, inspect
    from dcafy.emit import connections, freeze_base, parameter_groups, revert
    from dcafy.errors import DcafyError
    from dcafy.insert import insert
    from dcafy.usage import usage

__version__ = "0.1.0"

_HOME = {
    "AttentionBlock": "blocks",
    "Chain": "blocks",
    "Connection": "connection",
    "DcafyError": "errors",
    "Link": "blocks",
    "Plan": "blocks",
    "Skipped": "blocks",
    "connections": "emit",
    "convert": "convert",
    "freeze_base": "emit",
    "insert": "insert",
    "inspect": "convert",
    "load": "checkpoint",
    "parameter_groups": "emit",
    "revert": "emit",
    "save": "checkpoint",
    "usage": "usage",
}
"""Public name -> the module it lives in."""

__all__ = [
    "AttentionBlock",
    "Chain",
    "Connection",
    "DcafyError",
    "Link",
    "Plan",
    "Skipped",
    "__version__",
    "connections",
    "convert",
    "freeze_base",
    "insert",
    "inspect",
    "load",
    "parameter_groups",
    "revert",
    "save",
    "usage",
]


class _Package(ModuleType):
    """The package itself, in which ``dcafy.convert`` stays the function.

    Importing the submodule ``dcafy/convert.py`` would bind the module to the function's name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dcafy' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dcafy.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
