"""The root of a connected model: the user's own forward, in a run of the wire; and an ``fx.GraphModule`` besides."""

from __future__ import annotations

import copy
import dataclasses
import threading
import weakref
from typing import Any

from torch import fx, nn

from dcafy.emit.dca import Connections, Example, Recipe, dca_of, ends_of
from dcafy.emit.ends import WIRES, Wire, add_wire, keep_wires, wires_of
from dcafy.emit.whole import require_no_hooks, written
from dcafy.emit.wire import Opened
from dcafy.graph.rewritten import Forward, forward_of, hold, refusal, rewrite
from dcafy.graph.rows import rows_of
from dcafy.graph.source import source_of


class Whole(fx.GraphModule):
    """What makes a connected root a ``GraphModule``: its graph is the whole connected network, written when asked for.

    The root runs the user's own forward, unless a graph is assigned: then that runs, as users of fx expect. This class
    stands behind the user's, and is never built: what ``GraphModule`` has of its own for that is put back to what
    ``nn.Module`` does.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    __init__ = nn.Module.__init__
    __str__ = nn.Module.__repr__
    __reduce__ = object.__reduce__  # type: ignore[assignment]
    _replicate_for_data_parallel = nn.Module._replicate_for_data_parallel

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy._reconstruct(self, memo, *self.__reduce_ex__(4))  # type: ignore[attr-defined]

    def __copy__(self) -> Any:
        return copy._reconstruct(self, None, *self.__reduce_ex__(4))  # type: ignore[attr-defined]

    @property
    def graph(self) -> fx.Graph:
        """The whole connected network, with its connections as plain edges.

        Raises ``TracingError`` where none can be written, and while hooks act on a module that is no call in it.
        """
        if self not in _GRAPHS:
            _GRAPHS[self] = written(self)
        forward = forward_of(self)
        if forward is None or forward.rows is None:  # what runs is the network, and not the graph
            require_no_hooks(self, _GRAPHS[self])
        return _GRAPHS[self]

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        _GRAPHS[self] = graph
        self.recompile()

    _graph = graph

    @property
    def code(self) -> str:
        """The graph as Python."""
        return str(source_of(rows_of(self.graph)).src)

    _code = code

    @property
    def meta(self) -> dict[str, Any]:
        """What passes note beside the graph."""
        return _META.setdefault(self, {})

    @meta.setter
    def meta(self, value: dict[str, Any]) -> None:
        _META[self] = value

    def recompile(self) -> Any:
        """Has the graph run, as it is now, in the place of the user's forward."""
        forward = forward_of(self)
        assert forward is not None
        rewrite(self, dataclasses.replace(forward, rows=rows_of(self.graph), usual=None))
        return source_of(rows_of(self.graph))


_GRAPHS: weakref.WeakKeyDictionary[nn.Module, fx.Graph] = weakref.WeakKeyDictionary()
"""The graph of each root that was asked for it; not in the root, which is copied and pickled without it."""

_META: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


def open_runs(
    model: nn.Module, recipe: Recipe, wire: Wire, example: Any, *, whole: bool, below: Forward | None
) -> None:
    """Has every call of ``model`` open a run, and puts the recipe on its ``dca``.

    ``example``: inputs to write the graph with. ``whole``: whether there is one. ``below``: what the class of ``model``
    was generated from before it was connected.
    """
    hooks, dca = _by_hooks(model), dca_of(model)
    if dca is None:
        dca = Connections().train(model.training)
        taken = any("dca" in own for own in (model.__dict__, model._modules, model._parameters, model._buffers))
        hold(model, "dca_" if taken else "dca", dca)
    dca.recipe, dca.wire, dca.example = recipe, wire, Example(example)
    _runs_of(model, wire, None if hooks else Forward(mixins=(Whole,) if whole else (), below=below))


def relay_runs(model: nn.Module, wire: Wire) -> None:
    """Has every call of ``model`` open a run of ``wire``, on which units hand a state on."""
    if wires_of(model):
        add_wire(model, wire)
    else:
        _runs_of(model, wire, None if _by_hooks(model) else Forward(needs=WIRES, below=forward_of(model)))


def _by_hooks(model: nn.Module) -> bool:
    """Whether the class of a root cannot be another, or has a graph that goes with it."""
    return refusal(model) is not None or isinstance(model, fx.GraphModule)


def _runs_of(model: nn.Module, wire: Wire, new: Forward | None) -> None:
    """``new``: what the class of ``model`` is generated from besides; ``None``: hooks serve in its place."""
    opens = bool(wires_of(model))
    add_wire(model, wire)
    if new is not None:
        own: dict[str, Any] = {"mixins": new.mixins, "needs": new.needs, "below": new.below}
        rewrite(model, dataclasses.replace(forward_of(model) or new, around=Opened, **own))
    elif not opens:
        model.register_forward_pre_hook(_open)
        model.register_forward_hook(_close, always_call=True)


def _open(model: nn.Module, args: Any) -> None:
    run = Opened(model)
    run.__enter__()
    _here.runs = (*getattr(_here, "runs", ()), run)


_here = threading.local()


def _close(model: nn.Module, args: Any, output: Any) -> None:
    *_here.runs, run = _here.runs
    run.__exit__()


def close_runs(model: nn.Module) -> None:
    """Undoes :func:`open_runs`, but for the class; what still has ends in ``model`` goes on."""
    there = {ends.wire for ends in map(ends_of, model.modules()) if ends is not None}
    keep_wires(model, there)
    if wires_of(model):
        return
    for hooks, own in ((model._forward_pre_hooks, _open), (model._forward_hooks, _close)):
        for number in [number for number, hook in hooks.items() if hook is own]:
            del hooks[number]
            model._forward_hooks_always_called.pop(number, None)
