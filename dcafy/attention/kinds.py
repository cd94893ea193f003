"""The attentions that can be inserted, by name; each is imported where it is built, so that the names cost nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from dcafy.plan.options import Init
from dcafy.records import one_of, within

if TYPE_CHECKING:
    from torch import nn

Build = Callable[[int, Any, Init, int], "nn.Module"]
"""(channels, reduction or ``None``, init, side of the map) -> the module that attends a map."""


@dataclass(frozen=True)
class Attention:
    """One attention that can be inserted.

    ``obstacle``            why it cannot start as an exact no-op, empty where it can
    ``silent``              the layers, below the module, that are zero where it does: T is the same whatever G is
    ``without_bottleneck``  whether it can do without one (a reduction of ``None``)
    ``behind``              whether it goes behind the whole unit, and not at the end of its main branch
    ``by_nature``           whether it is connected from unit to unit (``dcafy.find.natures``), by the insertion itself
    """

    build: Build
    obstacle: str = ""
    silent: tuple[str, ...] = ()
    without_bottleneck: bool = False
    behind: bool = False
    by_nature: bool = False


def _of(module: str, name: str) -> Callable[..., nn.Module]:
    made: Callable[..., nn.Module] = getattr(importlib.import_module(f"dcafy.attention.{module}"), name)
    return made


def _reduced(module: str, name: str) -> Build:
    return lambda channels, reduction, init, side: _of(module, name)(channels, reduction, init=init)


def _ge_theta(channels: int, reduction: int, init: Init, side: int) -> nn.Module:
    """As many halvings, up to three, as leave maps of 7x7 to be averaged."""
    steps = next((steps for steps in (3, 2, 1) if side >> steps >= 7), 0)
    return _of("ge", "GETheta")(channels, steps, init=init)


def _sk(channels: int, reduction: int, init: Init, side: int) -> nn.Module:
    """Built where the convolution is known that it gives a second branch."""
    from torch import nn

    return _of("sk", "SK")(channels, nn.Identity(), reduction)


ATTENTIONS: dict[str, Attention] = {
    "se": Attention(_reduced("se", "SE"), silent=("expand",)),
    "ge": Attention(
        lambda channels, reduction, init, side: _of("ge", "GEPlain")(), obstacle="nothing in it can be trained"
    ),
    "ge-theta": Attention(_ge_theta),
    "sk": Attention(_sk, obstacle="its maps weigh two branches against one another, and the second one is new"),
    "cbam": Attention(_reduced("cbam", "CBAM"), silent=("channel.expand", "spatial.norm")),
    "bam": Attention(_reduced("bam", "BAM"), silent=("channel.norm", "norm")),
    "gc": Attention(_reduced("gc", "GC"), silent=("bottleneck.expand",), without_bottleneck=True),
    "sge": Attention(lambda channels, reduction, init, side: _of("sge", "SGE")(channels, init=init), silent=("norm",)),
    "mrla": Attention(
        lambda channels, reduction, init, side: _of("mrla", "MRLA")(channels, init=init),
        silent=("norm",),
        behind=True,
        by_nature=True,
    ),
    "eca": Attention(lambda channels, reduction, init, side: _of("eca", "ECA")(channels, init=init), silent=("conv",)),
}
"""Name -> the attention."""

INSERTED = "inserted_attention"
"""The attribute of a network that says what was inserted into it, in this order."""

KIND = "inserted_as"
"""The attribute of an inserted module that says what attention it is."""


@dataclass(frozen=True)
class Insertion:
    """What one call of :func:`dcafy.insert` did: enough to do it again."""

    attention: Annotated[str, one_of(ATTENTIONS)]
    reduction: Annotated[int, within(1, 2**16)] | None
    where: str
    init: Init
