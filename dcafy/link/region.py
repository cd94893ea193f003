"""A region: one recording, the blocks in it, and whose output reaches whom."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from torch import fx, nn

from dcafy.find.roles import Found
from dcafy.graph.ops import Op, alters_argument, op_of
from dcafy.graph.paths import joined
from dcafy.link.batches import Batch
from dcafy.link.message import Message, Unlinkable, extents
from dcafy.link.sites import Site, Sites, placed
from dcafy.plan.blocks import Of, Skipped
from dcafy.trace.lineage import Mark
from dcafy.trace.recording import Call, Recording


@dataclass(frozen=True)
class InTraining:
    """A module that decides by its mode, as it is recorded in training by itself.

    ``blocks``  the blocks of its first call in the other recording -> what they are in this one
    """

    region: Region
    blocks: dict[str, Found]

    def nodes(self, other: Region) -> dict[fx.Node, fx.Node]:
        """What blocks make and pass on, in the other recording -> the same in this one."""
        same: dict[fx.Node, fx.Node] = {}
        for name, found in self.blocks.items():
            ours, theirs = (_made(region, one) for region, one in ((other, other[name]), (self.region, found)))
            same.update(zip(ours, theirs, strict=True))
        return same


def _made(region: Region, found: Found) -> tuple[fx.Node, ...]:
    message = region.messages[found.name]
    return (found.map, *found.contexts, *(message.maps if isinstance(message, Message) else ()))


def training_of(region: Region, path: str, trained: Region) -> InTraining | None:
    """The module at ``path`` as it is in training, where its attention is the same; ``trained``: recorded by itself."""
    call = region.sites.calls(path)[0]
    nodes = set(call.nodes if call else region.recording.graph.nodes)
    ours = [found for found in region.found if found.fusions[0] in nodes]
    pairs = list(zip(ours, trained.found, strict=False))
    if len(ours) != len(trained.found) or not all(_alike(region, one, trained, other) for one, other in pairs):
        return None
    named = {
        one.name: dataclasses.replace(other, block=dataclasses.replace(other.block, name=one.name))
        for one, other in pairs
    }
    messages = {one.name: trained.messages[other.name] for one, other in pairs}
    return InTraining(dataclasses.replace(trained, found=tuple(named.values()), messages=messages), named)


def _alike(region: Region, one: Found, trained: Region, other: Found) -> bool:
    """Whether a block is the same in training, as far as its connections go."""
    messages = region.messages[one.name], trained.messages[other.name]
    blocks = [
        (f.block.dimension, f.block.channels, f.block.size, f.block.gate, f.block.fusion_kind) for f in (one, other)
    ]
    kinds = [
        (m.kind, m.extents, len(m.maps)) if isinstance(m, Message) and m.kind != "fused" else None for m in messages
    ]
    return blocks[0] == blocks[1] and len(one.contexts) == len(other.contexts) and kinds[0] == kinds[1] is not None


@dataclass(frozen=True)
class Region:
    """A module with a graph of its own: its blocks, what each passes on, and who could hear whom.

    ``messages``  block name -> what it passes on, or why it cannot
    ``batches``   block name -> of how many samples its maps are
    ``earlier``   block name -> the earlier blocks of its dimension whose outputs reach it, nearest last
    ``skipped``   what was seen in it and is no block to connect
    ``trainings`` what modules that decide by their mode do in training
    """

    path: str
    recording: Recording
    found: tuple[Found, ...]
    messages: dict[str, Message | Unlinkable]
    batches: dict[str, Batch]
    earlier: dict[str, tuple[str, ...]]
    skipped: tuple[Skipped, ...]
    order: dict[fx.Node, int] = field(repr=False)
    trainings: dict[str, InTraining] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Found:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @functools.cached_property
    def _by_name(self) -> dict[object, Found]:
        return {block.name: block for block in self.found}

    @functools.cached_property
    def sites(self) -> Sites:
        """The places in this recording's modules."""
        return Sites(self.recording, self.trainings)

    def hearing(self, name: str) -> tuple[Site, ...]:
        """Where each extraction output of a block is taken; raises ``NoPlace``."""
        found = self[name]
        return tuple(self.sites.hearing(context, found.between) for context in found.contexts)

    def message(self, name: str, of: Of = "message") -> Message | Unlinkable:
        """What a block passes on: T̃, or its G."""
        if of == "context":
            found = self[name]
            return Message("context", extents(found), found.kinds, found.axis)
        return self.messages[name]

    def telling(self, name: str, of: Of = "message") -> dict[str, Site]:
        """Name of each value that a block passes on -> where it is told; raises ``NoPlace``."""
        message = self.message(name, of)
        assert isinstance(message, Message)
        return placed(self[name], message, self.sites)

    def turn(self, found: Found) -> tuple[str, int]:
        """The module that makes a block's G, as seen from the region, and in which of its calls."""
        call = self.recording.home.get(found.contexts[0])
        return (call.path, self.sites.calls(call.path).index(call)) if call else ("", 0)

    @functools.cached_property
    def around(self) -> dict[str, tuple[Call, ...]]:
        """Block -> the calls that its G is made in, innermost first."""
        return {found.name: tuple(self._around(found)) for found in self.found}

    def _around(self, found: Found) -> Iterator[Call]:
        call = self.recording.home.get(found.contexts[0])
        while call is not None:
            yield call
            call = self.recording.around[call]

    def marks(self) -> Iterator[Mark]:
        """The blocks as one run of the whole model can follow them: by the modules in which they read and fuse."""
        recording = self.recording
        for found in self.found:
            ends = [recording.home.get(node) for node in (found.contexts[0], found.fusions[-1])]
            paths = [call.path if call else "" for call in ends]
            calls = [self.sites.calls(path) for path in paths]
            turns = [known.index(call) for known, call in zip(calls, ends, strict=True)]
            reads, makes = (joined(self.path, path) for path in paths)
            yield Mark(found.name, reads, makes, turns[0], turns[1], (len(calls[0]), len(calls[1])))

    def entered(self, source: str, target: str) -> set[str]:
        """The modules that no graph of both blocks can call: all around what is told and what is heard."""
        recording = self.recording
        paths = set()
        for node in (*self[source].contexts, *self[source].fusions, *self[target].contexts, *self[target].fusions):
            call = recording.home.get(node)
            while call is not None:
                paths.add(call.path)
                call = recording.around[call]
        return paths

    def without(self, names: Collection[str]) -> Region:
        """The region in which these blocks are none."""
        return dataclasses.replace(self, found=tuple(block for block in self.found if block.name not in names))


def earlier(graph: fx.Graph, modules: dict[str, nn.Module], found: tuple[Found, ...]) -> dict[str, tuple[str, ...]]:
    """Block name -> all earlier blocks of its dimension whose fused outputs reach it, nearest last."""
    bits: dict[fx.Node, int] = {}
    bit: dict[fx.Node, int] = {}
    for i, block in enumerate(found):
        bit.update((node, bit.get(node, 0) | 1 << i) for node in block.fusions)
    reach: dict[fx.Node, int] = {}
    for node in graph.nodes:
        reach[node] = bit.get(node, 0)
        for source in node.all_input_nodes:
            reach[node] |= reach[source]
        altered = node.args[0] if alters_argument(node, modules) and node.args else None
        while isinstance(altered, fx.Node):  # whoever reads the altered tensor later hears it, too
            reach[altered] |= reach[node]
            altered = next(iter(altered.all_input_nodes), None) if op_of(altered, modules) is Op.SLICE else None
        bits[node] = reach[node]
    heard: dict[str, tuple[str, ...]] = {}
    for block in found:
        reaching = 0
        for context in block.contexts:
            for source in context.all_input_nodes:
                reaching |= bits[source]
        before = tuple(
            other.name
            for i, other in enumerate(found)
            if reaching >> i & 1 and other is not block and other.block.dimension == block.block.dimension
        )
        if before:
            heard[block.name] = before
    return heard
