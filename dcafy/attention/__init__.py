"""The attentions of the paper as plain modules, one file each, and what :func:`dcafy.insert` knows of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from dcafy.attention.bam import BAM
from dcafy.attention.cbam import CBAM
from dcafy.attention.eca import ECA
from dcafy.attention.gate import Init
from dcafy.attention.gc import GC
from dcafy.attention.ge import GEPlain, GETheta
from dcafy.attention.se import SE
from dcafy.attention.sge import SGE
from dcafy.attention.sk import SK

__all__ = [
    "ATTENTIONS",
    "BAM",
    "CBAM",
    "ECA",
    "GC",
    "INSERTED",
    "SE",
    "SGE",
    "SK",
    "Attention",
    "GEPlain",
    "GETheta",
    "Init",
    "Insertion",
]


@dataclass(frozen=True)
class Attention:
    """One attention that can be inserted.

    ``build``     (channels, reduction, init, side of the map) -> the module that attends a map
    ``obstacle``  why it cannot start as an exact no-op; empty where it can
    """

    build: Callable[[int, int, Init, int], nn.Module]
    obstacle: str = ""


def _ge_theta(channels: int, reduction: int, init: Init, side: int) -> nn.Module:
    """As many halvings, up to three, as leave maps of 7x7 to be averaged."""
    return GETheta(channels, next((steps for steps in (3, 2, 1) if side >> steps >= 7), 0), init=init)


ATTENTIONS: dict[str, Attention] = {
    "se": Attention(lambda channels, reduction, init, side: SE(channels, reduction, init=init)),
    "ge": Attention(lambda channels, reduction, init, side: GEPlain(), obstacle="nothing in it can be trained"),
    "ge-theta": Attention(_ge_theta),
    "sk": Attention(
        # Built where the convolution is known that it gives a second branch.
        lambda channels, reduction, init, side: SK(channels, nn.Identity(), reduction),
        obstacle="its maps weigh two branches against one another, and the second one is new",
    ),
    "cbam": Attention(lambda channels, reduction, init, side: CBAM(channels, reduction, init=init)),
    "bam": Attention(lambda channels, reduction, init, side: BAM(channels, reduction, init=init)),
    "gc": Attention(lambda channels, reduction, init, side: GC(channels, reduction, init=init)),
    "sge": Attention(lambda channels, reduction, init, side: SGE(channels, init=init)),
    "eca": Attention(lambda channels, reduction, init, side: ECA(channels, init=init)),
}
"""Name -> the attention."""

INSERTED = "inserted_attention"
"""The attribute of a network that says what was inserted into it, in this order."""


@dataclass(frozen=True)
class Insertion:
    """What one call of :func:`dcafy.insert` did: enough to do it again."""

    attention: str
    reduction: int
    where: str
    init: Init
