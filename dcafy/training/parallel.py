"""Which of several processes this one is, before and after Accelerate has the say."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch.distributed as dist

__all__ = ["finished", "is_main_process", "on_main_process"]


def is_main_process() -> bool:
    """Whether this process tells and saves: torchrun counts from 0."""
    return int(os.environ.get("RANK", "0")) == 0


def on_main_process(action: Callable[[], None]) -> None:
    """Does ``action`` in the main process alone."""
    if is_main_process():
        action()


def finished() -> None:
    """Leaves the group of processes, where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
