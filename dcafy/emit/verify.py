"""Does the converted model compute what the original does? Both are run, in eval mode, and left as they were."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dcafy.errors import InputError, VerificationError
from dcafy.graph.nodes import tensors_in
from dcafy.trace.inputs import real_inputs
from dcafy.wording import reason_of, warn


def verify_outputs(model: nn.Module, converted: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raises unless both give bit-identical outputs in eval mode."""
    example = real_inputs(inputs, model)
    try:
        expected = _output(model, example)
    except Exception as error:  # any forward may refuse its input in any way
        raise InputError(
            f"{type(model).__name__} does not run on the example input: {reason_of(error)}. "
            "Pass example_inputs that it accepts."
        ) from error
    actual = _output(converted, example)
    for ours, theirs in zip(tensors_in(actual), tensors_in(expected), strict=True):
        if not torch.equal(ours, theirs) and not torch.equal(ours.nan_to_num(), theirs.nan_to_num()):
            raise VerificationError(
                f"The converted model differs from the original by up to {float((ours - theirs).abs().max()):.3g} "
                "on the example. If the model draws random numbers in eval mode, that is expected: pass verify=False. "
                "If not, please report it with the model's code."
            )


def tell_drift(schema: str, model: nn.Module, converted: nn.Module, inputs: tuple[Any, ...] | None) -> None:
    """Warns that a schema is not the identity at the start, and tells by how much where ``inputs`` are given."""
    message = f"The schema {schema!r} is not the identity at α = 1, β = 0, so that the outputs have moved"
    if inputs is not None:
        example = real_inputs(inputs, model)
        pairs = zip(tensors_in(_output(model, example)), tensors_in(_output(converted, example)), strict=True)
        drifts = [(float((a - b).abs().max()), float(a.abs().max())) for a, b in pairs if a.is_floating_point()]
        drift, largest = max(drifts)
        message += f": by up to {drift:.3g} on the example, where the largest output is {largest:.3g}"
    warn(f"{message}. Train before you use it.")


def _output(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        for module, _ in modes:
            module.training = False
        torch.manual_seed(0)
        with torch.no_grad():
            return model(*inputs)
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                if buffer.shape == before.shape and not torch.equal(buffer, before):
                    buffer.copy_(before)
