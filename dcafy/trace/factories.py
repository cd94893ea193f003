"""What a forward calls that plain tracing does not see: tensor factories, ``len``, functions of the user's own."""

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

__all__ = ["recorded_factories", "watched_functions"]

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


@contextlib.contextmanager
def recorded_factories(recorder: Recorder) -> Iterator[None]:
    """Tensors that a forward makes become nodes: baked, a random number would stay the same for ever.

    The C++ parser of ``torch.zeros`` refuses a proxy before any override is asked, so the names in ``torch``
    are replaced while the trace runs. So is ``len``, which has to return a real number: ``x.view(len(x), -1)``
    would have the example's batch size for ever.
    """

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

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.running or not any(type(a) is ValueProxy for a in args):
            return original.__get__(None, cls)(*args, **kwargs)
        return recorder.create_proxy("call_function", original.__get__(None, cls), args, kwargs)

    def entered(context: Any, enter: Callable[..., Any]) -> Callable[..., Any]:
        def tell(self: Any) -> Any:
            recorder.switches(f"torch.{context.__name__}")
            return enter(self)

        return tell

    def autocast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        real = recorder.device.type if device_type == "meta" else device_type  # there is none for meta tensors
        autocast_made(self, real, *args, **kwargs)

    def length(value: Any, /) -> Any:
        if recorder.running or type(value) is not ValueProxy or not isinstance(value.value, Tensor):
            return original_len(value)
        return recorder.create_proxy("call_method", "size", (value, 0), {})

    original_len = builtins.len
    autocast_made = torch.autocast.__init__
    originals = {name: getattr(torch, name) for name in _FACTORIES}
    contexts = {context: context.__dict__["__enter__"] for context in _CONTEXTS}
    original = torch.autograd.Function.__dict__["apply"]
    try:
        for name, factory in originals.items():
            setattr(torch, name, recorded(factory))
        for context, enter in contexts.items():
            context.__enter__ = entered(context, enter)
        torch.autocast.__init__ = autocast  # type: ignore[method-assign]
        torch.autograd.Function.apply = classmethod(apply)
        builtins.len = length
        yield
    finally:
        builtins.len = original_len
        for name, factory in originals.items():
            setattr(torch, name, factory)
        for context, enter in contexts.items():
            context.__enter__ = enter
        torch.autocast.__init__ = autocast_made  # type: ignore[method-assign]
        torch.autograd.Function.apply = original


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
