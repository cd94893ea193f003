"""A forward that compares ``type(module)`` with a class would miss the subclass that connecting gives a module."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcafy

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class SE(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]


KINDS = (SE, nn.Conv1d)
HERE = sys.modules[__name__]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Conv2d(3, 8, 3), SE(), nn.Conv2d(8, 8, 3), SE()])

    def adds(self, module: nn.Module) -> bool:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        for module in self.body:
            x = x + module(x) if self.adds(module) else module(x)
        return x


def free(module: nn.Module) -> bool:
    return type(module) == SE  # noqa: E721


ways: dict[str, Any] = {
    "is": lambda self, m: type(m) is SE,
    "the other way round": lambda self, m: SE is type(m),
    "==": lambda self, m: type(m) == SE,  # noqa: E721
    "in": lambda self, m: type(m) in (nn.Linear, SE),
    "in a global tuple": lambda self, m: type(m) in KINDS,
    "__class__": lambda self, m: m.__class__ is SE,
    "of a module": lambda self, m: type(m) is HERE.SE,
    "in a function beside": lambda self, m: free(m),
}


@pytest.mark.parametrize("way", ways)
def test_blocks_whose_type_is_compared_are_skipped(way: str) -> None:
    model = type("Net", (Net,), {"adds": ways[way], "__module__": __name__})().eval()
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    assert not plan.links
    assert sum("compares its type with SE" in item.reason for item in plan.skipped) == 2, plan.skipped


@pytest.mark.parametrize(
    "way",
    [
        lambda self, m: isinstance(m, SE),
        lambda self, m: type(m).__name__ == "SE",
        lambda self, m: type(m) is nn.Conv1d or isinstance(m, SE),
    ],
    ids=["isinstance", "name", "another class"],
)
def test_other_questions_cost_nothing(way: Any) -> None:
    model = type("Net", (Net,), {"adds": way, "__module__": __name__})().eval()
    connected = dcafy.convert(model, example_inputs=IMAGES).eval()
    assert len(dcafy.connections(connected)) == 1
    assert torch.equal(connected(IMAGES), model(IMAGES))


def test_an_error_names_the_first_module_that_differs() -> None:
    class Hidden(Net):
        """Compares types in a way that no code shows."""

        def __init__(self) -> None:
            super().__init__()
            self.head, self.kinds = nn.Sequential(nn.Conv2d(8, 4, 1)), {SE}

        def forward(self, x: Tensor) -> Tensor:
            for module in self.body:
                x = module(x) + (type(module) in self.kinds)
            return self.head(x)

    with pytest.raises(dcafy.VerificationError, match=r"what body\.2 puts out is the first"):
        dcafy.convert(Hidden().eval(), example_inputs=IMAGES)


class Once(type):
    """Takes one class of each name."""

    known: dict[str, type] = {}  # noqa: RUF012

    def __new__(mcs, name: str, bases: tuple[type, ...], space: dict[str, Any]) -> Any:
        if name in mcs.known:
            raise TypeError(f"{name} is registered twice")
        mcs.known[name] = made = super().__new__(mcs, name, bases, space)
        return made


class Gate(SE, metaclass=Once):
    pass


def test_a_metaclass_that_refuses_the_subclass() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Gate(), nn.Conv2d(8, 8, 3), Gate()).eval()
    expected, kinds = model(IMAGES), [type(module) for module in model]
    for copy in (True, False):
        with pytest.raises(dcafy.InputError, match=r"Gate .* metaclass Once .*Gate is registered twice"):
            dcafy.convert(model, example_inputs=IMAGES, copy=copy)
        assert [type(module) for module in model] == kinds
        assert torch.equal(model(IMAGES), expected)
