"""A graph as Python: the one place where names and constants of a model become source that runs.

``torch.fx`` writes paths of modules, names of arguments and the ``repr`` of constants into source as they are: a module
that is named ``a") or run("x`` would run. Here all of them are held against what they may be, before any is written.
"""

from __future__ import annotations

import enum
import keyword
import unicodedata
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from dcafy.errors import InputError
from dcafy.graph.rows import Rows, graph_from
from dcafy.wording import quoted


def is_plain(name: object) -> bool:
    """Whether a module, parameter or buffer may have that name: letters, digits, ``_`` and ``-``.

    Letters are those that Python has in names, of any alphabet, and in the one form in which it reads them: in source
    the ligature ``ﬁ`` is ``fi``, which would be another module.

    >>> is_plain("block1-0"), is_plain("слой"), is_plain("a b"), is_plain("a.b"), is_plain("")
    (True, True, False, False, False)
    """
    if not isinstance(name, str) or str(name) != name or not name:
        return False
    return f"_{name.replace('-', '_')}".isidentifier() and unicodedata.is_normalized("NFKC", name)


def own_names(kind: type) -> set[str]:
    """What instances of a class find in it: in source ``self.NAME`` is that, and not a module of the same name.

    >>> {"forward", "call_super_init"} <= own_names(torch.nn.Linear), "mro" in own_names(torch.nn.Linear)
    (True, False)
    """
    return {name for base in kind.__mro__ for name in vars(base)}


def is_hidden(module: torch.nn.Module, name: str, held: object) -> bool:
    """Whether ``self.NAME`` is another thing than what the module holds under that name; a property may be that."""
    if name not in module.__dict__ and not any(name in vars(base) for base in type(module).__mro__):
        return False
    try:
        return getattr(module, name) is not held
    except Exception:  # a property of the user's may raise anything: it gives no module then
        return True


ALLOWED = "names have letters, digits, '_' and '-' only, as they become source of the connected model"


def source_of(rows: Rows) -> Any:
    """The ``PythonCode`` of a graph; ``InputError`` where :func:`require_writable` raises it."""
    graph = graph_from(rows)
    require_writable(graph)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = _Path(node.target)
    return graph.python_code("self")


class _Path(str):
    """A path of which fx writes down a part that is a word of Python's (``lambda``, ``global``) as it does ``0``."""

    __slots__ = ()

    def split(self, *args: Any) -> list[str]:
        return [_Part(part) for part in str(self).split(*args)]


class _Part(str):
    __slots__ = ()

    def isidentifier(self) -> bool:
        return str(self).isidentifier() and not keyword.iskeyword(self)


def require_writable(graph: fx.Graph) -> None:
    """Nothing for a graph whose names and constants stand for nothing but themselves in source; else ``InputError``."""
    for node in graph.nodes:
        paths = node.target.split(".") if node.op in ("call_module", "get_attr") else ()
        for name in paths:
            if not is_plain(name):
                raise InputError(f"The graph reads {quoted(name)} of the model; {ALLOWED}. Rename it.")
        for name in (*_spoken(node), *node.kwargs):
            if not _is_word(name):
                raise InputError(f"{quoted(str(name))} is no name that a graph can have as source. Rename it.")
        for value in (*node.args, *node.kwargs.values()):
            for odd in _unwritable(value):
                raise InputError(
                    f"{quoted(str(odd))}, of class {type(odd).__qualname__}, is a constant of a forward that cannot be "
                    "written into a graph. Use a plain number or string there, or a tensor."
                )


def _spoken(node: fx.Node) -> list[str]:
    """The names, besides paths, that fx writes down for ``node`` as they are."""
    if node.op == "placeholder":
        return [node.target.lstrip("*")]  # type: ignore[union-attr]
    if node.op == "call_method":
        return node.target.split(".")  # type: ignore[union-attr]
    home = str(getattr(node.target, "__module__", None) or "")
    if node.op == "call_function" and f"{home}.".startswith("torch."):  # of others' functions it makes names of its own
        return [*home.split("."), *str(node.target.__name__).split(".")]  # type: ignore[union-attr]
    return []


def _is_word(name: object) -> bool:
    return is_plain(name) and name.isidentifier() and not keyword.iskeyword(name)  # type: ignore[attr-defined, arg-type]


_MARK = "# COUNTER: "
"""With this fx marks lines of source which it takes out again, with whatever else is in them."""


def _unwritable(value: Any) -> Iterator[Any]:
    """What in ``value`` has a ``repr`` that is not of Python's or torch's own making."""
    kind = type(value)
    if isinstance(value, enum.Enum):
        if not _is_word(value.name):
            yield value
    elif kind in (dict, fx.immutable_collections.immutable_dict):
        for item in (*value.keys(), *value.values()):
            yield from _unwritable(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _unwritable(item)
    elif kind is slice:
        yield from _unwritable((value.start, value.stop, value.step))
    elif kind not in _WRITTEN or (kind is str and _MARK in value):
        yield value


_WRITTEN: frozenset[type] = frozenset(
    {
        *(fx.Node, int, float, complex, bool, str, bytes, type(None), type(...), range),
        *(torch.dtype, torch.device, torch.memory_format, torch.layout),
        *(torch._ops.OpOverload, torch._ops.HigherOrderOperator),
    }
)
