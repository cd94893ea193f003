"""Fine-tuning: from a checkpoint to a better checkpoint.

The names are resolved when they are first used, as those of ``dcafy`` are: the command reads the configurations
for its ``--help`` without waiting for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcafy.fronts import front

if TYPE_CHECKING:
    from dcafy.images.data import Data
    from dcafy.images.options import DataOptions
    from dcafy.images.sources import open_data
    from dcafy.training.history import ConnectionState, Epoch, History
    from dcafy.training.loop import finetune
    from dcafy.training.options import TrainingConfig
    from dcafy.training.telling import Listener

_HOME = {
    "ConnectionState": "history",
    "Data": "dcafy.images.data",
    "DataOptions": "dcafy.images.options",
    "Epoch": "history",
    "History": "history",
    "Listener": "telling",
    "TrainingConfig": "options",
    "finetune": "loop",
    "open_data": "dcafy.images.sources",
}

__all__ = [
    "ConnectionState",
    "Data",
    "DataOptions",
    "Epoch",
    "History",
    "Listener",
    "TrainingConfig",
    "finetune",
    "open_data",
]


__getattr__, __dir__ = front(__name__, _HOME)
