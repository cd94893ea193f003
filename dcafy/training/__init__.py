"""Fine-tuning: from a checkpoint to a better checkpoint.

The names are resolved when they are first used, as those of ``dcafy`` are: the command reads the configurations
for its ``--help`` without waiting for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcafy.images.data import Data, open_data
    from dcafy.runs.compare import Comparison
    from dcafy.training.config import DataOptions, TrainingConfig
    from dcafy.training.history import ConnectionState, Epoch, History
    from dcafy.training.loop import finetune

_HOME = {
    "Comparison": "compare",
    "ConnectionState": "history",
    "Data": "data",
    "DataOptions": "config",
    "Epoch": "history",
    "History": "history",
    "TrainingConfig": "config",
    "finetune": "loop",
    "open_data": "data",
}

__all__ = [
    "Comparison",
    "ConnectionState",
    "Data",
    "DataOptions",
    "Epoch",
    "History",
    "TrainingConfig",
    "finetune",
    "open_data",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dcafy.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dcafy.training.{_HOME[name]}"), name)
