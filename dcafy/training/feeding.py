"""What a training reads: data sets, of which it makes the batches, or DataLoaders, whose batches it takes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Sampler, Subset

from dcafy.errors import InputError
from dcafy.images.data import known_labels
from dcafy.images.order import Batches, Key, Sample, Seeded, Spread, derived_seed, seeded
from dcafy.training.options import TrainingConfig
from dcafy.training.tasks import Batch, Task, class_number


class Order(Protocol):
    """Which batches an epoch has: those of ``epoch``, from batch ``start`` on.

    ``in_all``: batches of a whole epoch, ``length``: images of the data set.
    """

    epoch: int
    start: int
    length: int

    @property
    def in_all(self) -> int: ...


class Fed:
    """The images of a training, or those that it validates on, from a data set of (image, label)."""

    def __init__(self, data: Any, config: TrainingConfig, task: Task) -> None:
        self.data, self.task = data, task
        self.batch_size, self.workers = config.batch_size, config.workers
        self.begin_worker: Callable[[int], None] | None = None
        self.transform = getattr(data, "transform_sample", None)

    def order(self, *, seed: int, training: bool) -> Order:
        """Which batches an epoch has."""
        return Batches(len(self.data), self.batch_size, seed=seed, shuffle=training)

    def loader(self, order: Any, *, seed: int, training: bool, cuda: bool) -> DataLoader[Any]:
        """What gives the batches; the random transforms of an image follow from (``seed``, epoch, index)."""
        samples = Seeded(self.data, seed=seed, transform=self.transform, counts_stand_ins=training)
        return self.loaded(samples, order, training=training, cuda=cuda)

    def some(self, most: int, *, cuda: bool) -> DataLoader[Any]:
        """What gives at most so many images, from everywhere, to look at a network with."""
        # Mixed: data sets are often sorted by class, and messages are shuffled within a batch.
        shown: Any = Spread(self.shown_images(), most, mixed=True)
        samples = Seeded(shown, seed=0, transform=self.transform, counts_stand_ins=False)
        order = Batches(len(samples), self.batch_size, seed=0, shuffle=False)
        return self.loaded(samples, order, training=False, cuda=cuda)

    def shown_images(self) -> Any:
        """The images that an epoch goes through."""
        return self.data

    def batch(self, samples: Sequence[Sample], *, training: bool) -> Batch:
        """The samples as a batch."""
        return self.task.collate(samples, training=training)

    def first(self, *, seed: int) -> Sample:
        """A sample to look at."""
        return Seeded(self.data, seed=seed, transform=self.transform)[(0, 0)]

    def labels(self) -> list[int]:
        """The class of every image; those of a data set that has no list of them are read one by one."""
        known = known_labels(self.data)
        if known is not None:
            return known
        seen = Seeded(self.data, seed=0)
        return [class_number(seen[(0, index)].label) for index in range(len(seen))]

    def loaded(self, samples: Seeded, order: Any, *, training: bool, cuda: bool) -> DataLoader[Any]:
        """What gives the samples in that order, as batches."""
        return DataLoader(
            samples,
            batch_sampler=order,
            collate_fn=functools.partial(self.batch, training=training),
            num_workers=self.workers,
            worker_init_fn=self.begin_worker,
            pin_memory=cuda,
            generator=torch.Generator(),  # its own: the global one is dropout's
            multiprocessing_context="spawn" if self.workers and cuda else None,
        )


class FedByLoader(Fed):
    """The images from a DataLoader: its data set, the batches of its sampler, its ``collate_fn`` and its workers.

    The order of its sampler and the random transforms of its data set follow from (seed, epoch, index), as those of a
    data set do: so the training can be gone on with from the middle of an epoch.
    """

    def __init__(self, loader: DataLoader[Any], config: TrainingConfig, task: Task) -> None:
        super().__init__(_Items(loader.dataset), config, task)
        self.given, self.workers, self.begin_worker = loader, loader.num_workers, loader.worker_init_fn
        self.batch_size = loader.batch_size or config.batch_size

    def order(self, *, seed: int, training: bool) -> GivenBatches:
        return GivenBatches(self.given, seed=seed)

    def shown_images(self) -> Any:
        return Subset(self.data, sorted({index for batch in GivenBatches(self.given, seed=0) for _, index in batch}))

    def batch(self, samples: Sequence[Sample], *, training: bool) -> Batch:
        return self.task.batched(*self._pair(samples), samples, training=training)

    def _pair(self, samples: Sequence[Sample]) -> tuple[Any, Any]:
        """What the ``collate_fn`` makes of the samples; ``InputError`` where that is no images with labels."""
        return images_and_labels(self.given.collate_fn([sample.image for sample in samples]))

    def first(self, *, seed: int) -> Sample:
        found = super().first(seed=seed)
        image, label = first_of(self._pair([found, found]))
        return found._replace(image=image, label=label)

    def labels(self) -> list[int]:
        known = known_labels(self.given.dataset)
        if known is not None:
            return known
        seen = Seeded(self.data, seed=0)
        every = (seen[(0, index)] for index in range(len(seen)))
        return [class_number(self._pair([one, one])[1][0]) for one in every]


def images_and_labels(made: Any) -> tuple[Any, Any]:
    """What a DataLoader gives as a batch, as images and labels; ``InputError`` where it is something else."""
    if isinstance(made, list | tuple) and len(made) == 2:
        return made[0], made[1]
    what = f"{len(made)} things" if isinstance(made, list | tuple) else f"a {type(made).__name__}"
    raise InputError(
        f"The DataLoader gives {what} as a batch, and training takes (images, labels). Give it a collate_fn "
        "that makes these two."
    )


def first_of(made: Any) -> tuple[Any, Any]:
    """The first image of a batch with its label; ``InputError`` where there is none."""
    images, labels = images_and_labels(made)
    try:
        return images[0], labels[0]
    except (LookupError, TypeError) as error:
        kinds = " and ".join(f"a {type(part).__name__}" for part in made)
        raise InputError(
            f"The DataLoader gives {kinds} as a batch, and training takes (images, labels) with one of each for every "
            "sample. Give it a collate_fn that makes them."
        ) from error


class _Items:
    """What a data set gives, whole, as if it were an image: its DataLoader knows what to make of it."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.data[index], 0


class GivenBatches(Sampler[list[Key]]):
    """The batches of ``epoch`` as the sampler of a DataLoader makes them, from batch ``start`` on."""

    def __init__(self, loader: DataLoader[Any], *, seed: int) -> None:
        self.loader, self.seed = loader, seed
        self.batch_sampler: Any = loader.batch_sampler
        self.batch_size = loader.batch_size or 1  # Accelerate asks, also where it splits nothing
        self.drop_last, self.length = loader.drop_last, len(loader.dataset)  # type: ignore[arg-type]
        self.epoch = self.start = 0

    @property
    def in_all(self) -> int:
        """Batches in a whole epoch."""
        return len(self.batch_sampler)

    def __len__(self) -> int:
        return self.in_all - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        samplers = [self.batch_sampler, getattr(self.batch_sampler, "sampler", None)]
        with_epoch(samplers, self.epoch)
        with seeded(self.seed, self.epoch), generators_seeded([self.loader, *samplers], self.seed, self.epoch):
            batches = [[(self.epoch, int(index)) for index in batch] for batch in self.batch_sampler]
        yield from batches[self.start :]


def with_epoch(holders: Sequence[Any], epoch: int) -> None:
    """Tells those that want to know it which epoch comes."""
    for one in holders:
        if callable(getattr(one, "set_epoch", None)):
            one.set_epoch(epoch)


@contextlib.contextmanager
def generators_seeded(holders: Sequence[Any], seed: int, epoch: int) -> Iterator[None]:
    """Inside it generators of the user's own follow from seed and epoch; then they are as they were."""
    found = [getattr(holder, "generator", None) for holder in holders]
    own = {id(one): one for one in found if isinstance(one, torch.Generator)}
    states = [one.get_state() for one in own.values()]
    try:
        for one in own.values():
            one.manual_seed(derived_seed(seed, epoch))
        yield
    finally:
        for one, state in zip(own.values(), states, strict=True):
            one.set_state(state)
