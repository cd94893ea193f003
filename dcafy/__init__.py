"""Model surgery for convolutional attention: connect the attention blocks of a trained network.

The names are resolved when they are first used (PEP 562), so that ``import dcafy`` costs nothing
and ``dcafy --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcafy.analysis.usage import usage
    from dcafy.attention.insertion import insert
    from dcafy.checkpoint import load, save
    from dcafy.conversion import convert, inspect
    from dcafy.emit.connect import connections, freeze_base, parameter_groups, revert
    from dcafy.emit.connection import Connection
    from dcafy.errors import DcafyError
    from dcafy.plan.blocks import AttentionBlock, Chain, Link, Plan, Skipped

__version__ = "0.1.0"

_HOME = {
    "AttentionBlock": "plan.blocks",
    "Chain": "plan.blocks",
    "Connection": "emit.connection",
    "DcafyError": "errors",
    "Link": "plan.blocks",
    "Plan": "plan.blocks",
    "Skipped": "plan.blocks",
    "connections": "emit.connect",
    "convert": "conversion",
    "freeze_base": "emit.connect",
    "insert": "attention.insertion",
    "inspect": "conversion",
    "load": "checkpoint",
    "parameter_groups": "emit.connect",
    "revert": "emit.connect",
    "save": "checkpoint",
    "usage": "analysis.usage",
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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dcafy' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dcafy.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
