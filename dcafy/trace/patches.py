"""Names that stand for something else while a trace runs, so that what plain tracing does not see is recorded."""

from __future__ import annotations

import builtins
import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dcafy.graph.nodes import VALUE, values_of
from dcafy.trace.effects import forward_globals
from dcafy.trace.named import Applied, Scripted
from dcafy.trace.proxy import ValueProxy
from dcafy.trace.tracer import ValueTracer

_FACTORIES = (
    "arange empty eye full linspace logspace normal ones rand randint randn randperm range scalar_tensor tensor zeros"
)

_CONTEXTS: tuple[Any, ...] = (torch.autocast, torch.no_grad, torch.enable_grad, torch.inference_mode)

_Patch = tuple[Any, str, Any]
"""What has a name, the name, and what it stands for meanwhile."""


@contextlib.contextmanager
def recorded_calls(tracer: ValueTracer) -> Iterator[None]:
    """Has calls become nodes that no proxy sees: tensor factories, ``len``, ``autograd.Function``; tells of contexts.

    The names in ``torch`` are replaced while the trace runs: the C++ parser of ``torch.zeros`` refuses a proxy before
    any override is asked. Whether gradients are computed is as before afterwards, also where a forward fails half-way.
    """
    import torch._dynamo  # which notes what ``len`` is when it is first imported, as operations on meta tensors do

    with_gradients = torch.is_grad_enabled()
    patches = [*_factories(tracer), *_questions(tracer), _function(tracer), *_contexts(tracer)]
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in patches]
    try:
        for owner, name, value in patches:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        torch.set_grad_enabled(with_gradients)


def _factories(tracer: ValueTracer) -> Iterator[_Patch]:
    """Tensors that a forward makes become nodes: baked, a random number would stay the same for ever."""

    def recorded(factory: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            if tracer.running:  # among values, where everything is on the meta device
                return factory(*args, **(kwargs if tracer.on_data else {**kwargs, "device": "meta"}))
            node = tracer.create_node("call_function", factory, tracer.create_arg(args), tracer.create_arg(kwargs))
            with tracer.evaluating(node), torch.no_grad():
                node.meta[VALUE] = factory(*values_of(args), **{**values_of(kwargs), "device": "meta"})
            return ValueProxy(node, tracer)

        return make

    for name in _FACTORIES.split():
        yield torch, name, recorded(getattr(torch, name))


def _questions(tracer: ValueTracer) -> Iterator[_Patch]:
    """``len`` has to return a real number: ``x.view(len(x), -1)`` would have the example's batch size for ever."""
    real, is_tensor = builtins.len, torch.is_tensor

    def length(value: Any, /) -> Any:
        if tracer.running or type(value) is not ValueProxy or not isinstance(value.value, Tensor):
            return real(value)
        return tracer.create_proxy("call_method", "size", (value, 0), {})

    yield builtins, "len", length
    yield torch, "is_tensor", lambda value: is_tensor(value) or _stands_for_tensor(value)


def _function(tracer: ValueTracer) -> _Patch:
    real = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if tracer.running or not any(type(a) is ValueProxy for a in args):
            return real.__get__(None, cls)(*args, **kwargs)
        return tracer.create_proxy("call_function", Applied(cls), args, kwargs)

    return torch.autograd.Function, "apply", classmethod(apply)


def _contexts(tracer: ValueTracer) -> Iterator[_Patch]:
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


@contextlib.contextmanager
def watched_functions(modules: Iterable[nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Has the functions that the modules' forwards find beside their classes go through ``call(function, ...)``.

    ``isinstance`` is another one there: asked whether a proxy is a tensor, it looks at what the proxy stands for.
    To be entered before fx patches functions itself, and left after.
    """
    scopes = {id(scope): scope for scope in (forward_globals(module) for module in modules)}
    for scope in list(scopes.values()):  # ``einops.reduce``: a function in a module
        scopes.update((id(vars(v)), vars(v)) for v in scope.values() if isinstance(v, ModuleType) and _is_others(v))
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for scope in scopes.values():
            for name, value in list(scope.items()):
                if type(value) is FunctionType and _is_users(value.__module__):
                    before.append((scope, name, value))
                    scope[name] = functools.wraps(value)(functools.partial(call, value))
                elif isinstance(value, torch.jit.ScriptFunction):
                    before.append((scope, name, value))
                    scope[name] = functools.partial(call, Scripted(value, scope["__name__"], name))
            if "isinstance" not in scope and _is_users(scope.get("__name__")):
                before.append((scope, "isinstance", _ABSENT))
                scope["isinstance"] = _isinstance
        yield
    finally:
        for scope, name, value in before:
            if value is _ABSENT:
                del scope[name]
            else:
                scope[name] = value


_ABSENT = object()


def _is_users(module: str | None) -> bool:
    return not f"{module}.".startswith("torch.")


def _is_others(module: ModuleType) -> bool:
    """Whether a module that a forward finds beside its class belongs neither to Python nor to PyTorch."""
    return module.__name__.partition(".")[0] not in {*sys.stdlib_module_names, "torch", "numpy"}


def _isinstance(value: Any, kinds: Any, /) -> bool:
    return isinstance(value, kinds) or (_stands_for_tensor(value) and isinstance(value.value, kinds))


def _stands_for_tensor(value: Any) -> bool:
    return type(value) is ValueProxy and isinstance(value.value, Tensor)
