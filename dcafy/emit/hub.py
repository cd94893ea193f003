"""``hub``: a block hears the state of one small LSTM cell, which reads the G of every block before it in its stage.

::

    block 1:  G₁ ──tell──▶ block 2:  s = cell(G₁, 0) ─▶ f(αG₂, β·h(s))
                                     │ s          G₂ ──tell──▶ block 3:  s = cell(G₂, s) ─▶ f(αG₃, β·h(s))
                                     └────────────── relay ──────────────▶ ...

Dense-and-implicit attention (DIA, arXiv 1905.10671 and 2210.16101) as a retrofit: there the h of the cell takes the
place of every block's T; here each block keeps its own transformation, and hears h. A stage is the blocks of one width
(and dimension) that reach one another, as in the paper, where a cell has the width of its stage.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dcafy.emit.cell import LightCell
from dcafy.emit.connection import Connection, JoinedConnection, joined
from dcafy.emit.matching import MATCHES, to_size
from dcafy.emit.mixing import Mixed
from dcafy.emit.relay import Relay


class HubConnection(JoinedConnection):
    """G connected to the state of the cell of its stage, which is then handed on to the next block.

    What is heard of others is their G, each over its root mean square, for the contexts of a trained network have any
    scale; the cell reads it and goes on from the state that the block before has told. Cell and relay hang on the first
    part. Where nothing is heard, nothing is handed on.
    """

    def __init__(self, parts: list[Connection], cell: LightCell, rank: int) -> None:
        super().__init__(parts)
        for part in parts:
            part.beta = parts[0].beta
            part.is_read = True
        parts[0].cell = cell
        parts[0].relay = Relay(2 * cell.channels, rank)

    @property
    def relay(self) -> Relay:
        """Where the state is heard and told."""
        relay: Relay = self.parts[0].relay  # type: ignore[assignment]
        return relay

    def forward(self, G: Tensor, *messages: Tensor | None) -> Tensor:
        """G connected; ``messages``: G and ``None`` of each block that is heard, one after the other."""
        parts: Any = self.parts
        first, matching = parts[0], MATCHES[parts[0].dimension]
        told = zip(parts, messages[::2], strict=True)
        read = [matching.places(part, part.matched(G, context)) for part, context in told if context is not None]
        if not read:
            return joined(first, G, ())
        state = self.relay.heard(read[0])
        if self.relay.rank > 2:
            state = to_size(state, read[0].shape[2:], grows=False)
        for context in read:
            state = first.cell(context.movedim(1, -1), state.movedim(1, -1)).movedim(-1, 1)
        self.relay.tell(state)
        h = matching.from_places(first, state[:, : first.cell.channels], G)
        return joined(first, G, ((first.beta, first.heard(G, h)),))


def mix(parts: list[Connection], mixed: Mixed) -> nn.Module:
    """The module of a block; the cell is that of all blocks of its width, and of one ``reduction`` of their links."""
    (channels, size), reduction = mixed.extent, mixed.links[0].reduction or 16
    key = "hub", mixed.target.dimension, channels, reduction, str(mixed.place.get("device"))
    if key not in mixed.shared:
        mixed.shared[key] = LightCell(channels, reduction, remembers=False, silent=False, **mixed.place)
    cell = mixed.shared[key]
    assert isinstance(cell, LightCell)
    if ("hub", mixed.links[-1].source) in mixed.shared:
        cell.remember(**mixed.place)
    mixed.shared["hub", mixed.target.name] = made = HubConnection(parts, cell, 2 + len(size or ()))
    return made
