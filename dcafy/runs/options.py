"""What a run trains on, where it is kept and how it begins, as frozen data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcafy.images.sources import forms
from dcafy.plan.options import check, setting
from dcafy.training.options import TrainingConfig

TASKS: dict[str, dict[str, Any]] = {
    "classification": {},
    "detection": {"optimizer": "sgd", "schedule": "multistep", "epochs": 12, "batch_size": 16},
}
"""What a network can be trained for -> the defaults that are others for it."""


KEPT = ("last", "best", "both")
"""Which epoch's model the folder of a run gives; with ``best`` and ``both`` the best one is in ``best`` inside it."""


@dataclass(frozen=True)
class RunOptions:
    """What a run trains on, where it is kept, and how it begins."""

    data: str | None = setting(
        None,
        f"The images: {forms(explained=True)}. With --task detection: "
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
    seeds: int = setting(1, "How many seeds are compared.", least=1)
    keep: str = setting(
        "last",
        "Which epoch's model the folder gives: the last, or the best on the validation images; both gives the last, "
        "and the best in the folder best inside.",
        choices=KEPT,
    )
    json_log: Path | None = setting(
        None, "Also write every step and epoch here, one JSON object a line.", metavar="FILE"
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class UseOptions:
    """How a trained network is run on images."""

    batch_size: int = setting(32, "Images in a batch.", least=1)
    workers: int = setting(0, "Processes that read images.", least=0)
    cpu: bool = setting(False, "Run on the CPU even where there is a GPU.")
    image_size: int | None = setting(
        None, "Side of the images in pixels. [default: what the network was trained with]", least=1
    )
    cut: bool = setting(False, "Switch all connections off (β = 0).")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class PredictOptions(UseOptions):
    """What is told of each image."""

    top: int | None = setting(
        None,
        "How many classes, or boxes, are told of each image. [default: 5 classes, 100 boxes]",
        metavar="K",
        least=1,
    )
    threshold: float = setting(0.5, "The least score of a box that is told.", least=0, below=1)


@dataclass(frozen=True)
class EvaluateOptions(UseOptions):
    """What a network is measured on."""

    part: str = setting(
        "val",
        "Which images of --data: those to validate on, those to train on, or all.",
        choices=("val", "train", "all"),
    )
    val_fraction: float | None = setting(
        None,
        "The part of the images to validate on, where the data has no part of its own. [default: as in the training on "
        "the same data, else 0.2]",
        above=0,
        below=1,
    )
    follow_links: bool = setting(False, "Also take pictures that links lead to outside of the folder.")


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
