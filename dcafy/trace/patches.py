"""Names that stand for something else while a trace runs, so that what plain tracing does not see is recorded."""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dcafy.trace.proxy import ValueProxy
from dcafy.trace.values import VALUE, values_of

if TYPE_CHECKING:
    from dcafy.trace.recorder import Recorder

__all__ = ["recorded_calls", "watched_functions"]

_FACTORIES = (
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "range",
    "scalar_tensor",
    "tensor",
    "zeros",
)


_CONTEXTS: tuple[Any, ...] = (torch.autocast, torch.no_grad, torch.enable_grad, torch.inference_mode)


_Patch = tuple[Any, str, Any]
"""What has a name, the name, and what it stands for meanwhile."""


@contextlib.contextmanager
def recorded_calls(recorder: Recorder) -> Iterator[None]:
    """Has calls become nodes that no proxy sees: tensor factories, ``len``, ``autograd.Function``; tells of contexts.

    The names in ``torch`` are replaced while the trace runs: the C++ parser of ``torch.zeros`` refuses a proxy before
    any override is asked. Whether gradients are computed is as before afterwards, also where a forward fails half-way.
    """
    with_gradients = torch.is_grad_enabled()
    patches = [*_factories(recorder), _length(recorder), _function(recorder), *_contexts(recorder)]
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in patches]
    try:
        for owner, name, value in patches:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        torch.set_grad_enabled(with_gradients)


def _factories(recorder: Recorder) -> Iterator[_Patch]:
    """Tensors that a forward makes become nodes: baked, a random number would stay the same for ever."""

    def recorded(factory: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            if recorder.running:  # among values, where everything is on the meta device
                return factory(*args, **{**kwargs, "device": "meta"})
            node = recorder.create_node(
                "call_function", factory, recorder.create_arg(args), recorder.create_arg(kwargs)
            )
            with recorder.run(), torch.no_grad():
                node.meta[VALUE] = factory(*values_of(args), **{**values_of(kwargs), "device": "meta"})
            return ValueProxy(node, recorder)

        return make

    for name in _FACTORIES:
        yield torch, name, recorded(getattr(torch, name))


def _length(recorder: Recorder) -> _Patch:
    """``len`` has to return a real number: ``x.view(len(x), -1)`` would have the example's batch size for ever."""
    real = builtins.len

    def length(value: Any, /) -> Any:
        if recorder.running or type(value) is not ValueProxy or not isinstance(value.value, Tensor):
            return real(value)
        return recorder.create_proxy("call_method", "size", (value, 0), {})

    return builtins, "len", length


def _function(recorder: Recorder) -> _Patch:
    real = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.running or not any(type(a) is ValueProxy for a in args):
            return real.__get__(None, cls)(*args, **kwargs)
        return recorder.create_proxy("call_function", real.__get__(None, cls), args, kwargs)

    return torch.autograd.Function, "apply", classmethod(apply)


def _contexts(recorder: Recorder) -> Iterator[_Patch]:
    def entered(context: Any, enter: Callable[..., Any]) -> Callable[..., Any]:
        def tell(self: Any) -> Any:
            recorder.switches(f"torch.{context.__name__}")
            return enter(self)

        return tell

    made = torch.autocast.__init__

    def autocast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        real = recorder.device.type if device_type == "meta" else device_type  # there is none for meta tensors
        made(self, real, *args, **kwargs)

    yield torch.autocast, "__init__", autocast
    for context in _CONTEXTS:
        yield context, "__enter__", entered(context, vars(context)["__enter__"])
    switched = torch.set_grad_enabled.__init__

    def set_grad_enabled(self: Any, mode: bool) -> None:  # which needs no ``with`` to take effect
        recorder.switches("torch.set_grad_enabled")
        switched(self, mode)

    yield torch.set_grad_enabled, "__init__", set_grad_enabled


@contextlib.contextmanager
def watched_functions(modules: Iterable[nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Has the functions that the modules' forwards find beside their classes go through ``call(function, ...)``.

    To be entered before fx patches functions itself, and left after.
    """
    scopes = {id(scope): scope for scope in (_scope(module) for module in modules)}
    patched: list[tuple[dict[str, Any], str, FunctionType]] = []
    try:
        for scope in scopes.values():
            for name, function in list(scope.items()):
                if type(function) is FunctionType and not f"{function.__module__}.".startswith("torch."):
                    patched.append((scope, name, function))
                    scope[name] = functools.wraps(function)(functools.partial(call, function))
        yield
    finally:
        for scope, name, function in patched:
            scope[name] = function


def _scope(module: nn.Module) -> dict[str, Any]:
    """The global names of a module's forward."""
    return getattr(inspect.unwrap(module.forward), "__globals__", {})
