"""How what a block hears of several others becomes one term of f: the seam for topologies with layers of their own.

A topology (``dcafy.link.topology``) says who is heard. Where what is heard is not just added up, its row names a file
here, ``mixing="depth"`` for ``dcafy/emit/depth.py``, and that file has a function ``mix``, which is all that is asked::

    def mix(parts: list[Connection], mixed: Mixed) -> nn.Module: ...

``parts`` has one :class:`Connection` for each block that is heard, in the order of the links: with its α and β, and
``matched(G, T, G_prev)`` for what it hears in the shape and dtype of G. What comes back is one of them, where a block
hears one only and nothing is mixed; or an ``nn.Module`` like :class:`JoinedConnection` (a subclass, best), with

- ``forward(G, *messages)``: G connected. ``messages``: T and G (or ``None``) of each part, one after the other;
  ``None`` twice for a block that told nothing in this run. Terms go through ``part.heard(G, term)``, where usage
  listens, and into ``dcafy.emit.connection.joined(parts[0], G, ((β, term), ...))``, which has the schema: exact at
  β = 0;
- ``parts``, an ``nn.ModuleList`` of the very parts. Layers of its own hang on the parts (``parts[0]`` for what all
  share): ``dcafy.drop`` takes over what hangs there. They are made on ``mixed.place``; what parts share is the same
  module or parameter in each (as JoinedConnection does it with α), and a folder keeps it so.

``Topology.of`` says what of a block is heard: T̃, or with ``of="context"`` its G, which ``matched(G, C, None)`` gives.
``mixed.shared`` is empty at the start of a conversion, and handed to every block in turn, in the order of the plan:
modules that several blocks share (one cell for each stage, say) are kept there under a key of the topology's own. Each
of those blocks registers the module; it is counted and saved once.

A mixing that hands a state on from block to block (``dcafy.emit.hub``) has the end of the wire for that under ``relay``
(:class:`dcafy.emit.relay.Relay`); blocks hear the state of the last one that they hear.

Names of connections, costs, folders, ``inspect``, ``usage``, the command and the report follow. Links keep the name of
the topology as their ``mixing``, so that a plan or a folder says all of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from dcafy.emit.connection import Connection, JoinedConnection
from dcafy.find.layout import Extent
from dcafy.plan.blocks import AttentionBlock, Link

Shared = dict[Any, Any]
"""What the blocks of one conversion share, by keys of a topology's own; and the modules by which each is connected."""


@dataclass(frozen=True)
class Mixed:
    """What a mixing is made for.

    ``target``  the block that hears
    ``extent``  channels of its G, and its size for spatial attention
    ``place``   device and dtype of new layers
    ``links``   what is heard, in the order of the parts, with all settings
    ``shared``  what other blocks of this conversion share with it
    """

    target: AttentionBlock
    extent: Extent
    place: dict[str, Any]
    links: tuple[Link, ...]
    shared: Shared


Mix = Callable[[list[Connection], Mixed], Any]
"""(parts, what they are made for) -> the module that takes the place of G: one of the parts, or one that has them."""


def mixing_named(name: str) -> Mix:
    """How a topology mixes, by the name in its row; empty: every term is added up with a β of its own."""
    if not name:
        return _added
    mix: Mix = importlib.import_module(f"dcafy.emit.{name}").mix
    return mix


def _added(parts: list[Connection], mixed: Mixed) -> nn.Module:
    return parts[0] if len(parts) == 1 else JoinedConnection(parts)
