"""What a run trains on, where it is kept and how it begins, as frozen data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dcafy.errors import UsageError
from dcafy.images.options import DataOptions
from dcafy.images.sources import forms
from dcafy.plan.options import Conversion, check, setting
from dcafy.runs.paper import RECIPES, explained
from dcafy.training.options import TrainingConfig
from dcafy.wording import nearest, quoted

TASKS: dict[str, dict[str, Any]] = {
    # What the study supports where a trained network is trained on (benchmarks/results/accuracy.md, "tuned"); a
    # detector sees too few images at a time to centre by.
    "classification": {"message": "centred"},
    "detection": {"optimizer": "sgd", "schedule": "multistep", "epochs": 12, "batch_size": 16},
}
"""What a network can be trained for -> the defaults that are others for it."""


ARMS = ("plain", "attention", "original", "connected")
"""What can be trained: the network as it is, with inserted attention, without the connections only, and with them."""

KEPT = ("last", "best", "both")
"""Which epoch's model the folder of a run gives; with ``best`` and ``both`` the best one is in ``best`` inside it."""


TRACKERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio")
"""Trackers of Accelerate's, each with the name of the package that it needs."""


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
        "What the network is trained for. Classifiers hear centred messages (--message), but under --recipe, with "
        "--topology hub and with a --schema other than direct. Detectors are measured by average precision, and have "
        "other defaults: sgd, 12 epochs, 16 images in a batch, --schedule multistep, a learning rate of 0.01 for 16 "
        "images (in proportion).",
        choices=tuple(TASKS),
    )
    recipe: str | None = setting(
        None,
        f"One of the paper's own trainings; options that are given beat it, and connections have the base's rate. "
        f"{explained()} With another batch the rate is in proportion, with another --image-size the "
        "resize.",
        choices=tuple(RECIPES),
    )
    output: Path | None = setting(None, "The folder of the run.", metavar="DIR", short="-o")
    config: Path | None = setting(
        None,
        "A file of options, YAML or JSON; the finetune.json of another run is one. The command line beats it.",
        metavar="FILE",
    )
    backbone: Path | None = setting(
        None,
        "The folder of a dcafy finetune run whose network lies under the detector, with its attention and connections; "
        "of a comparison, that of each arm. Its batch norms keep their statistics, and the first stage of a ResNet is "
        "not trained, as usual under detectors.",
        metavar="RUN",
    )
    resume: bool = setting(
        False,
        "Go on with the run in a folder, which MODEL or -o names; without a checkpoint in it, start over. With more "
        "--epochs a run that has ended is trained further.",
    )
    overwrite: bool = setting(
        False, "Replace the run or the model in the folder, once the new run has ended well. [default: refuse]"
    )
    plain: bool = setting(False, "Train the network as it is, without connections.")
    compare: str | None = setting(
        None,
        "Train several forms of the network with the same seeds and budget, and compare: any of plain (as it is), "
        "attention (with --attention, unconnected) and connected, such as plain,attention,connected. Without a value: "
        "original (all but the connections) and connected.",
        metavar="[ARMS]",
    )
    seeds: int = setting(1, "How many seeds are compared; 3 or more for a verdict.", least=1)
    keep: str = setting(
        "last",
        "Which epoch's model the folder gives: the last, or the best on the validation images; both gives the last, "
        "and the best in the folder best inside.",
        choices=KEPT,
    )
    dry_run: bool = setting(
        False,
        "Send one batch through all of it, validation included, and tell the memory and the time that the run takes; "
        "nothing is written.",
    )
    track: str | None = setting(
        None,
        f"Also track the run with these, by Accelerate: {', '.join(TRACKERS)}. Files lie in the folder tracked of the "
        "run. With --resume it has to be said again.",
        metavar="TRACKERS",
    )
    json_log: Path | None = setting(
        None, "Also write every step and epoch here, one JSON object a line.", metavar="FILE"
    )

    def __post_init__(self) -> None:
        check(self)
        if self.plain and self.compare:
            raise UsageError("--plain trains one network, and --compare several. Leave one of them out.")
        self.arms, self.trackers  # noqa: B018 (say what is wrong with them)

    @property
    def trackers(self) -> tuple[str, ...]:
        """What the run is tracked with."""
        asked = [name.lower() for name in (self.track or "").replace(",", " ").split()]
        for name in asked:
            if name not in TRACKERS:
                raise UsageError(
                    f"--track {quoted(name)} is not known.{nearest(name, TRACKERS)} Use any of: {', '.join(TRACKERS)}."
                )
        return tuple(dict.fromkeys(asked))

    @property
    def arms(self) -> tuple[str, ...]:
        """What is compared, in the order of ``ARMS``; empty where nothing is."""
        asked = [name for name in (self.compare or "").replace(",", " ").split() if name]
        for name in asked:
            if name not in ARMS:
                raise UsageError(
                    f"--compare {name!r} is not known.{nearest(name, list(ARMS))} Use any of: plain, attention, "
                    "connected."
                )
        return tuple(name for name in ARMS if name in asked)


@dataclass(frozen=True)
class UseOptions:
    """How a trained network is run on images."""

    batch_size: int = setting(32, "Images in a batch.", least=1, also=("--bs",))
    workers: int = setting(0, "Processes that read images.", least=0)
    cpu: bool = setting(False, "Run on the CPU even where there is a GPU.")
    image_size: int | None = setting(
        None, "Side of the images in pixels. [default: what the network was trained with]", least=1
    )
    cut: bool = setting(False, "Switch all connections off (β = 0).")
    follow_links: bool = setting(False, "Also take pictures that links lead to outside of the folder.")

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


_DETECTION_RATE = 0.01 / 16
"""RetinaNet's learning rate for each image of a batch: 0.01 with 16 (Lin et al., 2017, arXiv 1708.02002, 4.1)."""


def with_defaults_of(task: str, config: TrainingConfig, given: Iterable[str]) -> TrainingConfig:
    """``config`` with the defaults of ``task`` for everything that was not given.

    >>> chosen = with_defaults_of("detection", TrainingConfig(batch_size=4), ["batch_size"])
    >>> chosen.optimizer, chosen.schedule, chosen.lr
    ('sgd', 'multistep', 0.0025)
    """
    config = _with(config, TASKS[task], given)
    if task == "detection" and config.lr is None and config.optimizer == "sgd":
        config = dataclasses.replace(config, lr=_DETECTION_RATE * config.batch_size)
    return config


@dataclass(frozen=True)
class Chosen:
    """What a run is asked to do, once the defaults of its task or its recipe stand in for what was not given."""

    task: str
    training: TrainingConfig
    images: DataOptions
    conversion: Conversion


def chosen(
    run: RunOptions, training: TrainingConfig, images: DataOptions, conversion: Conversion, given: Iterable[str]
) -> Chosen:
    """The options with what the recipe (:data:`dcafy.runs.paper.RECIPES`), else the task, says of what was not given.

    A schema that is no plain sum, and the hub, are others' published forms, and so are their messages. Under a recipe,
    another batch has its rate in proportion, another number of epochs its milestones, another size of images what they
    are resized to, and connections have the base's rate.

    >>> found = chosen(RunOptions(recipe="paper"), TrainingConfig(epochs=5), DataOptions(), Conversion(), ["epochs"])
    >>> found.training.lr, found.training.epochs, found.images.crop_scale, found.conversion.attention_init
    (0.1, 5, 0.1, 'paper')
    """
    kept = set(given)
    if run.recipe is None:
        as_published = conversion.schema != "direct" or conversion.topology == "hub"
        own = _with(conversion, TASKS[run.task], kept | {"message"} if as_published else kept)
        return Chosen(run.task, with_defaults_of(run.task, training, kept), images, own)
    recipe = RECIPES[run.recipe]
    if "task" in kept and run.task != recipe.task:
        raise UsageError(f"--recipe {run.recipe} is for --task {recipe.task}, not {run.task}. Leave one of them out.")
    options = recipe.options
    if "epochs" in kept and "milestones" in options:
        part = training.epochs / options["epochs"]
        options["milestones"] = ",".join(f"{float(epoch) * part:g}" for epoch in options["milestones"].split(","))
    if images.image_size is not None and "val_resize" in options:
        options["val_resize"] = round(options["val_resize"] * images.image_size / options["image_size"])
    if {"warmup_epochs", "warmup_steps"} & kept:
        options = {name: value for name, value in options.items() if not name.startswith("warmup")}
    made = _with(training, options, kept)
    if "lr" not in kept:
        batch = made.batch_size * made.accumulate
        made = dataclasses.replace(made, lr=recipe.options["lr"] * batch / recipe.options["batch_size"])
    if "connection_lr" not in kept:
        made = dataclasses.replace(made, connection_lr=made.base_rate)
    return Chosen(recipe.task, made, _with(images, options, kept), _with(conversion, options, kept))


def conversion_of(task: str, recipe: str | None) -> Conversion:
    """The options of a conversion where none is given: the recipe's, else the task's."""
    return _with(Conversion(), RECIPES[recipe].options if recipe else TASKS[task], ())


Configuration = TypeVar("Configuration", TrainingConfig, DataOptions, Conversion)


def _with(config: Configuration, options: Mapping[str, Any], given: Iterable[str]) -> Configuration:
    """``config`` with those of the options that it has and that were not given."""
    own = {item.name for item in dataclasses.fields(config)} - set(given)
    return dataclasses.replace(config, **{name: value for name, value in options.items() if name in own})
