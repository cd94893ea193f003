"""A small LSTM cell that goes from unit to unit, or from block to block, of a stage (arXiv 1905.10671, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LightCell(nn.Module):
    """h and c after one more step, from a context x and the state before (the paper's modified LSTM).

    ::

        i, f, g, o = expand(ReLU(reduce(x))) + expand'(ReLU(reduce'(h)))
        c' = σ(f)·c + σ(i)·tanh(g)        h' = σ(o)·σ(c')

    Two linear layers through ``channels // reduction`` stand in the place of one of full size, and σ in that of the
    second tanh. ``remembers``: whether there ever is a state before; without one its layers would never learn.
    ``silent``: the last layers are zero, so that c' is 0 and h' is 1/4, whatever is heard. At that h no ReLU that reads
    it cuts off.
    """

    def __init__(
        self,
        channels: int,
        reduction: int,
        *,
        remembers: bool = True,
        silent: bool = True,
        **place: Any,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.hidden = max(channels // reduction, _LEAST)
        self.reduce = nn.ModuleList()
        self.expand = nn.ModuleList()
        for _ in range(1 + remembers):
            self._add(True, place)
        if silent:
            for parameter in self.expand.parameters():
                nn.init.zeros_(parameter)

    def _add(self, bias: bool, place: dict[str, Any]) -> None:
        self.reduce.append(nn.Linear(self.channels, self.hidden, bias, **place))
        if len(self.reduce) > 1:
            _revived(*self.reduce[-1].parameters())
        self.expand.append(nn.Linear(self.hidden, 4 * self.channels, bias, **place))

    def remember(self, **place: Any) -> None:
        """Has the cell read the state before from now on, with layers without a bias: zeros are as no state."""
        if len(self.reduce) == 1:
            self._add(False, place)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """The next state; a state is h and c, side by side: ``[N, ..., 2C]``; ``x``: ``[N, ..., C]``."""
        h, c = state.chunk(2, -1)
        read = zip(self.reduce, self.expand, (x, h), strict=False)
        i, f, g, o = sum(expand(F.relu(reduce(value))) for reduce, expand, value in read).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.cat((torch.sigmoid(o) * torch.sigmoid(c), c), -1)


_LEAST = 4
"""The least hidden width: one or two would be cut off by their ReLU all too often, and learn nothing."""


@torch.no_grad()
def _revived(weight: Tensor, *bias: Tensor) -> None:
    """Turns round what a layer makes of an h that is 1/4 where that is negative; its draws are as likely so."""
    sign = torch.where(weight.sum(1) / 4 + sum(bias) < 0, -1.0, 1.0)
    weight.mul_(sign[:, None])
    for one in bias:
        one.mul_(sign)
