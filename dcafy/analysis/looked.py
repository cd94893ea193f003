"""A network while it is being looked at: run on a loader as it is, and with what it hears changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcafy.analysis.contributions import contributions
from dcafy.analysis.ears import CHANGES, Ear, eager, hearing, run
from dcafy.analysis.tapped import Tap, tapped
from dcafy.emit.dca import is_connected, recipes
from dcafy.errors import DcafyError, InputError
from dcafy.graph.modes import evaluating
from dcafy.graph.paths import joined
from dcafy.wording import one_line, reason_of


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
class Looked:
    """The network while it is being looked at: run batch by batch, as it is and changed.

    It is a copy of the model on the same parameters that tells its T, where that can be made; else the model itself.
    """

    model: nn.Module
    loader: Iterable[Any]
    device: torch.device | str
    ears: dict[str, Ear] = field(default_factory=dict)
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
        with evaluating(self.network), eager(), hearing(self.network) as self.ears:
            yield

    def _in_eval(self, inputs: Tensor, labels: Tensor) -> Tensor:
        with evaluating(self.network), eager():
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
            outputs = run(self.network, inputs, self.ears)
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
                self.ears[name].change, self.ears[name].order = CHANGES[kind], order
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


def unwrapped(model: nn.Module) -> nn.Module:
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
