"""Dense-and-implicit attention (Huang et al., 2020, arXiv 1905.10671 and 2210.16101): one LSTM cell for a stage."""

from __future__ import annotations

from torch import Tensor, nn

from dcafy.attention.order import Order
from dcafy.attention.units import Unit
from dcafy.emit.cell import LightCell
from dcafy.emit.relay import Calls, Relay
from dcafy.plan.options import Init


class DIA(nn.Module):
    """``x`` with every channel scaled by the state of a cell that all units of its stage share (eq. 2 of the paper).

    The cell reads the means of every unit in turn, and its h is the map T of the unit. ``init="identity"``: T is 4h,
    which is exactly 1 while the cell is silent; ``"paper"``: h.

    >>> import torch
    >>> x = torch.rand(2, 32, 8, 8)
    >>> torch.equal(DIA(LightCell(32, 4))(x), x)
    True
    """

    def __init__(self, cell: LightCell, *, init: Init = "identity") -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.cell = cell
        self.relay = Relay(2 * cell.channels, rank=2)
        self.scale = 4.0 if init == "identity" else 1.0

    def extract(self, x: Tensor) -> Tensor:
        """G: the mean of every channel, ``[N, C]``."""
        g: Tensor = self.pool(x).flatten(1)
        return g

    def transform(self, g: Tensor) -> Tensor:
        """T: what the cell makes of G and of the units before, ``[N, C]``; the state is handed on."""
        state = self.cell(g, self.relay.heard(g))
        self.relay.tell(state)
        t: Tensor = self.scale * state[:, : self.cell.channels]
        return t

    def fuse(self, x: Tensor, t: Tensor) -> Tensor:
        """X scaled by T."""
        return x * t[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """The attended ``x``."""
        return self.fuse(x, self.transform(self.extract(x)))


def along(
    units: tuple[Unit, ...], order: Order, reduction: int, init: Init
) -> tuple[dict[str, nn.Module], dict[str, Calls]]:
    """One cell for all units of one width that reach one another; the state goes from each to the next of them."""
    remember = {order.stages[path] for path, calls in order.alike.items() if any(calls.hears)}
    cells: dict[int, LightCell] = {}
    made: dict[str, nn.Module] = {}
    for unit in units:
        stage = order.stages[unit.path]
        if stage not in cells:
            cells[stage] = LightCell(unit.channels, reduction, remembers=stage in remember, silent=init == "identity")
        made[unit.path] = DIA(cells[stage], init=init)
    return made, order.alike
