"""The wire of one conversion, its lines from block to block, and the ends of them that a module has."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

Before = dict[str, tuple[str, int, int | None]]


class _OnWire:
    """Something of a wire that holds a value on each thread.

    It is found through the modules at its ends and never by a name: code that ``torch.compile`` makes for one block
    then serves all of the same kind. It stays itself in copies and pickles of what holds it, so that a block that was
    copied and put back still talks.
    """

    def __init__(self, wire: Wire, number: int) -> None:
        self.wire = wire
        self.number = number
        self.here = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _found, (type(self), self.wire, self.number)


class Line(_OnWire):
    """From one value of a block to one reader: holds it from when it is told until it is heard."""


class Count(_OnWire):
    """How often a module at an end of the wire was called in the run."""


class Wire:
    """All lines of one conversion, and a count for each module at their ends.

    ``token``   the same in all copies of what was converted
    ``before``  block -> the block that it hears and the lines on which it does, if those who hear the first could hear
                that as well
    """

    def __init__(self, token: str, lines: int, hosts: int, before: Before) -> None:
        self.token = token
        self.before = before
        self.lines = tuple(Line(self, i) for i in range(lines))
        self.counts = tuple(Count(self, i) for i in range(hosts))
        self.here = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Wire:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return wire_of, (self.token, len(self.lines), len(self.counts), self.before)


_wires: weakref.WeakValueDictionary[str, Wire] = weakref.WeakValueDictionary()


def wire_of(token: str, lines: int, hosts: int, before: Before) -> Wire:
    """The wire of the conversion of that token: the one that is there, or a new one."""
    wire = _wires.get(token)
    if wire is None or (len(wire.lines), len(wire.counts)) != (lines, hosts):
        wire = _wires[token] = Wire(token, lines, hosts, before)
    return wire


WIRES = "dcafy_wires"
"""Under which a root has the wires that its runs are of."""


def wires_of(root: Any) -> tuple[Wire, ...]:
    """The wires of which every call of ``root`` opens a run."""
    wires: tuple[Wire, ...] = getattr(root, WIRES, ())
    return wires


def add_wire(root: Any, wire: Wire) -> None:
    """Has the calls of ``root``, once they open runs, open those of ``wire`` as well."""
    root.__dict__[WIRES] = (*wires_of(root), wire)


def keep_wires(root: Any, kept: Collection[Wire]) -> None:
    """The calls of ``root`` open runs of these of its wires only."""
    left = tuple(wire for wire in wires_of(root) if wire in kept)
    root.__dict__.pop(WIRES, None)
    if left:
        root.__dict__[WIRES] = left


def _found(kind: type[_OnWire], wire: Wire, number: int) -> _OnWire:
    return wire.lines[number] if kind is Line else wire.counts[number]


@dataclass(frozen=True)
class Heard:
    """What a port hears in one call of its module.

    ``reader``      who hears: the block
    ``connection``  where the connection is below ``dca``; empty: ``dca`` itself
    ``sources``     per block that is heard: the line of its T, and of its G or ``None``; ``None`` for itself
    ``batch``       per source: whether its messages have the batch size of G
    ``source``      the block that is heard, where it is one: if it is taken out, what it would have heard is heard
    """

    reader: str
    connection: str
    sources: tuple[tuple[Line, Line | None] | None, ...]
    batch: tuple[bool, ...]
    source: str = ""


@dataclass(frozen=True)
class Told:
    """What a port tells in one call of its module: the lines that each value goes to; ``source``: the block."""

    source: str
    lines: tuple[tuple[Line, ...], ...]


@dataclass(frozen=True)
class Port:
    """A place in a module's code where something is heard or told.

    ``calls``   for each call of the module in a run that the recording knows: what happens, if anything
    ``enters``  whether it is the first place in the code, at which a call is counted
    """

    calls: tuple[Heard | Told | None, ...]
    enters: bool = False


@dataclass(frozen=True)
class Ends:
    """The ends of the wire in one module, kept by its ``dca``.

    ``count``      the count of its calls; ``None``: it is called any number of times, every time alike
    ``addresses``  name of each connection -> its path below ``dca``
    """

    wire: Wire
    count: Count | None
    ports: tuple[Port, ...]
    addresses: tuple[tuple[str, str], ...] = ()

    @property
    def told(self) -> tuple[Told, ...]:
        """Everything that is told in the module."""
        return tuple(what for port in self.ports for what in port.calls if isinstance(what, Told))

    def __deepcopy__(self, memo: dict[int, Any]) -> Ends:
        return self
