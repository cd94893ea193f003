"""Comparing both models on the example: whatever they put out, and whatever they raise."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import networks
import pytest
import torch
from networks import with_attention
from torch import Tensor, nn

import dcafy
from dcafy.errors import InputError, UsageError, VerificationError

X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Puts(nn.Module):
    """A network, and what is made of what it puts out."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.make = with_attention(networks.SELinear), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.body(x))


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "whole numbers": lambda y: y.argmax(1),
    "truths": lambda y: y > 0,
    "complex": lambda y: torch.complex(y, y),
    "none": lambda y: y[:0],
    "no tensor": lambda y: {"classes": 10},
    "several": lambda y: [y, y.long(), {"mask": y > 0}],
    "no numbers": lambda y: y * float("nan"),
}


@pytest.mark.parametrize("schema", ["direct", "softmax"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_any_kind_are_compared(name: str, schema: str) -> None:
    model = Puts(OUTPUTS[name]).eval()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        connected = dcafy.convert(model, example_inputs=X, schema=schema)
    assert len(dcafy.connections(connected)) > 0
    assert any("moved" in str(warning.message) for warning in told) is (schema == "softmax")


class Fails(nn.Module):
    """A network that does not run on data, or does so the first time only."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.body, self.left = with_attention(networks.SELinear), [times]

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and x.device.type != "meta":
            check(self.left)
        return self.body(x)


RUNS = [0]


def check(left: list[int]) -> None:
    RUNS[0] += 1
    if RUNS[0] > left[0]:
        raise ValueError("not on data")


@pytest.mark.parametrize("schema", ["direct", "softmax"])
@pytest.mark.parametrize(("times", "error"), [(0, InputError), (1, VerificationError)])
def test_what_a_forward_raises_is_told(times: int, error: type[Exception], schema: str) -> None:
    RUNS[0] = 0
    with pytest.raises(error, match="not on data"):
        dcafy.convert(Fails(times), example_inputs=X, schema=schema)


@pytest.mark.parametrize("schema", [["softmax"], {"softmax"}, 3, None, "soft max", "s" * 100_000, "softmax\nand more"])
def test_a_schema_that_there_is_not(schema: Any) -> None:
    with pytest.raises(UsageError, match="direct, weighted, softmax") as caught:
        dcafy.convert(with_attention(networks.SELinear), example_inputs=X, schema=schema)
    assert "\n" not in str(caught.value)
