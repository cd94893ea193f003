"""Proxies that carry the value of their node, so that a forward's questions have an answer.

``torch.fx`` stops at the first ``if x.shape[1] == 3``. A ``ValueProxy`` knows what its node computes on
the example: lengths, branches, iteration and ``isinstance`` of numbers and tuples are settled from it,
while the graph keeps the symbolic node. Every value that is settled is told to the tracer, which
checks afterwards that it holds at another batch and image size, too.

It never claims to be a tensor through ``__class__``: C++ code would believe it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from types import BuiltinMethodType, MethodType
from typing import Any

from torch import Tensor, fx

from dcafy.graph.nodes import VALUE, node_value
from dcafy.graph.ops import IN_PLACE
from dcafy.graph.paths import joined


class Answering(fx.Tracer):
    """What proxies need of the tracer that makes them.

    ``mode_read``  pairs of paths: the module whose forward decides by a mode, and the one whose mode it is
    ``mode``       what they are told
    ``owner``      the path of the module whose forward runs
    """

    mode_read: set[tuple[str, str]]
    owner: str
    mode: bool = False

    def settle(self, proxy: fx.Proxy, ask: Callable[[Any], Any]) -> Any:
        """What a forward wants to decide by: ``ask`` of the proxy's value."""
        raise NotImplementedError


class ValueProxy(fx.Proxy):
    """An ``fx.Proxy`` whose node's value on the example is known."""

    tracer: Answering
    __getitem__: Callable[[Any, Any], Any]  # fx.Proxy has it, made in a loop that type checkers cannot see

    @property
    def value(self) -> Any:
        """What the node computes on the example."""
        return node_value(self.node)

    # isinstance(x.shape[0], int) is asked of numbers and tuples; a tensor's proxy says what it is.
    @property
    def __class__(self) -> type:
        value = node_value(object.__getattribute__(self, "node"))
        return type(self) if value is None or isinstance(value, Tensor) else type(value)

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError("the class of a proxy cannot be assigned")

    def __getattr__(self, name: str) -> Any:
        value = self.value
        attribute = getattr(value, name)  # AttributeError is the right answer to hasattr()
        if isinstance(value, dict) and name in _DICT_VIEWS:
            return lambda: _DICT_VIEWS[name](self, list(value))
        if isinstance(attribute, str) or (isinstance(value, Tensor) and name == "ndim"):
            return attribute  # C++ wants a real string for a device's type; a rank does not vary
        if isinstance(attribute, MethodType | BuiltinMethodType) or (callable(attribute) and hasattr(value, name)):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(Tensor, name):  # data, grad, requires_grad: of the tensor, and no graph would have it
            raise fx.proxy.TraceError(f"the forward assigns to .{name} of a tensor")
        super().__setattr__(name, value)

    def dim(self) -> Any:
        """The rank: it does not vary with the input, so it is a plain number."""
        return self.value.dim()

    ndimension = dim

    def __bool__(self) -> bool:
        return bool(self.tracer.settle(self, bool))

    def __int__(self) -> int:
        return int(self.tracer.settle(self, int))

    def __index__(self) -> int:
        return operator.index(self.tracer.settle(self, operator.index))

    def __float__(self) -> float:
        return float(self.tracer.settle(self, float))

    def __len__(self) -> int:
        value = self.value
        if isinstance(value, Tensor):
            return int(self.shape[0])
        return len(value)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, dict):
            return iter(list(self.value))
        return (self[i] for i in range(len(self)))

    def __contains__(self, item: Any) -> bool:
        return any(item is own or bool(item == own) for own in self)

    def __setitem__(self, key: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, item), {})

    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __trunc__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.trunc, (self,), {})

    def __divmod__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", divmod, (self, other), {})

    def __rdivmod__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", divmod, (other, self), {})

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self,) if digits is None else (self, digits), {})

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        value = self.value
        shown = f"{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        return f"ValueProxy({self.node.name}: {shown})"


_DICT_VIEWS: dict[str, Callable[[ValueProxy, list[Any]], list[Any]]] = {
    "keys": lambda proxy, keys: keys,
    "values": lambda proxy, keys: [proxy[key] for key in keys],
    "items": lambda proxy, keys: [(key, proxy[key]) for key in keys],
}
"""The keys of a dict that a leaf returns are known; its items are nodes."""


def _in_place(name: str) -> Any:
    def update(self: ValueProxy, other: Any) -> Any:
        target = getattr(operator, name)
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return update


# Python falls back from x *= y to x = x * y where there is no __imul__: the user's in-place update of a
# tensor that something else still reads would be lost.
for _name in IN_PLACE:
    setattr(ValueProxy, f"__{_name}__", _in_place(_name))


class Mode:
    """Stands for the ``training`` of one module while a forward is recorded, be it the module's own or another's.

    As an argument (``F.dropout(x, training=self.training)``) it becomes a node that reads the module's
    mode when the graph runs. Where it is asked for its truth, the forward's control flow depends
    on the mode: eval is recorded, unless training is asked for, and the tracer is told.
    """

    def __init__(self, tracer: Answering, path: str) -> None:
        self._tracer = tracer
        self._path = path

    def __bool__(self) -> bool:
        self._tracer.mode_read.add((self._tracer.owner, self._path))
        return self._tracer.mode

    def __fx_create_arg__(self, tracer: fx.Tracer) -> fx.Node:
        node = tracer.create_node("get_attr", joined(self._path, "training"), (), {})
        node.meta[VALUE] = False
        return node
