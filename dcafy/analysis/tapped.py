"""A copy of a network that tells its attention maps and its stages' feature maps while it runs.

Many blocks apply their gate as a function, where no hook is called. So the module that holds a block is given a graph
of its own, as in a connected network (``dcafy.emit``), with a module behind every T.

::

    gate = call_function[sigmoid](fc)               gate = call_function[sigmoid](fc)
    mul = call_function[mul](gate, x)        ─▶     tap = call_module[taps.0](gate)
                                                    mul = call_function[mul](gate, x)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dcafy.analysis.stages import Stage, stages
from dcafy.find.roles import Found
from dcafy.graph.copies import shared_copy
from dcafy.graph.paths import free_name, joined
from dcafy.graph.rewritten import Forward, forward_of, rewrite
from dcafy.graph.rows import rows_of
from dcafy.link.region import Region
from dcafy.link.sites import NoPlace
from dcafy.plan.blocks import Skipped
from dcafy.plan.plan import Plan
from dcafy.survey import survey


class Tap(nn.Module):
    """Its input, unchanged, of which it keeps what came last in one of the calls of its module, as it was then."""

    def __init__(self, turn: int = 0, turns: int = 1) -> None:
        super().__init__()
        self.turn, self.turns = turn, turns
        self.calls = 0
        self.seen: Tensor | None = None

    def forward(self, value: Tensor) -> Tensor:
        if self.calls % self.turns == self.turn:
            self.seen = value.detach().clone()
        self.calls += 1
        return value


@dataclass(frozen=True)
class Tapped:
    """The copy and its taps.

    ``model``    computes what the original computes, in eval mode, on the very same parameters
    ``plan``     the blocks that were found, and their chains
    ``maps``     block name -> the tap behind its T
    ``stages``   the stages, in the order data meets them
    ``points``   stage name -> the module whose output is the stage's feature map
    ``sizes``    stage name -> the shape of its feature map when the model ran last
    ``unread``   blocks whose T cannot be read, with reasons
    """

    model: nn.Module
    plan: Plan
    maps: dict[str, Tap]
    stages: tuple[Stage, ...]
    points: dict[str, nn.Module]
    sizes: dict[str, tuple[int, ...]]
    unread: tuple[Skipped, ...]


def tapped(model: nn.Module, example_inputs: Any = None) -> Tapped:
    """A copy of ``model`` to look into, which shares its parameters; the model itself is not changed.

    Raises what :func:`dcafy.inspect` raises. A model without attention is copied as it is, without stages.
    """
    known = survey(model, example_inputs)
    host = shared_copy(model)
    host.eval()
    maps: dict[str, Tap] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    unread: list[Skipped] = []
    met: list[Stage] = []
    for region in known.network.regions:
        taps = _Taps(region, host)
        for found in region.found:
            try:
                maps[found.name] = taps.behind(found)
            except NoPlace as error:  # noqa: PERF203 (each block has its own reason)
                unread.append(Skipped(found.name, f"its map cannot be read: {error.reason}"))
        taps.put()
        met += stages(region)
    points = {stage.name: host.get_submodule(stage.name) for stage in met}
    for name, point in points.items():
        point.register_forward_hook(functools.partial(_note, sizes, name))
    return Tapped(host, known.plan, maps, tuple(met), points, sizes, tuple(unread))


def _note(sizes: dict[str, tuple[int, ...]], name: str, _: nn.Module, given: Any, output: Any) -> None:
    sizes[name] = tuple(getattr(output, "shape", ()))


class _Taps:
    """Puts taps into the modules of one region."""

    def __init__(self, region: Region, model: nn.Module) -> None:
        self.region = region
        self.model = model
        self._made: dict[str, nn.ModuleList] = {}

    def behind(self, found: Found) -> Tap:
        """The tap behind the T of a block; raises ``NoPlace``."""
        sites = self.region.sites
        (site,) = sites.telling((found.map,), found.fusions[0])
        tap = Tap(site.turn, sites.times(site))
        host = self.model.get_submodule(joined(self.region.path, site.path))
        taps = self._made.setdefault(site.path, nn.ModuleList())
        if site.layer:
            host.register_forward_hook(lambda _, given, output: tap(output))
            return tap
        folded = sites.folded(site.path)
        image = folded.image[sites.canonical(site)]
        with folded.graph.inserting_after(image):
            folded.graph.call_module(f"{free_name(host, _NAME)}.{len(taps)}", (image,))
        taps.append(tap)
        return tap

    def put(self) -> None:
        """Has the modules run their graphs."""
        for path, taps in self._made.items():
            host = self.model.get_submodule(joined(self.region.path, path))
            if len(taps):
                graph = self.region.sites.folded(path).graph
                graph.lint()
                name = free_name(host, _NAME)
                host.add_module(name, taps.eval())
                before = forward_of(host)
                around = None if before is None else before.around
                rewrite(host, Forward(rows_of(graph), needs=name, around=around))


_NAME = "taps"
"""What the taps are called in a module, where it has nothing else of that name."""
