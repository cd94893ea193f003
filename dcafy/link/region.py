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
from dcafy.link.message import Message, Unlinkable
from dcafy.link.sites import Site, Sites, placed
from dcafy.plan.blocks import Skipped
from dcafy.trace.lineage import Mark
from dcafy.trace.recording import Recording


@dataclass(frozen=True)
class Region:
    """A module with a graph of its own: its blocks, what each passes on, and who could hear whom.

    ``messages``  block name -> what it passes on, or why it cannot
    ``earlier``   block name -> the earlier blocks of its dimension whose outputs reach it, nearest last
    ``skipped``   what was seen in it and is no block to connect
    """

    path: str
    recording: Recording
    found: tuple[Found, ...]
    messages: dict[str, Message | Unlinkable]
    earlier: dict[str, tuple[str, ...]]
    skipped: tuple[Skipped, ...]
    order: dict[fx.Node, int] = field(repr=False)

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
        return Sites(self.recording)

    def hearing(self, name: str) -> tuple[Site, ...]:
        """Where each extraction output of a block is taken; raises ``NoPlace``."""
        found = self[name]
        return tuple(self.sites.hearing(context, found.between) for context in found.contexts)

    def telling(self, name: str) -> dict[str, Site]:
        """Name of each value that a block passes on -> where it is told; raises ``NoPlace``."""
        message = self.messages[name]
        assert isinstance(message, Message)
        return placed(self[name], message, self.sites)

    def turn(self, found: Found) -> tuple[str, int]:
        """The module that makes a block's G, as seen from the region, and in which of its calls."""
        call = self.recording.home.get(found.contexts[0])
        return (call.path, self.sites.calls(call.path).index(call)) if call else ("", 0)

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
        """The modules that one graph of both blocks cannot call: those that what is told leaves, or is heard in."""
        recording = self.recording
        ends = []
        for node in (self[source].fusions[0], self[target].contexts[0]):
            around = []
            call = recording.home.get(node)
            while call is not None:
                around.append(call)
                call = recording.around[call]
            ends.append(around)
        common = set(ends[0]) & set(ends[1])
        return {call.path for around in ends for call in around if call not in common or call is around[0]}

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
