"""Blocks that a module says it has: attention that is connected by nature, which no dataflow tells from a plain layer.

Such a module (``dcafy.attention.mrla``) has a class attribute ``nature``. What passes through one layer of its own is
what it hears with, G; what passes through another is what it tells, T. In the plan it is a block like any other, that
hears those of its nature only, as its own topology has it (``dcafy.link.topology.BY_NATURE``); what dataflow finds
inside it is a part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from dcafy.find.roles import Found
from dcafy.graph.nodes import node_value
from dcafy.graph.paths import joined
from dcafy.plan.blocks import AttentionBlock
from dcafy.trace.recording import Call, Recording


@dataclass(frozen=True)
class Nature:
    """What a module says of itself.

    ``topology``  how it is connected: a name in :data:`dcafy.link.topology.BY_NATURE`
    ``context``   the name of its child, an ``nn.Identity``, through which G passes
    ``map``       and of the one through which T passes, behind it
    """

    topology: str
    context: str
    map: str


def with_natures(recording: Recording, found: tuple[Found, ...], path: str) -> tuple[Found, ...]:
    """The blocks that were found, and those that modules say they have, in the order data meets them."""
    own, inside = [], set[fx.Node]()
    turns: dict[str, int] = {}
    for call in recording.calls:
        nature = getattr(recording.modules[call.path], "nature", None)
        if isinstance(nature, Nature) and call.nodes:
            turns[call.path] = turn = turns.get(call.path, 0) + 1
            name = joined(path, call.path) + (f"#{turn}" if turn > 1 else "")
            own.append(_block(nature, call, name))
            inside.update(call.nodes)
    if not own:
        return found
    every = [*own, *(one for one in found if inside.isdisjoint(one.fusions))]
    return tuple(sorted(every, key=lambda one: recording.order[one.fusions[0]]))


def _block(nature: Nature, call: Call, name: str) -> Found:
    context, map_ = (_passing(call, joined(call.path, child)) for child in (nature.context, nature.map))
    value = node_value(context)
    assert isinstance(value, Tensor)
    _, channels, *size = value.shape
    block = AttentionBlock(
        name=name,
        dimension="spatial",
        channels=channels,
        size=tuple(size),
        gate="none",
        fusion_kind="add",
        extraction=(context.name,),
        transformation=(map_.name,),
        fusion=(call.output.name,),
        nature=nature.topology,
    )
    kind = tuple(f"{nature.topology} {axis}" for axis in range(1, value.ndim))  # no other map is of this kind
    return Found(block, (context,), map_, (call.output,), frozenset((map_,)), axis=1, bounded=False, kinds=(kind,))


def _passing(call: Call, path: str) -> fx.Node:
    """What passes through the layer at ``path`` in a call."""
    return next(node for node in call.nodes if node.op == "call_module" and node.target == path)
