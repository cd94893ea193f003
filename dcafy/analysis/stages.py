"""Where a network's stages end: the places at which Grad-CAM looks, and the lanes of the drawing.

A stage is what computes on feature maps of one size. It is named by the module whose output is its last map:
``layer1`` to ``layer4`` of a ResNet, ``features.6`` of a MobileNet, ``blocks.4`` of timm's EfficientNets. Modules are
told by the paths that the graph's nodes carry, and not by their calls: a connected network has entered some of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, fx

from dcafy.graph.nodes import OWNER, node_value
from dcafy.graph.paths import above, joined
from dcafy.link.region import Region

MOST_SHRINKING = 2
"""A module that shrinks maps by more than this, each side, holds several stages; they are looked for inside it."""


@dataclass(frozen=True)
class Stage:
    """One stage: ``name`` of the module it ends with, ``size`` and ``channels`` of its map, ``blocks`` in it.

    ``maps``: of each block the shape of its X without the batch. Most are of the stage's size; a block in front of a
    stride, or on the way down of a network that goes up again, is not.
    """

    name: str
    size: tuple[int, ...]
    channels: int
    blocks: tuple[str, ...]
    node: fx.Node = field(repr=False, compare=False)
    maps: tuple[tuple[int, ...], ...] = ()


def stages(region: Region) -> tuple[Stage, ...]:
    """The stages of a region, in the order data meets them; those before the first attention block are left out."""
    last: dict[tuple[int, ...], tuple[str, fx.Node]] = {}
    for path, node in _Spans(region).units(""):
        size = tuple(node_value(node).shape[2:])
        last.pop(size, None)
        last[size] = (path, node)
    made: list[Stage] = []
    left = list(region.found)
    for size, (path, node) in sorted(last.items(), key=lambda item: region.order[item[1][1]]):
        end = region.order[node]
        inside = [block for block in left if min(map(region.order.__getitem__, block.fusions)) <= end]
        left = [block for block in left if block not in inside]
        if inside or made:
            name = joined(region.path, path)
            maps = tuple(tuple(node_value(block.fusions[0]).shape[1:]) for block in inside)
            made.append(Stage(name, size, node_value(node).shape[1], tuple(b.name for b in inside), node, maps))
    return tuple(made)


class _Spans:
    """The nodes that each module accounts for, by path, and the feature map that it yields."""

    def __init__(self, region: Region) -> None:
        self.order = region.order
        self.home = {node: _home(node) for node in region.order}
        self.spans: dict[str, list[fx.Node]] = {}
        self.children: dict[str, dict[str, None]] = {}
        for node in region.recording.graph.nodes:
            if node.op in ("placeholder", "output", "get_attr"):
                continue
            path = self.home[node]
            self.spans.setdefault(path, []).append(node)
            for inner, outer in itertools.pairwise((path, *above(path))):
                self.children.setdefault(outer, {})[inner] = None
                self.spans.setdefault(outer, []).append(node)

    def units(self, path: str) -> Iterator[tuple[str, fx.Node]]:
        """The outermost modules inside ``path`` that shrink maps at most once, each with its feature map."""
        for child in sorted(self.children.get(path, ()), key=lambda child: self.order[self.spans[child][0]]):
            sizes = self._shrinking(child)
            if sizes is None or (sizes > MOST_SHRINKING and self.children.get(child)):
                yield from self.units(child)
            else:
                node = self._output(child)
                if node is not None:
                    yield child, node

    def _output(self, path: str) -> fx.Node | None:
        """The last feature map in a module that somebody outside of it reads."""
        own = set(self.spans[path])
        read = [node for node in self.spans[path] if _is_map(node) and any(user not in own for user in node.users)]
        return max(read, key=self.order.__getitem__, default=None)

    def _shrinking(self, path: str) -> float | None:
        """How many times smaller, each side, a module's output is than its input; ``None`` where it yields no map."""
        own, node = set(self.spans[path]), self._output(path)
        if node is None:
            return None
        sources = [n for inner in self.spans[path] for n in inner.all_input_nodes if n not in own and _is_map(n)]
        largest = max((node_value(n).shape[-1] for n in sources), default=node_value(node).shape[-1])
        return float(largest / node_value(node).shape[-1])


def _home(node: fx.Node) -> str:
    """The path of the module that a node calls, or whose forward made it."""
    return str(node.target) if node.op == "call_module" else str(node.meta.get(OWNER, ""))


def _is_map(node: fx.Node) -> bool:
    """Whether a node yields feature maps: more than one channel, on more than one place."""
    value = node_value(node)
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] > 1 and min(value.shape[2:]) > 1
