"""What a training was given, as what it reads; what it cannot be is told before anything is done."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from dcafy.errors import InputError, UsageError
from dcafy.training.feeding import Fed, FedByLoader
from dcafy.training.options import TrainingConfig
from dcafy.training.streams import FedByStream
from dcafy.training.tasks import Task


def fed(name: str, given: Any, config: TrainingConfig, task: Task) -> Fed:
    """The images of ``given``, a data set or a DataLoader; ``InputError`` where it is neither, or has none.

    ``name``: what messages call it.
    """
    is_loader = isinstance(given, DataLoader)
    data: Any = given.dataset if is_loader else given
    if isinstance(data, IterableDataset) or (is_loader and given.batch_sampler is None):
        if is_loader and given.persistent_workers:
            raise InputError(
                f"{name} has persistent workers, whose random numbers go on from epoch to epoch, so that no training "
                "could be gone on with. Leave persistent_workers out."
            )
        return FedByStream(name, given, config, task)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise InputError(
            f"{name} is a {type(given).__name__}; finetune takes DataLoaders, iterable data sets of torch's "
            "(IterableDataset), and data sets of (image, label) with a length and an index."
        )
    if not len(data) or (is_loader and not len(given)):
        raise InputError(f"{name} has no images.")
    return FedByLoader(given, config, task) if is_loader else Fed(given, config, task)


def check_split(name: str, batches: Fed, processes: int) -> None:
    """Nothing where every batch can be split between the processes; else ``UsageError``."""
    if processes > 1 and isinstance(batches, FedByStream):
        raise UsageError(
            f"{name} cannot be split between {processes} processes, for nobody knows which images come when. Pass a "
            "data set with a length and an index, or train in one process."
        )
    own = batches.given.batch_size if isinstance(batches, FedByLoader) else batches.batch_size
    if processes > 1 and own is None:
        raise UsageError(
            f"The batch_sampler of {name} makes batches that cannot be split between {processes} processes. Pass a "
            "DataLoader with a batch_size."
        )
    if own is not None and own % processes:
        option = f"The batch_size {own} of {name}" if isinstance(batches, FedByLoader) else f"--batch-size {own}"
        raise UsageError(f"{option} cannot be split between {processes} processes. Choose a multiple.")
