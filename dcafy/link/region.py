"""A region: one recording, the blocks in it, and whose output reaches whom."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn

from dcafy.find.roles import Found
from dcafy.graph.ops import Op, alters_argument, op_of
from dcafy.link.message import Message, Unlinkable, mismatch
from dcafy.plan.blocks import Link, Skipped
from dcafy.trace.fold import Folded, fold
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
        return next(block for block in self.found if block.name == name)

    def __contains__(self, name: object) -> bool:
        return any(block.name == name for block in self.found)

    def obstacle(self, source: str, target: str) -> str | None:
        """Why ``target`` cannot hear what ``source`` passes on; ``None`` where it can."""
        message = self.messages[source]
        return str(message) if isinstance(message, Unlinkable) else mismatch(message, self[target])

    def local(self, name: str) -> str:
        """A block's name as seen from the region."""
        return name.removeprefix(f"{self.path}.") if self.path else name

    def fold(self, links: tuple[Link, ...]) -> Folded:
        """The shallow graph in which everything these links touch has a node of its own."""
        visible: set[fx.Node] = set()
        apart = []
        for link in links:
            source, target, message = self[link.source], self[link.target], self.messages[link.source]
            visible.update(target.contexts, source.contexts, source.fusions, target.fusions, {source.map})
            if isinstance(message, Message):
                visible.update(message.maps, message.extraction)
                visible.update(node for node in (message.fused_output, message.source) if node is not None)
            apart += [(context, target.between) for context in target.contexts]
        return fold(self.recording, visible, apart)


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
