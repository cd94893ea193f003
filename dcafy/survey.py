"""Trace, find and link in one go: everything that is known about a model before anything is changed.

A *region* is a module with a graph of its own: the root, or an island inside a module whose
forward cannot be written down as one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, fx, nn

from dcafy.errors import InputError, TracingError
from dcafy.find.axes import Axes
from dcafy.find.dataflow import Dataflow
from dcafy.find.fusions import find
from dcafy.find.natures import with_natures
from dcafy.find.selfattention import self_attention
from dcafy.find.unfound import unfound_gates
from dcafy.graph.copies import has_own_hooks
from dcafy.graph.evaluator import Evaluator, device_of
from dcafy.graph.nodes import mapped_tensors, node_value, values_of
from dcafy.graph.paths import joined, outermost
from dcafy.graph.reading import named, types_compared
from dcafy.graph.rewritten import CONTAINERS, original_class, refusal, taken_of_graphs
from dcafy.link.batches import batches
from dcafy.link.message import Message, message_of
from dcafy.link.network import Network
from dcafy.link.region import InTraining, Region, earlier, training_of
from dcafy.link.sharing import settled
from dcafy.link.sites import NoPlace
from dcafy.link.topology import grouped, links_in
from dcafy.plan.blocks import Link, Skipped
from dcafy.plan.plan import Plan
from dcafy.trace import Recordable, judged, recorded
from dcafy.trace.accepted import LOOKED_THROUGH, kept_whole, require_module
from dcafy.trace.fold import CannotEnter
from dcafy.trace.forms import require_one_form
from dcafy.trace.inputs import as_inputs, guesses, on_one_of, probe, require_positional, told_unknown_names
from dcafy.trace.islands import observe
from dcafy.trace.lineage import lineage
from dcafy.trace.recorder import is_layer
from dcafy.trace.recording import Observed
from dcafy.trace.witness import OTHER_SIZES


@dataclass(frozen=True)
class Survey:
    """What is known about a model.

    ``inputs``  those it was recorded with (meta tensors where guessed)
    ``whole``   whether one graph of the whole connected model can be written
    ``lost``    the attention blocks that were found and cannot be connected where they are
    """

    plan: Plan
    network: Network
    inputs: tuple[Any, ...]
    whole: bool
    lost: tuple[str, ...] = ()


def survey(model: nn.Module, example_inputs: Any = None) -> Survey:
    """What there is to connect in ``model``; raises ``TracingError`` or ``InputError``, changes nothing."""
    require_module(model)
    with uncollected():
        if example_inputs is not None:
            inputs = as_inputs(example_inputs, model)
            try:
                return _Surveyor(model).run(inputs)
            except (TracingError, InputError) as error:
                if not (isinstance(example_inputs, Mapping) and inputs[0] is example_inputs):
                    raise
                raise told_unknown_names(example_inputs, model, error) from error
        require_positional(model, signature(model.forward).parameters)
        tried = list(guesses(model))
        shapes = ", ".join(str(tuple(inputs[0].shape)) for inputs in tried[:4])
        return on_one_of(
            tried,
            lambda inputs: _Surveyor(model).run(inputs),
            none=f"{type(model).__name__} ran on none of the inputs that were guessed for it ({shapes}, ...)",
            call="dcafy.inspect(model,",
        )


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
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
        self.recordables: dict[str, Recordable] = {}

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
        network, refused = self._placed(look, inputs)
        blocks = tuple(found.block for found in network.found)
        links, unheard = links_in(network)
        obstacle = self._no_graph(network, links) if links else None
        unwritten = (
            [] if obstacle is None else [Skipped(self.name, f"no graph of the whole can be written: {obstacle}")]
        )
        plan = Plan(
            blocks=blocks,
            chains=grouped(blocks, links, {block.name: number for number, block in enumerate(blocks)}),
            skipped=tuple(
                dict.fromkeys(
                    (
                        *unheard,
                        *(s for region in look.regions for s in region.skipped),
                        *refused,
                        *look.skipped,
                        *unwritten,
                    )
                )
            ),
            islands=tuple(region.path for region in network.regions if region.path),
            model=self.name,
        )
        lost = (found.name for region in look.regions for found in region.found if found.name not in network)
        return Survey(settled(plan, network), network, inputs, obstacle is None, tuple(lost))

    def _no_graph(self, network: Network, links: list[Link]) -> str | None:
        """Why the whole connected model cannot be written down as one graph, if there is a reason."""
        if isinstance(self.model, fx.GraphModule):  # it is one graph already
            return None
        taken = taken_of_graphs(self.model)
        if taken is not None:
            return f"it has a {taken!r} of its own"
        reason = refusal(self.model)
        if reason is not None:
            return reason
        region = next((region for region in network.regions if not region.path), None)
        if region is None or len(network.regions) > 1:
            return "its forward could not be traced as a whole"
        entered = {""}.union(*(region.entered(link.source, link.target) for link in links))
        recording = region.recording
        hooked = next((path for path in sorted(entered) if has_own_hooks(self.model.get_submodule(path))), None)
        if hooked is not None:
            return f"{hooked or self.name} has a forward hook, and a graph goes past its call"
        for path in sorted(entered & (recording.mode_read.keys() | recording.unwritten.keys())):
            what = recording.unwritten.get(path, "its forward takes another path in training than in eval")
            return f"{path or self.name}: {what}"
        try:
            judged(self.recordables[""], recording, entered)
            require_one_form(recording, lambda path: path not in entered)
        except CannotEnter as error:
            return error.reason
        return None

    def _placed(self, look: _Look, inputs: tuple[Any, ...]) -> tuple[Network, list[Skipped]]:
        """The network of those blocks that have a place to hear and tell in, and what the others lack."""
        regions = tuple(region for region in look.regions if region.found)
        network, skipped = self._joined(regions, inputs)
        network = self._without_repetitions(network)
        while True:
            network, hosts, refused = self._with_sites(network)
            network, more = self._judged(network, hosts)
            refused.update(more)
            if not refused:
                return network, skipped
            skipped += dict.fromkeys(refused.values())
            network = network.without(refused)

    def _joined(self, regions: tuple[Region, ...], inputs: tuple[Any, ...]) -> tuple[Network, list[Skipped]]:
        """The regions as one network: one run says in which order they come, and what of one reaches another."""
        order = tuple(block.name for region in regions for block in region.found)
        earlier = {name: before for region in regions for name, before in region.earlier.items()}
        if len(regions) < 2:
            return Network(regions, order, earlier), []
        marks = tuple(mark for region in regions for mark in region.marks())
        paths = tuple(region.path for region in regions)
        seen = lineage(self.model, Observed(probe(inputs), {}, inputs), self.evaluator, marks, paths)
        if isinstance(seen, str):
            reason = f"what its parts hand to each other is not known, as it did not run on the example: {seen}"
            return Network(regions, order, earlier), [Skipped(self.name, reason)]
        repeats = frozenset(path for path in paths if seen.calls.get(path, 0) > 1)
        ran = {name: number for number, name in enumerate(seen.order)}
        order = tuple(sorted(order, key=lambda name: ran.get(name, len(ran))))
        found = {block.name: (block.block.dimension, region.path) for region in regions for block in region.found}
        skipped = []
        for name in seen.order:
            dimension, home = found[name]
            across = {
                other
                for other in seen.reach[name]
                if found[other][0] == dimension and found[other][1] != home and ran[other] < ran[name]
            }
            once = {other for other in across if not {home, found[other][1]} & repeats}
            if across and not once and name not in earlier:
                skipped.append(Skipped(name, "its part is called several times in a run, each time with another input"))
            before = once.union(earlier.get(name, ()))
            if before:
                earlier[name] = tuple(sorted(before, key=ran.__getitem__))
        return Network(regions, order, earlier, repeats), skipped

    def _without_repetitions(self, network: Network) -> Network:
        """The network in which a module that is called once for each image, say, is connected alike in all its calls.

        How often it is called is then a matter of the input's size: its blocks are those of its first call, and hear
        and tell nothing outside of it.
        """
        repeated: dict[str, str] = {}
        later: set[str] = set()
        for region in network.regions:
            often = {path for path, calls in region.recording.calls_of.items() if len(calls) > 1}
            turns = {found.name: region.turn(found) for found in region.found}
            if not often or not any(path in often for path, _ in turns.values()):
                continue
            varying = self._varying(region, often)
            for name, (path, turn) in turns.items():
                if path in varying:
                    repeated[name] = joined(region.path, path)
                    if turn:
                        later.add(name)
        if not repeated:
            return network
        earlier = {
            name: tuple(other for other in before if (other in repeated) is (name in repeated))
            for name, before in network.earlier.items()
        }
        repeats = network.repeats | set(repeated.values())
        return dataclasses.replace(network, earlier=earlier, repeats=repeats).without(later)

    def _varying(self, region: Region, often: set[str]) -> set[str]:
        """Those modules that are called another number of times for another batch or image size."""
        recordable, found = self.recordables[region.path], set()
        for change in OTHER_SIZES:
            args, kwargs = mapped_tensors((recordable.inputs.args, recordable.inputs.kwargs), change)
            try:
                other = recorded(dataclasses.replace(recordable, inputs=Observed(args, kwargs)))
            except (CannotEnter, InputError):  # it takes no other size, and so there is none to go by
                continue
            calls = region.recording.calls_of
            found |= {path for path in often if len(other.calls_of.get(path, ())) != len(calls[path])}
        return found

    def _with_sites(self, network: Network) -> tuple[Network, dict[str, set[str]], dict[str, Skipped]]:
        """Block name -> the modules it is in, by path; and those that cannot be connected where they are."""
        hosts: dict[str, set[str]] = {}
        refused: dict[str, Skipped] = {}
        told = dict.fromkeys(name for before in network.earlier.values() for name in before)
        asked = [(name, "hearing") for name in network.earlier] + [
            (name, "telling") for name in told if isinstance(network.message(name), Message)
        ]
        for name, what in asked:
            region = network.region(name)
            try:
                sites = region.hearing(name) if what == "hearing" else tuple(region.telling(name).values())
            except NoPlace as error:
                refused[name] = Skipped(joined(region.path, error.path) or self.name, f"kept whole: {error.reason}")
            else:
                hosts.setdefault(name, set()).update(site.path for site in sites if not site.layer)
                for path in dict.fromkeys(joined(region.path, site.path) for site in sites):
                    kind = original_class(self.model.get_submodule(path))
                    if kind in self._compared:
                        where = f"{self._compared[kind]} compares its type with {kind.__name__}"
                        why = f"kept whole: {where}, of which it would be a subclass; use isinstance() there"
                        refused.setdefault(name, Skipped(path or self.name, why))
        return network, hosts, refused

    @functools.cached_property
    def _compared(self) -> dict[type, str]:
        """The classes that a forward in the model holds the type of something against, and the first that does."""
        found: dict[type, str] = {}
        for module in {type(module): module for module in self.model.modules() if not is_layer(module)}.values():
            for function in named(module, original_class(module)).functions:
                found = dict.fromkeys(types_compared(function), function.__qualname__) | found
        return found

    def _judged(self, network: Network, hosts: dict[str, set[str]]) -> tuple[Network, dict[str, Skipped]]:
        """The network whose modules check what they decide by sizes; and blocks whose modules compute with them."""
        regions, refused = [], {}
        for region in network.regions:
            own = {path for block in region.found for path in hosts.get(block.name, ())}
            try:
                recording = judged(self.recordables[region.path], region.recording, own)
            except CannotEnter as error:
                for name in (block.name for block in region.found):
                    path = next((path for path in error.reasons if path in hosts.get(name, ())), None)
                    if path is not None:
                        why = f"kept whole: {error.reasons[path]}"
                        refused[name] = Skipped(joined(region.path, path) or self.name, why)
            else:
                same = recording is region.recording
                region = region if same else dataclasses.replace(region, recording=recording)
            regions.append(region)
        return dataclasses.replace(network, regions=tuple(regions)), refused

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
        try:
            region = self._region(path, Recordable(module, observed, self.evaluator, opaque))
        except CannotEnter as reason:
            yield from self._islands(path, module, observed, known, reason.reason)
            return
        yield region
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
        plain = find(flow, path)
        found = with_natures(recording, plain, path)
        axes = Axes(flow)
        messages = {f.name: message_of(f, axes, self.evaluator) for f in found}
        before = earlier(recording.graph, modules, found)
        samples = batches(recording, found, self.evaluator)
        skipped = (*self_attention(flow, plain, path), *unfound_gates(flow, plain, path))
        if not recordable.training:
            self.recordables[path] = recordable
        region = Region(path, recording, found, messages, samples, before, skipped, flow.order)
        trainings = {inner: self._training(region, inner, recordable) for inner in sorted(recording.mode_read)}
        known = {inner: training for inner, training in trainings.items() if isinstance(training, InTraining)}
        why = {inner: training for inner, training in trainings.items() if isinstance(training, str)}
        if why:
            region = dataclasses.replace(
                region, recording=dataclasses.replace(recording, unwritten={**why, **recording.unwritten})
            )
        return dataclasses.replace(region, trainings=known) if known else region

    def _training(self, region: Region, inner: str, recordable: Recordable) -> InTraining | str | None:
        """What a module that decides by its mode does in training, where it holds attention and that stays the same.

        In words: why that cannot be written down.
        """
        calls = region.sites.calls(inner) if not inner or inner in region.recording.calls_of else ()
        ends = {region.recording.home.get(node) for found in region.found for node in (*found.contexts, *found.fusions)}
        if recordable.training or not calls or calls[0] not in ends:
            return None
        inputs = recordable.inputs
        if calls[0] is not None:
            inputs = Observed(values_of(calls[0].args), values_of(calls[0].kwargs))
        opaque = frozenset(path.removeprefix(f"{inner}.") for path in recordable.opaque) if inner else recordable.opaque
        module = recordable.module.get_submodule(inner)
        itself = dataclasses.replace(recordable, module=module, inputs=inputs, opaque=opaque, training=True)
        try:
            trained = self._region(joined(region.path, inner), itself)
            trained = dataclasses.replace(trained, recording=judged(itself, trained.recording, {""}))
            training = training_of(region, inner, dataclasses.replace(trained, trainings={"": InTraining(trained, {})}))
            if training is not None:
                training.region.sites.folded("")
        except (CannotEnter, NoPlace) as error:
            return f"its forward takes another path in training than in eval, and there {error.reason}"
        return training

    def _islands(
        self, path: str, module: nn.Module, observed: Observed, known: dict[str, Observed], reason: str
    ) -> Iterator[Region | Skipped]:
        yield Skipped(path or self.name, f"not traced as a whole: {reason}")
        if not any(child.startswith(f"{path}.") for child in known):
            inside = observe(module, observed, self.evaluator)
            if isinstance(inside, str) and path:
                yield Skipped(path, f"nothing was looked for in it, as it could not be run by itself either: {inside}")
                return
            if isinstance(inside, str):
                again = "" if inside in reason else f" ({inside})"
                raise TracingError(
                    f"{path or self.name} could not be traced: {reason}. It could not be run on the example "
                    f"either{again}, so its submodules were not tried. Pass example_inputs that the model accepts."
                )
            known = {joined(path, child): inputs for child, inputs in inside.items()}
        yield from self._children(path, known)

    def _children(self, path: str, known: dict[str, Observed]) -> Iterator[Region | Skipped]:
        """The regions of the modules directly inside one that has no graph of its own."""
        for name, module in self.model.get_submodule(path).named_children():
            child = joined(path, name)
            layer = is_layer(module) and not isinstance(module, (*CONTAINERS, *LOOKED_THROUGH))
            alone = next(module.children(), None) is None
            if layer or (child not in known and alone):
                continue
            if child not in known:  # a container that is indexed and never called
                yield from self._children(child, known)
            elif _has_parameters(module) or not alone:
                yield from self._regions(child, known[child], known)
            else:  # gather-excite has neither; what else is without them may well be no matter of tensors alone
                with contextlib.suppress(CannotEnter):
                    yield self._region(child, Recordable(module, known[child], self.evaluator))


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
