"""Student's t distribution, for the intervals of few values."""

from __future__ import annotations

import functools
import math


@functools.cache
def student(freedom: int) -> float:
    """The 97.5% point of Student's t distribution.

    >>> round(student(2), 3), round(student(30), 3)
    (4.303, 2.042)
    """
    scale = 2 * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if scale * _half(freedom, middle) < 0.95 else (low, middle)
    return low


def _half(freedom: int, point: float) -> float:
    """The integral of cos(x)^(freedom - 1) from 0 to atan(point / √freedom), by Simpson's rule."""
    end, steps = math.atan(point / math.sqrt(freedom)), 400
    values = [math.cos(end * i / steps) ** (freedom - 1) for i in range(steps + 1)]
    return end / (3 * steps) * (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]))
