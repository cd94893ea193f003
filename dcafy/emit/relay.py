"""An end of the wire for what is handed on from unit to unit: a state, not a block's attention map.

::

    unit 1:  y ─▶ tell(h)          unit 2:  h = heard ─▶ ... ─▶ tell(h)          unit 3:  h = heard ─▶ ...
                     └──────── wire ────────┘                    └──────── wire ────────┘

The same lines, runs and rules as between blocks (:mod:`dcafy.emit.wire`); no state is kept in a module.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dcafy.emit.dca import EXAMPLE, Example
from dcafy.emit.ends import Ends, Heard, Port, Told, wire_of
from dcafy.emit.root import relay_runs
from dcafy.emit.wire import hear_state, tell


class Relay(nn.Module):
    """Hears the state of the unit before, at each of its ears, and tells the one of its own.

    ``width``: channels of the state. ``rank``: 4 for a map, 2 for a vector. ``ears``: how often a call of the unit asks
    for the state. Until it is joined to others (:func:`join`) it hears zeros.
    """

    held_as = "relay"

    def __init__(self, width: int, rank: int = 4, ears: int = 1) -> None:
        super().__init__()
        self.width = width
        self.rank = rank
        self.ears = ears
        self.ends = Ends(wire_of(uuid.uuid4().hex, 0, 0, {}), None, (Port((None,)),) * (ears + 1))

    def heard(self, like: Tensor, ear: int = 0) -> Tensor:
        """The state that was told, ``[N, width, ...]``; zeros, of the batch and places of ``like``, where none was."""
        return hear_state(self, ear, like, self.width, self.rank)

    def tell(self, state: Tensor) -> None:
        """Hands the state on to those who hear it."""
        tell(self, self.ears, state)

    @property
    def hears(self) -> tuple[str, ...]:
        """The units whose state it hears, by their paths; none where it only tells."""
        heard = (what for what in self.ends.ports[0].calls if isinstance(what, Heard))
        return tuple(dict.fromkeys(what.source for what in heard))

    def extra_repr(self) -> str:
        """Whom it tells."""
        told = [line for one in self.ends.told for lines in one.lines for line in lines]
        return f"{self.width} channels, told on {len(told)} lines"


Call = tuple[str, int]
"""A unit, by its path, and which of its calls in a run."""


@dataclass(frozen=True)
class Calls:
    """The calls of one unit in a run.

    ``hears``    for each of them the call whose state is heard, if any
    ``repeats``  whether a run calls it any number of times, each time alike
    """

    hears: tuple[Call | None, ...]
    repeats: bool = False


def join(model: nn.Module, relays: Mapping[str, Relay], calls: Mapping[str, Calls], example: Any = None) -> None:
    """Has the units of ``model`` hear one another, by paths, and every call of ``model`` open a run.

    ``example``: inputs to write its graph with, where nothing else says them.
    """
    if example is not None:
        model.__dict__[EXAMPLE] = Example(example)
    readers: dict[Call, list[Call]] = {}
    for path in relays:
        for turn, source in enumerate(calls[path].hears):
            if source is not None:
                readers.setdefault(source, []).append((path, turn))
    ends = [(one, ear) for heard in readers.values() for one in heard for ear in range(relays[one[0]].ears)]
    wire = wire_of(uuid.uuid4().hex, len(ends), len(relays), {})
    lines = dict(zip(ends, wire.lines, strict=True))

    def hears(call: Call, ear: int) -> Heard | None:
        line, source = lines.get((call, ear)), calls[call[0]].hears[call[1]]
        return None if line is None else Heard(call[0], "", ((line, None),), (True,), source[0] if source else "")

    def tells(call: Call) -> Told | None:
        to = tuple(lines[one, ear] for one in readers.get(call, ()) for ear in range(relays[one[0]].ears))
        return Told(call[0], (to,)) if to else None

    for number, (path, relay) in enumerate(relays.items()):
        own = [(path, turn) for turn in range(len(calls[path].hears))]
        ears = (Port(tuple(hears(call, ear) for call in own), enters=not ear) for ear in range(relay.ears))
        count = None if calls[path].repeats else wire.counts[number]
        relay.ends = Ends(wire, count, (*ears, Port(tuple(map(tells, own)))))
    relay_runs(model, wire)
