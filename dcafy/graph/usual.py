"""What a graph was recorded for: the arguments of a call, and the plain values that the forward reads of its module."""

from __future__ import annotations

import contextlib
import dis
import enum
import inspect
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from dcafy.graph.nodes import mapped, node_value


@dataclass(frozen=True)
class Usual:
    """What a graph was recorded for; where it differs, the user's own forward runs.

    ``arguments``   what the call was given by position, with :class:`Varies` for what may differ; ``None``: whatever
    ``named``       the same, by keyword
    ``attributes``  plain values of the module that its class reads
    ``children``    names of submodules that its class reads -> whether there is one
    ``absent``      what its class reads of itself, and the module has no value of its own for
    ``modes``       paths of its parts by whose mode it decides, which was the module's own
    """

    arguments: tuple[Any, ...] | None = None
    named: tuple[tuple[str, Any], ...] = ()
    attributes: tuple[tuple[str, Any], ...] = ()
    children: tuple[tuple[str, bool], ...] = ()
    absent: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()

    def differs(self, module: nn.Module) -> str | None:
        """The attribute of ``module``, or of a part of it, that has another value, if there is one."""
        own = module.__dict__
        for name, value in self.attributes:
            if name not in own or not same(own[name], value):
                return name
        for name in self.absent:
            if name in own:
                return name
        modules = own["_modules"]
        for name, there in self.children:
            if (modules.get(name) is not None) is not there:
                return name
        for path in self.modes:
            if module.get_submodule(path).training is not module.training:
                return f"{path}.training"
        return None

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call is given what the recorded one was given, in the same way."""
        if self.arguments is None:
            return True
        if len(args) != len(self.arguments) or len(kwargs) != len(self.named):
            return False
        for wanted, value in zip(self.arguments, args, strict=True):
            if not _fits(wanted, value):
                return False
        return all(name in kwargs and _fits(wanted, kwargs[name]) for name, wanted in self.named)


class Varies(enum.Enum):
    """Stands for what may differ from call to call."""

    TENSOR = "a tensor"
    VALUE = "anything"


_PLAIN = (int, float, complex, bool, str, bytes, type(None))


def same(value: Any, wanted: Any) -> bool:
    """Whether a plain value, or one in a list or dictionary, is the one that was noted."""
    if isinstance(wanted, tuple) and isinstance(value, dict):
        return same(tuple(value.items()), wanted)
    if isinstance(wanted, tuple) and isinstance(value, tuple | list):
        return len(value) == len(wanted) and all(map(same, value, wanted))
    return value is wanted or (type(value) is type(wanted) and bool(value == wanted))


_TENSORS = (Tensor, fx.Proxy)


def _fits(wanted: Any, value: Any) -> bool:
    if wanted is Varies.TENSOR:
        return isinstance(value, _TENSORS)
    if wanted is Varies.VALUE:
        return True
    if isinstance(wanted, tuple | list):
        return isinstance(value, tuple | list) and len(value) == len(wanted) and all(map(_fits, wanted, value))
    if isinstance(wanted, dict):
        return (
            isinstance(value, dict)
            and value.keys() == wanted.keys()
            and all(_fits(wanted[k], value[k]) for k in wanted)
        )
    return same(value, wanted)


def template(arguments: Any) -> Any:
    """Arguments of a recorded call as a :class:`Usual` has them: nodes stand for what varies."""

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, fx.Node):
            return leaf
        return Varies.TENSOR if isinstance(node_value(leaf), Tensor) else Varies.VALUE

    return mapped(arguments, change)


def reads(module: nn.Module, kind: type[nn.Module], stores: Iterable[str] = ()) -> Usual:
    """The plain values and the submodules of ``module`` that ``kind``, its class, or a forward of its own speaks of.

    ``stores``: attributes that its forward only writes.
    """
    names = _names(kind, module.__dict__.get("forward")) - {*stores}
    own = module.__dict__
    attributes: list[tuple[str, Any]] = []
    for name in sorted(names & own.keys() - _BOOKKEEPING - {"forward"}):
        value = own[name]
        if isinstance(value, list | tuple) and all(isinstance(item, _PLAIN) for item in value):
            attributes.append((name, tuple(value)))
        elif isinstance(value, dict) and all(isinstance(item, _PLAIN) for pair in value.items() for item in pair):
            attributes.append((name, tuple(value.items())))
        elif isinstance(value, _PLAIN) or callable(value):
            attributes.append((name, value))
    shadowed = tuple(
        name for name in sorted(names - own.keys() - own["_modules"].keys()) if _is_plain_of_class(kind, name)
    )
    children = tuple((name, own["_modules"][name] is not None) for name in sorted(names & own["_modules"].keys()))
    return Usual(attributes=tuple(attributes), absent=shadowed, children=children)


_BOOKKEEPING = frozenset(nn.Module().__dict__)


def _is_plain_of_class(kind: type, name: str) -> bool:
    """Whether ``name`` is a plain value that the class has and its instances may have one of their own for."""
    return isinstance(inspect.getattr_static(kind, name, ...), (*_PLAIN, tuple, list))


def loaded(module: nn.Module, kind: type[nn.Module]) -> set[str]:
    """The attributes that its forward, and whatever function that reaches, may ask for, of whatever."""
    names: set[str] = set()
    seen: set[int] = set()
    pending: list[Any] = [module.__dict__.get("forward"), inspect.getattr_static(kind, "forward", None)]
    while pending:
        function = _plain_function(pending.pop())
        if function is None or id(function) in seen:
            continue
        seen.add(id(function))
        scopes = [module.__dict__, function.__globals__, *(vars(base) for base in kind.__mro__)]
        scopes += [vars(value) for value in function.__globals__.values() if isinstance(value, types.ModuleType)]
        pending += closed_over(function)
        for code in _codes(function):
            steps = list(dis.get_instructions(code))
            names.update(step.argval for step in steps if step.opname in ("LOAD_ATTR", "LOAD_METHOD"))
            names.update(const for const in code.co_consts if isinstance(const, str))  # getattr(self, "name")
            pending += [scope[name] for name in code.co_names for scope in scopes if name in scope]
    return names


def _names(kind: Any, own: Any = None) -> frozenset[str]:
    """Every name that the forward looks up, and what it calls of its own class.

    ``own``: a forward that the module itself has.
    """
    names: set[str] = set()
    pending = [own, inspect.getattr_static(kind, "forward", None)]
    while pending:
        function = _plain_function(pending.pop())
        new = {name for code in _codes(function) for name in code.co_names} - names
        names |= new
        pending += [inspect.getattr_static(kind, name, None) for name in new]
    return frozenset(names)


def _plain_function(value: Any) -> types.FunctionType | None:
    """The user's function in a method, property, partial or wrapper, if there is one."""
    value = getattr(value, "__func__", getattr(value, "fget", getattr(value, "func", value)))
    value = inspect.unwrap(value) if isinstance(value, types.FunctionType) else value
    of_user = isinstance(value, types.FunctionType) and not (value.__module__ or "").startswith("torch.")
    return value if of_user else None


def _codes(function: types.FunctionType | None) -> list[types.CodeType]:
    """The code of a function, and of the functions inside it."""
    codes = [] if function is None else [function.__code__]
    for code in codes:
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return codes


def closed_over(function: Any) -> Iterator[Any]:
    """What the cells of a function's closure hold; some hold nothing yet."""
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):
            yield cell.cell_contents
