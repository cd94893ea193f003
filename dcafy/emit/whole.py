"""The whole connected network as one graph: a recording of the result, in which messages are plain edges."""

from __future__ import annotations

import contextlib
import keyword
import operator
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import fx, nn

from dcafy.emit.dca import connected_hosts, ends_of, example_of, require_recipe
from dcafy.errors import TracingError
from dcafy.graph.copies import has_own_hooks, own_copy
from dcafy.graph.evaluator import Evaluator, device_of
from dcafy.graph.rewritten import forward_of, is_rewritten, taken_of_graphs
from dcafy.graph.source import require_writable
from dcafy.threads import ONE_AT_A_TIME
from dcafy.trace import Recordable, judged, recorded
from dcafy.trace.fold import CannotEnter, fold
from dcafy.trace.forms import require_one_form
from dcafy.trace.inputs import in_dtype_of
from dcafy.trace.recording import Observed, Recording, check_decision, check_default


def written(model: nn.Module, *, entered: bool = False) -> fx.Graph:
    """The graph of a connected model; a call of a module stays one where no message passes in or out.

    ``entered``: what connections compute is written out, too. Raises ``TracingError`` where there is none. It is
    written on a thread of its own: modes that whoever asks is in (an export, autocast, ``no_grad``) are not on there.
    """
    if ONE_AT_A_TIME._is_owned():  # type: ignore[attr-defined]  # asked in a recording: another thread would wait for it
        return _written(model, entered)
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(_written, model, entered).result()


def _written(model: nn.Module, entered: bool) -> fx.Graph:
    example = example_of(model)
    assert example is not None
    inputs = Observed(in_dtype_of(model, example.inputs), {})
    recordable = Recordable(model, inputs, Evaluator(device_of(model)), connections="entered" if entered else "called")
    with _refused(model):
        recording = recorded(recordable)
        _require_every_connection(model, recording)
        own = frozenset(_of_dcafy(recording))
        # What is folded back stays the user's, and may go by whatever it likes.
        recording = judged(recordable, recording, {"", *fold(recording, own).entered})
        folded = fold(recording, own)
        called = {node.target for node in folded.graph.nodes if node.op == "call_module"}
        require_one_form(recording, called.__contains__)
    for node in folded.graph.nodes:
        node.meta = {}
    require_no_hooks(model, folded.graph)
    return folded.graph


def require_no_hooks(model: nn.Module, graph: fx.Graph) -> None:
    """Raises ``TracingError`` where the user's hooks act on the call of a module that ``graph`` goes past."""
    hooked = [(path, module) for path, module in model.named_modules() if has_own_hooks(module)]
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"} if hooked else set()
    inside = {id(inner) for path in called for inner in model.get_submodule(path).modules()}
    for path, module in hooked:
        if id(module) not in inside:
            raise TracingError(
                f"No graph of the whole {type(model).__name__} can be written: {path or 'the network itself'} has a "
                "forward hook, and a graph goes past its call. Take the hook off (handle.remove()), or export with "
                "torch.export.export(..., strict=True), which needs no graph."
            )


@contextlib.contextmanager
def _refused(model: nn.Module) -> Iterator[None]:
    """Inside it what cannot be entered becomes the error that is documented."""
    try:
        yield
    except CannotEnter as error:
        where = f"{error.path}: " if error.path else ""
        raise TracingError(
            f"No graph of the whole {type(model).__name__} can be written: {where}{error.reason}."
        ) from error


def _require_every_connection(model: nn.Module, recording: Recording) -> None:
    """Raises :class:`CannotEnter` where something connected is no nodes: what it hears and tells would be no edges."""
    for node in recording.graph.nodes:
        path = str(node.target)
        module = recording.modules[path] if node.op == "call_module" else None
        if module is not None and not getattr(module, "is_connection", False) and _is_on_wire(module):
            why = recording.kept_whole.get(path, "it is called as a whole")
            raise CannotEnter({path: f"what is connected in it cannot be written out: {why}"})
    _require_alike(model, recording.model)


def _require_alike(model: nn.Module, twin: nn.Module) -> None:
    """Raises :class:`CannotEnter` for a host that is connected in ``model`` and not in ``twin``, a copy of it."""
    for path, host, _ in connected_hosts(model):
        forward = forward_of(host)
        usual = None if forward is None else forward.usual
        name = None if usual is None or usual.differs(host) else usual.differs(twin.get_submodule(path))
        if name is not None:
            raise CannotEnter({path: f"its self.{name} is another object in every copy, so that no copy is connected"})


def _is_on_wire(module: nn.Module) -> bool:
    return next(connected_hosts(module), None) is not None or any(map(ends_of, module.modules()))


def _of_dcafy(recording: Recording) -> Iterator[fx.Node]:
    """The nodes that modules of generated and of dcafy's own classes made, and connections."""
    for node, call in recording.home.items():
        module = recording.modules[call.path]
        ours = type(module).__module__.partition(".")[0] == __name__.partition(".")[0]
        if ours or is_rewritten(module) or getattr(module, "is_connection", False):
            yield node


def flat(model: nn.Module) -> fx.GraphModule:
    """A plain, trainable ``fx.GraphModule`` that computes what the connected ``model`` does, without a wire.

    Its modules are copies of the network's own and plain torch layers, and nothing in it is of dcafy: for
    ``torch.jit.script``, for tools that know graphs only, and for machines without dcafy. Its state dict has the keys
    of ``model``, those of unused modules left out; what is shared is shared.

    A network whose units hand a state on by themselves (``rla``, ``dia``) is taken as well, connected or not.

    Raises ``InputError`` for a model that was not converted, ``TracingError`` where the whole of it cannot be written
    down as one graph, with the reason.

    >>> import dcafy, torch, torchvision
    >>> model = dcafy.convert(torchvision.models.mobilenet_v3_small()).eval()
    >>> plain = dcafy.flat(model)
    >>> x = torch.rand(1, 3, 64, 64)
    >>> torch.equal(plain(x), model(x))
    True
    """
    if example_of(model) is None:
        require_recipe(model)
    taken = taken_of_graphs(model)
    if taken is not None:
        raise TracingError(f"No GraphModule can have a {taken!r} of its own, as {type(model).__name__} does.")
    twin = own_copy(model)
    with _refused(model):
        _require_alike(model, twin)
    graph = written(twin, entered=True)
    for node in list(graph.nodes):
        if node.target is check_decision:
            value, answer, module = node.args
            with graph.inserting_before(node):
                if type(answer) is bool:  # an export cannot compare what it has not been asked for yet
                    value = graph.call_function(bool, (value,))
                same = graph.call_function(operator.eq, (value, answer))
                graph.call_function(torch._assert, (same, f"{module} computes otherwise at this size of its input"))
            graph.erase_node(node)
        elif node.target is check_default:
            placeholder = node.args[0]
            graph.erase_node(node)
            if not placeholder.users:
                graph.erase_node(placeholder)
    own = [n for n in graph.nodes if n.op == "call_function" and _home(n.target).startswith("dcafy.")]
    if own:
        raise TracingError(
            f"No plain graph of {type(model).__name__} can be written: it calls {own[0].target.__name__}, which needs "
            "dcafy to run."
        )
    require_writable(graph)
    for part in (part for node in graph.nodes for part in str(node.target).split(".")):
        if keyword.iskeyword(part):
            raise TracingError(f"No GraphModule can have a submodule called {part!r}, which is a word of Python's.")
    made = fx.GraphModule(twin, graph, class_name=type(model).__name__)
    _share(twin, made)
    modes = {path: module.training for path, module in twin.named_modules()}
    for path, module in made.named_modules():
        module.training = modes.get(path, model.training)
    return made


def _share(twin: nn.Module, made: fx.GraphModule) -> None:
    """Has what stands in ``twin`` under several names stand under all of them in ``made``; a graph knows one."""
    modules, there = {id(module) for module in made.modules()}, dict(made.named_modules(remove_duplicate=False))
    for path, module in twin.named_modules(remove_duplicate=False):
        if id(module) in modules and path not in there:
            made.add_submodule(path, module)
    parameters = {id(parameter) for parameter in made.parameters()}
    names = dict(made.named_parameters(remove_duplicate=False))
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        if id(parameter) in parameters and name not in names:
            path, _, last = name.rpartition(".")
            if path not in dict(made.named_modules(remove_duplicate=False)):
                made.add_submodule(path, nn.Module())
            made.get_submodule(path).register_parameter(last, parameter)


def _home(function: Any) -> str:
    return str(getattr(function, "__module__", None) or type(function).__module__)
