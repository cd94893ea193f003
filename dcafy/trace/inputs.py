"""Example inputs: what the user gave, or a good guess, as tensors to trace with."""

from __future__ import annotations

import inspect
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dcafy.errors import DcafyError, InputError, TracingError
from dcafy.graph.evaluator import device_of
from dcafy.graph.nodes import mapped_tensors, tensors_in
from dcafy.wording import few

R = TypeVar("R")

_SIDES = {1: (16000, 4096, 1024, 256), 2: (224, 256, 299, 320, 384, 512, 128, 96, 64, 32), 3: (112, 64, 224, 32)}
"""Usual lengths, image sides and frame sides, most usual first."""

_CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


def as_inputs(example_inputs: Any, model: nn.Module) -> tuple[Any, ...]:
    """The positional inputs of ``model`` that a user's ``example_inputs`` stands for; ``InputError`` where it is none.

    A dict or a named tuple whose names are all parameters of the forward gives these; any other one is an input itself.
    """
    named = example_inputs._asdict() if hasattr(example_inputs, "_fields") else example_inputs
    inputs = example_inputs if isinstance(named, tuple) else (example_inputs,)
    parameters = inspect.signature(model.forward).parameters
    require_positional(model, parameters)
    if isinstance(named, Mapping) and named and parameters.keys() >= set(named):
        inputs = _by_position(named, parameters)
    for value in tensors_in(inputs):
        if value.numel() == 0:
            raise InputError(
                f"The example input has the shape {tuple(value.shape)}, which holds no elements. "
                "Pass one like example_inputs=torch.rand(2, 3, 224, 224)."
            )
    if next(tensors_in(inputs), None) is None:
        numbers = isinstance(example_inputs, tuple | list) and all(type(n) is int for n in example_inputs)
        if numbers and example_inputs:
            raise InputError(
                f"example_inputs={example_inputs!r} are numbers and no tensors. If they are a shape, pass "
                f"example_inputs=torch.rand({', '.join(map(str, example_inputs))})."
            )
        raise InputError(
            "example_inputs must be a tensor, a tuple of positional inputs or a dict of inputs by name, with a tensor "
            f"in it, not {type(example_inputs).__name__}. Pass one like example_inputs=torch.rand(2, 3, 224, 224)."
        )
    return inputs


_NO_STAR = (
    "Models are called with positional inputs here: write its parameters out, without a * before them, or work on the "
    "part of the model that computes with tensors (model.backbone)"
)


def require_positional(model: nn.Module, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Nothing for a forward that takes an input by position; ``InputError`` says what else to do."""
    by_position = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY}
    if not any(p.kind in by_position or p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        raise InputError(
            f"{type(model).__name__}.forward{inspect.signature(model.forward)} takes no input by position. {_NO_STAR}."
        )


def told_unknown_names(example_inputs: Any, model: nn.Module, error: DcafyError) -> DcafyError:
    """``error``, which says besides that a dictionary was taken for an input itself, as its names are no parameters."""
    parameters = inspect.signature(model.forward).parameters
    unknown = sorted({str(name) for name in example_inputs} - parameters.keys())
    return type(error)(
        f"{error} (example_inputs is a dictionary with {few([repr(name) for name in unknown])}, and "
        f"{type(model).__name__}.forward has the parameters {', '.join(parameters)}: the whole dictionary was its "
        "first input.)"
    )


def _by_position(named: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> tuple[Any, ...]:
    """The values of the parameters up to the last one that is named, with defaults in between."""
    positions = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    for name in named:
        if name not in positions:
            needed = "Leave it out" if parameters[name].default is not parameters[name].empty else _NO_STAR
            raise InputError(f"example_inputs names {name!r}, which the forward takes by keyword only. {needed}.")
    given = positions[: 1 + max(map(positions.index, named))]
    values = {**{name: parameters[name].default for name in given}, **named}
    for name, value in values.items():
        if value is inspect.Parameter.empty:
            raise InputError(f"example_inputs has no value for {name!r}, which the forward needs. Add it.")
    return tuple(values.values())


def probe(inputs: Any, scale: int = 1) -> Any:
    """``inputs`` without data, with a batch of at least 2 and maps ``scale`` times as large."""

    def blank(value: Tensor) -> Tensor:
        shape = list(value.shape)
        if len(shape) > 1:
            shape[0] = max(shape[0], 2)
        if len(shape) > 3:
            shape[2:] = [n * scale for n in shape[2:]]
        return torch.empty(shape, dtype=value.dtype, device="meta")

    return mapped_tensors(inputs, blank)


def without_data(value: Any) -> Any:
    """``value`` with meta tensors of the same layout in place of its tensors."""
    return mapped_tensors(
        value, lambda own: torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device="meta")
    )


def real_inputs(inputs: Any, model: nn.Module, seed: int = 0) -> Any:
    """``inputs`` with data (a guess is made of meta tensors), on the model's device, without touching the RNG.

    ``seed``: data of another seed have other signs and sizes, too.
    """
    device = device_of(model)
    generator = torch.Generator().manual_seed(seed)

    def fill(value: Tensor) -> Tensor:
        if value.device.type != "meta":
            return value
        if not value.is_floating_point():
            return torch.zeros(value.shape, dtype=value.dtype, device=device)
        data = torch.rand(value.shape, generator=generator).to(device=device, dtype=value.dtype)
        return data if seed == 0 else 20 * data - 10

    return mapped_tensors(inputs, fill)


def in_dtype_of(model: nn.Module, inputs: Any) -> Any:
    """``inputs`` in the dtype of the model, which may have been cast since they were noted."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return mapped_tensors(inputs, lambda value: value.to(dtype) if value.is_floating_point() else value)


_SEQUENCES: dict[str, type[Any]] = {"tuple": tuple, "list": list}

_DTYPES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)}

_MOST = 2**31
"""Elements that described inputs may have: some networks can only be looked at by running them."""


def as_data(inputs: Any) -> Any:
    """The shapes, dtypes and plain values of ``inputs`` as JSON-ready data; ``None`` for any other kind.

    >>> as_data((torch.empty(2, 3, 224, 224), None))
    {'tuple': [{'tensor': {'shape': [2, 3, 224, 224], 'dtype': 'float32'}}, {'value': None}]}
    """
    if sum(value.numel() for value in tensors_in(inputs)) > _MOST:
        return None
    try:
        return _written(inputs)
    except TypeError:
        return None


def _written(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        return {"tensor": {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}}
    for name, kind in _SEQUENCES.items():
        if type(value) is kind:
            return {name: [_written(item) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _written(item) for key, item in value.items()}}
    fields = getattr(value, "_fields", ()) if isinstance(value, tuple) else ()
    if fields and all(map(_FIELD.fullmatch, fields)):
        return {"named": {name: _written(item) for name, item in zip(fields, value, strict=True)}}
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return {"value": value}
    raise TypeError(f"a {type(value).__name__} cannot be written down")


_FIELD = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
"""Names of a named tuple's fields that are written down."""


class _Named(tuple[Any, ...]):
    """A named tuple that a folder describes: of the user's it has the fields and not the class, which is code.

    ``collections.namedtuple`` would do, and writes the names into source that it runs.
    """

    _fields: tuple[str, ...] = ()

    def __new__(cls, *values: Any) -> _Named:
        return super().__new__(cls, values)

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)

    @classmethod
    def _make(cls, values: Iterable[Any]) -> _Named:
        return cls(*values)

    def _asdict(self) -> dict[str, Any]:
        return dict(zip(self._fields, self, strict=True))

    def _replace(self, **changed: Any) -> _Named:
        return self._make({**self._asdict(), **changed}.values())


def _named(items: dict[str, Any]) -> _Named:
    reads = {name: property(operator.itemgetter(place)) for place, name in enumerate(items)}
    made: _Named = type("Named", (_Named,), {"_fields": tuple(items), **reads})(*items.values())
    return made


def from_data(data: Any) -> tuple[Any, ...]:
    """The inputs that :func:`as_data` wrote down, as meta tensors; ``ValueError`` where it did not write this."""
    try:
        inputs = _restored(data)
    except RuntimeError as error:  # a shape beyond all bounds, or lists in lists without end
        raise ValueError(str(error)[:80]) from error
    if not isinstance(inputs, tuple) or next(tensors_in(inputs), None) is None:
        raise ValueError("the inputs are no tuple with a tensor in it")
    if sum(value.numel() for value in tensors_in(inputs)) > _MOST:
        raise ValueError("the inputs are too large")
    return inputs


def _restored(data: Any) -> Any:
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError("an input is described by one entry: tensor, tuple, list, dict, named or value")
    ((kind, value),) = data.items()
    if kind in _SEQUENCES and isinstance(value, list):
        return _SEQUENCES[kind](_restored(item) for item in value)
    if kind == "dict" and isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if kind == "named" and isinstance(value, dict) and all(map(_FIELD.fullmatch, value)):
        return _named({key: _restored(item) for key, item in value.items()})
    if kind == "value" and not isinstance(value, dict | list):
        return value
    if kind == "tensor" and isinstance(value, dict) and set(value) == {"shape", "dtype"}:
        shape, dtype = value["shape"], _DTYPES.get(str(value["dtype"]))
        if isinstance(shape, list) and all(type(n) is int and 0 < n < 2**31 for n in shape) and dtype is not None:
            return torch.empty(shape, dtype=dtype, device="meta")
    raise ValueError(f"{str(data)[:60]} describes no input")


def guesses(model: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    """Likely inputs of ``model``, best first, as meta tensors with a batch of 2."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for shape in dict.fromkeys(_shapes(model)):
        yield (torch.empty((2, *shape), dtype=dtype, device="meta"),)


def on_one_of(tried: Iterable[tuple[Any, ...]], run: Callable[[tuple[Any, ...]], R], none: str, call: str) -> R:
    """What ``run`` gives on the first of the inputs on which it raises no ``TracingError``.

    Where there is none, ``TracingError`` says so with ``none``, the ``call`` that would take better inputs, and the
    first of the errors.
    """
    errors = []
    for inputs in tried:
        try:
            return run(inputs)
        except TracingError as error:  # noqa: PERF203 (a failed guess is the exception that is expected here)
            errors.append(error)
    raise TracingError(
        f"{none}. Pass one that fits, for example {call} example_inputs=torch.rand(2, 3, 224, 224)). "
        f"The first error was: {errors[0]}"
    ) from errors[0]


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, name, None)
        shape = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
        if isinstance(shape, tuple | list) and all(isinstance(n, int) for n in shape):
            yield tuple(shape)
    first: Any = next((m for m in model.modules() if isinstance(m, (*_CONVOLUTIONS, nn.Linear))), None)
    if isinstance(first, nn.Linear):
        yield (first.in_features,)
        yield (16, first.in_features)
        return
    rank = next((n for kind, n in _CONVOLUTIONS.items() if isinstance(first, kind)), 2)
    channels = first.in_channels if first is not None else 3
    stated = getattr(model, "image_size", None) or getattr(model, "img_size", None)
    sides = [stated] if isinstance(stated, int) else []
    for side in (*sides, *_SIDES[rank]):
        yield (channels, 16, side, side) if rank == 3 else (channels, *[side] * rank)
    if channels != 3 and rank == 2:  # the first convolution registered need not be the first one called
        yield (3, 224, 224)
