"""SIGTERM and Ctrl-C during a training: it stops after the step it is at, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from dcafy.errors import Interrupted
from dcafy.wording import printable

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def stopped(number: int, directory: Path | None) -> Interrupted:
    """What is raised where a signal stopped the run in ``directory``."""
    name = signal.Signals(number).name
    if directory is None:
        return Interrupted(f"Stopped by {name}. No folder was named, so nothing was saved.", number)
    go_on = f"dcafy finetune {printable(str(directory))} --resume"
    return Interrupted(f"Stopped by {name}; where it stands is saved. Go on with: {go_on}", number)


class Interruption:
    """Inside it the first signal is noted; a second one of the same kind does what it always does."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        which = signal.Signals(number)
        signal.signal(which, self._before[which])

    def signal(self, device: torch.device) -> Tensor:
        """The number of the signal that came, or 0."""
        return torch.tensor(float(self.number), device=device)
