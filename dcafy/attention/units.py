"""Where attention goes in a network that has none: its residual units, found by what they compute.

A *unit* is a module whose own forward adds two maps of one size that come from the same input, where the
longer way (the main branch) holds a convolution larger than 1x1. Class names play no part; the class of a unit
does: where it also occurs without the addition (MobileNetV2 with stride 2), those instances are units, too.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from dcafy.errors import InputError, TracingError
from dcafy.graph.evaluator import Evaluator, device_of
from dcafy.graph.nodes import OWNER, node_value
from dcafy.graph.ops import Op, op_name, op_of
from dcafy.graph.paths import joined, outermost
from dcafy.trace import Recordable, judged, recorded
from dcafy.trace.fold import CannotEnter
from dcafy.trace.inputs import as_inputs, guesses, on_one_of, probe
from dcafy.trace.islands import observe
from dcafy.trace.recording import Observed, Recording, passed_through

Reads = Mapping[str, tuple[fx.Node, ...]]
"""What attention reads in a unit: the path of a part of it ("" for all of it) -> the nodes that this is given, of which
it takes the place of the last one."""


@dataclass(frozen=True)
class Kernel:
    """The k x k convolution of a unit, with what follows it."""

    convolution: fx.Node
    norm: fx.Node
    activation: fx.Node | None

    @property
    def input(self) -> fx.Node:
        """What the convolution reads."""
        return self.convolution.all_input_nodes[0]

    @property
    def output(self) -> fx.Node:
        """What the convolution, its norm and its activation make."""
        return self.activation or self.norm


@dataclass(frozen=True)
class Unit:
    """A module that gets attention.

    ``recording``  of the module alone
    ``end``        the node behind which attention goes: the last of the main branch, before the addition and
                   before what drops whole paths
    ``kernel``     the convolution that selective kernels give a second branch to, if there is one
    ``first``      the first convolution of the main branch, if there is one
    ``calls``      how often it is called in the recording that it was found in
    ``output``     what it returns, where that is a map
    """

    path: str
    recording: Recording
    end: fx.Node
    kernel: Kernel | None
    first: fx.Node | None = None
    calls: int = 1
    output: fx.Node | None = None

    @property
    def channels(self) -> int:
        """Channels of the map at ``end``."""
        return int(node_value(self.end).shape[1])

    @property
    def side(self) -> int:
        """The shorter side of the map at ``end``, in the example."""
        return int(min(self.size))

    @property
    def size(self) -> tuple[int, ...]:
        """Height and width of the map at ``end``, in the example."""
        return tuple(node_value(self.end).shape[2:])


@dataclass(frozen=True)
class Chosen:
    """The units of a model that get attention, in the order they are called.

    ``inputs``      those that they are seen on
    ``classifier``  the path of the linear layer whose output is the model's, where there is one
    """

    units: tuple[Unit, ...]
    inputs: Observed
    classifier: str | None


def units(model: nn.Module, where: str = "auto", example_inputs: Any = None) -> Chosen:
    """The modules of ``model`` that get attention.

    ``where``: ``auto`` for every residual unit, or a glob of module paths: the residual units among them, and where
    there is none the outermost modules that match. Raises ``InputError`` where there is nothing, or
    where a module's output is no map ``[N, C, H, W]``; ``TracingError`` where the model does not run.
    """
    return on_one_of(
        [as_inputs(example_inputs, model)] if example_inputs is not None else guesses(model),
        lambda inputs: _Search(model).units(where, Observed(probe(inputs), {}, inputs)),
        none=f"{type(model).__name__} ran on none of the inputs that were tried",
        call="dcafy.insert(model, 'se',",
    )


class _Search:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.evaluator = Evaluator(device_of(model))
        self.classifier: str | None = None

    def units(self, where: str, inputs: Observed) -> Chosen:
        found = self._residual(inputs)
        if where != "auto":
            found = {path: unit for path, unit in found.items() if fnmatch.fnmatchcase(path, where)}
            found = found or self._matching(where, inputs)
        if not found:
            raise InputError(self._nothing())
        return Chosen(tuple(found.values()), inputs, self.classifier)

    # -- residual units --------------------------------------------------------------------------

    def _residual(self, inputs: Observed) -> dict[str, Unit]:
        """Path -> unit: those with an addition, and the other instances of their classes."""
        adding: dict[str, Unit] = {}
        calls: dict[str, Observed] = {}
        times: dict[str, int] = {}
        for path, call, adds in self._calls("", inputs):
            times[path] = times.get(path, 0) + 1
            if path and path not in calls:
                calls[path] = call
                # A feature pyramid adds maps as well, of a dict of them.
                unit = self._unit(path, call, residual=True) if adds and _takes_a_map(call) else None
                if unit is not None:
                    adding[path] = unit
        kinds = {type(self.model.get_submodule(path)) for path in adding}
        found = {}
        for path, call in calls.items():
            if path in adding:
                found[path] = adding[path]
            elif type(self.model.get_submodule(path)) in kinds:
                unit = self._unit(path, call, residual=False)
                if unit is not None:
                    found[path] = unit
        return {path: dataclasses.replace(unit, calls=times[path]) for path, unit in found.items()}

    def _calls(self, path: str, inputs: Observed) -> Iterator[tuple[str, Observed, bool]]:
        """(path, inputs, whether its own forward adds two maps) of every module that is called."""
        module = self.model.get_submodule(path)
        try:
            recording = recorded(Recordable(module, inputs, self.evaluator))
        except (CannotEnter, InputError) as error:  # its submodules may be fine
            inside = observe(module, inputs, self.evaluator)
            if isinstance(inside, str):
                raise TracingError(
                    f"{path or type(module).__name__} could not be traced ({error}) nor run ({inside})."
                ) from error
            yield from self._outermost(path, inside)
            return
        self.classifier = self.classifier if path else _classifier(recording)
        adding = {str(node.meta.get(OWNER, "")) for node in recording.graph.nodes if _added(node, recording.modules)}
        for call in recording.calls:
            seen = Observed(map_arg(call.args, node_value), map_arg(call.kwargs, node_value))
            yield joined(path, call.path), seen, call.path in adding
        for whole in recording.kept_whole:
            yield from self._outermost(path, {c: o for c, o in recording.observed.items() if c.startswith(f"{whole}.")})

    def _outermost(self, path: str, inside: dict[str, Observed]) -> Iterator[tuple[str, Observed, bool]]:
        """What is called in those called modules that lie in no other one of them."""
        for child in outermost(inside):
            yield from self._below(joined(path, child), inside[child])

    def _below(self, path: str, inputs: Observed) -> Iterator[tuple[str, Observed, bool]]:
        if not _has_children(self.model.get_submodule(path)):
            return
        try:
            yield from self._calls(path, inputs)
        except TracingError:
            return

    # -- one module ------------------------------------------------------------------------------

    def _unit(self, path: str, call: Observed, *, residual: bool) -> Unit | None:
        """The unit that the module at ``path`` is, or ``None`` where it is none."""
        recording = self._recorded(path, call)
        shape = _Shape(recording)
        last = shape.main_branch() if residual else shape.output()
        if last is None or (residual and not shape.kernels(last)):
            return None
        end = shape.before_drops(last)
        if not shape.is_map(end):
            return None
        output = shape.output()
        output = output if output is not None and shape.is_map(output) else None
        return Unit(path, recording, end, shape.kernel(end), shape.first(end), output=output)

    def _recorded(self, path: str, call: Observed) -> Recording:
        recordable = Recordable(self.model.get_submodule(path), call, self.evaluator)
        try:
            return judged(recordable, recorded(recordable))
        except (CannotEnter, InputError) as error:  # here the user asked for this very module
            raise InputError(f"{path} cannot be given attention: {error}.") from error

    def _matching(self, where: str, inputs: Observed) -> dict[str, Unit]:
        """The outermost called modules whose paths match, residual or not."""
        seen = observe(self.model, inputs, self.evaluator)
        if isinstance(seen, str):
            raise TracingError(seen)
        paths = outermost(path for path in seen if fnmatch.fnmatchcase(path, where))
        if not paths:
            raise InputError(
                f"where={where!r} matches no module that {type(self.model).__name__} calls. "
                f"Its modules are: {self._some(seen)}."
            )
        found = {}
        for path in paths:
            unit = self._unit(path, seen[path], residual=False)
            if unit is None:
                raise InputError(
                    f"where={where!r} matches {path}, which does not end in a map [N, C, H, W] of a convolution's "
                    "channels. Name only modules that do."
                )
            found[path] = unit
        return found

    def _nothing(self) -> str:
        name = type(self.model).__name__
        paths = [path for path, module in self.model.named_modules() if path and _has_children(module)]
        example = paths[0] if paths else "features"
        return (
            f"{name} has no residual or bottleneck units with convolutions, at whose ends where='auto' would put "
            "attention. Say with a glob of module paths behind which modules it goes, for example "
            f"dcafy.insert(model, 'se', where={f'{example}.*'!r}). Its modules are: {self._some(paths)}."
        )

    def _some(self, paths: Any) -> str:
        shown = list(paths)[:12]
        return ", ".join(shown) + (", ..." if len(paths) > len(shown) else "")


class _Shape:
    """The branches of one recorded module."""

    def __init__(self, recording: Recording) -> None:
        self.graph = recording.graph
        self.modules = recording.modules
        self.behind: dict[fx.Node, set[fx.Node]] = {}
        for node in self.graph.nodes:
            own = {node} if node.op == "placeholder" or _is_kernel(node, self.modules) else set()
            self.behind[node] = own.union(*(self.behind[n] for n in node.all_input_nodes))

    def kernels(self, node: fx.Node) -> set[fx.Node]:
        """The convolutions larger than 1x1 that ``node`` depends on."""
        return {n for n in self.behind[node] if n.op != "placeholder"}

    def main_branch(self) -> fx.Node | None:
        """The longer operand of the module's last residual addition."""
        for node in reversed(self.graph.nodes):
            if node.meta.get(OWNER) != "" or not _added(node, self.modules):
                continue
            first, second = _operands(node)
            if len(self.kernels(first)) < len(self.kernels(second)):
                first, second = second, first
            inputs = [{n for n in self.behind[o] if n.op == "placeholder"} for o in (first, second)]
            if len(self.kernels(first)) > len(self.kernels(second)) and inputs[0] & inputs[1]:
                return first
        return None

    def output(self) -> fx.Node | None:
        """What the module returns, where that is one tensor."""
        returned = next(node for node in reversed(self.graph.nodes) if node.op == "output").args[0]
        return returned if isinstance(returned, fx.Node) else None

    def before_drops(self, node: fx.Node) -> fx.Node:
        """The node before dropout and dropped paths, which would hide attention's work from the addition."""
        while True:
            sources = [n for n in node.all_input_nodes if isinstance(node_value(n), Tensor)]
            if len(sources) != 1 or node_value(sources[0]).shape != node_value(node).shape:
                return node
            drops = "drop" in op_name(node, self.modules) or op_name(node, self.modules) == "stochastic_depth"
            if node.target is not passed_through and not drops and not self._is_empty_layer(node):
                return node
            node = sources[0]

    def _is_empty_layer(self, node: fx.Node) -> bool:
        """A module without weights that the trace cannot look into: a dropped path of somebody's own."""
        return node.op == "call_module" and op_of(node, self.modules) is Op.OTHER

    def is_map(self, node: fx.Node) -> bool:
        """Whether ``node`` is ``[N, C, H, W]`` with the channels of the layer that made it."""
        value = node_value(node)
        if not isinstance(value, Tensor) or value.ndim != 4:
            return False
        while True:
            width = self._width(node)
            if width is not None:
                return bool(value.shape[1] == width)
            sources = [n for n in node.all_input_nodes if isinstance(node_value(n), Tensor) and node_value(n).ndim == 4]
            if not sources:
                return node.op == "placeholder"
            node = sources[0]

    def _width(self, node: fx.Node) -> int | None:
        """The channels that a layer gives its output."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        for name in ("out_channels", "out_features", "num_features", "num_channels"):
            if isinstance(getattr(module, name, None), int):
                return int(getattr(module, name))
        if node.op == "call_function" and op_of(node, self.modules) is Op.PARAMETRIC and len(node.args) > 1:
            weight = node_value(node.args[1]) if isinstance(node.args[1], fx.Node) else None
            return int(weight.shape[0]) if isinstance(weight, Tensor) else None
        return None

    def kernel(self, end: fx.Node) -> Kernel | None:
        """The first convolution larger than 1x1 on the way to ``end`` that a norm and an activation follow."""
        behind = self.kernels(end)
        for node in self.graph.nodes:
            if node in behind and isinstance(self.modules.get(str(node.target)), nn.Conv2d):
                norm = self._only_user(node)
                if norm is None or not isinstance(self.modules.get(str(norm.target)), nn.BatchNorm2d):
                    continue
                if type(self.modules[str(norm.target)]) is not nn.BatchNorm2d:
                    return Kernel(node, norm, None)  # a norm that brings its activation along
                activation = self._only_user(norm)
                if activation is not None and _is_activation(activation, self.modules):
                    return Kernel(node, norm, activation)
        return None

    def first(self, end: fx.Node) -> fx.Node | None:
        """The first convolution on the way to ``end``: what a unit makes of its input."""
        behind, pending = {end}, [end]
        while pending:
            new = [n for n in pending.pop().all_input_nodes if n not in behind]
            behind.update(new)
            pending += new
        layers = (n for n in self.graph.nodes if n in behind and n.op == "call_module")
        return next((n for n in layers if isinstance(self.modules[str(n.target)], nn.Conv2d)), None)

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        """What alone reads ``node``, behind layers that hand it on as it is (a slot for dropped blocks)."""
        users = list(node.users)
        while len(users) == 1 and isinstance(self.modules.get(str(users[0].target)), nn.Identity):
            users = list(users[0].users)
        return users[0] if len(users) == 1 else None


def _classifier(recording: Recording) -> str | None:
    """The path of the linear layer that makes the recorded module's output, ``[N, classes]``, and nothing else."""
    node = _Shape(recording).output()
    while node is not None and node.target is passed_through:
        node = node.all_input_nodes[0]
    if node is None or node.op != "call_module" or node_value(node).ndim != 2:
        return None
    path = str(node.target)
    times = sum(other.op == "call_module" and other.target == path for other in recording.graph.nodes)
    return path if type(recording.modules[path]) is nn.Linear and times == 1 else None


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _takes_a_map(call: Observed) -> bool:
    """Whether the first input is a tensor, as that of every unit is."""
    return any(isinstance(value, Tensor) for value in (*call.args[:1], *call.kwargs.values()))


def _added(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether ``node`` adds two maps of one size."""
    if op_of(node, modules) is not Op.ADD:
        return False
    values = [node_value(n) for n in _operands(node)]
    return len(values) == 2 and values[0].ndim == 4 and values[0].shape == values[1].shape


def _operands(node: fx.Node) -> list[fx.Node]:
    given = (*node.args, *node.kwargs.values())
    return [a for a in given if isinstance(a, fx.Node) and isinstance(node_value(a), Tensor)]


def _is_kernel(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether ``node`` is a convolution larger than 1x1."""
    if node.op == "call_module":
        module = modules.get(str(node.target))
        return isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
    if op_name(node, modules) in ("conv2d", "convolution") and len(node.args) > 1 and isinstance(node.args[1], fx.Node):
        return bool(max(node_value(node.args[1]).shape[2:]) > 1)
    return False


def _is_activation(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    plain = op_of(node, modules) in (Op.ELEMENTWISE, Op.GATE, Op.OTHER)
    return plain and (node.op == "call_module" or op_name(node, modules) == "relu")
