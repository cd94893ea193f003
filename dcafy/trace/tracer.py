"""Nodes with values: every operation of a forward becomes a node, and is computed on the example beside it."""

from __future__ import annotations

import collections
import contextlib
import enum
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace

from dcafy.draws import drawing_apart
from dcafy.graph.evaluator import Evaluator
from dcafy.graph.nodes import OWNER, PLACE, VALUE, Remake, behind, is_record, node_value, parts, tensors_in, values_of
from dcafy.graph.ops import alters_argument
from dcafy.graph.paths import joined
from dcafy.trace.inputs import real_inputs
from dcafy.trace.proxy import Answering, Mode, ValueProxy
from dcafy.trace.recording import Decision, Question

_PLAIN: dict[type, Callable[[Any], Any]] = {
    bool: lambda value: value,
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
}
"""A class of constants -> what makes one of that very class of an instance of a subclass."""


class ValueTracer(Answering):
    """Makes the nodes of one trace of ``model``, which must be data-free: each with its value and its owner.

    ``original``   what the model is a copy of
    ``owner``      the path of the module whose forward runs
    ``place``      the path under which it was called: a module that several share has several
    ``running``    real code runs on values, and nothing is recorded; ``on_data``: on values with data
    ``refused``    paths of modules whose forwards were stopped by an error of the recording's own, and the error
    ``settled``    what forwards decided by
    ``asked_for``  names that were asked of a module that has no value of its own for them, but parts and parameters
    ``unwritten``  module path -> what its forward does besides, which no graph has
    ``asked``      module path -> what its forward asks of torch, and is told
    ``by_dtype``   paths of modules whose forwards decide by a dtype
    ``without_gradient``  nodes that are computed where gradients are switched off -> the path of whose forward did so
    """

    def __init__(self, evaluator: Evaluator, model: nn.Module, original: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.original = original
        self.modules = dict(model.named_modules())
        self._paths = {id(module): path for path, module in self.modules.items()}
        self.evaluator = evaluator
        self.owner = ""
        self.place = ""
        self.running = self.on_data = False
        self.refused: list[tuple[str, str]] = []
        self.mode_read: set[tuple[str, str]] = set()
        self.settled: list[Decision] = []
        self.asked_for: set[str] = set()
        self.unwritten: dict[str, str] = {}
        self.asked: dict[str, list[Question]] = {}
        self.by_dtype: set[str] = set()
        self.without_gradient: dict[fx.Node, str] = {}
        self._switched_by = ""
        self._is_grad_enabled = torch.is_grad_enabled  # before it is replaced
        self._with_gradients = torch.is_grad_enabled()
        self._attributes: dict[str, ValueProxy] = {}
        self._tensors: dict[int, str] = {}
        for path, module in self.modules.items():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._tensors.setdefault(id(tensor), joined(path, name))

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Real code runs on values: patched calls and attributes behave as if nobody were tracing."""
        outer, self.running = self.running, True
        try:
            yield
        finally:
            self.running = outer

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """As ``fx.Tracer`` does it, but for what it replaces for every thread: see :mod:`dcafy.trace.patches`."""
        flags = getattr(_symbolic_trace, "_is_fx_tracing_tls", _symbolic_trace)
        flag = "_is_fx_tracing_flag" if flags is _symbolic_trace else "flag"
        outer = getattr(flags, flag, False)
        try:
            setattr(flags, flag, True)
            self.root, self.root_module_name = root, type(root).__name__
            self.submodule_paths = {module: path for path, module in root.named_modules()}
            self.graph = fx.Graph(tracer_cls=type(self))
            self.tensor_attrs = {
                value: joined(path, name)
                for path, module in root.named_modules()
                for name, value in module.__dict__.items()
                if isinstance(value, Tensor | torch.ScriptObject)
            }
            forward, args = self.create_args_for_root(type(root).forward, True, concrete_args)
            self.create_node("output", "output", (self.create_arg(forward(*args)),), {})
            self.submodule_paths = None
        finally:
            setattr(flags, flag, outer)
        return self.graph

    # -- the questions that fx asks -------------------------------------------------------------

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        node.meta[OWNER], node.meta[PLACE] = self.owner, self.place
        if self._with_gradients and not self._is_grad_enabled():
            self.without_gradient[node] = self._switched_by
        return node

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if issubclass(kind, fx.Proxy):
            return a.node
        if kind is Mode:
            return a.__fx_create_arg__(self)
        if kind is collections.OrderedDict:  # fx would hand it on as a plain dict
            rows = [(key, self.create_arg(item)) for key, item in a.items()]
            return self._made(collections.OrderedDict, (rows,), a)
        if is_record(kind):
            return self._made(Remake(kind), parts(a, self.create_arg), a)
        if isinstance(a, Tensor):
            return self._tensor(a).node
        if kind is torch.device and a.type == "meta":
            return self._device(a)
        if not isinstance(a, enum.Enum):  # fx writes the ``repr`` of a number into source, whatever class it is of
            a = a.item() if isinstance(a, np.generic) else a
            plain = next((plain for base, plain in _PLAIN.items() if isinstance(a, base)), None)
            a = a if plain is None else plain(a)
        return super().create_arg(a)

    def _device(self, known: torch.device) -> Any:
        """The node that asks a parameter where it is, where a forward has asked one of the data-free copy."""
        owners = (self.modules[self.owner], self.model)
        parameter = next((p for owner in owners for p in owner.parameters()), None)
        if parameter is None:
            return known
        node = self.create_node("call_function", getattr, (self._tensor(parameter).node, "device"), {})
        node.meta[VALUE] = self.evaluator.device
        return node

    def _made(self, make: Callable[..., Any], args: tuple[Any, ...], container: Any) -> fx.Node:
        """The node that makes a container when the graph runs."""
        node = self.create_node("call_function", make, args, {})
        node.meta[VALUE] = values_of(container)
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs), *rest[:2])
        with self.evaluating(node):
            node.meta[VALUE] = self.value(
                functools.partial(self._value, kind, target), values_of(args), values_of(kwargs)
            )
        if node.meta[VALUE] is None and target is operator.getitem:
            return None  # an item that is None is asked for with ``is None``, which no proxy can answer
        return self._result(node, args, alters_argument(node, {}))

    @contextlib.contextmanager
    def evaluating(self, node: fx.Node) -> Iterator[None]:
        """Inside it the value of ``node`` is computed; where that fails, there is no such node."""
        try:
            with self.run():
                yield
        except Exception:  # which the user's code may catch, and go on
            self.graph.erase_node(node)
            raise

    def value(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What ``call`` yields on values. Raises what it raises on data as well: that is the user's own error."""
        try:
            return call(args, kwargs)
        except Exception as error:  # any operation may fail on meta tensors in any way
            if self.knows_data(args, kwargs):
                self.with_data(call, args, kwargs)
                raise self.refusal("its forward goes by the content of a tensor") from error
            raise

    def knows_data(self, args: Any, kwargs: Any) -> bool:
        """Whether data would make a difference, and the model has any."""
        without = any(own.device.type == "meta" for own in tensors_in((args, kwargs)))
        return without and all(p.device.type != "meta" for p in self.original.parameters())

    def with_data(self, call: Callable[..., Any], args: Any, kwargs: Any, seed: int = 0) -> Any:
        """What ``call`` yields on data like the values."""
        with self._data():
            given = real_inputs((args, kwargs), self.original, seed)
            return drawing_apart(lambda: call(*given))

    @contextlib.contextmanager
    def _data(self) -> Iterator[None]:
        outer, self.on_data = self.on_data, True
        try:
            with torch.no_grad():
                yield
        finally:
            self.on_data = outer

    def refusal(self, reason: str) -> fx.proxy.TraceError:
        """The error for what no recording can follow; remembered, as the user's code may catch it."""
        self.refused.append((self.owner, reason))
        return fx.proxy.TraceError(reason)

    def _value(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kind == "call_function":
            return self.evaluator.function(target, args, kwargs)
        if kind == "call_method":
            return self.evaluator.method(target, args, kwargs)
        raise TypeError(f"a {kind} node is not made this way")

    def _result(self, node: fx.Node, args: Any, in_place: bool) -> ValueProxy:
        """The proxy of ``node``; who holds the proxy of what it altered in place reads ``node`` from now on."""
        if in_place and isinstance(node.meta[VALUE], Tensor) and args and type(args[0]) is ValueProxy:
            args[0].node = node
            return args[0]
        return ValueProxy(node, self)

    def _placeholder(self, name: str, default: tuple[Any, ...], value: Any) -> Any:
        node = self.create_node("placeholder", name, default, {})
        node.meta[VALUE] = value
        return ValueProxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.running or not isinstance(attr_val, Tensor) or id(attr_val) not in self._tensors:
            return attr_val
        return self._tensor(attr_val)

    def mode_of(self, module: nn.Module) -> Any:
        """What a module's ``training`` is: layers that are run on values are in eval."""
        path = self._paths.get(id(module))
        if path is None:  # some other model's, which has no mode
            raise AttributeError(f"{type(module).__name__!r} object has no attribute 'training'")
        return False if self.running else Mode(self, path)

    def _tensor(self, tensor: Tensor) -> ValueProxy:
        """The node that reads one of the model's own tensors."""
        path = self._tensors.get(id(tensor)) or self.tensor_attrs.get(tensor)
        if path is None:
            raise self.refusal("its forward computes a constant tensor that belongs to no module")
        if path not in self._attributes:
            node = self.create_node("get_attr", path, (), {})
            node.meta[VALUE] = tensor
            self._attributes[path] = ValueProxy(node, self)
        return self._attributes[path]

    # -- what proxies and patches tell ------------------------------------------------------------

    def settle(self, proxy: fx.Proxy, ask: Callable[[Any], Any]) -> Any:
        """What a forward wants to decide by; remembered, to be checked at other sizes."""
        if isinstance(node_value(proxy.node), Tensor):
            raise self.refusal("its forward decides by the content of a tensor")
        read = _read_of_tensors(proxy.node)
        if not read.isdisjoint(_BY_GRADIENTS):
            self.goes_by(f"{next(iter(read & _BY_GRADIENTS))} of a tensor")
        if not read.isdisjoint(_OF_DTYPE):
            self.by_dtype.add(self.owner)
        decision = Decision(proxy.node, ask, self.owner)
        answer = decision.answer
        self.settled.append(decision)
        return answer

    def goes_by(self, what: str) -> None:
        """Told where a forward reads what is another at every call, or in training: a graph has it once for all."""
        if not self.running:
            self.unwritten.setdefault(self.owner, f"its forward goes by {what}")

    def asks(self, function: str, given: tuple[Any, ...], answer: Any) -> None:
        """Told where a forward asks torch for something that stays, as a rule."""
        if not self.running:
            self.asked.setdefault(self.owner, []).append((function, given, answer))

    def switches(self, what: str) -> None:
        """Told where a forward enters a context: its effect is on what runs, and nodes run outside of it."""
        if not self.running:
            self._switched_by = self.owner
            self.unwritten.setdefault(self.owner, f"its forward runs a part under {what}")


_BY_GRADIENTS = frozenset({"requires_grad", "is_leaf"})
_OF_DTYPE = frozenset({"dtype", "is_floating_point", "is_complex", "type", "element_size", "itemsize"})


def _read_of_tensors(node: fx.Node) -> frozenset[str]:
    """What is read of tensors, by name, in what ``node`` is computed from."""
    read: set[str] = set()
    for current in behind(node):
        if current.target is getattr:
            read.add(str(current.args[1]))
        elif current.op == "call_method":
            read.add(str(current.target))
        elif current.op == "call_function":
            read.add(getattr(current.target, "__name__", ""))
    return frozenset(read)
