"""What is inside a network from a file: looked over once, so that nothing later stumbles over it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from dcafy.graph.paths import joined
from dcafy.graph.source import is_hidden, own_names
from dcafy.sources.pickles import Unread
from dcafy.wording import short


class Odd(Exception):
    """A network has something inside that no network of its class has; the message says where and what."""


_DEEPEST = 60
"""Modules that may lie inside one another, and containers in an attribute; copying goes through both recursively."""

_MOST = 100_000
"""Modules that a network may have, however often each is used."""

_HOLDERS: dict[str, tuple[type[Any], ...]] = {
    "_parameters": (Tensor, type(None)),
    "_buffers": (Tensor, type(None)),
    "_modules": (nn.Module, type(None)),
}
"""The dicts of a module, and what they may hold."""

_EMPTY = nn.Module()
_USUAL = {name: value for name, value in vars(_EMPTY).items() if value is not None}
_HOOKS = tuple(name for name, value in _USUAL.items() if isinstance(value, dict) and name not in _HOLDERS)


def fill(built: Iterable[tuple[nn.Module, Any]]) -> None:
    """Gives networks that a pickle made what it has for them; ``Odd`` where that is nothing for one."""
    seen: set[int] = set()
    for module, state in built:
        name = type(module).__name__
        if id(module) in seen:
            raise Odd(f"a {name} is filled twice")
        seen.add(id(module))
        if type(state) is not dict or any(type(key) is not str for key in state):
            raise Odd(f"what a {name} holds is no dict")
        if isinstance(module, nn.RNNBase) and not _is_count(
            state.get("num_layers"), len(state.get("_parameters") or ())
        ):
            raise Odd(f"a {name} has another number of layers than weights")
        vars(module).update({**{name: type(vars(_EMPTY)[name])() for name in _HOOKS}, **state})
    for module, _ in built:
        _look_over(module, type(module).__name__, trusted=False)
    for module, state in built:
        _set_state(module, state)


def _set_state(module: Any, state: dict[str, Any]) -> None:
    try:
        module.__setstate__(state)  # what older versions lack is added by the class itself
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise Odd(f"a {type(module).__name__} cannot be filled in ({short(str(error))})") from error


def look_over(network: nn.Module, *, trusted: bool) -> None:
    """Nothing for a network whose insides are those of one; ``Odd`` says where it has something else.

    ``trusted``: whether its hooks and methods may be functions of its own.
    """
    modules = 0
    inside: list[int] = []
    pending: list[tuple[str, nn.Module, bool]] = [("", network, True)]
    while pending:
        path, module, enters = pending.pop()
        if not enters:
            inside.pop()
            continue
        modules += 1
        if id(module) in inside:
            raise Odd(f"{short(path)} is inside itself")
        if len(inside) >= _DEEPEST or modules > _MOST:
            raise Odd("its modules lie too deep inside one another" if modules <= _MOST else "it has too many modules")
        _look_over(module, path, trusted=trusted)
        inside.append(id(module))
        pending.append((path, module, False))
        pending += [(joined(path, name), child, True) for name, child in module._modules.items() if child is not None]


def _look_over(module: nn.Module, path: str, *, trusted: bool) -> None:
    cls, attributes = type(module), vars(module)
    where = short(path) or cls.__name__
    for name, usual in _USUAL.items():
        if name not in attributes:
            raise Odd(f"{where} has no {name}")
        if not isinstance(attributes[name], type(usual)):
            raise Odd(f"{where}: {name} is a {type(attributes[name]).__name__}")
    taken = own_names(cls) | attributes.keys()
    for holder, kinds in _HOLDERS.items():
        for name, value in attributes[holder].items():
            hides = name in taken and (value is not None or name in attributes or _is_of_the_class(cls, name))
            hides = hides and (not trusted or is_hidden(module, name, value))
            if type(name) is not str or not name or "." in name or hides:
                raise Odd(f"{where} has something named {short(str(name))!r} in {holder}")
            if isinstance(value, Unread):
                raise Odd(f"{joined(where, short(name))} is {value.what}, which dcafy does not work on")
            if not isinstance(value, kinds):
                raise Odd(f"{joined(where, short(name))} is a {type(value).__name__}")
            if isinstance(value, Tensor) and not _is_plain(value, trusted=trusted):
                raise Odd(f"{joined(where, short(name))} is no dense tensor with data")
    for name in _HOOKS:
        for hook in attributes[name].values():
            if not trusted or isinstance(hook, type) or not callable(hook):
                raise Odd(f"{where} has a hook that is no function")
    for name, value in attributes.items():
        if type(name) is not str:
            raise Odd(f"{where} has an attribute that has no name")
        if name not in _USUAL and _is_of_the_class(cls, name) and not (trusted and isinstance(value, _FUNCTIONS)):
            raise Odd(f"{where}: its {short(name)} is a {type(value).__name__}, where its class has a method")
        if name not in _USUAL:
            _shallow(value, joined(where, short(name)))


_FUNCTIONS = (FunctionType, MethodType)


def _is_of_the_class(cls: type[Any], name: str) -> bool:
    """Whether the class has a method or property of that name, which an attribute would hide or be hidden by."""
    found = inspect.getattr_static(cls, name, None)
    if isinstance(found, type):
        return False
    return callable(found) or inspect.isdatadescriptor(found) or isinstance(found, classmethod | staticmethod)


def _is_plain(value: Tensor, *, trusted: bool) -> bool:
    if trusted:
        return True
    return value.layout == torch.strided and not value.is_meta and not value.is_quantized


def _is_count(number: Any, most: int) -> bool:
    return type(number) is int and 0 < number <= most


def _shallow(value: Any, where: str) -> None:
    """Nothing; ``Odd`` where containers lie in containers too deep, or something unread in them."""
    level, seen = [value], set[int]()
    for _ in range(_DEEPEST):
        if not level:
            return
        if any(isinstance(item, Unread) for item in level):
            raise Odd(f"{where} is of a kind that dcafy does not work on")
        outer = [
            item for item in level if isinstance(item, dict | list | tuple | set | frozenset) and id(item) not in seen
        ]
        seen |= {id(item) for item in outer}
        level = [item for one in outer for item in _items(one)]
    raise Odd(f"{where} is nested too deep")


def _items(container: Any) -> Iterator[Any]:
    yield from (*container, *container.values()) if isinstance(container, dict) else container
