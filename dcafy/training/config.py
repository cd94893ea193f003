"""What a run is asked to do: the options of ``dcafy finetune`` as frozen data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcafy.errors import UsageError
from dcafy.plan.options import check_choices, setting

__all__ = ["TASKS", "DataOptions", "RunOptions", "TrainingConfig", "with_defaults_of"]


TASKS: dict[str, dict[str, Any]] = {
    "classification": {},
    "detection": {"optimizer": "sgd", "schedule": "multistep", "epochs": 12, "batch_size": 16},
}
"""What a network can be trained for -> the defaults that are others for it."""


@dataclass(frozen=True)
class RunOptions:
    """What a run trains on, where it is kept, and how it begins."""

    data: str | None = setting(
        None,
        "The images: imagefolder:PATH (with train/ and val/, or one folder for each class), torchvision:NAME:ROOT such "
        "as torchvision:CIFAR10:data, digits, or fashion-mnist[:PATH]. With --task detection: "
        "coco:IMAGES:ANNOTATIONS.json, or coco:IMAGES:TRAIN.json:VAL_IMAGES:VAL.json.",
        metavar="DATA",
    )
    task: str = setting(
        "classification",
        "What the network is trained for. Detectors are measured by average precision, and have other defaults: sgd, "
        "12 epochs, 16 images in a batch, --schedule multistep, a learning rate of 0.01 for 16 images (in proportion).",
        choices=tuple(TASKS),
    )
    output: Path | None = setting(None, "The folder of the run.", metavar="DIR", short="-o")
    resume: bool = setting(
        False, "Go on with the run in a folder, which MODEL or -o names; without a checkpoint in it, start over."
    )
    compare: bool = setting(
        False, "Train the unconnected network as well, with the same seeds and budget, and compare."
    )
    seeds: int = setting(1, "How many seeds are compared.")
    json_log: Path | None = setting(
        None, "Also write every step and epoch here, one JSON object a line.", metavar="FILE"
    )

    def __post_init__(self) -> None:
        check_choices(self)
        _at_least("seeds", self.seeds, 1)


@dataclass(frozen=True)
class DataOptions:
    """Where the images come from and how they are shown to the network."""

    val_fraction: float = setting(0.2, "The part of the images to validate on, where the data has no part of its own.")
    image_size: int | None = setting(
        None, "Side of the images in pixels. [default: what the weights were trained with, else the network's own]"
    )
    augment: str = setting(
        "auto",
        "How training images are varied: none, shift (by an eighth), standard (random resized crop and flip, as in "
        "paper 4.1), trivial (standard and TrivialAugment); auto is shift for digits and fashion, else standard.",
        choices=("auto", "none", "shift", "standard", "trivial"),
    )
    download: bool = setting(False, "Fetch a torchvision data set that is not there.")
    strict: bool = setting(False, "Stop at an image that cannot be read. [default: name, count and skip it]")

    def __post_init__(self) -> None:
        check_choices(self)
        _within("--val-fraction", self.val_fraction, 0, 1, "a part between 0 and 1")
        if self.image_size is not None and self.image_size < 1:
            raise UsageError(f"--image-size {self.image_size} is no number of pixels.")


LEARNING_RATES = {"adamw": 5e-4, "sgd": 0.01}
WEIGHT_DECAYS = {"adamw": 1e-2, "sgd": 1e-4}


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained: the optimizer, its schedule, the budget, what is kept."""

    epochs: int = setting(10, "How often the training images are gone through.")
    batch_size: int = setting(32, "Images in a batch, over all processes together.")
    accumulate: int = setting(1, "Batches for one step of the optimizer.")
    optimizer: str = setting("adamw", "adamw, or sgd with Nesterov momentum (the paper's).", choices=("adamw", "sgd"))
    lr: float | None = setting(None, "Learning rate of the base. [default: 0.0005 with adamw, 0.01 with sgd]")
    connection_lr: float | None = setting(None, "Learning rate of the connections. [default: 10 times --lr]")
    weight_decay: float | None = setting(
        None, "Not on α, β, norms and biases. [default: 0.01 with adamw, 0.0001 with sgd]"
    )
    momentum: float = setting(0.9, "Momentum of sgd.")
    schedule: str = setting(
        "cosine",
        "How the rates fall: cosine, to 0; step, by 10 every --step-epochs (paper 4.1); multistep, by 10 at 2/3 and "
        "again at 11/12 of the run (usual for detectors); constant.",
        choices=("cosine", "step", "multistep", "constant"),
    )
    step_epochs: int = setting(30, "Epochs between two steps of the schedule.")
    warmup_epochs: float = setting(0.0, "Epochs over which the rates rise from 0.")
    label_smoothing: float = setting(0.0, "The part of each label that is spread over all classes.")
    mixup: float = setting(0.0, "Strength (alpha) of mixup; 0 is none.")
    cutmix: float = setting(0.0, "Strength (alpha) of CutMix; 0 is none. With both, each batch gets one of them.")
    ema: float = setting(0.0, "Decay of an average of the weights, such as 0.999, which is then evaluated and kept.")
    clip_norm: float = setting(0.0, "The largest norm of all gradients together; 0 is no limit.")
    precision: str = setting("no", "Mixed precision.", choices=("no", "bf16", "fp16"))
    freeze_base: bool = setting(False, "Train the connections only (and a new classifier, where there is one).")
    freeze_base_epochs: int = setting(0, "Epochs at the start in which the connections train alone.")
    seed: int = setting(0, "Decides the new weights, the order of the images, augmentation and dropout.")
    workers: int = setting(0, "Processes that read images, for each training process; 0 reads them in it.")
    checkpoint_steps: int = setting(0, "Steps between two checkpoints. [default: one after each epoch]")
    usage_images: int = setting(2048, "Validation images on which each connection is cut at the end; 0 is none.")
    cpu: bool = setting(False, "Train on the CPU also where there is a GPU.")

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("epochs", "batch_size", "accumulate", "step_epochs"):
            _at_least(name, getattr(self, name), 1)
        for name in ("warmup_epochs", "mixup", "cutmix", "clip_norm", "freeze_base_epochs", "workers"):
            _at_least(name, getattr(self, name), 0)
        for name in ("checkpoint_steps", "usage_images", "seed"):
            _at_least(name, getattr(self, name), 0)
        for name in ("lr", "connection_lr", "weight_decay"):
            _at_least(name, getattr(self, name) or 0, 0)
        for name in ("label_smoothing", "ema", "momentum"):
            _within(f"--{name.replace('_', '-')}", getattr(self, name), 0, 1, "at least 0 and below 1", closed=True)

    @property
    def base_rate(self) -> float:
        """The learning rate of the base."""
        return LEARNING_RATES[self.optimizer] if self.lr is None else self.lr

    @property
    def connection_rate(self) -> float:
        """The learning rate of everything under ``dca``."""
        return 10 * self.base_rate if self.connection_lr is None else self.connection_lr

    @property
    def decay(self) -> float:
        """The weight decay of what has one."""
        return WEIGHT_DECAYS[self.optimizer] if self.weight_decay is None else self.weight_decay


def _at_least(name: str, value: float, least: float) -> None:
    if not least <= value < float("inf"):
        raise UsageError(f"--{name.replace('_', '-')} must be at least {least} and finite, not {value}.")


def _within(option: str, value: float, least: float, most: float, expected: str, *, closed: bool = False) -> None:
    if not (least <= value if closed else least < value) or not value < most:
        raise UsageError(f"{option} must be {expected}, not {value}.")


_DETECTION_RATE = 0.01 / 16
"""RetinaNet's learning rate for each image of a batch: 0.01 with 16 (Lin et al., 2017, arXiv 1708.02002, 4.1)."""


def with_defaults_of(task: str, config: TrainingConfig, given: Iterable[str]) -> TrainingConfig:
    """``config`` with the defaults of ``task`` for everything that was not given.

    >>> chosen = with_defaults_of("detection", TrainingConfig(batch_size=4), ["batch_size"])
    >>> chosen.optimizer, chosen.schedule, chosen.lr
    ('sgd', 'multistep', 0.0025)
    """
    kept = set(given)
    config = dataclasses.replace(config, **{name: value for name, value in TASKS[task].items() if name not in kept})
    if task == "detection" and config.lr is None and config.optimizer == "sgd":
        config = dataclasses.replace(config, lr=_DETECTION_RATE * config.batch_size)
    return config
