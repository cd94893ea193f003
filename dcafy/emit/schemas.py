"""The forms of f: how a block's own context and what it hears are joined (paper 3.2), one row each.

Torch is imported where it is used: the command reads the names from here.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


Term = tuple["Tensor", "Tensor"]
"""β, and ``match(T̃)`` in the shape and dtype of G."""


@dataclass(frozen=True)
class Schema:
    """``combine``: f, of ``a = αG`` and ``b = βT̃``; ``exact``: whether it is G itself at α = 1, β = 0.

    ``normalises``: whether f ends with the norm and the ReLU that each dimension has for it (``dcafy.emit.matching``).
    """

    combine: Callable[[Tensor, Tensor], Tensor]
    exact: bool = True
    normalises: bool = False

    def of(self, G: Tensor, alpha: Tensor, terms: tuple[Term, ...]) -> Tensor:
        """f(αG, Σβᵢ·match(T̃ᵢ)); αG where there is no term."""
        alpha = _as(alpha, G)
        if not terms:
            return alpha * G
        second = functools.reduce(operator.add, [_as(beta, G) * matched for beta, matched in terms])
        return self.combine(alpha * G, second)


def _as(scale: Tensor, G: Tensor) -> Tensor:
    """α or β in the dtype of G, which autocast may have changed."""
    import torch

    dtype = G.dtype  # where G is traced, this is a proxy, too, and no dtype to go by
    return scale if isinstance(dtype, torch.dtype) and dtype == scale.dtype else scale.to(dtype)


def _direct(a: Tensor, b: Tensor) -> Tensor:
    """``a + b`` (paper eq. 3)."""
    return a + b


_POLE = 1e-3
"""How near to 0 the denominator of ``weighted`` may come, as a part of ``|a| + |b|``."""


def _weighted(a: Tensor, b: Tensor) -> Tensor:
    """``(a² + b²) / (a + b)`` (paper eq. 4), finite everywhere.

    Written as ``a + b - 2ab/d`` it is exactly ``a`` where ``b`` is 0. ``d`` is ``a + b``, kept away from 0.
    """
    import torch

    wide = a.float() if a.dtype in (torch.float16, torch.bfloat16) else a
    other = b.to(wide.dtype)
    total = wide + other
    # The smallest floor is for a = b = 0; its inverse is finite, and so are gradients.
    floor = (_POLE * (wide.abs() + other.abs())).clamp_min(1e-30)
    divisor = torch.where(total < 0, -1.0, 1.0).to(wide.dtype) * torch.maximum(total.abs(), floor)
    result = total - 2 * wide * (other / divisor)
    if wide.dtype != a.dtype:  # near the pole it is a thousand times a, which half precision may not hold
        largest = torch.finfo(a.dtype).max
        return result.clamp(-largest, largest).to(a.dtype)
    return result


def _softmax(a: Tensor, b: Tensor) -> Tensor:
    """``a`` and ``b``, weighed by a softmax over the two, element by element."""
    weight = (a - b).sigmoid()
    return weight * a + (1 - weight) * b


SCHEMAS: dict[str, Schema] = {
    "direct": Schema(_direct),
    "weighted": Schema(_weighted),
    "softmax": Schema(_softmax, exact=False),
    "normalised": Schema(_direct, exact=False, normalises=True),
}
"""Name -> the schema."""
