"""What a deep trace yields: the graph, the calls in it, what was decided on the way; and the functions it calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from dcafy.errors import DcafyError
from dcafy.graph.nodes import node_value

Question = tuple[str, tuple[Any, ...], Any]
"""What a forward asks of torch: a function's name, what it is given, and the answer."""


@dataclass(eq=False)
class Call:
    """One entered module call, and the nodes that it was recorded as.

    ``record``: it returned a container of a class of its own, of which ``output`` has what is under its keys.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    nodes: list[fx.Node] = field(default_factory=list)
    output: Any = None
    record: bool = False


@dataclass(frozen=True)
class Decision:
    """What a forward asked of the value of ``node`` while it was recorded: its truth, or a number.

    ``asker``: the path of the module whose forward it was.
    """

    node: fx.Node
    ask: Callable[[Any], Any]
    asker: str = ""

    @property
    def answer(self) -> Any:
        """What it was told, which is true of the example."""
        return self.ask(node_value(self.node))


@dataclass(frozen=True)
class Observed:
    """The inputs of one call: meta tensors, and where they are known with data (``real``)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    real: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Recording:
    """What a deep trace yields.

    ``graph``       every node with its value (``node.meta["value"]``) and owner (``node.meta["owner"]``)
    ``calls``       the entered calls, outer before inner
    ``mode_read``   modules whose control flow asks for a mode -> whose, seen from them ("": their own); as in eval
    ``kept_whole``  module path -> why its forward was not recorded
    ``unwritten``   module path -> what its forward does besides, which no graph has: stored values, autocast, no_grad
    ``stores``      of these, those whose forward stores tensors as attributes and does nothing else: name -> node
    ``observed``    inside modules kept whole: path -> the inputs of the submodule's first call
    ``settled``     what the forward decided by
    ``held``        those of them that the sizes of the input might answer otherwise; the graph checks them when it runs
    ``model``       the data-free copy that was traced
    ``modules``     its submodules by path
    ``asked``       module path -> what its forward asks of torch: the function's name, with what, and the answer
    ``without_gradient``  nodes that are always computed where a forward has gradients switched off
    ``by_dtype``    paths of modules whose forwards decide by the dtype of a tensor
    """

    graph: fx.Graph
    calls: tuple[Call, ...]
    mode_read: dict[str, frozenset[str]]
    kept_whole: dict[str, str]
    unwritten: dict[str, str]
    stores: dict[str, dict[str, fx.Node]]
    observed: dict[str, Observed]
    settled: tuple[Decision, ...]
    model: nn.Module
    modules: dict[str, nn.Module]
    held: tuple[Decision, ...] = ()
    asked: dict[str, tuple[Question, ...]] = field(default_factory=dict)
    by_dtype: frozenset[str] = frozenset()
    without_gradient: frozenset[fx.Node] = frozenset()

    @functools.cached_property
    def order(self) -> dict[fx.Node, int]:
        """Where each node stands in the graph."""
        return {node: i for i, node in enumerate(self.graph.nodes)}

    @functools.cached_property
    def home(self) -> dict[fx.Node, Call]:
        """The innermost call that a node was recorded in; a node that the root's own forward made has none."""
        return {node: call for call in self.calls for node in call.nodes}  # outer before inner

    @functools.cached_property
    def around(self) -> dict[Call, Call | None]:
        """The call inside which each was made; ``None``: the root's."""
        found: dict[Call, Call | None] = {}
        open_: list[Call] = []
        for call in self.calls:
            if not call.nodes:
                continue
            while open_ and self.order[open_[-1].nodes[-1]] < self.order[call.nodes[0]]:
                open_.pop()
            found[call] = open_[-1] if open_ else None
            open_.append(call)
        return found

    @functools.cached_property
    def calls_of(self) -> dict[str, tuple[Call, ...]]:
        """Path -> the calls of the module, in order."""
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            if call.nodes:
                found.setdefault(call.path, []).append(call)
        return {path: tuple(calls) for path, calls in found.items()}

    @functools.cached_property
    def inside(self) -> dict[Call | None, tuple[Call, ...]]:
        """The calls made directly inside each."""
        found: dict[Call | None, list[Call]] = {}
        for call in self.calls:
            if call.nodes:
                found.setdefault(self.around[call], []).append(call)
        return {call: tuple(inner) for call, inner in found.items()}


def passed_through(value: Any) -> Any:
    """``value``: marks where a module handed its own input on, so that the call can be folded."""
    return value


def check_default(value: Any, default: Any, name: str) -> None:
    """Nothing, unless an argument that was recorded with its default is given another value."""
    if type(value) is fx.Proxy:  # somebody traces the result
        value.tracer.create_proxy("call_function", check_default, (value, default, name), {})
    elif value is not default and not (isinstance(value, int | float | str) and value == default):
        raise DcafyError(
            f"This model was converted with {name}={default!r} and computes only that; got {name}={value!r}. "
            f"Convert it with example_inputs that contain the value you need for {name!r}."
        )


def check_decision(value: Any, answer: Any, module: str) -> None:
    """Nothing, unless a forward would take another path at this size of the input than the recorded one."""
    if isinstance(value, fx.Proxy):  # somebody traces the result
        value.tracer.create_proxy("call_function", check_decision, (value, answer, module), {})
        return
    now = bool(value) if isinstance(answer, bool) else value
    if now != answer:
        raise DcafyError(
            f"The forward of {module} goes by the size of its input: what was {answer} for the example with which this "
            f"model was converted is {now} here. Give it inputs of sizes like the example's, or convert it with "
            "example_inputs of this size."
        )
