"""Does the network listen? What each connection says, what the network makes of it, and what could be left out.

The contribution ratio (paper 4.5) says how large β is beside α, not whether anything depends on it: a large β may
scale a message that is next to nothing, or one that the layers behind it ignore. And a message is mostly the same for
every image: what is lost with it may be a bias, which another layer could have learned, or what it says of the image.
So each connection is changed in three ways, and so is the state that units hand on by themselves (``rla``, ``dia``)::

    cut        no message                     what the connection is worth in all
    mean       the average of its messages    what it is worth that messages differ between images
    shuffled   the message of another image   what it is worth that a message is of this very image
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcafy.analysis.contributions import contributions
from dcafy.analysis.listening import ALL, KINDS, ConnectionUsage, Effect, States, StateUsage, Usage
from dcafy.analysis.tapped import Tap, tapped
from dcafy.attention.inserted import hearing_states
from dcafy.attention.starting import unspoken
from dcafy.emit.connection import Connection
from dcafy.emit.dca import connections, is_connected, recipes
from dcafy.emit.relay import Relay
from dcafy.errors import DcafyError, InputError
from dcafy.graph.modes import evaluating
from dcafy.graph.paths import joined
from dcafy.plan.blocks import Contribution
from dcafy.wording import one_line, reason_of


@torch.no_grad()
def usage(model: nn.Module, loader: Iterable[Any], *, device: torch.device | str | None = None) -> Usage:
    """What the network makes of each connection, one at a time and all: cut, shuffled, and its mean message.

    The same of the state that each unit hears where attention was put in that hands one on (``rla``, ``dia``), which is
    in ``states``.

    ``model``: a converted classifier with outputs ``[N, classes]``. ``loader``: batches of images and labels, in mixed
    order; it is gone through twice, and each batch is run as it is and three times for each connection. What is left
    out of the network at no cost is looked for with a few more turns. ``device``: where the batches go; default: where
    the model is. The model is as it was; ``print`` the result to see a table, and the call that drops what nobody
    listens to.

    Raises ``InputError`` for a model without connections and such a state, a loader without labelled batches, and
    batches or labels that the model does not take.

    >>> import dcafy, torch, torchvision
    >>> model = dcafy.convert(torchvision.models.mobilenet_v3_small(num_classes=3), verify=False)
    >>> found = dcafy.usage(model, [(torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 0]))])
    >>> found.connections[0].message_share, found.connections[0].cut.loss  # a fresh connection says nothing
    (0.0, 0.0)
    """
    units = hearing_states(_plain(model))
    own = contributions(model) if is_connected(model) or not units else ()
    if not own and not units:
        raise InputError(f"{type(model).__name__} has no connections any more: all of them have been dropped.")
    look = _Looked(_plain(model), loader, device or next(model.parameters()).device)
    with look.listening():
        look.measure()
        asked = {(row.name, kind): {row.name: kind} for row in own for kind in KINDS}
        asked |= {(ALL, kind): {row.name: kind for row in own} for kind in KINDS}
        asked |= {(name, kind): {name: kind} for name in map(_state, units) for kind in KINDS}
        asked |= {(_state(ALL), kind): dict.fromkeys(map(_state, units), kind) for kind in KINDS}
        effects = {key: _effect(rows) for key, rows in look.changed(asked).items()}
        links, without = _unheard(own, effects, unspoken(look.model) if own else frozenset()), None
        while unheard := look.leaving_last(links):
            together = look.changed({(ALL, "cut"): {name: "cut" for link in unheard for name in link}})
            without = _known(_effect(together[ALL, "cut"]))
            if without.is_negligible:
                break
            links = unheard[: len(unheard) // 2]  # together they are worth something: those of least effect, then
        images, loss, accuracy = look.as_it_is()
    rows = tuple(
        ConnectionUsage(
            row.name,
            row.dimension,
            row.alpha,
            row.beta,
            row.ratio,
            look.ears[row.name].share,
            look.ears[row.name].varying,
            look.moved(row.name),
            _known(effects[row.name, "cut"]),
            effects[row.name, "shuffled"],
            _known(effects[row.name, "mean"]),
        )
        for row in own
    )
    left_out = {name for link in unheard for name in link}
    return Usage(
        images,
        loss,
        accuracy,
        rows,
        _known(effects[ALL, "cut"]),
        effects[ALL, "shuffled"],
        _known(effects[ALL, "mean"]),
        look.alike,
        tuple(row.name for row in own if row.name in left_out),
        without if unheard else None,
        look.unread,
        _states(units, effects, look.ears) if units else None,
    )


def listeners(model: nn.Module) -> int:
    """How many there are whose messages :func:`usage` changes: connections, and modules that hear a state."""
    return (len(connections(model)) if is_connected(model) else 0) + len(hearing_states(model))


def _state(path: str) -> str:
    """What the state is called that a module hears, among the names of connections, which have no such sign."""
    return f"{path}|state"


def _states(
    units: Mapping[str, Relay], effects: Mapping[tuple[str, str], Effect | None], ears: Mapping[str, _Ear]
) -> States:
    def changed(path: str) -> tuple[Effect, Effect | None, Effect]:
        cut, shuffled, mean = (effects[_state(path), kind] for kind in KINDS)
        return _known(cut), shuffled, _known(mean)

    rows = tuple(
        StateUsage(path, ", ".join(relay.hears), ears[_state(path)].varying, *changed(path))
        for path, relay in units.items()
    )
    return States(rows, *changed(ALL))


def _known(effect: Effect | None) -> Effect:
    assert effect is not None
    return effect


def _effect(differences: Tensor) -> Effect | None:
    """Of rows (loss, right), one for each image: what a change makes of it; ``None`` without any."""
    number = len(differences)
    if not number:
        return None
    loss, accuracy = differences.mean(0).tolist()
    if number == 1:
        return Effect(loss, None, accuracy, None, number)
    errors = (differences.std(0) / number**0.5).tolist()
    return Effect(loss, errors[0], accuracy, errors[1], number)


def _unheard(
    own: Sequence[Contribution], effects: Mapping[tuple[str, str], Effect | None], unspoken: Collection[str]
) -> list[list[str]]:
    """The links that cost nothing when they are cut, each by its connections, those that cost least first.

    To have said nothing yet is another thing than not being listened to.
    """
    links: dict[str, list[str]] = {}
    for row in own:
        links.setdefault(re.sub(r"\[\d+\]", "", row.name), []).append(row.name)
    spoken = {row.name for row in own} - set(unspoken)
    cut = {row.name: _known(effects[row.name, "cut"]) for row in own}
    whole = [names for names in links.values() if all(cut[name].is_negligible for name in names)]
    whole = [names for names in whole if not spoken.isdisjoint(names)]
    return sorted(whole, key=lambda names: max(cut[name].loss for name in names))


@torch.no_grad()
def message_shares(model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """Connection -> ‖β·match(T̃)‖ / (‖αG‖ + ‖β·match(T̃)‖) over all of these images; modes are as they were.

    ``batches``: inputs of the model, on its device. Raises ``InputError`` for a model without connections.
    """
    names = list(connections(model))
    with evaluating(model), _eager(), _listening(model) as ears:
        for ear in ears.values():
            ear.measures = True
        for images in batches:
            _run(model, images, ears)
    return {name: ears[name].share for name in names}


# --- what a connection hears ----------------------------------------------------------------------------


class _Ear:
    """What is heard at one place, measured and changed.

    ``sums``: for each call in a run and each size of maps, what the mean takes: messages in all, their sum.
    """

    is_weighed = False
    cell: nn.Module | None = None
    """What has read messages, and hands its state on, where that is what is heard."""

    def __init__(self) -> None:
        self.measures = False
        self.change: Callable[[_Ear, Any, Tensor], Tensor | None] | None = None
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


class _OfConnection(_Ear):
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


class _OfState(_Ear):
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


def _cut(ear: _Ear, place: Any, message: Tensor) -> Tensor | None:
    return None if ear.is_weighed else torch.zeros_like(message)


def _mean(ear: _Ear, place: Any, message: Tensor) -> Tensor:
    return ear.average(place).to(message.dtype).expand_as(message)


def _shuffled(ear: _Ear, place: Any, message: Tensor) -> Tensor:
    """Each image's message, in the place of another's; an image may have several in a row (windows of a map)."""
    order = ear.order
    if order is None or len(message) % len(order):
        ear.could_shuffle = False
        return message
    parts = message.reshape(len(order), -1, *message.shape[1:])
    return parts[order].reshape(message.shape)


_CHANGES = {"cut": _cut, "shuffled": _shuffled, "mean": _mean}


@contextmanager
def _listening(model: nn.Module) -> Iterator[dict[str, _Ear]]:
    """Inside it every connection hears through an ear of its own, and so does every unit to which a state is handed."""
    ears: dict[str, _Ear] = {_state(path): _OfState(relay) for path, relay in hearing_states(model).items()}
    of_cells: dict[Any, _Ear] = {}  # all that a block's cell has read is heard at one place
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
def _eager() -> Iterator[None]:
    """Inside it nothing runs compiled code, which would not come by here."""
    stance = getattr(torch.compiler, "set_stance", None)  # of torch 2.6
    with contextlib.nullcontext() if stance is None else stance("force_eager"):
        yield


def _run(model: nn.Module, inputs: Any, ears: Mapping[str, _Ear]) -> Any:
    for ear in ears.values():
        ear.turn = 0
    return model(inputs)


# --- the network on the loader --------------------------------------------------------------------------


@dataclass
class _Moved:
    """How T is spread, and how far it was moved, in sums over all values."""

    number: int = 0
    total: float = 0.0
    squares: float = 0.0
    moves: float = 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        before, after = before.double(), after.double()
        self.number += before.numel()
        self.total += float(before.sum())
        self.squares += float(before.square().sum())
        self.moves += float((after - before).square().sum())

    @property
    def in_spreads(self) -> float | None:
        if not self.number:
            return None
        mean = self.total / self.number
        variance = self.squares / self.number - mean**2
        # What is left of equal values are rounding errors.
        return (self.moves / self.number / variance) ** 0.5 if variance > 1e-12 * (1 + mean**2) else None


@dataclass
class _Looked:
    """The network while it is being looked at: run batch by batch, as it is and changed.

    It is a copy of the model on the same parameters that tells its T, where that can be made; else the model itself.
    """

    model: nn.Module
    loader: Iterable[Any]
    device: torch.device | str
    ears: dict[str, _Ear] = field(default_factory=dict)
    taps: dict[str, Tap] = field(default_factory=dict)
    moves: dict[str, _Moved] = field(default_factory=dict)
    scores: list[Tensor] = field(default_factory=list)
    alike: float = 0.0
    unread: str = ""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside it the network can be looked at."""
        first = next(self._batches(), None)
        if first is None:
            raise InputError(_NOTHING)
        self.network = self.model
        expected = self._in_eval(*first)
        try:
            copy = tapped(self.model, first[0][:2])
        except DcafyError as error:  # what can be run and not be recorded is told of all but its T
            self.unread = one_line(error)
        else:
            self.network = copy.model
            if torch.allclose(self._in_eval(*first), expected, rtol=1e-3, atol=1e-5, equal_nan=True):
                self.taps = self._of_targets(copy.maps)
            else:
                self.network, self.unread = self.model, "a copy of the network that tells them computes otherwise"
        with evaluating(self.network), _eager(), _listening(self.network) as self.ears:
            yield

    def _in_eval(self, inputs: Tensor, labels: Tensor) -> Tensor:
        with evaluating(self.network), _eager():
            return self._rows(inputs, labels)

    def _of_targets(self, taps: Mapping[str, Tap]) -> dict[str, Tap]:
        """Connection -> the tap behind the T of the block that hears."""
        if not is_connected(self.model):
            return {}
        around = next(path for path, _ in recipes(self.model))
        targets = {row.name: joined(around, row.target) for row in contributions(self.model)}
        return {name: taps[target] for name, target in targets.items() if target in taps}

    def _batches(self) -> Iterator[tuple[Any, Tensor]]:
        for batch in self.loader:
            if not isinstance(batch, tuple | list) or len(batch) < 2:
                raise InputError("The loader should give batches of images and labels, as (images, labels).")
            yield _on(batch[0], self.device), _on(batch[1], self.device)

    def _rows(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """(loss, right) of each image."""
        try:
            outputs = _run(self.network, inputs, self.ears)
        except DcafyError:
            raise
        except Exception as error:  # any forward may refuse its input in any way
            raise InputError(
                f"{type(self.model).__name__} does not run on a batch of the loader, of shape {tuple(inputs.shape)}: "
                f"{reason_of(error)}. Give it batches that it accepts."
            ) from error
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(inputs):
            raise InputError("The model is no classifier: its outputs are not of shape [N, classes].")
        _check_labels(labels, *outputs.shape)
        losses = F.cross_entropy(outputs.float(), labels.long(), reduction="none", ignore_index=-1)
        return torch.stack([losses.double(), (outputs.argmax(1) == labels).double()], dim=1)

    def measure(self) -> None:
        """Goes through the loader once, for what messages are like."""
        for ear in self.ears.values():
            ear.measures = True
        for inputs, labels in self._batches():
            rows = self._rows(inputs, labels)[labels >= 0]
            self.scores.append(rows)
        for ear in self.ears.values():
            ear.measures = False
        if not sum(map(len, self.scores)):
            raise InputError(_NOTHING)
        if not any(ear.sums for ear in self.ears.values()):
            raise InputError(
                f"What is heard in {type(self.model).__name__} is not run when it is called, or not by Python: is "
                "it compiled? Pass the model itself, as dcafy.convert returned it."
            )

    def as_it_is(self) -> tuple[int, float, float]:
        """(images, mean cross-entropy, top-1 accuracy); images labelled -1 do not count."""
        rows = torch.cat(self.scores)
        loss, accuracy = rows.mean(0).tolist()
        return len(rows), loss, accuracy

    def changed(self, asked: Mapping[tuple[str, str], Mapping[str, str]]) -> dict[tuple[str, str], Tensor]:
        """What the changes (connection -> kind) under each key make of each image's (loss, right).

        Goes through the loader once, and compares only what was computed on one and the same batch.
        """
        found: dict[tuple[str, str], list[Tensor]] = {key: [] for key in asked}
        others, same, number = 0, 0, -1
        for number, (inputs, labels) in enumerate(self._batches()):
            order = _other(len(labels), number).to(labels.device)
            counted = labels >= 0
            before = self._rows(inputs, labels)
            maps = {name: tap.seen for name, tap in self.taps.items()}
            for key, changes in asked.items():
                if order.numel() < 2 and "shuffled" in changes.values():
                    continue  # there is no other image in this batch
                after = self._changed(inputs, labels, changes, order)
                found[key].append((after - before)[counted])
                if key[1] == "cut":
                    self._note(key[0], maps.get(key[0]))
            if order.numel() > 1:
                others, same = others + int(counted.sum()), same + int(((labels == labels[order]) & counted).sum())
        if number < 0:
            raise InputError(
                "The loader gave batches once, and none the second time that it was gone through. Pass a DataLoader or "
                "a list of batches, and no generator or iterator, which is used up."
            )
        self.alike = same / others if others else 0.0
        for key, changes in asked.items():
            if not all(self.ears[name].could_shuffle for name, kind in changes.items() if kind == "shuffled"):
                found[key] = []
        empty = torch.zeros(0, 2, dtype=torch.float64)
        return {key: torch.cat(rows).cpu() if rows else empty for key, rows in found.items()}

    def _changed(self, inputs: Tensor, labels: Tensor, changes: Mapping[str, str], order: Tensor) -> Tensor:
        try:
            for name, kind in changes.items():
                self.ears[name].change, self.ears[name].order = _CHANGES[kind], order
            return self._rows(inputs, labels)
        finally:
            for name in changes:
                self.ears[name].change = None

    def _note(self, name: str, before: Tensor | None) -> None:
        after = self.taps[name].seen if before is not None else None
        if before is not None and after is not None:
            self.moves.setdefault(name, _Moved()).add(before, after)

    def leaving_last(self, links: list[list[str]]) -> list[list[str]]:
        """Those of the links without which nothing changes but what they are heard in.

        A cell hands its state on: what it has read on its way is left out at the end of that only.
        """
        whole = {name: link for link in links for name in link}
        gone, heard_behind = set(whole), set()
        for name, ear in reversed(self.ears.items()):
            if ear.cell in heard_behind:
                gone.difference_update(whole.get(name, ()))
            if ear.cell is not None and name not in gone:
                heard_behind.add(ear.cell)
        return [link for link in links if gone.issuperset(link)]

    def moved(self, name: str) -> float | None:
        """How far cutting a connection moves the T of its block."""
        return self.moves[name].in_spreads if name in self.moves else None


_NOTHING = "The loader gave no images, so there is nothing to measure. Pass one that is not used up."


def _on(value: Any, device: torch.device | str) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputError(
            f"The loader gives images and labels of {type(value).__name__}, and tensors are needed. Collate them first."
        )
    return value.to(device)


def _check_labels(labels: Tensor, images: int, classes: int) -> None:
    if labels.shape != (images,) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(
            f"Labels of shape {tuple(labels.shape)} and {labels.dtype} are no class numbers for {images} images. Give "
            "whole numbers, [N]."
        )
    for label in (int(labels.min()), int(labels.max())) if images else ():
        if not -1 <= label < classes:
            raise InputError(
                f"A label is {label}, and the model has {classes} classes, counted from 0. Give labels that are among "
                "them, or -1 for images that do not count."
            )


def _plain(model: nn.Module) -> nn.Module:
    """The model inside what compiles it or spreads it over devices."""
    while True:
        inside = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inside = model.module
        if inside is None:
            return model
        model = inside


def _other(images: int, number: int) -> Tensor:
    """For each image of a batch another one of it: along one circle through all, drawn for the batch's number alone."""
    circle = torch.randperm(images, generator=torch.Generator().manual_seed(number))
    return torch.empty_like(circle).scatter_(0, circle, circle.roll(-1))
