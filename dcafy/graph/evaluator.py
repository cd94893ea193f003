"""The meta value of every node: what a node would compute on the example, at no cost in data.

Shapes come from running each operation once on meta tensors. The same layer on the same shape
recurs dozens of times in a network, so results are memoised by operation and operand layout; layers
that keep their input's shape are not run at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

_KEEP_LAYOUT = (
    "BatchNorm1d BatchNorm2d BatchNorm3d Dropout Dropout2d ELU GELU Hardsigmoid Hardswish Hardtanh Identity LeakyReLU "
    "Mish PReLU ReLU ReLU6 SiLU Sigmoid Softmax Softplus Tanh"
)

KEEPS_LAYOUT: frozenset[type[nn.Module]] = frozenset(getattr(nn, name) for name in _KEEP_LAYOUT.split())
"""Layers whose output is like their input."""


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; the CPU where it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


class Evaluator:
    """Runs one operation at a time on meta values, each distinct one once."""

    def __init__(self, device: torch.device) -> None:
        self._seen: dict[Any, Any] = {}
        self._structures: dict[nn.Module, Any] = {}
        self.device = device

    def module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of a leaf module's output."""
        if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
            if type(module) in KEEPS_LAYOUT:
                return args[0]
            if isinstance(module, _WEIGHTED) and module.weight.dtype != args[0].dtype:  # meta kernels do not look
                raise TypeError(f"the input is {args[0].dtype}, a layer's weights are {module.weight.dtype}")
            if type(module) in _ADAPTIVE:
                return _adaptively_pooled(args[0], module.output_size, _ADAPTIVE[type(module)])
            if isinstance(module, _RECURRENT) and args[0].ndim == 3:
                return _recurrent(module, args[0])
        return self._once(module, self._structure, args, kwargs)

    def anew(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of a module's output, by running it whatever is known of others like it."""
        if next(module.children(), None) is None:
            return self.module(module, args, kwargs)
        with torch.no_grad():
            return module(*args, **kwargs)

    def _structure(self, module: nn.Module) -> Any:
        """What decides a layer's output layout: its class, options, and the shapes of its tensors.

        What is no plain option (a function, an object of the user's) stands for itself alone.
        """
        if module not in self._structures:
            options = tuple(
                (name, _key(value) if type(value) in _OPTIONS else id(value))
                for name, value in module.__dict__.items()
                if name not in _BOOKKEEPING and value is not None
            )
            tensors = tuple(
                None if tensor is None else _key(tensor)
                for tensor in (*module._parameters.values(), *module._buffers.values())
            )
            children = tuple(self._structure(child) for child in module.children())
            self._structures[module] = (type(module), options, tensors, children)
        return self._structures[module]

    def function(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of a function call."""
        if target is getattr and isinstance(args[0], Tensor) and args[1] == "device":
            return self.device  # a model that asks for the device is told its own, never "meta"
        if target in _ADAPTIVE and len(args) == 2 and not kwargs:
            return _adaptively_pooled(args[0], args[1], _ADAPTIVE[target])
        return self._once(target, lambda function: function, args, kwargs)

    def method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of a method call on ``args[0]``."""
        if isinstance(args[0], Tensor) and args[0].is_meta and name in _PLACEMENT:
            args, kwargs = _stay_on_meta(args), _stay_on_meta(kwargs)
        if isinstance(args[0], Tensor) and name.endswith("_") and not name.endswith("__"):
            args = (args[0].detach(), *args[1:])  # ``unsqueeze_`` alters the shape of a value that others share
        return self.function(getattr(type(args[0]), name, getattr(args[0], name)), args, kwargs)

    def node(self, node: fx.Node, modules: dict[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``node`` would compute on other arguments."""
        if node.op == "call_module":
            return self.module(modules[str(node.target)], args, kwargs)
        if node.op == "call_method":
            return self.method(str(node.target), args, kwargs)
        return self.function(node.target, args, kwargs)  # type: ignore[arg-type]

    def _once(self, call: Any, known_as: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            key = (known_as(call), _key(args), _key(kwargs))
        except _NoKey:
            with torch.no_grad():
                return call(*args, **kwargs)
        if key not in self._seen:
            with torch.no_grad():
                self._seen[key] = call(*args, **kwargs)
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


_ADAPTIVE: dict[Any, int] = {
    nn.AdaptiveAvgPool1d: 1,
    nn.AdaptiveAvgPool2d: 2,
    nn.AdaptiveAvgPool3d: 3,
    nn.functional.adaptive_avg_pool1d: 1,
    nn.functional.adaptive_avg_pool2d: 2,
    nn.functional.adaptive_avg_pool3d: 3,
}
"""Pooling to a given size -> over how many axes: what attention does most, and torch's slowest meta kernel."""


def _adaptively_pooled(value: Tensor, size: Any, axes: int) -> Tensor:
    wanted = (size,) * axes if isinstance(size, int) else size
    kept = value.shape[value.ndim - axes :]
    shape = tuple(own if n is None else n for n, own in zip(wanted, kept, strict=True))
    return value.new_empty((*value.shape[: value.ndim - axes], *shape))


_RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)
"""Layers that torch takes apart step by step on meta tensors: seconds for a long sequence."""


def _recurrent(layer: nn.RNNBase, value: Tensor) -> tuple[Tensor, Any]:
    directions = 2 if layer.bidirectional else 1
    width = layer.proj_size or layer.hidden_size
    batch = value.shape[0 if layer.batch_first else 1]
    state = value.new_empty((directions * layer.num_layers, batch, width))
    cell = value.new_empty((directions * layer.num_layers, batch, layer.hidden_size))
    output = value.new_empty((*value.shape[:2], directions * width))
    return output, (state, cell) if isinstance(layer, nn.LSTM) else state


_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_OPTIONS = frozenset({int, float, bool, str, tuple, torch.Size, torch.dtype, torch.device})
_BOOKKEEPING = frozenset(nn.Module().__dict__) - {"training"}

_PLAIN = frozenset({int, float, bool, str, type(None), type(...), torch.dtype, torch.device})
