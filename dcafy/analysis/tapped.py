"""A copy of a network that tells its attention maps and its stages' feature maps while it runs.

Hooks cannot do that everywhere: a connected network computes inside an SE block without calling it, and many blocks
apply their gate as a function. So the copy is emitted once more, as a connected network is (``dcafy.emit``), with a
module of its own behind every T and behind every stage.

::

    gate = call_function[sigmoid](fc)               gate = call_function[sigmoid](fc)
    mul = call_function[mul](gate, x)        ─▶     tap = call_module[taps.0](gate)
                                                    mul = call_function[mul](gate, x)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from dcafy.analysis.stages import Stage, stages
from dcafy.find.roles import Found
from dcafy.graph.copies import shared_copy
from dcafy.graph.emitted import EmittedModule
from dcafy.graph.paths import free_name, put
from dcafy.link.region import Region
from dcafy.plan.blocks import Skipped
from dcafy.plan.plan import Plan
from dcafy.survey import survey
from dcafy.trace.fold import CannotEnter, Folded, fold


class Tap(nn.Module):
    """Its input, unchanged; of an attention map it keeps what came last, as it was then."""

    def __init__(self, *, keeps: bool) -> None:
        super().__init__()
        self.keeps = keeps
        self.seen: Tensor | None = None
        self.shape: tuple[int, ...] = ()

    def forward(self, value: Tensor) -> Tensor:
        self.shape = tuple(value.shape)
        if self.keeps:
            self.seen = value.detach().clone()
        return value


@dataclass(frozen=True)
class Tapped:
    """The copy and its taps.

    ``model``    computes what the original computes, in eval mode, on the very same parameters
    ``plan``     the blocks that were found, and their chains
    ``maps``     block name -> the tap behind its T
    ``stages``   the stages, in the order data meets them
    ``points``   stage name -> the module whose output is the stage's feature map
    ``unread``   blocks whose T cannot be read, with reasons
    """

    model: nn.Module
    plan: Plan
    maps: dict[str, Tap]
    stages: tuple[Stage, ...]
    points: dict[str, nn.Module]
    unread: tuple[Skipped, ...]


def tapped(model: nn.Module, example_inputs: Any = None) -> Tapped:
    """A copy of ``model`` to look into, which shares its parameters; the model itself is not changed.

    Raises what :func:`dcafy.inspect` raises. A model without attention is copied as it is, without stages.
    """
    known = survey(model, example_inputs)
    host = shared_copy(model)
    host.eval()
    maps: dict[str, Tap] = {}
    points: dict[str, nn.Module] = {}
    unread: list[Skipped] = []
    met: list[Stage] = []
    for region in known.regions:
        readable, folded = _readable(region.found, region, unread)
        own = stages(region)
        taps = _Taps(host.get_submodule(region.path), folded)
        for found in readable:
            maps[found.name] = taps.behind(found.map, keeps=True)
        for stage in own:
            inner = host.get_submodule(stage.name) if stage.name else host
            points[stage.name] = taps.behind(stage.node, keeps=False) if stage.node in folded.image else inner
        met += own
        host = put(host, region.path, taps.module())
    return Tapped(host, known.plan, maps, tuple(met), points, tuple(unread))


def _readable(found: tuple[Found, ...], region: Region, unread: list[Skipped]) -> tuple[tuple[Found, ...], Folded]:
    """The blocks whose T can be given a node of its own, and the graph in which they have it."""
    try:
        return found, fold(region.recording, {block.map for block in found})
    except CannotEnter as reason:
        entered = [call.nodes for call in region.recording.calls if call.path == reason.path]
        kept = tuple(block for block in found if not any(block.map in nodes for nodes in entered))
        if kept == found:
            raise
        unread += [Skipped(b.name, f"its map cannot be read: {reason.reason}") for b in found if b not in kept]
    return _readable(kept, region, unread)


class _Taps:
    """Puts taps into one folded graph."""

    def __init__(self, host: nn.Module, folded: Folded) -> None:
        self.host = host
        self.graph = folded.graph
        self.image = folded.image
        self.name = free_name(host, "taps")
        self.taps = nn.ModuleList()
        host.add_module(self.name, self.taps)

    def behind(self, node: fx.Node, *, keeps: bool) -> Tap:
        """The tap behind ``node``; whoever read the node of a stage now reads the tap's output."""
        tap = Tap(keeps=keeps)
        image = self.image[node]
        readers = list(image.users)
        with self.graph.inserting_after(image):
            call = self.graph.call_module(f"{self.name}.{len(self.taps)}", (image,))
        self.taps.append(tap)
        for reader in readers if not keeps else ():
            reader.replace_input_with(image, call)
        return tap

    def module(self) -> EmittedModule:
        """The host as a graph with its taps."""
        self.graph.lint()
        self.taps.eval()
        return EmittedModule(self.host, self.graph, class_name=type(self.host).__name__)
