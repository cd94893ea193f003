"""Names that stand for something else while a trace runs, so that what plain tracing does not see is recorded."""

from __future__ import annotations

import builtins
import functools
import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace

from dcafy.draws import plain_draws
from dcafy.graph.nodes import VALUE, leaves, mapped_tensors, values_of
from dcafy.graph.reading import is_pythons
from dcafy.graph.rewritten import written_globals
from dcafy.threads import Patch, Swap
from dcafy.trace.effects import forward_globals
from dcafy.trace.named import Applied, Scripted
from dcafy.trace.proxy import ValueProxy
from dcafy.trace.sizes import numbers
from dcafy.trace.tracer import ValueTracer

_FACTORIES = (
    *("arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand"),
    *("randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros"),
)

_CONTEXTS: tuple[Any, ...] = (torch.autocast, torch.no_grad, torch.enable_grad, torch.inference_mode)


def swap_for(tracer: ValueTracer, modules: Iterable[nn.Module], call: Callable[..., Any]) -> Swap:
    """What has calls become nodes that no proxy sees: of modules, tensor factories, ``len``, ``autograd.Function``.

    The names in ``torch`` have to be replaced while the trace runs: the C++ parser of ``torch.zeros`` refuses a proxy
    before any override is asked. ``fx`` replaces those of ``nn.Module`` for every thread, so its ``trace`` is not used.

    The functions that the modules' forwards find beside their classes go through ``call(function, ...)``.
    """

    importlib.import_module("torch._dynamo")  # meta kernels do so: it would note the replaced ``len`` as Python's own
    scopes = _scopes(modules)
    leaves = list(_leaves(tracer, scopes))
    taken = {(id(scope), name) for scope, name, _ in leaves}
    beside = [patch for patch in _functions(scopes, call) if (id(patch[0]), patch[1]) not in taken]
    of_torch = *_modules(tracer), *_factories(tracer), *_questions(tracer), _function(tracer), *_contexts(tracer)
    unsteady = *_draws(tracer, scopes), *_surroundings(tracer, scopes), *_asked(tracer, scopes)
    return Swap((*of_torch, *_variables(scopes), *_seeds(), *unsteady, *leaves, *beside, *numbers(tracer, modules)))


def _modules(tracer: ValueTracer) -> Iterator[Patch]:
    # An export that asks for our graph has fx's wrappers there, which speak to its own tracer.
    own = _symbolic_trace._orig_module_call, _symbolic_trace._orig_module_getattr
    there = nn.Module.__call__, nn.Module.__getattr__
    call, get = (mine if _is_of_fx(one) else one for one, mine in zip(there, own, strict=True))

    def called(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return tracer.call_module(module, functools.partial(call, module), args, kwargs)

    yield nn.Module, "__call__", called

    def attribute(module: nn.Module, name: str) -> Any:
        if name == "training":  # which no module has of its own while it is recorded
            return tracer.mode_of(module)
        tracer.asked_for.add(name)
        return tracer.getattr(name, get(module, name), {})

    yield nn.Module, "__getattr__", attribute


def _is_of_fx(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == _symbolic_trace.__file__


def _leaves(tracer: ValueTracer, scopes: Iterable[dict[str, Any]]) -> Iterator[Patch]:
    """Functions of ``math``, and those that ``torch.fx.wrap`` names: nodes wherever they are given a proxy."""

    def leaf(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(issubclass(type(value), fx.Proxy) for value in leaves((args, kwargs))):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    wrapped = [
        (scope, name, scope[name] if name in scope else getattr(builtins, name))
        for (_, name), scope in _symbolic_trace._wrapped_fns_to_patch.copy().items()
    ]
    known = {id(value) for name, value in vars(math).items() if not name.startswith("_") and callable(value)}
    written = known.union(id(function) for *_, function in wrapped)  # code that was written calls them by other names
    for scope in (vars(math), *scopes):
        for name, value in list(scope.items()):
            if id(value) in (known if "__name__" in scope else written) and not name.startswith("_"):
                yield scope, name, leaf(value)
    for scope, name, function in wrapped:
        yield scope, name, leaf(function)
    for kind, name in _symbolic_trace._wrapped_methods_to_patch:
        yield kind, name, _leaf_method(tracer, getattr(kind, name), name)


def _leaf_method(tracer: ValueTracer, method: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(issubclass(type(value), fx.Proxy) for value in leaves((args, kwargs))):
            return tracer.create_proxy("call_method", name, args, kwargs)
        return method(*args, **kwargs)

    return call


def _factories(tracer: ValueTracer) -> Iterator[Patch]:
    """Tensors that a forward makes become nodes: baked, a random number would stay the same for ever."""

    def recorded(factory: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            if tracer.running:  # among values, where everything is on the meta device
                return factory(*args, **(kwargs if tracer.on_data else {**kwargs, "device": "meta"}))
            node = tracer.create_node("call_function", factory, tracer.create_arg(args), tracer.create_arg(kwargs))
            with tracer.evaluating(node), torch.no_grad():
                given, named = values_of(args), {**values_of(kwargs), "device": "meta"}
                if factory is full:  # with what, is no matter here
                    given, named = mapped_tensors((given, named), lambda _: 0.0)
                node.meta[VALUE] = factory(*given, **named)
            return ValueProxy(node, tracer)

        return make

    full = torch.full
    for name in _FACTORIES:
        yield torch, name, recorded(getattr(torch, name))


def _seeds() -> Iterator[Patch]:
    """A forward that sets the seed sets it when the graph runs, too: by its user, not by who looks at it."""
    for owner in (torch, torch.random):
        yield owner, "manual_seed", lambda seed: torch.default_generator


def _draws(tracer: ValueTracer, scopes: Iterable[dict[str, Any]]) -> Iterator[Patch]:
    """What Python and numpy draw would be the same for ever."""
    for owner, name, draw in plain_draws():
        what = f"what {owner.__name__}.{name} draws"

        def told(*args: Any, draw: Callable[..., Any] = draw, what: str = what, **kwargs: Any) -> Any:
            tracer.goes_by(what)
            return draw(*args, **kwargs)

        yield from _wherever(owner, name, told, scopes)


def _surroundings(tracer: ValueTracer, scopes: Iterable[dict[str, Any]]) -> Iterator[Patch]:
    """What the clock and the environment say may be another thing at the next call."""
    clocks = ("time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time")
    environment: Any = type(os.environ)
    places = [(time, name, f"time.{name}()") for name in clocks] + [(os, "getenv", "os.getenv()")]
    places += [(environment, name, "os.environ") for name in ("__getitem__", "__contains__", "get")]
    for owner, name, what in places:
        real = getattr(owner, name)

        def told(*args: Any, real: Callable[..., Any] = real, what: str = what, **kwargs: Any) -> Any:
            if _asked_by_user():
                tracer.goes_by(what)
            return real(*args, **kwargs)

        yield from _wherever(owner, name, told, scopes)


_IN_ONE_MODE = ("is_grad_enabled", "is_inference_mode_enabled")
"""What differs between training and evaluation: a graph would be right in one of them."""

_STAYING = (
    *("is_autocast_enabled", "is_autocast_cpu_enabled", "get_autocast_dtype", "get_autocast_gpu_dtype"),
    *("get_autocast_cpu_dtype", "get_default_dtype", "are_deterministic_algorithms_enabled"),
)
"""What stays as it is for long, and is compared. (Not what asks for a tracer or an export: these get one graph.)"""


def _asked(tracer: ValueTracer, scopes: Iterable[dict[str, Any]]) -> Iterator[Patch]:
    for name in (name for name in (*_IN_ONE_MODE, *_STAYING) if hasattr(torch, name)):
        real = getattr(torch, name)

        def told(*args: Any, real: Callable[..., Any] = real, name: str = name) -> Any:
            answer = real(*args)
            if _asked_by_user() and name in _IN_ONE_MODE:
                tracer.goes_by(f"torch.{name}()")
            elif _asked_by_user():
                tracer.asks(name, args, answer)
            return answer

        yield from _wherever(torch, name, told, scopes)


def _wherever(owner: Any, name: str, function: Callable[..., Any], scopes: Iterable[dict[str, Any]]) -> Iterator[Patch]:
    """The name where it stands, and where a forward's own file has what it stands for (``from time import time``)."""
    yield owner, name, function
    real = None if isinstance(owner, type) else getattr(owner, name)
    for scope in scopes if real is not None else ():
        yield from ((scope, key, function) for key, value in list(scope.items()) if value == real and callable(value))


def _asked_by_user() -> bool:
    """Whether it is no code of Python's or torch's that called a replaced function; told from inside that."""
    return not is_pythons(sys._getframe(3).f_globals.get("__name__"))


def _questions(tracer: ValueTracer) -> Iterator[Patch]:
    """``len`` has to return a real number: ``x.view(len(x), -1)`` would have the example's batch size for ever."""
    real, is_tensor = builtins.len, torch.is_tensor

    def length(value: Any, /) -> Any:
        if tracer.running or type(value) is not ValueProxy or not isinstance(value.value, Tensor):
            return real(value)
        return tracer.create_proxy("call_method", "size", (value, 0), {})

    yield builtins, "len", length
    yield torch, "is_tensor", lambda value: is_tensor(value) or _stands_for_tensor(value)


def _function(tracer: ValueTracer) -> Patch:
    real = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if tracer.running or not any(type(a) is ValueProxy for a in args):
            return real.__get__(None, cls)(*args, **kwargs)
        return tracer.create_proxy("call_function", Applied(cls), args, kwargs)

    return torch.autograd.Function, "apply", apply


class _OfOld(type):
    """``Variable(x)`` of old is ``x``, and every tensor is one."""

    def __call__(cls, data: Any = None, *args: Any, **kwargs: Any) -> Any:
        return data if _stands_for_tensor(data) else _VARIABLE(data, *args, **kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, Tensor) or _stands_for_tensor(value)


class _Variable(metaclass=_OfOld):
    """Stands for ``torch.autograd.Variable``."""


_VARIABLE: Any = torch.autograd.Variable


def _variables(scopes: Iterable[dict[str, Any]]) -> Iterator[Patch]:
    for scope in (vars(torch.autograd), *scopes):
        yield from ((scope, name, _Variable) for name, value in list(scope.items()) if value is _VARIABLE)


def _contexts(tracer: ValueTracer) -> Iterator[Patch]:
    def entered(context: Any, enter: Callable[..., Any]) -> Callable[..., Any]:
        def tell(self: Any) -> Any:
            tracer.switches(f"torch.{context.__name__}")
            return enter(self)

        return tell

    made = torch.autocast.__init__

    def autocast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        real = tracer.evaluator.device.type if device_type == "meta" else device_type  # there is none for meta tensors
        made(self, real, *args, **kwargs)

    yield torch.autocast, "__init__", autocast
    for context in _CONTEXTS:
        yield context, "__enter__", entered(context, vars(context)["__enter__"])
    switched = torch.set_grad_enabled.__init__

    def set_grad_enabled(self: Any, mode: bool) -> None:  # which needs no ``with`` to take effect
        tracer.switches("torch.set_grad_enabled")
        switched(self, mode)

    yield torch.set_grad_enabled, "__init__", set_grad_enabled


def _scopes(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """The names that the modules' forwards find beside their classes, and in others' modules among those."""
    modules = list(modules)
    scopes = {id(scope): scope for scope in (forward_globals(module) for module in modules)}
    for scope in list(scopes.values()):  # ``einops.reduce``: a function in a module
        beside = (v for v in scope.values() if isinstance(v, ModuleType) and not is_pythons(v.__name__))
        scopes.update((id(vars(module)), vars(module)) for module in beside)
    # What was a node of its own when a host was recorded is one again: code that was written calls it by itself.
    scopes.update((id(scope), scope) for module in modules for scope in written_globals(module))
    return list(scopes.values())


def _functions(scopes: Iterable[dict[str, Any]], call: Callable[..., Any]) -> Iterator[Patch]:
    """``isinstance`` is another one there: asked whether a proxy is a tensor, it looks at what the proxy stands for."""
    for scope in scopes:
        for name, value in list(scope.items()):
            if isinstance(value, Scripted) or (type(value) is FunctionType and _is_users(value.__module__)):
                yield scope, name, functools.partial(call, value)
            elif isinstance(value, torch.jit.ScriptFunction) and "__name__" in scope:
                yield scope, name, functools.partial(call, Scripted(value, scope["__name__"], name))
        if "isinstance" not in scope and _is_users(scope.get("__name__")):
            yield scope, "isinstance", _isinstance


def _is_users(module: str | None) -> bool:
    return not f"{module}.".startswith("torch.")


def _isinstance(value: Any, kinds: Any, /) -> bool:
    return isinstance(value, kinds) or (_stands_for_tensor(value) and isinstance(value.value, kinds))


def _stands_for_tensor(value: Any) -> bool:
    return type(value) is ValueProxy and isinstance(value.value, Tensor)
