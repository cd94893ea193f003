"""Which of several processes this one is, before and after Accelerate has the say."""

from __future__ import annotations

import os

import torch.distributed as dist


def is_main_process() -> bool:
    """Whether this process tells and saves: torchrun counts from 0."""
    return int(os.environ.get("RANK", "0")) == 0


def finished() -> None:
    """Leaves the group of processes, where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
