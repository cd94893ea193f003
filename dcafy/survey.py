"""Trace, find and link in one go: everything that is known about a model before anything is changed.

A *region* is a module with a graph of its own: the root, or an island inside a module whose
forward cannot be written down as one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcafy.errors import TracingError
from dcafy.find.dataflow import Dataflow
from dcafy.find.fusions import find
from dcafy.find.selfattention import self_attention
from dcafy.graph.evaluator import Evaluator, device_of
from dcafy.graph.nodes import node_value
from dcafy.graph.paths import joined, outermost
from dcafy.link.message import message_of
from dcafy.link.region import Region, earlier
from dcafy.link.topology import grouped, links_in
from dcafy.plan.blocks import Skipped
from dcafy.plan.plan import Plan
from dcafy.trace import Recordable, judged, recorded
from dcafy.trace.accepted import LOOKED_THROUGH, kept_whole, require_module
from dcafy.trace.fold import CannotEnter
from dcafy.trace.inputs import as_inputs, guesses, on_one_of, probe
from dcafy.trace.islands import observe
from dcafy.trace.recording import Observed


@dataclass(frozen=True)
class Survey:
    """All regions of a model, its plan, and the inputs they were recorded with (meta tensors where guessed)."""

    plan: Plan
    regions: tuple[Region, ...]
    inputs: tuple[Any, ...]


def survey(model: nn.Module, example_inputs: Any = None) -> Survey:
    """What there is to connect in ``model``; raises ``TracingError`` or ``InputError``, changes nothing."""
    require_module(model)
    with _uncollected():
        if example_inputs is not None:
            return _Surveyor(model).run(as_inputs(example_inputs, model))
        tried = list(guesses(model))
        shapes = ", ".join(str(tuple(inputs[0].shape)) for inputs in tried[:4])
        return on_one_of(
            tried,
            lambda inputs: _Surveyor(model).run(inputs),
            none=f"{type(model).__name__} ran on none of the inputs that were guessed for it ({shapes}, ...)",
            call="dcafy.inspect(model,",
        )


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Inside it Python does not look for garbage cycles: graphs are full of cycles that stay.

    A third of a survey's time went into looking, over and over, through everything that is imported.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class _Look:
    """What is seen of a model at one size of the example."""

    regions: tuple[Region, ...]
    skipped: tuple[Skipped, ...]

    @property
    def found(self) -> int:
        """How many blocks."""
        return sum(len(region.found) for region in self.regions)


class _Surveyor:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.name = type(model).__name__
        self.evaluator = Evaluator(device_of(model))

    def run(self, inputs: tuple[Any, ...]) -> Survey:
        look = self._look(inputs, 1)
        for scale in (2, 4, 8):
            tiny = _tiny_maps(look)
            if not tiny:
                break
            # On maps under 4x4 a reduction is no longer told from a plain layer: look at larger ones.
            try:
                larger = self._look(inputs, scale)
            except TracingError:  # the network takes the example's size only
                break
            if larger.found < look.found or len(larger.regions) > len(look.regions) or _tiny_maps(larger) == tiny:
                break  # nothing was gained: detectors, for one, resize their input themselves
            look = larger
        kept = tuple(region for region in look.regions if region.found)
        blocks = tuple(found.block for region in kept for found in region.found)
        made = {region.path: links_in(region) for region in look.regions}
        links = [link for region in kept for link in made[region.path][0]]
        unheard = [s for region in look.regions for s in (*made[region.path][1], *region.skipped)]
        plan = Plan(
            blocks=blocks,
            chains=grouped(blocks, links, {block.name: number for number, block in enumerate(blocks)}),
            skipped=tuple(unheard) + tuple(dict.fromkeys(look.skipped)),
            islands=tuple(region.path for region in kept if region.path),
            model=self.name,
        )
        return Survey(plan, kept, inputs)

    def _look(self, inputs: tuple[Any, ...], scale: int) -> _Look:
        """What is seen with maps ``scale`` times as large as the example's."""
        seen = list(self._regions("", Observed(probe(inputs, scale), {}, inputs), {}))
        regions = tuple(one for one in seen if isinstance(one, Region))
        return _Look(regions, tuple(one for one in seen if isinstance(one, Skipped)))

    def _regions(self, path: str, observed: Observed, known: dict[str, Observed]) -> Iterator[Region | Skipped]:
        """The region of the module at ``path``; where it cannot be one, those of its submodules.

        ``known``: inputs of submodules, by path from the root, where somebody has seen them already.
        """
        module = self.model.get_submodule(path)
        if isinstance(module, LOOKED_THROUGH):
            yield from self._children(path, known)
            return
        whole = {inner: f"kept whole: {why}" for inner, why in kept_whole(module)}
        yield from (Skipped(joined(path, inner), why) for inner, why in whole.items())
        opaque = frozenset(whole)
        while True:
            try:
                region = self._region(path, Recordable(module, observed, self.evaluator, opaque))
            except CannotEnter as reason:
                new = {inner: why for inner, why in reason.reasons.items() if inner and inner not in opaque}
                if new:
                    opaque |= new.keys()
                    yield from (Skipped(joined(path, inner), f"kept whole: {why}") for inner, why in new.items())
                    continue
                yield from self._islands(path, module, observed, known, reason.reason)
                return
            yield region
            break
        for inner, why in region.recording.kept_whole.items():
            if _has_parameters(module.get_submodule(inner)):
                yield Skipped(joined(path, inner), f"kept whole, nothing was looked for in it: {why}")
        seen = {joined(path, child): inputs for child, inputs in region.recording.observed.items()}
        closed = region.recording.kept_whole.keys() | opaque
        for inner in outermost(inner for inner, _ in module.named_modules() if inner in closed):
            yield from self._children(joined(path, inner), seen)

    def _region(self, path: str, recordable: Recordable) -> Region:
        recording = recorded(recordable)
        modules = recording.modules
        flow = Dataflow(recording.graph, modules)
        found = find(flow, path)
        messages = {f.name: message_of(f, modules, self.evaluator) for f in found}
        before = earlier(recording.graph, modules, found)
        skipped = self_attention(flow, found, path)
        region = Region(path, recording, found, messages, before, skipped, flow.order)
        if len(found) < 2:  # there is nothing to connect, and the graph is for looking only
            return region
        region = dataclasses.replace(region, recording=judged(recordable, recording))
        region.fold(tuple(links_in(region)[0]))
        return region

    def _islands(
        self, path: str, module: nn.Module, observed: Observed, known: dict[str, Observed], reason: str
    ) -> Iterator[Region | Skipped]:
        yield Skipped(path or self.name, f"not traced as a whole: {reason}")
        if not any(child.startswith(f"{path}.") for child in known):
            inside = observe(module, observed, self.evaluator)
            if isinstance(inside, str):
                raise TracingError(
                    f"{path or self.name} could not be traced: {reason}. It could not be run on the example either "
                    f"({inside}), so its submodules were not tried. Pass example_inputs that the model accepts."
                )
            known = {joined(path, child): inputs for child, inputs in inside.items()}
        yield from self._children(path, known)

    def _children(self, path: str, known: dict[str, Observed]) -> Iterator[Region | Skipped]:
        """The regions of the modules directly inside one that has no graph of its own."""
        for name, module in self.model.get_submodule(path).named_children():
            child = joined(path, name)
            if not _has_parameters(module) or next(module.children(), None) is None:
                continue
            if child in known:
                yield from self._regions(child, known[child], known)
            else:  # a container that is indexed and never called
                yield from self._children(child, known)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _tiny_maps(look: _Look) -> list[tuple[str, torch.Size]]:
    """The convolutions that yield maps under 4x4 from larger ones, and the sizes of the maps."""
    tiny = []
    for region in look.regions:
        modules = region.recording.modules
        for node in region.recording.graph.nodes:
            if node.op != "call_module" or not isinstance(modules[str(node.target)], nn.Conv2d | nn.Conv3d):
                continue
            made, given = node_value(node), node_value(node.all_input_nodes[0])
            if not (isinstance(made, Tensor) and isinstance(given, Tensor)):  # octave convolutions take and make two
                continue
            if max(given.shape[2:]) > 1 and max(made.shape[2:]) < 4:
                tiny.append((str(node.target), made.shape[2:]))
    return tiny
