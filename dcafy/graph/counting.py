"""What a run costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

from dcafy.threads import OwnThread


class _Counting(OwnThread, _FlopCounterMode):  # type: ignore[no-untyped-call]
    """What ``FlopCounterMode`` counts by, without the hooks that it puts on every module of every thread meanwhile."""


def multiply_adds(run: Callable[[], Any]) -> int:
    """The multiply-adds of convolutions and matrix products in ``run()``, which may be on meta tensors."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _Counting(counter):
        run()
    return int(counter.get_total_flops()) // 2
