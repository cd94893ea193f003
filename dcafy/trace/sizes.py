"""Numbers that a forward makes of sizes stay symbolic: ``int``, ``float``, ``max`` and ``min`` of them become nodes.

``int(h / 2)`` has to return a real number, which no proxy can be: the example's size would be computed with for ever.
"""

from __future__ import annotations

import builtins
import dis
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from dcafy.graph.reading import closed_over
from dcafy.threads import Patch
from dcafy.trace.effects import forward_globals
from dcafy.trace.proxy import ValueProxy
from dcafy.trace.tracer import ValueTracer


def numbers(tracer: ValueTracer, modules: Iterable[nn.Module]) -> Iterator[Patch]:
    """Look-alikes of ``int`` and ``float`` where forwards find them, and others of ``max`` and ``min`` for everybody.

    They do what the real ones do for all but proxies of numbers.
    """
    for scope, kinds in _scopes(modules):
        for kind in kinds:
            yield scope, kind.__name__, _look_alike(kind, tracer)
    for name in ("max", "min"):  # which an export has replaced by what has no name
        yield builtins, name, _extreme(getattr(builtins, name), tracer)


def _scopes(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], list[type]]]:
    """The global names of what forwards run of the user's own, and of which classes there may be look-alikes.

    ``type(x) is int`` would be told wrongly: where some code of a scope asks so, it is left alone.
    """
    scopes: dict[int, dict[str, Any]] = {}
    compared: dict[int, set[str]] = {}
    for function in _functions(modules):
        scope = function.__globals__
        scopes[id(scope)] = scope
        compared.setdefault(id(scope), set()).update(_compared(function.__code__))
    for key, scope in scopes.items():
        names = compared[key] | scope.keys()
        yield scope, [kind for kind in (int, float) if kind.__name__ not in names]


def _functions(modules: Iterable[nn.Module]) -> Iterator[FunctionType]:
    """Methods of the modules' classes, functions beside these and on the modules, and those in their closures."""
    pending: list[Any] = []
    seen: set[Any] = set()
    for module in modules:
        pending += module.__dict__.values()
        if type(module) not in seen:
            seen.add(type(module))
            pending += [value for base in type(module).__mro__ for value in vars(base).values()]
            pending += forward_globals(module).values()
    while pending:
        value = pending.pop()
        kind = type(value)
        function = value.fget if kind is property else value.__func__ if kind in _METHODS else value
        if type(function) is FunctionType and function not in seen:
            seen.add(function)
            if not f"{function.__globals__.get('__name__')}.".startswith(("torch.", "dcafy.")):
                yield function
                pending += closed_over(function)
                pending.append(getattr(function, "__wrapped__", None))


_METHODS = (MethodType, staticmethod, classmethod)


def _compared(code: CodeType) -> Iterator[str]:
    """The numbers' classes, by name, that the code holds others against with ``is``."""
    before: list[Any] = []
    for step in dis.get_instructions(code) if {"int", "float"} & set(code.co_names) else ():
        if step.opname == "IS_OP":
            yield from (name for name in before[-4:] if name in ("int", "float"))
        before.append(step.argval)
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _compared(const)


class _LookAlike(type):
    """The class of what stands for a class, and answers what is asked of that."""

    real: type

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, cls.real)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, cls.real)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.real

    def __hash__(cls) -> int:
        return hash(cls.real)


def _look_alike(kind: type, tracer: ValueTracer) -> type:
    def make(cls: Any, *args: Any, **kwargs: Any) -> Any:
        value = args[0] if len(args) == 1 and not kwargs else None
        if type(value) is not ValueProxy or tracer.running or isinstance(value.value, Tensor):
            return kind(*args, **kwargs)
        return value.tracer.create_proxy("call_function", kind, (value,), {})

    return _LookAlike(kind.__name__, (kind,), {"__new__": make, "real": kind})


def _extreme(real: Callable[..., Any], tracer: ValueTracer) -> Callable[..., Any]:
    def extreme(*args: Any, **kwargs: Any) -> Any:
        if not kwargs and not tracer.running:
            items = args[0] if len(args) == 1 else args
            proxied = type(items) is ValueProxy or (
                type(items) in (tuple, list) and any(type(item) is ValueProxy for item in items)
            )
            if proxied and isinstance(items, tuple | list) and all(isinstance(item, int | float) for item in items):
                return tracer.create_proxy("call_function", real, args, {})
        return real(*args, **kwargs)

    return extreme
