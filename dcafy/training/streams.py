"""What cannot be asked for its n-th image: iterable data sets, and DataLoaders that only go from front to back."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dcafy.errors import InputError
from dcafy.images.order import Batches, Draws, Sample, Seeded, Spread, pair
from dcafy.training.feeding import Fed, Order, first_of, generators_seeded, images_and_labels, with_epoch
from dcafy.training.options import TrainingConfig
from dcafy.training.tasks import Batch, Task, class_number
from dcafy.wording import warn


class Stream(IterableDataset[Batch]):
    """The batches of ``epoch``, from batch ``start`` on; what comes before it is read again and left out.

    ``made``: (what the DataLoader gives, the epoch, images before it in the epoch) -> a batch. ``in_all`` and
    ``length``: batches and images of an epoch as far as that is known, else 0. ``most``: batches that are taken.
    """

    def __init__(self, name: str, loader: DataLoader[Any], made: Callable[[Any, int, int], Batch], seed: int) -> None:
        self.name, self.loader, self.made, self.seed = name, loader, made, seed
        self.epoch = self.start = self.in_all = self.length = 0
        self.most: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        batches = images = 0
        for given in itertools.islice(self.given(), self.most):
            batch = self.made(given, self.epoch, images)
            batches, images = batches + 1, images + len(batch.indices)
            if batches > self.start:
                yield batch
        if not batches:
            raise InputError(f"{self.name} has no images.")
        if self.in_all > batches:
            warn(f"{self.name} says that it has {self.in_all} batches and has given {batches}: make its length right.")
        if not self.in_all:
            self.in_all, self.length = batches, images

    def given(self) -> Iterator[Any]:
        """What the DataLoader gives in this epoch, with random numbers that follow from seed and epoch."""
        draws, holders = Draws(self.seed, self.epoch), [self.loader, self.loader.dataset]
        with_epoch(holders, self.epoch)
        with generators_seeded(holders, self.seed, self.epoch):
            with draws.drawn():
                batches = iter(self.loader)
            while True:
                with draws.drawn():  # the network's dropout draws in between, from the global generators
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch


class FedByStream(Fed):
    """The images from an iterable data set, or from a DataLoader that makes batches of such a one.

    An epoch is what it gives from front to back, and of what has a length in training no more than that: so an endless
    one has epochs, too. What has no length is read through once beforehand to be counted, for the rates hang on the
    number of steps. Its random transforms follow from (seed, epoch) where they draw from the global generators; a
    training goes on from the middle of an epoch by reading again what comes before.
    """

    def __init__(self, name: str, given: Any, config: TrainingConfig, task: Task) -> None:
        self.own = isinstance(given, DataLoader)
        data = given.dataset if self.own else given
        super().__init__(data, config, task)
        self.name = name
        self.given: DataLoader[Any] = given
        if not self.own:
            self.given = DataLoader(data, config.batch_size, num_workers=config.workers, collate_fn=list)
        self.batch_size, self.workers = self.given.batch_size or config.batch_size, 0

    def order(self, *, seed: int, training: bool) -> Stream:
        found = self._stream(seed, training=training)
        try:
            found.in_all = len(self.given)
        except TypeError:
            if training:
                warn(f"{self.name} has no length, so it is read through once to be counted. A __len__ spares that.")
                for _ in found:  # which counts
                    pass
        else:
            found.length = len(self.data) if self.given.batch_size is not None else found.in_all
            found.most = found.in_all if training else None
        self.shown = found
        return found

    def _stream(self, seed: int, *, training: bool) -> Stream:
        return Stream(self.name, self.given, functools.partial(self._made, training=training), seed)

    def _made(self, given: Any, epoch: int, before: int, *, training: bool) -> Batch:
        if not self.own:
            pairs = [pair(item) for item in given]
            samples = [Sample(*one, (epoch, before + place)) for place, one in enumerate(pairs)]
            return self.task.collate(samples, training=training)
        images, labels = images_and_labels(given)
        samples = [Sample(None, 0, (epoch, before + place)) for place in range(self._count(labels))]
        return self.task.batched(images, labels, samples, training=training)

    def _count(self, labels: Any) -> int:
        try:
            return len(labels)
        except TypeError as error:
            raise InputError(f"{self.name} gives one image at a time. Give the DataLoader a batch_size.") from error

    def loader(self, order: Order, *, seed: int, training: bool, cuda: bool) -> DataLoader[Any]:
        own = torch.Generator()  # the global one is dropout's
        return DataLoader(order, batch_size=1, collate_fn=_the_only, pin_memory=cuda, generator=own)  # type: ignore[arg-type]

    def some(self, most: int, *, cuda: bool) -> DataLoader[Any]:
        known = self.shown.length or most
        places = Spread(range(known), most, mixed=True).places
        wanted, found = set(places), dict[int, tuple[Any, Any]]()
        for place, (image, label) in enumerate(self._pairs(seed=0)):
            if place in wanted:  # a row of a batch would keep the whole batch
                found[place] = (image.clone() if isinstance(image, Tensor) else image), label
            if len(found) == len(wanted):
                break
        samples = Seeded([found[place] for place in places if place in found], seed=0, counts_stand_ins=False)
        order = Batches(len(samples), self.batch_size, seed=0, shuffle=False)
        return self.loaded(samples, order, training=False, cuda=cuda)

    def _pairs(self, *, seed: int) -> Iterator[tuple[Any, Any]]:
        """The images of the first epoch, one by one."""
        for given in self._stream(seed, training=False).given():
            yield from zip(*images_and_labels(given), strict=True) if self.own else map(pair, given)

    def first(self, *, seed: int) -> Sample:
        given = next(self._stream(seed, training=True).given(), None)
        if given is None:
            raise InputError(f"{self.name} has no images.")
        if not self.own:
            return Sample(*pair(given[0]), (0, 0))
        self._count(images_and_labels(given)[1])
        return Sample(*first_of(given), (0, 0))

    def labels(self) -> list[int]:
        return [class_number(label) for _, label in self._pairs(seed=0)]


def _the_only(batches: list[Batch]) -> Batch:
    return batches[0]
