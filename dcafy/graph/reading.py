"""What the code of a forward names: attributes of whatever, and what stands beside it. It is read, and does not run."""

from __future__ import annotations

import contextlib
import dis
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

_ASKS = frozenset({"getattr", "hasattr", "__dict__", "vars", "attrgetter"})
"""By which an attribute is asked for with a string."""

_LOOKS_UP = frozenset({"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_GLOBAL", "LOAD_NAME"})
"""Steps of code that look up a name, and do not give it a value."""

_OF_PYTHON = frozenset({*sys.stdlib_module_names, "torch", "numpy", "dcafy"}) - {"__main__"}


class Beside:
    """What stands beside some code under a name, and is read as that code reads it.

    By a function, as ``torch.compile`` then watches this name only, and not the whole dictionary.
    """

    kind = ""

    def __init__(self, name: str, read: Callable[[], Any]) -> None:
        self.name, self.read = name, read

    @property
    def title(self) -> str:
        """What it is and is called, of two words."""
        return f"{self.kind} {self.name}"


class Global(Beside):
    """A global name."""

    kind = "global"

    def __init__(self, scope: dict[str, Any], name: str) -> None:
        self.module = str(scope.get("__name__"))
        super().__init__(name, types.FunctionType(_read_global.__code__.replace(co_names=(name,)), scope))

    def __reduce__(self) -> Any:
        return _global_of, (self.module, self.name)

    def __repr__(self) -> str:
        return f"Global({self.module}.{self.name}, {id(self.read.__globals__)})"


class Enclosed(Beside):
    """A name of a function around some code, or the default of an argument, in a cell of its own.

    A pickle has no cells: ``where`` says in which function of the class's code it is, to be looked for there.
    """

    def __init__(self, kind: str, name: str, where: tuple[Any, ...], cell: types.CellType | None) -> None:
        self.kind, self.where, self.is_found = kind, where, cell is not None
        self._cell = types.CellType(_NOT_FOUND) if cell is None else cell
        super().__init__(name, types.FunctionType(_read_cell.__code__, globals(), closure=(self._cell,)))

    def __reduce__(self) -> Any:
        return Enclosed, (self.kind, self.name, self.where, None)

    def __repr__(self) -> str:
        return f"Enclosed({self.title}, {self.where}, {id(self._cell)})"


_NOT_FOUND = types.SimpleNamespace()
"""In the place of what was in a pickle and is not there any more: nothing that was noted is the same."""


def _read_global() -> Any:
    return Global


def _reader(cell: Any) -> Callable[[], Any]:
    return lambda: cell


_read_cell = _reader(None)


def _global_of(module: str, name: str) -> Global:
    return Global(vars(importlib.import_module(module)), name)


@dataclass
class Named:
    """What code names.

    ``attributes``  names that are looked up, of whatever
    ``behind``      those of them that are looked up of what was looked up just before (``self.drop.p``)
    ``strings``     strings with which attributes may be asked for
    ``beside``      what stands beside the code, in the order in which it is met
    ``functions``   whose code that is
    """

    attributes: set[str] = field(default_factory=set)
    behind: set[str] = field(default_factory=set)
    strings: set[str] = field(default_factory=set)
    beside: dict[tuple[int, str], Beside] = field(default_factory=dict)
    functions: list[types.FunctionType] = field(default_factory=list)


def named(module: nn.Module, kind: type[nn.Module], own: Any = None) -> Named:
    """What the forward of ``module`` names, and whatever that reaches of its own class, its parts and its package.

    ``kind``: the user's class of the module. ``own``: a forward of its own, where that is not found in the module any
    more. Functions of other packages are what their packages make of them.
    """
    found = Named()
    packages = {base.__module__.partition(".")[0] for base in kind.__mro__}
    seen: set[int] = set()
    pending: list[Any] = [own or module.__dict__.get("forward"), *_of_class(kind, "forward", set())]
    holders: dict[int, Any] = {}
    while pending:
        while pending:
            for function in _functions(pending.pop()):
                if id(function) in seen:
                    continue
                seen.add(id(function))
                found.functions.append(function)
                pending += closed_over(function)
                own = _of_function(function)
                found.attributes |= own.attributes
                found.behind |= own.behind
                found.strings |= own.strings
                found.beside |= own.beside
                found.beside |= {(id(function), one.title): one for one in _numbered(_enclosed_by(function), found)}
        names = found.attributes | found.strings
        beside = [value for one in found.beside.values() for value in _values(one)]
        holders = {id(value): value for value in (*_held(module, names), *beside)}
        pending = [v for name in sorted(names) for v in _of_class(kind, name, names)]
        pending += [v for v in holders.values() if type(v) is types.FunctionType and is_of(v.__module__, packages)]
        for holder in holders.values():
            pending += _methods(holder, names, packages)
        pending = [value for value in pending if any(id(function) not in seen for function in _functions(value))]
    return found


@functools.lru_cache(maxsize=4096)
def _of_function(function: types.FunctionType) -> Named:
    found = Named(functions=[function])
    for one in _globals_of(function):
        found.beside[id(function.__globals__), one.name] = one
    for code in codes_of(function):
        found.attributes.update(step.argval for step in dis.get_instructions(code) if step.opname in _LOOKS_UP)
        found.behind.update(_behind(code))
        if not _ASKS.isdisjoint(code.co_names):
            found.strings.update(_strings(code))
    return found


def is_of(module: str | None, packages: set[str]) -> bool:
    """Whether a module, by its name, is of one of the packages, or of nobody's: a file beside the user's own."""
    package = (module or "").partition(".")[0]
    return package not in _OF_PYTHON and (package in packages or not _is_installed(package))


def is_pythons(module: str | None) -> bool:
    """Whether a module, by its name, is of Python itself, of torch or of numpy, or of dcafy."""
    return (module or "").partition(".")[0] in _OF_PYTHON


@functools.cache
def _is_installed(package: str) -> bool:
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _of_class(kind: type, name: str, names: set[str]) -> list[Any]:
    """What a class has under the name, and where ``super`` is among the names, those that it is derived from."""
    found = [vars(base)[name] for base in kind.__mro__ if name in vars(base) and base is not nn.Module]
    return found if "super" in names else found[:1]


def _methods(holder: Any, names: set[str], packages: set[str]) -> Iterator[Any]:
    """What code may call of an object or module that it names; a part's own forward runs where the part is called."""
    if isinstance(holder, types.ModuleType):
        if is_of(holder.__name__, packages):
            yield from (vars(holder)[name] for name in sorted(names & vars(holder).keys()))
        return
    kind = holder if isinstance(holder, type) else type(holder)
    if kind.__module__.partition(".")[0] in _OF_PYTHON or isinstance(holder, types.FunctionType):
        return
    for name in sorted(names - {"forward"} if isinstance(holder, nn.Module) else names | {"__call__"}):
        yield from _of_class(kind, name, names)


def _held(module: nn.Module, names: set[str], depth: int = 3) -> Iterator[Any]:
    """The parts and objects of a module that are named, and those of these."""
    own = vars(module) | module._modules if isinstance(module, nn.Module) else getattr(module, "__dict__", {})
    for name in sorted(names & own.keys()) if depth else ():
        for value in own[name] if isinstance(own[name], nn.ModuleList | nn.Sequential | list | tuple) else [own[name]]:
            if isinstance(value, nn.Module) or not isinstance(value, Tensor | types.ModuleType | str | int | float):
                yield value
                yield from _held(value, names, depth - 1)


def found_again(
    beside: tuple[tuple[Beside, Any], ...], module: nn.Module, kind: type[nn.Module], own: Any
) -> tuple[tuple[Beside, Any], ...]:
    """The same with what is enclosed in code that ``module`` runs looked for anew, where it comes out of a pickle."""
    if all(one.is_found for one, _ in beside if isinstance(one, Enclosed)):
        return beside
    there = [one for one in named(module, kind, own).beside.values() if isinstance(one, Enclosed)]
    again = {(one.title, one.where): one for one in there}
    return tuple((again.get((one.title, one.where), one) if isinstance(one, Enclosed) else one, v) for one, v in beside)


def _values(one: Beside) -> Iterator[Any]:
    with contextlib.suppress(NameError):
        yield one.read()


def _globals_of(function: types.FunctionType) -> Iterator[Global]:
    for code in codes_of(function):
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in function.__globals__:
                yield Global(function.__globals__, step.argval)


def _enclosed_by(function: types.FunctionType) -> Iterator[Enclosed]:
    """What a function closes over, and those of its defaults that can be changed where they are."""
    if is_pythons(function.__module__):
        return
    code = function.__code__
    where = function.__module__, function.__qualname__, getattr(code, "co_qualname", code.co_name)  # of Python 3.11
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if name != "__class__":  # of which the attributes are known
            yield Enclosed("enclosed", name, where, cell)
    given = function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount]
    by_name = dict(zip(names[len(names) - len(given) :], given, strict=True)) | (function.__kwdefaults__ or {})
    for name, value in by_name.items():
        if not isinstance(value, str | int | float | types.NoneType):
            yield Enclosed("default", name, where, types.CellType(value))


def _numbered(held: Iterator[Enclosed], found: Named) -> Iterator[Enclosed]:
    """With a number behind where each is, among those that are in code of the same name: a decorator may come twice."""
    there = [(one.title, one.where[:-1]) for one in found.beside.values() if isinstance(one, Enclosed)]
    for one in held:
        one.where = (*one.where, there.count((one.title, one.where)))
        yield one


def _behind(code: types.CodeType) -> Iterator[str]:
    before: list[str] = []
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_ATTR" and before[-1:] == ["LOAD_ATTR"]:
            yield step.argval
        if step.opname != "CACHE":
            before.append(step.opname)


def _strings(code: types.CodeType) -> Iterator[str]:
    """The names among the strings of a code, also those in tuples (``for name in ("a", "b")``)."""
    for const in code.co_consts:
        for item in const if isinstance(const, tuple | frozenset) else (const,):
            if isinstance(item, str) and item.isidentifier():
                yield item


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """The user's function in a method, property, partial or wrapper, and the wrapper, if it is the user's too."""
    value = getattr(value, "__func__", getattr(value, "fget", getattr(value, "func", value)))
    for one in (value, inspect.unwrap(value)) if isinstance(value, types.FunctionType) else ():
        if isinstance(one, types.FunctionType) and not f"{one.__module__}.".startswith("torch."):
            yield one


def codes_of(function: types.FunctionType) -> list[types.CodeType]:
    """The code of a function, and of the functions inside it."""
    codes = [function.__code__]
    for code in codes:
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return codes


def closed_over(function: Any) -> Iterator[Any]:
    """What the cells of a function's closure hold; some hold nothing yet."""
    for cell in getattr(function, "__closure__", None) or ():
        yield from _content(cell)


def _content(cell: types.CellType) -> Iterator[Any]:
    with contextlib.suppress(ValueError):
        yield cell.cell_contents


@functools.lru_cache(maxsize=4096)
def types_compared(function: types.FunctionType) -> frozenset[type]:
    """The classes that the code holds the type of something against, with ``is``, ``==`` or ``in``."""
    found: set[type] = set()
    for code in codes_of(function):
        if {"type", "__class__"}.isdisjoint(code.co_names):
            continue
        since: list[dis.Instruction] = []  # the last step that ends an expression
        for step in dis.get_instructions(code):
            if step.opname in ("IS_OP", "COMPARE_OP", "CONTAINS_OP"):
                if any(one.argval in ("type", "__class__") for one in since):
                    found.update(_classes(function, since))
            elif step.opname.startswith(("STORE_", "POP_", "RETURN_", "JUMP", "FOR_")):
                since.clear()
            since.append(step)
    return frozenset(found)


def _classes(function: types.FunctionType, steps: list[dis.Instruction]) -> Iterator[type]:
    """The classes that are loaded in the steps: global or closed over, of a module, or in a tuple or dictionary."""
    closed = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    value: Any = None
    for step in steps:
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = function.__globals__.get(step.argval)
        elif step.opname == "LOAD_DEREF" and step.argval in closed:
            value = next(_content(closed[step.argval]), None)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, types.ModuleType):
            value = vars(value).get(step.argval)
        else:
            continue
        items = value if isinstance(value, tuple | list | set | frozenset | dict) else (value,)
        yield from (item for item in items if isinstance(item, type))
