"""Names that stand for something else in one thread for a while, and for themselves in every other.

What has no other way in than a name of ``torch`` or of Python has to be replaced there, for the whole process. So who
replaces holds a lock, a replacement speaks in its own thread only, and all names are put back in one go.
"""

from __future__ import annotations

import builtins
import collections
import functools
import itertools
import operator
import os
import threading
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

ONE_AT_A_TIME = threading.RLock()
"""Held by whoever replaces names; a thread may replace more while it does."""

Patch = tuple[Any, str, Callable[..., Any]]
"""What has a name (a module, a class, or a dict of names), the name, and what it stands for meanwhile."""


class Swap:
    """Replacements that are ready: to be put in a ``try`` whose ``finally`` puts the names back, under the lock.

    ::

        with ONE_AT_A_TIME:
            swap = Swap(patches)
            try:
                swap.put()
                ...
            finally:
                swap.put_back()

    Both are one call of C code, in which no other thread runs and no signal is handled: an interrupt finds either all
    names replaced or none. (The end of a ``with`` is Python, and an interrupt may come before its first line.)
    """

    def __init__(self, patches: Iterable[Patch]) -> None:
        self._thread: dict[str, int | None] = {"recording": threading.get_ident()}
        put, back = [], []
        for owner, name, meanwhile in patches:
            names = owner if isinstance(owner, dict) else vars(owner)
            before = names.get(name, _ABSENT)
            found = before if before is not _ABSENT else getattr(builtins if names is owner else owner, name)
            either = self._either(meanwhile, found)
            put.append(_named(owner, name, either))
            back.append(_named(owner, name, before))
        back.append(functools.partial(operator.setitem, self._thread, "recording", None))
        self.put, self.put_back = _at_once(put), _at_once(back[::-1])
        self.number = next(_numbers)
        _READY.add(self)

    def _either(self, meanwhile: Callable[..., Any], before: Any) -> Any:
        """``meanwhile`` in this thread, while it lasts, and what the name stood ``before`` in every other.

        Whoever imports in the meantime may keep it for good. A class tells by itself whom it has before it.
        """
        if isinstance(meanwhile, type):
            return meanwhile
        here, thread = self._thread, threading.get_ident
        of_class = isinstance(before, classmethod | types.ClassMethodDescriptorType)

        def of(kind: type, *args: Any, **kwargs: Any) -> Any:
            return before.__get__(None, kind)(*args, **kwargs)

        real = of if of_class else before

        @functools.wraps(before, updated=())
        def either(*args: Any, **kwargs: Any) -> Any:
            return (meanwhile if here["recording"] == thread() else real)(*args, **kwargs)

        return classmethod(either) if of_class else either


_ABSENT = object()


def _named(owner: Any, name: str, value: Any) -> functools.partial[Any]:
    step: Callable[..., functools.partial[Any]] = functools.partial
    if value is _ABSENT:
        return step(owner.pop, name, None) if isinstance(owner, dict) else step(delattr, owner, name)
    return step(operator.setitem if isinstance(owner, dict) else setattr, owner, name, value)


def _at_once(steps: list[functools.partial[Any]]) -> Callable[[], object]:
    """What takes the steps, once, without a line of Python in between."""
    taken = itertools.starmap(functools.partial.__call__, [(step,) for step in steps])
    return functools.partial(collections.deque, taken, 0)


class OwnThread:
    """Mixed into a ``TorchDispatchMode`` it tells ``torch.compile`` nothing: torch notes modes for all threads at once.

    A function compiled with ``fullgraph=True`` would raise there, and two threads would leave the note behind for good:
    the first one to leave takes back what it found, and the second what the first one had noted. So a mode goes on the
    stack, which is each thread's own, and off it, and nothing is noted.
    """

    def __enter__(self) -> Any:
        torch._C._push_on_torch_dispatch_stack(self)  # type: ignore[arg-type]
        return self

    def __exit__(self, *of: Any) -> None:
        torch._C._pop_torch_dispatch_stack(None)

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True


_numbers = itertools.count()
_READY: weakref.WeakSet[Swap] = weakref.WeakSet()


def _in_child() -> None:
    """A process forked meanwhile, by whichever thread, has torch as it is, and a lock that nobody holds."""
    for swap in sorted(_READY, key=lambda swap: swap.number, reverse=True):
        swap.put_back()
    ONE_AT_A_TIME._at_fork_reinit()  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
