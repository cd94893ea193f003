"""What a connection hears, and what a unit hears of a state that is handed on: measured, and changed for another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dcafy.attention.inserted import hearing_states
from dcafy.emit.connection import Connection
from dcafy.emit.dca import connections, is_connected
from dcafy.emit.relay import Relay
from dcafy.errors import InputError


class Ear:
    """What is heard at one place, measured and changed.

    ``sums``: for each call in a run and each size of maps, what the mean takes: messages in all, their sum.
    """

    is_weighed = False
    cell: nn.Module | None = None
    """What has read messages, and hands its state on, where that is what is heard."""

    def __init__(self) -> None:
        self.measures = False
        self.change: Callable[[Ear, Any, Tensor], Tensor | None] | None = None
        self.order: Tensor | None = None
        self.could_shuffle = True
        self.turn = 0
        self.sums: dict[Any, list[Any]] = {}
        self.energies = [0.0, 0.0, 0.0]  # of αG, of β times the message, of the message

    @property
    def stands_in(self) -> tuple[nn.Module, dict[str, Any]]:
        """The module that hears, and what of it this stands in the place of."""
        raise NotImplementedError

    def noted(self, message: Tensor) -> Tensor | None:
        """What is heard in the place of ``message``."""
        place = (self.turn, *message.shape[1:])
        self.turn += 1
        if self.measures:
            self._add(2, message)
            total = self.sums.setdefault(place, [0, 0.0])
            total[0] += len(message)
            total[1] = total[1] + message.double().sum(0)
        return message if self.change is None else self.change(self, place, message)

    def _add(self, which: int, value: Tensor) -> None:
        self.energies[which] += float(value.double().square().sum())

    def average(self, place: Any) -> Tensor:
        """The average message at that place."""
        if place not in self.sums:
            raise InputError(
                "The loader gave maps of another size the second time that it was gone through. Pass images that are "
                "cut to one size, or the same ones each time."
            )
        number, total = self.sums[place]
        mean: Tensor = total / number
        return mean

    @property
    def share(self) -> float:
        own, message = (energy**0.5 for energy in self.energies[:2])
        return message / (own + message) if own + message else 0.0

    @property
    def varying(self) -> float:
        alike = sum(float(total.square().sum()) / number for number, total in self.sums.values())
        return max(1 - alike / self.energies[2], 0.0) if self.energies[2] else 0.0


class _OfConnection(Ear):
    """In the place of a connection's ``matched`` and ``heard``."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection
        self.own = connection.matched
        self.is_weighed = connection.is_weighed
        self.cell = getattr(connection, "cell", None)

    @property
    def stands_in(self) -> tuple[nn.Module, dict[str, Any]]:
        return self.connection, {"matched": self.matched, "heard": self.heard}

    def matched(self, G: Tensor, T_prev: Tensor, G_prev: Tensor | None = None) -> Tensor | None:
        """What goes in beside G; ``None``: nothing, where messages are weighed against one another."""
        message = self.own(G, T_prev, G_prev)
        return message if self.connection.is_read else self.noted(message)

    def heard(self, G: Tensor, message: Tensor) -> Tensor | None:
        """What goes into f: of what is matched, as much as is mixed in; or the state of the cell that has read it."""
        heard = self.noted(message) if self.connection.is_read else message
        if self.measures:
            alpha, beta = (value.to(G.dtype) for value in (self.connection.alpha, self.connection.beta))
            self._add(0, alpha * G)
            self._add(1, beta * message)
        return heard


class _OfState(Ear):
    """In the place of what a unit hears of the state that is handed on to it."""

    def __init__(self, relay: Relay) -> None:
        super().__init__()
        self.relay = relay
        self.own = relay.heard

    @property
    def stands_in(self) -> tuple[nn.Module, dict[str, Any]]:
        return self.relay, {"heard": self.heard}

    def heard(self, like: Tensor, ear: int = 0) -> Tensor | None:
        """The state, or what it was changed to."""
        return self.noted(self.own(like, ear))


def _cut(ear: Ear, place: Any, message: Tensor) -> Tensor | None:
    return None if ear.is_weighed else torch.zeros_like(message)


def _mean(ear: Ear, place: Any, message: Tensor) -> Tensor:
    return ear.average(place).to(message.dtype).expand_as(message)


def _shuffled(ear: Ear, place: Any, message: Tensor) -> Tensor:
    """Each image's message, in the place of another's; an image may have several in a row (windows of a map)."""
    order = ear.order
    if order is None or len(message) % len(order):
        ear.could_shuffle = False
        return message
    parts = message.reshape(len(order), -1, *message.shape[1:])
    return parts[order].reshape(message.shape)


CHANGES = {"cut": _cut, "shuffled": _shuffled, "mean": _mean}


def state_name(path: str) -> str:
    """What the state is called that a module hears, among the names of connections, which have no such sign."""
    return f"{path}|state"


@contextmanager
def hearing(model: nn.Module) -> Iterator[dict[str, Ear]]:
    """Inside it every connection hears through an ear of its own, and so does every unit to which a state is handed."""
    ears: dict[str, Ear] = {state_name(path): _OfState(relay) for path, relay in hearing_states(model).items()}
    of_cells: dict[Any, Ear] = {}  # all that a block's cell has read is heard at one place
    for name, connection in connections(model).items() if is_connected(model) else ():
        ear = _OfConnection(connection)
        ears[name] = of_cells.setdefault(connection.beta, ear) if connection.is_read else ear
    places = [ear.stands_in for ear in ears.values()]
    try:
        for module, own in places:
            module.__dict__.update(own)
        yield ears
    finally:
        for module, own in places:
            for name in own:
                module.__dict__.pop(name, None)


@contextmanager
def eager() -> Iterator[None]:
    """Inside it nothing runs compiled code, which would not come by here."""
    stance = getattr(torch.compiler, "set_stance", None)  # of torch 2.6
    with contextlib.nullcontext() if stance is None else stance("force_eager"):
        yield


def run(model: nn.Module, inputs: Any, ears: Mapping[str, Ear]) -> Any:
    for ear in ears.values():
        ear.turn = 0
    return model(inputs)
