"""What a case is, the two sides it runs on, and the comparisons it is made of."""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trained import seeded

import dcafy

Run = Callable[["Side"], "str | None"]


@dataclass(frozen=True)
class Case:
    """One thing that a client does.

    ``client``     the distribution whose version the table names
    ``needs``      further distributions
    ``compares``   what is compared, as the table says it
    ``run``        does it on one side; raises where it does not work, and may return a detail of what was seen
    ``processes``  how many run it together
    """

    name: str
    client: str
    needs: tuple[str, ...]
    compares: str
    run: Run
    processes: int = 1


CASES: dict[str, Case] = {}
"""Every case by its name, in the order of the table."""


def case(client: str, *needs: str, processes: int = 1) -> Callable[[Run], Run]:
    """Adds a function to the cases: its name is the case's, its docstring says what is compared."""

    def add(run: Run) -> Run:
        name = f"{client}/{run.__name__.replace('_', '-')}"
        assert name not in CASES, name
        CASES[name] = Case(name, client, needs, " ".join((run.__doc__ or "").split()).rstrip("."), run, processes)
        return run

    return add


class Side(enum.Enum):
    """Which model a case is given: the original, or the connected one."""

    ORIGINAL = "original"
    CONVERTED = "converted"

    def at_start(self, model: nn.Module, example: Any) -> nn.Module:
        """The model just after it was connected (α = 1, β = 0): every client must see what the original shows."""
        if self is Side.ORIGINAL:
            return copy.deepcopy(model)
        return dcafy.convert(model, example_inputs=example).train(model.training)

    def under_way(self, model: nn.Module, example: Any) -> nn.Module:
        """The model some way into training: connections that count, since its output is no longer the original's."""
        if self is Side.ORIGINAL:
            return copy.deepcopy(model)
        converted = moved(self.at_start(model, example))
        training = model.training
        before, after = (tensors(called(m.eval(), example)) for m in (model, converted))
        model.train(training)
        converted.train(training)
        moves = [difference(a, b) / max(scale(a), 1e-12) for a, b in zip(before, after, strict=True)]
        check(max(moves) > 1e-4, "the connections make no difference")
        return converted

    def connections(self, model: nn.Module) -> dict[str, nn.Module]:
        """The connections of a model or of what wraps one; the original has none."""
        return {} if self is Side.ORIGINAL else dict(dcafy.connections(model))


def moved(converted: nn.Module) -> nn.Module:
    """The connected model with every parameter of its connections away from where it started."""
    with seeded(31), torch.no_grad():
        for connection in dcafy.connections(converted).values():
            for parameter in connection.parameters():
                parameter.add_(torch.rand_like(parameter), alpha=0.3)
            connection.beta.add_(0.3)
    return converted


# -- what is given and what comes out ------------------------------------------------------------------------------


def called(model: nn.Module, example: Any) -> Any:
    """The output without gradients for an example as ``dcafy.convert`` takes it."""
    with torch.no_grad():
        if isinstance(example, Mapping):
            return model(**example)
        return model(*example) if isinstance(example, tuple) else model(example)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested values, in their order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in tensors(item)]


# -- comparisons ---------------------------------------------------------------------------------------------------


class Differs(AssertionError):
    """What did not hold."""


def check(holds: object, what: str) -> None:
    if not holds:
        raise Differs(what)


def equal(one: Any, other: Any, what: str = "outputs") -> None:
    """The same bits in every tensor of two values."""
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    check(pairs, f"{what}: no tensors")
    for left, right in pairs:
        check(left.shape == right.shape, f"{what}: {tuple(left.shape)} and {tuple(right.shape)}")
        if not torch.equal(left, right):
            raise Differs(f"{what} differ by {difference(left, right):.1e} of {scale(right):.1e}")


def close(one: Any, other: Any, what: str = "outputs", tolerance: float = 1e-4) -> str:
    """The largest difference as a share of the largest value, as a detail for the table."""
    largest = 0.0
    for left, right in zip(tensors(one), tensors(other), strict=True):
        check(left.shape == right.shape, f"{what}: {tuple(left.shape)} and {tuple(right.shape)}")
        largest = max(largest, difference(left, right) / max(scale(right), 1e-12))
    check(largest <= tolerance, f"{what} differ by {largest:.1e} of the largest value")
    return f"within {largest:.0e}" if largest else "to the bit"


def difference(one: Tensor, other: Tensor) -> float:
    return (one.detach().double() - other.detach().double()).abs().max().item()


def scale(tensor: Tensor) -> float:
    return tensor.detach().double().abs().max().item()


def all_receive_gradients(side: Side, model: nn.Module) -> None:
    """Every parameter of the connections has a gradient that is not zero throughout."""
    for name, connection in side.connections(model).items():
        for key, parameter in connection.named_parameters():
            check(parameter.grad is not None, f"{name} {key} has no gradient")
            check(parameter.grad.any(), f"{name} {key} has a gradient of zeros")


def all_change(side: Side, model: nn.Module, before: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Every parameter of the connections is another than it was (see :func:`values`)."""
    for name, connection in side.connections(model).items():
        for key, parameter in connection.named_parameters():
            check(not torch.equal(parameter, before[name][key]), f"{name} {key} was not trained")


def values(side: Side, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What the parameters of the connections are now."""
    return {
        name: {key: parameter.detach().clone() for key, parameter in connection.named_parameters()}
        for name, connection in side.connections(model).items()
    }


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same_state(one: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str) -> None:
    """Equal keys and equal values, in any order."""
    check(set(one) == set(other), f"{what}: keys differ: {sorted(set(one) ^ set(other))[:3]}")
    changed = [key for key in one if not torch.equal(one[key], other[key])]
    check(not changed, f"{what}: {len(changed)} values differ, among them {', '.join(changed[:3])}")


def base_names(names: Iterable[str]) -> list[str]:
    """Those that do not belong to a connection."""
    return [name for name in names if "dca" not in name.split(".")]
