"""The meta value of every node: what a node would compute on the example, at no cost in data.

Shapes come from running each operation once on meta tensors. The same layer on the same shape
recurs dozens of times in a network, so results are memoised by operation and operand layout; layers
that keep their input's shape are not run at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["Evaluator", "node_value", "tensors_in"]

VALUE = "value"
"""The key of a node's value in ``node.meta``."""

_KEEPS_LAYOUT: frozenset[type[nn.Module]] = frozenset(
    {
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.Dropout,
        nn.Dropout2d,
        nn.ELU,
        nn.GELU,
        nn.Hardsigmoid,
        nn.Hardswish,
        nn.Hardtanh,
        nn.Identity,
        nn.LeakyReLU,
        nn.Mish,
        nn.PReLU,
        nn.ReLU,
        nn.ReLU6,
        nn.SiLU,
        nn.Sigmoid,
        nn.Softmax,
        nn.Softplus,
        nn.Tanh,
    }
)

_GEOMETRY: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv1d: ("stride", "padding", "dilation", "groups"),
    nn.Conv2d: ("stride", "padding", "dilation", "groups"),
    nn.Conv3d: ("stride", "padding", "dilation", "groups"),
    nn.Linear: (),
    nn.AdaptiveAvgPool1d: ("output_size",),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    nn.Flatten: ("start_dim", "end_dim"),
}
"""Layer type -> the attributes that, with the shapes of input and weight, decide the output's shape."""


def node_value(node: fx.Node) -> Any:
    """What ``node`` computes on the example: a meta tensor, a number, a tuple, ... or ``None``."""
    return node.meta.get(VALUE)


def tensors_in(value: Any) -> Iterable[Tensor]:
    """The tensors inside nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


class Evaluator:
    """Runs one operation at a time on meta values, each distinct one once."""

    def __init__(self, device: torch.device) -> None:
        self._seen: dict[Any, Any] = {}
        self._device = device

    def module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of a leaf module's output."""
        kind = type(module)
        if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
            if kind in _KEEPS_LAYOUT:
                return args[0]
            if kind in _GEOMETRY:
                weight = getattr(module, "weight", None)
                if weight is not None and weight.dtype != args[0].dtype:  # meta kernels do not look
                    raise TypeError(
                        f"the input is {args[0].dtype}, and the weights of a {kind.__name__} are {weight.dtype}"
                    )
                geometry = tuple(_key(getattr(module, name)) for name in _GEOMETRY[kind])
                key = (kind, geometry, None if weight is None else _key(weight), _key(args[0]))
                return self._once(key, lambda: module(*args))
        with torch.no_grad():
            return module(*args, **kwargs)

    def function(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of a function call."""
        if target is getattr and isinstance(args[0], Tensor) and args[1] == "device":
            return self._device  # a model that asks for the device is told its own, never "meta"
        try:
            key = (target, _key(args), _key(kwargs))
        except _NoKey:
            with torch.no_grad():
                return target(*args, **kwargs)
        return self._once(key, lambda: target(*args, **kwargs))

    def method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of a method call on ``args[0]``."""
        if isinstance(args[0], Tensor) and name in _PLACEMENT:
            args, kwargs = _stay_on_meta(args), _stay_on_meta(kwargs)
        return self.function(getattr(type(args[0]), name, getattr(args[0], name)), args, kwargs)

    def node(self, node: fx.Node, modules: dict[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``node`` would compute on other arguments."""
        if node.op == "call_module":
            return self.module(modules[str(node.target)], args, kwargs)
        if node.op == "call_method":
            return self.method(str(node.target), args, kwargs)
        return self.function(node.target, args, kwargs)  # type: ignore[arg-type]

    def _once(self, key: Any, run: Callable[[], Any]) -> Any:
        if key not in self._seen:
            with torch.no_grad():
                self._seen[key] = run()
        return self._seen[key]


_PLACEMENT = frozenset({"to", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "cpu", "cuda", "type_as"})


def _stay_on_meta(arguments: Any) -> Any:
    """``arguments`` with every device replaced by ``meta``: where the example's values live."""
    meta = torch.device("meta")
    if isinstance(arguments, dict):
        return {k: meta if k == "device" and v is not None else v for k, v in arguments.items()}
    return tuple(meta if isinstance(a, torch.device) or (isinstance(a, str) and a != "meta") else a for a in arguments)


class _NoKey(Exception):
    """A value that cannot be compared cheaply; the operation is run each time."""


def _key(value: Any) -> Any:
    """A hashable description from which an operation's output layout follows."""
    kind = type(value)
    if kind in _PLAIN:
        return (kind, value)
    if isinstance(value, Tensor):
        if value.device.type != "meta":
            raise _NoKey
        return (value.shape, value.stride(), value.dtype)
    if kind is tuple or kind is list or kind is torch.Size or kind is fx.immutable_collections.immutable_list:
        return (kind, tuple(_key(item) for item in value))
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    if kind is slice:
        return (slice, _key(value.start), _key(value.stop), _key(value.step))
    raise _NoKey


_PLAIN = frozenset({int, float, bool, str, type(None), type(...), torch.dtype, torch.device})
