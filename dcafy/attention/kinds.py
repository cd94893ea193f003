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

    from dcafy.attention.order import Order
    from dcafy.attention.units import Reads, Unit
    from dcafy.emit.relay import Calls

Build = Callable[[int, Any, Init, int], "nn.Module"]
"""(channels, reduction or ``None``, init, side of the map) -> the module that attends a map."""

OfUnit = Callable[["Unit", "nn.Module", Any, Init], "nn.Module"]
"""(unit, its module, reduction or ``None``, init) -> what attends the unit."""

Along = Callable[["tuple[Unit, ...]", "Order", Any, Init], "tuple[dict[str, nn.Module], dict[str, Calls]]"]
"""(units, their order, reduction or ``None``, init) -> the modules of those that take part, and who hears whose state.

Each module has the end of the wire that it hears and tells at under ``relay``.
"""


@dataclass(frozen=True)
class Attention:
    """One attention that can be inserted.

    ``obstacle``            why it cannot start as an exact no-op, empty where it can
    ``silent``              the layers, below the module, that are zero where it does: T is the same whatever G is
    ``without_bottleneck``  whether it can do without one (a reduction of ``None``)
    ``reads``               where in a unit its parts go; by default it stands at the end of the main branch
    ``of_unit``             what builds it where it goes by more of the unit than its channels
    ``along``               what builds it for all units at once, where it hands a state on from unit to unit
    ``by_nature``           whether its units are blocks that hear one another by nature (``dcafy.find.natures``)
    ``what``                what it is, and where it comes from
    """

    build: Build | None = None
    obstacle: str = ""
    silent: tuple[str, ...] = ()
    without_bottleneck: bool = False
    reads: Callable[[Unit, nn.Module], Reads] = lambda unit, module: {"": (unit.end,)}
    of_unit: OfUnit | None = None
    along: Along | None = None
    by_nature: bool = False
    what: str = ""


def _of(module: str, name: str) -> Callable[..., Any]:
    made: Callable[..., Any] = getattr(importlib.import_module(f"dcafy.attention.{module}"), name)
    return made


def _reduced(module: str, name: str) -> Build:
    return lambda channels, reduction, init, side: _of(module, name)(channels, reduction, init=init)


def _plain(module: str, name: str) -> Build:
    return lambda channels, reduction, init, side: _of(module, name)(channels, init=init)


def _ge_theta(channels: int, reduction: Any, init: Init, side: int) -> nn.Module:
    """As many halvings, up to three, as leave maps of 7x7 to be averaged."""
    steps = next((steps for steps in (3, 2, 1) if side >> steps >= 7), 0)
    made: nn.Module = _of("ge", "GETheta")(channels, steps, init=init)
    return made


def _called(module: str, name: str) -> Callable[..., Any]:
    """A function of that module, which is imported when it is called."""
    return lambda *given: _of(module, name)(*given)


ATTENTIONS: dict[str, Attention] = {
    "se": Attention(_reduced("se", "SE"), silent=("expand",), what="squeeze-and-excitation (arXiv 1709.01507)"),
    "ge": Attention(
        lambda channels, reduction, init, side: _of("ge", "GEPlain")(),
        obstacle="nothing in it can be trained",
        what="gather-excite without parameters (arXiv 1810.12348)",
    ),
    "ge-theta": Attention(_ge_theta, what="gather-excite with parameters (arXiv 1810.12348)"),
    "sk": Attention(
        of_unit=_called("sk", "of_unit"),
        obstacle="its maps weigh two branches against one another, and the second one is new",
        reads=_called("sk", "reads"),
        what="selective kernels (arXiv 1903.06586)",
    ),
    "cbam": Attention(
        _reduced("cbam", "CBAM"),
        silent=("channel.expand", "spatial.norm"),
        what="convolutional block attention (arXiv 1807.06521)",
    ),
    "bam": Attention(
        _reduced("bam", "BAM"), silent=("channel.norm", "norm"), what="bottleneck attention (arXiv 1807.06514)"
    ),
    "gc": Attention(
        _reduced("gc", "GC"),
        silent=("bottleneck.expand",),
        without_bottleneck=True,
        what="global context (arXiv 1904.11492)",
    ),
    "sge": Attention(_plain("sge", "SGE"), silent=("norm",), what="spatial group-wise enhancement (arXiv 1905.09646)"),
    "eca": Attention(_plain("eca", "ECA"), silent=("conv",), what="efficient channel attention (arXiv 1910.03151)"),
    "mrla": Attention(
        _plain("mrla", "MRLA"),
        silent=("norm",),
        reads=_called("mrla", "reads"),
        by_nature=True,
        what="multi-head recurrent layer attention, light: what earlier units of a stage said goes along (arXiv "
        "2302.03985)",
    ),
    "dia": Attention(
        silent=("cell.expand",),
        along=_called("dia", "along"),
        what="dense-and-implicit attention: one LSTM cell for all units of a stage (arXiv 1905.10671, 2210.16101)",
    ),
    "rla": Attention(
        reads=_called("rla", "reads"),
        along=_called("rla", "along"),
        what="recurrent layer aggregation: a small map goes along the units (arXiv 2110.11852)",
    ),
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
