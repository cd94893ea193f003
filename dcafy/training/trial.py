"""What a training would take: one batch goes through all of it, and nothing is kept."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dcafy.training.given import fed
from dcafy.training.loop import Training
from dcafy.training.options import TrainingConfig
from dcafy.training.state import draws_kept, seed_draws
from dcafy.training.tasks import Task
from dcafy.training.telling import Silent


@dataclass(frozen=True)
class Trial:
    """What was measured with one batch.

    ``batches``        those of training in an epoch, ``val_batches`` those of validation; in seconds each
    ``usage_seconds``  what it takes in the end to look at the connections
    ``peak``           bytes: the most that was allocated on a GPU, else of the whole process; ``None`` where unknown
    """

    batches: int
    seconds: float
    val_batches: int
    val_seconds: float
    usage_seconds: float
    peak: int | None
    device: str
    loss: float

    @property
    def epoch_seconds(self) -> float:
        """What an epoch takes, validation included."""
        return self.batches * self.seconds + self.val_batches * self.val_seconds


def tried(
    model: nn.Module, train: Any, val: Any, config: TrainingConfig, task: Task, new_layers: tuple[str, ...] = ()
) -> Trial:
    """What a training takes, from one batch that goes through all of it: reading, a step, validation and usage.

    Each part is gone through twice, and the second time counts. ``model`` has made two steps afterwards. Nothing is
    written. Raises what :func:`dcafy.training.finetune` raises before its first step.
    """
    run = Training(model, fed("train", train, config, task), fed("val", val, config, task), config, task, new_layers,
                   Silent())  # fmt: skip
    device = run.accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with draws_kept(device):
        seed_draws(config.seed, device)
        return _measured(run, device)


def _measured(run: Training, device: torch.device) -> Trial:
    config = run.config
    # With all that is ever trained at once, and a step after every batch.
    run.progress.epoch = min(config.freeze_base_epochs, config.epochs - 1)
    run.accelerator.gradient_accumulation_steps = 1
    seconds = 0.0
    with run.phase() as wrapped:
        if wrapped is not None:
            for _ in range(2):
                start = _now(device)
                run.batch_done(wrapped, next(iter(run.train_loader)))
                seconds = _now(device) - start
    loss = run.progress.means()[0]
    val_seconds = 0.0
    for _ in range(2):
        start = _now(device)
        run.evaluate(run.model, most=1)
        val_seconds = _now(device) - start
    start = _now(device)
    shown = run.usage(min(config.usage_images, config.batch_size))
    usage = 0.0 if shown is None else (_now(device) - start) * _batches(shown.images, run)
    return Trial(run.order.in_all, seconds, run.val_order.in_all, val_seconds, usage, _peak(device), str(device), loss)


def _batches(images: int, run: Training) -> float:
    """How many times as many images the connections are looked at with in the end."""
    return max(min(run.config.usage_images, run.val_order.length) / max(images, 1), 1.0)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
