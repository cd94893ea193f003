"""What a training reads: data sets, of which it makes the batches, or DataLoaders, whose batches it takes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, Subset

from dcafy.errors import InputError, UsageError
from dcafy.images.data import known_labels
from dcafy.images.order import Batches, Key, Sample, Seeded, Spread, derived_seed, seeded
from dcafy.training.options import TrainingConfig
from dcafy.training.tasks import Batch, Task


class Fed:
    """The images of a training, or those that it validates on, from a data set of (image, label)."""

    def __init__(self, data: Any, config: TrainingConfig, task: Task) -> None:
        self.data, self.task = data, task
        self.batch_size, self.workers = config.batch_size, config.workers
        self.begin_worker: Callable[[int], None] | None = None
        self.transform = getattr(data, "transform_sample", None)

    def samples(self, *, seed: int, training: bool, spread: int | None = None) -> Seeded:
        """Every image by (epoch, index); ``spread``: so many of them, from everywhere, in mixed order."""
        # Mixed: data sets are often sorted by class, and messages are shuffled within a batch.
        source: Any = self.data if spread is None else Spread(self.data, spread, mixed=True)
        return Seeded(source, seed=seed, transform=self.transform, counts_stand_ins=training)

    def order(self, *, seed: int, training: bool) -> Batches | GivenBatches:
        """Which images make up which batch of an epoch."""
        return Batches(len(self.data), self.batch_size, seed=seed, shuffle=training)

    def batch(self, samples: Sequence[Sample], *, training: bool) -> Batch:
        """The samples as a batch."""
        return self.task.collate(samples, training=training)

    def first(self, samples: Seeded) -> Sample:
        """A sample to look at."""
        return samples[(0, 0)]

    def labels(self) -> list[int]:
        """The class of every image; those of a data set that has no list of them are read one by one."""
        known = known_labels(self.data)
        if known is not None:
            return known
        seen = Seeded(self.data, seed=0)
        return [int(seen[(0, index)].label) for index in range(len(seen))]

    def loader(self, samples: Seeded, order: Batches | GivenBatches, *, training: bool, cuda: bool) -> DataLoader[Any]:
        """What gives the batches."""
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

    def samples(self, *, seed: int, training: bool, spread: int | None = None) -> Seeded:
        if spread is None:
            return super().samples(seed=seed, training=training)
        places = sorted({index for batch in GivenBatches(self.given, seed=0) for _, index in batch})
        shown: Any = Spread(Subset(self.data, places), spread, mixed=True)
        return Seeded(shown, seed=seed, counts_stand_ins=training)

    def batch(self, samples: Sequence[Sample], *, training: bool) -> Batch:
        return self.task.batched(*self._pair(samples), samples, training=training)

    def _pair(self, samples: Sequence[Sample]) -> tuple[Any, Any]:
        """What the ``collate_fn`` makes of the samples; ``InputError`` where that is no images with labels."""
        made = self.given.collate_fn([sample.image for sample in samples])
        if not isinstance(made, list | tuple) or len(made) != 2:
            what = f"{len(made)} things" if isinstance(made, list | tuple) else f"a {type(made).__name__}"
            raise InputError(
                f"The DataLoader gives {what} as a batch, and training takes (images, labels). Give it a collate_fn "
                "that makes these two."
            )
        return made[0], made[1]

    def first(self, samples: Seeded) -> Sample:
        found = samples[(0, 0)]
        images, labels = self._pair([found, found])
        return found._replace(image=images[0], label=labels[0])

    def labels(self) -> list[int]:
        known = known_labels(self.given.dataset)
        if known is not None:
            return known
        seen = Seeded(self.data, seed=0)
        every = (seen[(0, index)] for index in range(len(seen)))
        return [int(self._pair([one, one])[1][0]) for one in every]


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
        for sampler in samplers:
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(self.epoch)
        with seeded(self.seed, self.epoch), _seeded_too([self.loader, *samplers], self.seed, self.epoch):
            batches = [[(self.epoch, int(index)) for index in batch] for batch in self.batch_sampler]
        yield from batches[self.start :]


@contextlib.contextmanager
def _seeded_too(holders: Sequence[Any], seed: int, epoch: int) -> Iterator[None]:
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


def fed(name: str, given: Any, config: TrainingConfig, task: Task) -> Fed:
    """The images of ``given``, a data set or a DataLoader; ``InputError`` where it is neither, or has none.

    ``name``: what messages call it.
    """
    is_loader = isinstance(given, DataLoader)
    data = given.dataset if isinstance(given, DataLoader) else given
    if is_loader and (isinstance(data, IterableDataset) or given.batch_sampler is None):
        why = "its data set has no index" if given.batch_sampler is not None else "it makes no batches"
        raise InputError(
            f"{name} is a DataLoader from whose middle no training can go on: {why}. Pass one over a data set with a "
            "length and an index, with a batch_size or a batch_sampler."
        )
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise InputError(
            f"{name} is a {type(given).__name__}; finetune takes DataLoaders, and data sets of (image, label) with a "
            "length and an index."
        )
    made: Callable[..., Fed] = FedByLoader if is_loader else Fed
    if not len(data) or (is_loader and not len(given)):
        raise InputError(f"{name} has no images.")
    return made(given, config, task)


def check_split(name: str, batches: Fed, processes: int) -> None:
    """Nothing where every batch can be split between the processes; else ``UsageError``."""
    own = batches.given.batch_size if isinstance(batches, FedByLoader) else batches.batch_size
    if processes > 1 and own is None:
        raise UsageError(
            f"The batch_sampler of {name} makes batches that cannot be split between {processes} processes. Pass a "
            "DataLoader with a batch_size."
        )
    if own is not None and own % processes:
        option = f"The batch_size {own} of {name}" if isinstance(batches, FedByLoader) else f"--batch-size {own}"
        raise UsageError(f"{option} cannot be split between {processes} processes. Choose a multiple.")
