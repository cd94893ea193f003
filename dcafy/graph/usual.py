"""What a graph was recorded for: the arguments of a call, and the plain values that the forward reads of its module."""

from __future__ import annotations

import collections
import enum
import functools
import inspect
import itertools
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from dcafy.graph.nodes import leaves, mapped, node_value
from dcafy.graph.reading import Beside, Named, is_pythons, named


@dataclass(frozen=True)
class Usual:
    """What a graph was recorded for; where it differs, the user's own forward runs.

    ``arguments``   what the call was given by position, with :class:`Varies` for what may differ; ``None``: whatever
    ``named``       the same, by keyword
    ``dtypes``      of the tensors that the call was given, where the forward decides by a dtype
    ``attributes``  what its class reads of the module: plain values, and what is in containers, objects and parts
    ``children``    names of submodules that its class reads, and that are there
    ``modes``       paths of its parts by whose mode it decides, which was the module's own
    ``beside``      what it reads beside the module: global names, and what is enclosed in its code
    ``asked``       what it asks of torch: the function's name, with what, and the answer
    """

    arguments: tuple[Any, ...] | None = None
    named: tuple[tuple[str, Any], ...] = ()
    dtypes: tuple[torch.dtype, ...] | None = None
    attributes: tuple[tuple[str, Any], ...] = ()
    children: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    beside: tuple[tuple[Beside, Any], ...] = ()
    asked: tuple[tuple[str, tuple[Any, ...], Any], ...] = ()

    def differs(self, module: nn.Module) -> str | None:
        """What has another value, if anything: of the ``module``, of a part of it, or beside it."""
        own = module.__dict__
        for name, wanted in self.attributes:
            if not same(own[name] if name in own else _got(module, name), wanted, module):
                return name
        modules = own["_modules"]
        for name in self.children:
            if modules.get(name) is None:
                return name
        for path in self.modes:
            if module.get_submodule(path).training is not module.training:
                return f"{path}.training"
        for one, wanted in self.beside:
            if not same(one.read(), wanted, module):
                return one.title
        for function, given, answer in self.asked:
            if getattr(torch, function)(*given) != answer:
                return f"torch.{function}()"
        return None

    def place(self, module: nn.Module, name: str) -> str:
        """Where in what :meth:`differs` names the difference is, if it is inside of it."""
        noted = dict(self.attributes)
        found = next((one for one, _ in self.beside if one.title == name), None)
        if name in noted:
            return place(_got(module, name), noted[name])
        return "" if found is None else place(found.read(), dict(self.beside)[found])

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call is given what the recorded one was given, in the same way."""
        if self.arguments is None:
            return True
        if len(args) != len(self.arguments) or len(kwargs) != len(self.named):
            return False
        for wanted, value in zip(self.arguments, args, strict=True):
            if not _fits(wanted, value):
                return False
        if not all(name in kwargs and _fits(wanted, kwargs[name]) for name, wanted in self.named):
            return False
        return self.dtypes is None or self.dtypes == dtypes_of((args, tuple(kwargs[name] for name, _ in self.named)))


def dtypes_of(arguments: Any) -> tuple[Any, ...]:
    """The dtypes of the tensors, or of what stands for some, in arguments."""
    return tuple(leaf.dtype for leaf in leaves(arguments) if isinstance(leaf, _TENSORS))


class Varies(enum.Enum):
    """Stands for what may differ from call to call."""

    TENSOR = "a tensor"
    VALUE = "anything"


class Held(enum.Enum):
    """Stands for what is known of something that a module, an object or a container has, besides plain values."""

    ANYTHING = "not compared"
    SOMETHING = "there, and not None"
    NOTHING = "not there"


@dataclass(frozen=True)
class Inside:
    """Of an object or a part: what is known of its attributes."""

    fields: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class OwnMethod:
    """A method of the module itself, as each copy of the module has one of its own."""

    function: Any


@dataclass(frozen=True)
class Numbers:
    """An array of numpy's."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


_PLAIN = (int, float, complex, bool, str, bytes, type(None))
_ATOMS = (*_PLAIN, enum.Enum, np.generic, torch.dtype, torch.memory_format, torch.layout)
_SAME_IN_COPIES = (types.FunctionType, types.BuiltinFunctionType, type)


def same(value: Any, wanted: Any, module: nn.Module | None = None) -> bool:
    """Whether a value is the one that was noted; one in a container, an object or a part is looked at there.

    ``module``: whose it is.
    """
    kind = type(wanted)
    if kind is Held:
        return wanted is Held.ANYTHING or (value is _ABSENT if wanted is Held.NOTHING else value is not None)
    if kind is Inside:
        return value is not None and all(same(_got(value, name), inner, module) for name, inner in wanted.fields)
    if kind is OwnMethod:
        is_own = isinstance(value, types.MethodType) and value.__self__ is module
        return is_own and value.__func__ is wanted.function
    if kind is Numbers:
        return isinstance(value, np.ndarray) and numbers(value) == wanted
    if isinstance(wanted, tuple) and isinstance(value, dict):
        return same(tuple(value.items()), wanted, module)
    if isinstance(wanted, tuple) and isinstance(value, tuple | list | collections.deque):
        return len(value) == len(wanted) and all(map(same, value, wanted, itertools.repeat(module)))
    if kind is frozenset:
        return bool(value == wanted)
    return value is wanted or (type(value) is type(wanted) and bool(value == wanted))


def numbers(value: Any) -> Numbers:
    """What an array holds now."""
    return Numbers(str(value.dtype), value.shape, value.tobytes())


def place(value: Any, wanted: Any) -> str:
    """Where in a value that is not :func:`same` the first difference is: ``.temperature``, or nothing."""
    fields = wanted.fields if isinstance(wanted, Inside) and value is not None else ()
    for name, inner in fields:
        if not same(_got(value, name), inner):
            return f".{name}{place(_got(value, name), inner)}"
    return ""


_ABSENT = object()


def _got(holder: Any, name: str) -> Any:
    """What ``holder`` has under the name, as its code would find it; properties do not run."""
    if isinstance(holder, nn.Module):
        own = holder.__dict__
        for there in (own, own["_modules"], own["_parameters"], own["_buffers"]):
            if name in there:
                return there[name]
        return getattr(type(holder), name, _ABSENT)
    return getattr(holder, name, _ABSENT)


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
    """What ``module`` holds, and what is beside it, of what ``kind``, its class, or a forward of its own speaks of.

    ``stores``: attributes that its forward only writes.
    """
    spoken = named(module, kind)
    note = _Notes(module, spoken, stores)
    own = note.fields(module, kind, note.depth)
    children = tuple(name for name, noted in own if noted is Held.SOMETHING and name in module._modules)
    attributes = tuple((name, noted) for name, noted in own if name not in children)
    beside = []
    for one in spoken.beside.values():
        try:
            noted = _portable(note.value(one.read(), note.depth))
        except NameError:  # there is nothing yet, or no more
            continue
        if noted is not Held.ANYTHING and noted is not Held.SOMETHING and not isinstance(noted, _SAME_IN_COPIES):
            beside.append((one, noted))
    return Usual(attributes=attributes, children=children, beside=tuple(beside))


def _portable(noted: Any) -> Any:
    """What is noted of something beside the code, but for functions that a pickle cannot name: it is in none."""
    if isinstance(noted, Inside):
        return Inside(tuple((name, _portable(inner)) for name, inner in noted.fields))
    if isinstance(noted, tuple):
        return tuple(map(_portable, noted))
    if not isinstance(noted, types.FunctionType | type):
        return noted
    found: Any = sys.modules.get(noted.__module__)
    for name in noted.__qualname__.split("."):
        found = getattr(found, name, None)
    return noted if found is noted else Held.SOMETHING


_BOOKKEEPING = frozenset(nn.Module().__dict__)


class _Notes:
    """What is noted of values, as far as code speaks of what is in them.

    ``names``: attributes that it looks up. ``strings``: by which it may ask for some that are not there. ``its_own``:
    what is looked up of the module itself, and not of its parts.
    """

    depth = 6

    def __init__(self, module: nn.Module, spoken: Named, stores: Iterable[str]) -> None:
        not_read = _BOOKKEEPING | {"forward", *stores}
        self.strings = spoken.strings - not_read
        self.names = sorted((spoken.attributes | spoken.strings) - not_read)
        self.its_own = vars(module).keys() - spoken.behind
        self._module = module
        self._around: set[int] = set()

    def value(self, value: Any, depth: int) -> Any:
        """The value as :func:`same` compares it."""
        if isinstance(value, type):
            fields = self.fields(value, value, depth) if depth and not is_pythons(value.__module__) else ()
            return Inside(fields) if fields else value
        if isinstance(value, (*_ATOMS, *_SAME_IN_COPIES)):
            return value
        if isinstance(value, _TENSORS):
            return Held.SOMETHING
        if not depth:
            return Held.ANYTHING
        if isinstance(value, set | frozenset):
            return frozenset(value) if all(isinstance(item, _ATOMS) for item in value) else Held.ANYTHING
        if isinstance(value, np.ndarray):
            return numbers(value) if value.dtype != object else Held.ANYTHING
        if isinstance(value, dict):
            plain = all(isinstance(key, _ATOMS) for key in value)
            items = tuple((key, self.value(item, depth - 1)) for key, item in value.items())
            return items if plain else Held.ANYTHING
        if isinstance(value, tuple | list | collections.deque):
            return tuple(self.value(item, depth - 1) for item in value)
        if isinstance(value, types.MethodType) and value.__self__ is self._module:
            return OwnMethod(value.__func__)
        if isinstance(value, types.MethodType):  # which a copy has of its own
            return Inside((("__func__", value.__func__), ("__self__", self.value(value.__self__, depth - 1))))
        if isinstance(value, functools.partial):
            given = ("func", "args", "keywords")
            return Inside(tuple((name, self.value(getattr(value, name), depth - 1)) for name in given))
        if id(value) in self._around:
            return Held.ANYTHING
        self._around.add(id(value))
        fields = self.fields(value, type(value), depth)
        self._around.remove(id(value))
        return Inside(fields) if fields else Held.SOMETHING if isinstance(value, nn.Module) else Held.ANYTHING

    def fields(self, holder: Any, kind: type, depth: int) -> tuple[tuple[str, Any], ...]:
        """What is noted of the attributes of a module, an object, a class or a module of Python."""
        if isinstance(holder, type | types.ModuleType) and is_pythons(holder.__name__):
            return ()
        if not isinstance(holder, nn.Module) and kind.__module__.startswith(("torch.", "numpy.")):
            return ()
        if isinstance(holder, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            inner = ((name, self.value(part, depth - 1)) for name, part in holder._modules.items())
            return tuple((name, noted) for name, noted in inner if noted is not Held.SOMETHING)
        found = []
        for name in self.names:
            if self._is_value(holder, kind, name):
                noted = self.value(_got(holder, name), depth - 1)
            elif name in self.strings and not hasattr(kind, name) and not hasattr(holder, name):
                noted = Held.NOTHING
            else:
                continue
            if noted is not Held.ANYTHING:
                found.append((name, noted))
        return tuple(found)

    def _is_value(self, holder: Any, kind: type, name: str) -> bool:
        """Whether ``holder`` has a value of its own under the name, or its class one for all."""
        own = getattr(holder, "__dict__", {})
        if isinstance(holder, nn.Module):
            own = own["_modules"] | own["_parameters"] | own["_buffers"] | own
        if isinstance(holder, nn.Module) and holder is not self._module and name in self.its_own:
            return False
        if name in own and not isinstance(holder, type):
            return not (isinstance(holder, types.ModuleType) and isinstance(own[name], _SAME_IN_COPIES))
        of_class = inspect.getattr_static(kind, name, _ABSENT)
        if isinstance(of_class, types.MemberDescriptorType):  # of __slots__
            return hasattr(holder, name)
        if of_class is _ABSENT:
            return not isinstance(holder, nn.Module) and hasattr(kind, "__getattr__") and hasattr(holder, name)
        return not hasattr(type(of_class), "__get__")  # as functions and properties have
