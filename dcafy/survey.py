"""Trace, find and link in one go: everything that is known about a model before anything is changed.

A *region* is a module with a graph of its own: the root, or an island inside a module whose
forward cannot be written down as one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dcafy.errors import InputError, TracingError
from dcafy.find.dataflow import Dataflow
from dcafy.find.fusions import find
from dcafy.find.roles import Found
from dcafy.find.selfattention import self_attention
from dcafy.graph.copies import data_free_copy
from dcafy.graph.evaluator import Evaluator, node_value
from dcafy.link.message import Carried, Unlinkable, carried_by, chains, predecessors
from dcafy.plan.blocks import Chain, Link, Plan, Skipped
from dcafy.trace.fold import CannotEnter, Folded, fold, outermost
from dcafy.trace.inputs import as_inputs, guesses, probe
from dcafy.trace.islands import Observed, observe
from dcafy.trace.reasons import one_line
from dcafy.trace.recorder import Recorder, is_layer
from dcafy.trace.recording import Recording
from dcafy.trace.witness import judged

__all__ = ["Region", "Survey", "survey"]


@dataclass(frozen=True)
class Region:
    """A module with a graph of its own, the blocks in it, and what they can pass on."""

    path: str
    recording: Recording
    found: tuple[Found, ...]
    carried: dict[str, Carried | Unlinkable]
    chains: tuple[Chain, ...]
    skipped: tuple[Skipped, ...]
    order: dict[fx.Node, int] = field(repr=False)

    def __getitem__(self, name: str) -> Found:
        return next(block for block in self.found if block.name == name)

    def __contains__(self, name: object) -> bool:
        return any(block.name == name for block in self.found)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The region's submodules by path, without data."""
        return self.recording.modules

    def local(self, name: str) -> str:
        """A block's name as seen from the region."""
        return name.removeprefix(f"{self.path}.") if self.path else name

    def fold(self, links: tuple[Link, ...]) -> Folded:
        """The shallow graph in which everything these links touch has a node of its own."""
        visible: set[fx.Node] = set()
        apart = []
        for link in links:
            source, target, passed = self[link.source], self[link.target], self.carried[link.source]
            visible.update(target.contexts, source.contexts, source.fusions, target.fusions, {source.map})
            if isinstance(passed, Carried) and passed.fused_output is not None and passed.source is not None:
                visible.update({passed.fused_output, passed.source}, passed.extraction)
            if isinstance(passed, Carried):
                visible.update(passed.maps)
            apart += [(context, target.between) for context in target.contexts]
        return fold(self.recording, visible, apart)


@dataclass(frozen=True)
class Survey:
    """All regions of a model, its plan, and the inputs they were recorded with (meta tensors where guessed)."""

    plan: Plan
    regions: tuple[Region, ...]
    inputs: tuple[Any, ...]


def survey(model: nn.Module, example_inputs: Any = None, name: str = "") -> Survey:
    """What there is to connect in ``model``; raises ``TracingError`` or ``InputError``, changes nothing."""
    require_module(model)
    with _uncollected():
        return _survey(model, example_inputs, name or type(model).__name__)


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


def _survey(model: nn.Module, example_inputs: Any, name: str) -> Survey:
    if example_inputs is not None:
        inputs = as_inputs(example_inputs, model)
        return _Surveyor(model, name).run(inputs)
    errors = []
    tried = list(guesses(model))
    for inputs in tried:
        try:
            return _Surveyor(model, name).run(inputs)
        except TracingError as error:  # noqa: PERF203 (a failed guess is the exception that is expected here)
            errors.append(error)
    shapes = ", ".join(str(tuple(inputs[0].shape)) for inputs in tried[:4])
    raise TracingError(
        f"{name} ran on none of the inputs that were guessed for it ({shapes}, ...). Pass one that fits, for "
        f"example dcafy.inspect(model, example_inputs=torch.rand(2, 3, 224, 224)). The first error was: {errors[0]}"
    ) from errors[0]


class _Surveyor:
    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        self.name = name
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.evaluator = Evaluator(device)
        self.skipped: list[Skipped] = []

    def run(self, inputs: tuple[Any, ...]) -> Survey:
        regions = self._regions_at(inputs, 1)
        for scale in (2, 4, 8):
            tiny = _tiny_maps(regions)
            if not tiny:
                break
            # On maps under 4x4 a reduction is no longer told from a plain layer: look at larger ones.
            before = list(self.skipped)
            try:
                larger = self._regions_at(inputs, scale)
            except TracingError:  # the network takes the example's size only
                self.skipped = before
                break
            if _count(larger) < _count(regions) or _tiny_maps(larger) == tiny:
                self.skipped = before  # nothing was gained: detectors, for one, resize their input themselves
                break
            regions = larger
        kept = tuple(region for region in regions if region.found)
        plan = Plan(
            blocks=tuple(found.block for region in kept for found in region.found),
            chains=tuple(chain for region in kept for chain in region.chains),
            skipped=tuple(s for region in regions for s in region.skipped) + tuple(dict.fromkeys(self.skipped)),
            islands=tuple(region.path for region in kept if region.path),
            model=self.name,
        )
        return Survey(plan, kept, inputs)

    def _regions_at(self, inputs: tuple[Any, ...], scale: int) -> list[Region]:
        """All regions, seen with maps ``scale`` times as large as the example's."""
        self.skipped = []
        return list(self._regions("", Observed(probe(inputs, scale), {}, inputs), {}))

    def _regions(self, path: str, observed: Observed, known: dict[str, Observed]) -> Iterator[Region]:
        """The region of the module at ``path``; where it cannot be one, those of its submodules.

        ``known``: inputs of submodules, by path from the root, where somebody has seen them already.
        """
        module = self.model.get_submodule(path)
        if isinstance(module, _LOOKED_THROUGH):
            yield from self._children(path, known)
            return
        whole = {inner: f"kept whole: {why}" for inner, why in _kept_whole(module)}
        self.skipped += [Skipped(_join(path, inner), why) for inner, why in whole.items()]
        opaque = frozenset(whole)
        while True:
            try:
                region = self._region(path, module, observed, opaque)
            except CannotEnter as reason:
                new = {inner: why for inner, why in reason.reasons.items() if inner and inner not in opaque}
                if new:
                    opaque |= new.keys()
                    self.skipped += [Skipped(_join(path, inner), f"kept whole: {why}") for inner, why in new.items()]
                    continue
                yield from self._islands(path, module, observed, known, reason.reason)
                return
            yield region
            break
        seen = {_join(path, child): Observed(*inputs) for child, inputs in region.recording.observed.items()}
        for inner, why in region.recording.kept_whole.items():
            if any(True for _ in module.get_submodule(inner).parameters()):
                self.skipped.append(Skipped(_join(path, inner), f"kept whole, nothing was looked for in it: {why}"))
        closed = region.recording.kept_whole.keys() | opaque
        for inner in outermost(inner for inner, _ in module.named_modules() if inner in closed):
            yield from self._children(_join(path, inner), seen)

    def _region(self, path: str, module: nn.Module, observed: Observed, opaque: frozenset[str]) -> Region:
        def record(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Recording:
            return Recorder(self.evaluator, opaque).record(data_free_copy(module), *inputs)

        inputs = (observed.args, observed.kwargs)
        try:
            recording = record(inputs)
        except InputError:
            raise
        except Exception as error:  # a user's forward may fail in any way; the reason is told
            raise CannotEnter({"": one_line(error)}) from error
        modules = recording.modules
        flow = Dataflow(recording.graph, modules)
        found = find(flow, path)
        heard = predecessors(recording.graph, modules, found)
        carried = {f.name: carried_by(f, modules, self.evaluator) for f in found}
        made, skipped = chains(found, heard, carried)
        skipped += self_attention(flow, found, path)
        region = Region(path, recording, found, carried, made, skipped, flow.order)
        if len(found) < 2:  # there is nothing to connect, and the graph is for looking only
            return region
        try:
            verdict = judged(recording, self.evaluator, inputs, record)
        except Exception as error:  # as above, of the forward at another size
            raise CannotEnter({"": one_line(error)}) from error
        if verdict.baked:
            raise CannotEnter(verdict.baked)
        region = dataclasses.replace(region, recording=dataclasses.replace(recording, held=verdict.held))
        region.fold(tuple(link for chain in made for link in chain.links))
        return region

    def _islands(
        self, path: str, module: nn.Module, observed: Observed, known: dict[str, Observed], reason: str
    ) -> Iterator[Region]:
        self.skipped.append(Skipped(path or self.name, f"not traced as a whole: {reason}"))
        if not any(child.startswith(f"{path}.") for child in known):
            inside = observe(module, observed, self.evaluator)
            if isinstance(inside, str):
                raise TracingError(
                    f"{path or self.name} could not be traced: {reason}. It could not be run on the example either "
                    f"({inside}), so its submodules were not tried. Pass example_inputs that the model accepts."
                )
            known = {_join(path, child): inputs for child, inputs in inside.items()}
        yield from self._children(path, known)

    def _children(self, path: str, known: dict[str, Observed]) -> Iterator[Region]:
        """The regions of the modules directly inside one that has no graph of its own."""
        for name, module in self.model.get_submodule(path).named_children():
            child = _join(path, name)
            if not any(True for _ in module.parameters()) or not any(True for _ in module.children()):
                continue
            if child in known:
                yield from self._regions(child, known[child], known)
            else:  # a container that is indexed and never called
                yield from self._children(child, known)


def _kept_whole(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(path, reason) of the submodules whose own call does what their forward does not."""
    for path, inner in module.named_modules():
        if path and isinstance(inner, _LOOKED_THROUGH):
            yield path, f"{type(inner).__name__} runs copies of it, so what it holds is connected on its own"
        elif (
            path
            and not is_layer(inner)
            and any(isinstance(h, _REPARAMETRIZING) for h in inner._forward_pre_hooks.values())
        ):
            yield path, "a hook computes its weights anew whenever it is called"


_REPARAMETRIZING = (BasePruningMethod, SpectralNorm, WeightNorm)
"""Hooks that compute a weight from the parameters (``torch.nn.utils.parametrizations`` does without hooks)."""


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _count(regions: list[Region]) -> int:
    return sum(len(region.found) for region in regions)


def _tiny_maps(regions: list[Region]) -> list[tuple[str, torch.Size]]:
    """The convolutions that yield maps under 4x4 from larger ones, and the sizes of the maps."""
    tiny = []
    for region in regions:
        modules = region.modules
        for node in region.recording.graph.nodes:
            if node.op != "call_module" or not isinstance(modules[str(node.target)], nn.Conv2d | nn.Conv3d):
                continue
            made, given = node_value(node), node_value(node.all_input_nodes[0])
            if not (isinstance(made, Tensor) and isinstance(given, Tensor)):  # octave convolutions take and make two
                continue
            if max(given.shape[2:]) > 1 and max(made.shape[2:]) < 4:
                tiny.append((str(node.target), made.shape[2:]))
    return tiny


_WRAPPERS = {
    "DistributedDataParallel": ("DistributedDataParallel", "module"),
    "DataParallel": ("DataParallel", "module"),
    "FullyShardedDataParallel": ("FullyShardedDataParallel", "module"),
    "OptimizedModule": ("torch.compile", "_orig_mod"),
}
"""Class of a wrapper -> what it is called, and where the model is in it."""

_LOOKED_THROUGH = (nn.DataParallel,)
"""Wrappers that may stay inside a model: what they hold becomes an island."""


def require_module(model: Any) -> None:
    """Nothing for a model that dcafy can work on; ``InputError`` says what else it is, and what to do."""
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise InputError(f"{model.__name__} is a class; an nn.Module instance is needed: {model.__name__}(...).")
    if not isinstance(model, nn.Module):
        raise InputError(
            f"A torch.nn.Module is needed, not {type(model).__name__}. Build the network first; "
            "weights alone are loaded into it with load_state_dict."
        )
    wrapper = type(model).__name__
    if wrapper in _WRAPPERS:
        known_as, inner = _WRAPPERS[wrapper]
        raise InputError(f"The model is wrapped by {known_as}. Pass model.{inner}, and wrap the result again.")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("A TorchScript module holds no Python to trace. Pass the model it was scripted from.")
    for path, module in model.named_modules():
        if type(module).__name__ in _WRAPPERS and not isinstance(module, _LOOKED_THROUGH):
            known_as, inner = _WRAPPERS[type(module).__name__]
            raise InputError(
                f"{path} is wrapped by {known_as}. Put model.{path}.{inner} in its place, and wrap that part of the "
                "result again."
            )
        quantized = type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))
        if quantized and type(module).__name__ != "FloatFunctional":  # which only adds, in float
            raise InputError(f"{path or wrapper} is quantized. Connect the float model before quantizing it.")
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(f"{path} is a TorchScript module. Pass a model built from Python modules.")
        for name in _REPLACEABLE:
            if _keeps_hold_of_a_module(module.__dict__.get(name)):
                raise InputError(
                    f"{_join(path, name)} was replaced by a function that keeps hold of a module, and in a copy of the "
                    "model it would go on using that very module. Write it into a subclass, or as a function of self "
                    f"and set it with types.MethodType(function, module)."
                )
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if torch.nn.parameter.is_lazy(tensor):
                raise InputError(
                    f"{_join(path, name)} is not initialized yet (a lazy module). Run the model once on an input first."
                )


_REPLACEABLE = ("forward", "train", "eval")


def _keeps_hold_of_a_module(value: Any) -> bool:
    """Whether a function has a module, or a method of one, in the scope it was made in."""
    pending, seen = [value], set()
    while pending:
        function = pending.pop()
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        held = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        held += function.__defaults__ or ()
        if any(isinstance(getattr(item, "__self__", item), nn.Module) for item in held):
            return True
        pending += held
    return False


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
