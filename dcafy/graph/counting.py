"""What a run costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(run: Callable[[], Any]) -> int:
    """The multiply-adds of convolutions and matrix products in ``run()``, which may be on meta tensors."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops()) // 2
