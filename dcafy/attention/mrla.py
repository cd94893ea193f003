"""Multi-head recurrent layer attention, its light form (Fang et al., 2023, arXiv 2302.03985)."""

from __future__ import annotations

from torch import Tensor, nn

from dcafy.attention.gate import zero_
from dcafy.attention.units import Reads, Unit
from dcafy.emit.matching import head, neighbours
from dcafy.errors import InputError
from dcafy.find.natures import Nature
from dcafy.plan.options import Init


class MRLA(nn.Module):
    """``x`` plus a norm of ``o``, which goes on from unit to unit of a stage (section 3.4 and eq. 8 of the paper).

    ``oᵗ = λᵗ ⊙ oᵗ⁻¹ + σ(qᵗ·kᵗ/√d) Vᵗ``, head by head of about 32 channels: V is a 3x3 convolution of every channel of x
    by itself, q and k are convolutions along the channels of x's means. σ is not in eq. 8: without a bound ``o`` goes
    with the cube of x, and half precision does not hold that in a network that was trained without it. ``oᵗ⁻¹`` comes
    by the wire, where the network was connected along its stages (:func:`dcafy.insert` does it).

    >>> import torch
    >>> x = torch.rand(2, 64, 8, 8)
    >>> torch.equal(MRLA(64).eval()(x), x)
    True
    """

    nature = Nature("along", context="local", map="state")

    def __init__(self, channels: int, *, init: Init = "identity") -> None:
        super().__init__()
        size, self.width = neighbours(channels), head(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.query = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.key = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.value = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.local = nn.Identity()
        self.state = nn.Identity()
        self.norm = nn.BatchNorm2d(channels)
        if init == "identity":
            zero_(self.norm)

    def extract(self, x: Tensor) -> Tensor:
        """The mean of every channel, ``[N, 1, C]``."""
        g: Tensor = self.pool(x).flatten(2).transpose(1, 2)
        return g

    def transform(self, g: Tensor) -> Tensor:
        """What each channel of V is weighed with: σ(q·k/√d) of its head, ``[N, C, 1, 1]``."""
        heads: Tensor = (self.query(g) * self.key(g)).reshape(g.shape[0], -1, self.width).sum(2) / self.width**0.5
        return heads.sigmoid().repeat_interleave(self.width, 1)[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """The attended ``x``."""
        o = self.state(self.local(self.transform(self.extract(x)) * self.value(x)))
        attended: Tensor = x + self.norm(o)
        return attended


def reads(unit: Unit, module: nn.Module) -> Reads:
    """It goes behind the whole unit, and sees what that returns."""
    if unit.output is None:
        raise InputError(
            f"{unit.path} returns no map [N, C, H, W], behind which 'mrla' could go. Leave it out with where=."
        )
    return {"": (unit.output,)}
