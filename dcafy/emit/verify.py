"""Does the converted model compute what the original does? Both are run in eval mode, and left as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dcafy.draws import drawing_apart
from dcafy.errors import InputError, VerificationError
from dcafy.graph.copies import copies_plainly, copy_to_run, own_copy
from dcafy.graph.nodes import tensors_in
from dcafy.trace.inputs import real_inputs
from dcafy.wording import reason_of, warn


def verify_outputs(model: nn.Module, converted: nn.Module, inputs: tuple[Any, ...], *, copied: bool) -> None:
    """Raises unless both give bit-identical outputs in eval mode.

    ``copied``: whether ``converted`` has weights of its own. Kernels may round otherwise where these lie elsewhere (a
    file that is mapped into memory lays them at odd addresses); then a plain copy is what it has to be equal to.
    """
    example, expected, actual = _both(model, converted, inputs)
    difference = _difference(actual, expected)
    if difference is None:
        return
    if copied and _difference(actual, _output(own_copy(model), example)) is None:
        warn(
            f"A plain copy.deepcopy of {type(model).__name__} differs from it by up to {difference:.3g} on the example "
            "(its weights lie elsewhere in memory, or it is copied in a way of its own). The result is equal to the "
            "copy; with copy=False it is equal to the model."
        )
        return
    first = _first_that_differs(model, converted, example)
    where = "" if first is None else f", and what {first} puts out is the first that does"
    raise VerificationError(
        f"The converted model differs from the original by up to {difference:.3g} on the example{where}. {_ADVICE}"
    )


def _first_that_differs(model: nn.Module, converted: nn.Module, inputs: tuple[Any, ...]) -> str | None:
    """The path of the first module whose call puts out something else than in the original, if there is one."""
    outputs: list[tuple[str, list[Tensor]]] = []
    _output(model, inputs, lambda path, output: outputs.append((path, [own.clone() for own in tensors_in(output)])))
    theirs, known = iter(outputs), {path for path, _ in outputs}
    found: list[str] = []

    def compare(path: str, output: Any) -> None:
        if path not in known or found:
            return
        there, expected = next(theirs, ("", []))
        ours = list(tensors_in(output))
        alike = [one.shape for one in ours] == [one.shape for one in expected]
        if there != path or not alike or _difference(ours, expected) is not None:
            found.append(path)

    _output(converted, inputs, compare)
    return next((path for path in found if path), None)


_ADVICE = (
    "If the model draws random numbers in eval mode, that is expected: pass verify=False. If not, please report it "
    "with the model's code."
)


def _both(
    model: nn.Module, converted: nn.Module, inputs: tuple[Any, ...]
) -> tuple[tuple[Any, ...], list[Tensor], list[Tensor]]:
    """The example as data, and the tensors that both put out, in pairs of one shape."""
    example = real_inputs(inputs, model)
    try:
        expected = _output(model, example)
    except Exception as error:  # any forward may refuse its input in any way
        raise InputError(
            f"{type(model).__name__} does not run on the example input: {reason_of(error)}. "
            "Pass example_inputs that it accepts."
        ) from error
    try:
        actual = _output(converted, example)
    except Exception as error:  # as above, where it goes by what it draws, or by how often it was called
        raise VerificationError(
            f"The converted model does not run on the example input: {reason_of(error)}. The original does. {_ADVICE}"
        ) from error
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        raise VerificationError(f"The converted model puts out other shapes than the original. {_ADVICE}")
    return example, expected, actual


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float | None:
    """By how much outputs differ at most; ``None`` where they are the same bits."""
    pairs = list(zip(ours, theirs, strict=True))
    if all(torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
        return None
    return max(_size(_wide(a) - _wide(b)) for a, b in pairs)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _size(value: Tensor) -> float:
    return float(_wide(value).abs().max()) if value.numel() else 0.0


def tell_drift(what: list[str], model: nn.Module, converted: nn.Module, inputs: tuple[Any, ...] | None) -> None:
    """Warns that this is not the identity at the start; with ``inputs``, by how much outputs have moved."""
    are = "is" if len(what) == 1 else "are"
    message = f"{' and '.join(what)} {are} not the identity at the start"
    moved = "so that the outputs have moved"
    if inputs is not None:
        _, expected, actual = _both(model, converted, inputs)
        drift, largest = _difference(actual, expected), max(map(_size, expected), default=0.0)
        moved += f": by up to {drift or 0:.3g} on the example, where the largest output is {largest:.3g}"
        moved = "though on the example no output has moved" if drift is None else moved
    warn(f"{message}, {moved}. Train before you use it.")


def _output(
    model: nn.Module, inputs: tuple[Any, ...], tell: Callable[[str, Any], object] | None = None
) -> list[Tensor]:
    """The tensors that the model puts out in eval mode, and it is as it was.

    ``tell``: is told what each module puts out, with its path.

    Where a copy computes the same for sure, it is a copy that runs: others may use the model meanwhile.
    """
    twin = copy_to_run(model) if copies_plainly(model) else model
    modes = [(module, module.training) for module in twin.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in twin.buffers()]
    hooks = contextlib.ExitStack()
    for path, module in twin.named_modules() if tell is not None else ():

        def told(_: nn.Module, args: Any, output: Any, path: str = path) -> None:
            assert tell is not None
            tell(path, output)

        hooks.callback(module.register_forward_hook(told).remove)
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), hooks:
            return list(tensors_in(drawing_apart(lambda: twin(*inputs), seed=0)))
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                if buffer.shape == before.shape and not torch.equal(buffer, before):
                    buffer.copy_(before)
