"""Which images make up which batch, and with which random numbers: functions of seed, epoch and index alone.

Nothing here draws from a global generator. So a run that was interrupted goes on with the very batches and
augmentations that it would have had, whatever had been read ahead, and two networks can be shown the same.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from dcafy.errors import DcafyError, InputError

Key = tuple[int, int]
"""(epoch, index) of a sample."""


class UnreadableImage(DcafyError):
    """One image of a data set is no image; training goes on without it."""


class Sample(NamedTuple):
    """One image, made ready; ``label`` is -1 where it only takes the place of one that could not be read.

    ``unreadable``: the names of the images that it stands in for, with the reasons.
    """

    image: Any
    label: Any
    key: Key
    unreadable: tuple[str, ...] = ()


def derived_seed(*numbers: int) -> int:
    """A seed for whatever these numbers stand for: equal for equal numbers, unrelated for others."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Inside it the CPU's random numbers of torch, numpy and Python follow from ``numbers``; then all is as before."""
    with Draws(*numbers).drawn():
        yield


class Draws:
    """The CPU's random numbers of torch, numpy and Python that follow from ``numbers``, drawn bit by bit."""

    def __init__(self, *numbers: int) -> None:
        self.seed = derived_seed(*numbers)
        self.states: _States | None = None

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Inside it the next of them are drawn; then the global generators are as before."""
        before = _states()
        try:
            if self.states is None:
                torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would reach for the GPU's as well
                np.random.seed(self.seed % 2**32)
                random.seed(self.seed)
            else:
                _put_back(self.states)
            yield
        finally:
            self.states = _states()
            _put_back(before)


_States = tuple[torch.Tensor, Any, Any]


def _states() -> _States:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _put_back(states: _States) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


class Batches(Sampler[list[Key]]):
    """The keys of each batch of ``epoch``, from batch ``start`` on.

    Images that do not fill a last batch are left out of a shuffled epoch, unless there is no other.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int, shuffle: bool) -> None:
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.drop_last = shuffle and length >= batch_size
        self.epoch = 0
        self.start = 0

    @property
    def in_all(self) -> int:
        """Batches in a whole epoch."""
        return self.length // self.batch_size if self.drop_last else -(-self.length // self.batch_size)

    def __len__(self) -> int:
        return self.in_all - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        order = list(range(self.length))
        if self.shuffle:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
        for number in range(self.start, self.in_all):
            yield [(self.epoch, index) for index in order[number * self.batch_size : (number + 1) * self.batch_size]]


class Spread(Dataset[Any]):
    """At most ``most`` of the samples of ``source``, evenly spread over it: data sets are often sorted by class.

    ``mixed``: in an order of its own, always the same, so that each batch has samples from everywhere.
    """

    def __init__(self, source: Any, most: int, *, mixed: bool = False) -> None:
        self.source = source
        self.places = [i * len(source) // min(most, len(source)) for i in range(min(most, len(source)))]
        if mixed:
            generator = torch.Generator().manual_seed(derived_seed(len(self.places)))
            self.places = [self.places[i] for i in torch.randperm(len(self.places), generator=generator).tolist()]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return self.source[self.places[index]]


def pair(item: Any) -> tuple[Any, Any]:
    """What a data set gives, as an image with its label; ``InputError`` where it is something else."""
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    what = f"{len(item)} things" if isinstance(item, tuple | list) else type(item).__name__
    raise InputError(f"The data set gives {what} for an index, not (image, label).")


class Seeded(Dataset[Sample]):
    """A data set of (image, label) whose random transforms depend on seed, epoch and index alone.

    An image that cannot be read is stood in for by the next one that can; ``counts_stand_ins``: whether that one
    then counts with its label (in training) or not at all (in validation).
    """

    def __init__(
        self,
        source: Sequence[Any],
        *,
        seed: int,
        transform: Callable[..., Any] | None = None,
        counts_stand_ins: bool = True,
    ) -> None:
        self.source, self.seed, self.transform = source, seed, transform
        self.counts_stand_ins = counts_stand_ins

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key
        unreadable: list[str] = []
        for offset in range(len(self.source)):
            place, is_read = (index + offset) % len(self.source), False
            with seeded(self.seed, epoch, index + offset):
                try:
                    image, label = pair(self.source[place])
                    is_read = True
                    if self.transform is not None:
                        image, label = self.transform(image, label)
                except UnreadableImage as error:  # a transform does not know whose picture it has
                    unreadable.append(f"image {place}: {error}" if is_read else str(error))
                    continue
            if unreadable and not self.counts_stand_ins:
                label = -1
            return Sample(image, label, key, tuple(unreadable))
        raise InputError(f"None of the {len(self.source)} images can be read; the first: {unreadable[0]}")
