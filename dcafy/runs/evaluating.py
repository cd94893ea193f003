"""How good a network is on labelled images, class by class, and beside another one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader

from dcafy.detection.classes import classes_of, labels_for, names_of_labels
from dcafy.detection.coco import CocoImages, open_coco
from dcafy.detection.resampling import Seen, paired_precisions
from dcafy.detection.task import Boxes, Detection
from dcafy.display import Brief
from dcafy.errors import InputError, UsageError
from dcafy.images.about import known, preparation_of
from dcafy.images.data import Data
from dcafy.images.options import DataOptions
from dcafy.images.order import Batches, Seeded
from dcafy.images.preparation import Prepared
from dcafy.images.sources import anchored, open_data
from dcafy.runs.evidence import LOSSES, Difference, over_images
from dcafy.runs.options import EvaluateOptions
from dcafy.runs.using import require_task
from dcafy.training.options import TrainingConfig
from dcafy.training.tasks import Classification, Task
from dcafy.wording import few, printable


@dataclass(frozen=True)
class ClassScore:
    """One class: of its ``images`` the fraction that was recognised, of what was called so the fraction that was right.

    ``AP`` (of COCO, over IoU 0.50 to 0.95) in their place for a detector. ``None``: there is nothing to divide by.
    """

    name: str
    images: int | None = None
    recall: float | None = None
    precision: float | None = None
    AP: float | None = None


@dataclass(frozen=True, repr=False)
class Evaluation(Brief):
    """What was measured.

    ``metrics``    loss and accuracies, or COCO's precisions, as training measures them; fractions
    ``classes``    class by class
    ``confusion``  row: the class that it is; column: the class that was seen; images. Empty for a detector
    ``rows``       index of the image -> what was measured of it: its loss and whether it was right
    ``seen``       index of the image -> the boxes that a detector found in it, and those that there are
    ``skipped``    images that could not be read, with the reasons
    """

    metrics: Mapping[str, float]
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...] = ()
    rows: Mapping[int, Mapping[str, float]] = dataclasses.field(default_factory=dict, repr=False)
    skipped: tuple[str, ...] = ()
    seen: Seen = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as JSON-ready data."""
        scores = [{k: v for k, v in dataclasses.asdict(row).items() if v is not None} for row in self.classes]
        names = [row.name for row in self.classes]
        confusion = {"classes": names, "images": [list(row) for row in self.confusion]} if self.confusion else None
        data = {"metrics": dict(self.metrics), "classes": scores, "confusion": confusion, "skipped": list(self.skipped)}
        return {name: value for name, value in data.items() if value is not None}


@dataclass(frozen=True)
class _Alone:
    """What a meter has to know of Accelerate where there is one process."""

    device: torch.device
    num_processes: int = 1


@torch.no_grad()
def evaluation(
    model: nn.Module,
    data: str,
    options: EvaluateOptions,
    *,
    spec: str = "the model",
    told: Callable[[int, int], None] = lambda done, of: None,
) -> Evaluation:
    """How good ``model`` is on the images of ``data``, a spec as for ``dcafy finetune --data``.

    The images are made ready and measured as those that a training validates on, by the same code: at one batch size,
    order and device the numbers are equal to the bit. Classes are matched by name where the network has names.

    ``model``: in eval mode on its device. ``told``: is called with the batches that are done, and all of them.

    Raises ``UsageError`` and ``InputError`` for data that cannot be opened or has classes that the network lacks.
    """
    found = require_task(model, spec)
    opened = _classified if found.task == "classification" else _boxed
    images: Any
    images, task, names, numbers = opened(model, data, options, spec)
    shown = Seeded(images, seed=0, transform=images.transform_sample, counts_stand_ins=False)
    device = next(model.parameters()).device
    task.check(model, shown[(0, 0)])
    order = Batches(len(shown), options.batch_size, seed=0, shuffle=False)
    loader = DataLoader(
        shown,
        batch_sampler=order,
        collate_fn=functools.partial(task.collate, training=False),
        num_workers=options.workers,
        multiprocessing_context="spawn" if options.workers else None,
        generator=torch.Generator(),  # else it draws a seed for its workers from the global one
    )
    meter: Any = task.meter()
    pairs: dict[int, tuple[int, int]] = {}
    skipped: dict[str, None] = {}
    for done, batch in enumerate(loader, start=1):
        skipped |= dict.fromkeys(batch.unreadable)
        inputs = batch.inputs.to(device) if isinstance(batch.inputs, Tensor) else [i.to(device) for i in batch.inputs]
        labels = batch.labels.to(device) if isinstance(batch.labels, Tensor) else batch.labels
        outputs = model(inputs)
        meter.update(lambda _, outputs=outputs: outputs, batch._replace(inputs=inputs, labels=labels,
                     indices=batch.indices.to(device)))  # fmt: skip
        if isinstance(outputs, Tensor):
            seen = outputs.float().argmax(1).tolist()
            for index, label, number in zip(batch.indices.tolist(), batch.labels.tolist(), seen, strict=True):
                if label >= 0:
                    pairs[index] = (label, number)
        told(done, len(order))
    metrics = meter.result(_Alone(device))
    if found.task == "detection":
        boxes = {index: (found, target) for index, found, target in meter.seen}
        return Evaluation(metrics, _precisions(meter.metric, numbers, names), skipped=tuple(skipped), seen=boxes)
    every = torch.cat(meter.rows).tolist()
    rows = {int(i): dict(zip(meter.measured, told, strict=False)) for i, yes, *told in every if yes}
    confusion = _confusion(pairs.values(), len(names))
    return Evaluation(metrics, _scores(confusion, names), confusion, rows, tuple(skipped))


class _Shown:
    """Pictures with labels as the network numbers them, and the way in which they are made ready."""

    def __init__(self, pictures: Any, transform: Any, numbers: Sequence[int] | None = None) -> None:
        self.pictures, self.transform, self.numbers = pictures, transform, numbers

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        return self.pictures[index]

    def transform_sample(self, picture: Any, label: Any) -> Any:
        return self.transform(picture, label if self.numbers is None else self.numbers[label])


def _part(data: Data, part: str) -> Any:
    return {"val": data.val, "train": data.train}[part] if part != "all" else ConcatDataset([data.train, data.val])


def _data_options(model: nn.Module, spec: str, options: EvaluateOptions) -> DataOptions:
    """Which images are held out: those of the training, where it was on the same data."""
    found = known(model)
    same = found is not None and found.trained is not None and found.trained.data == anchored(spec)
    as_trained = found.trained.val_fraction if same and found is not None and found.trained is not None else 0.2
    fraction = as_trained if options.val_fraction is None else options.val_fraction
    return DataOptions(val_fraction=fraction, follow_links=options.follow_links)


def _classified(
    model: nn.Module, spec: str, options: EvaluateOptions, named: str
) -> tuple[_Shown, Task, tuple[str, ...], Sequence[int]]:
    if spec.partition(":")[0] == "coco":
        raise UsageError(f"--data {spec!r} has boxes, and {named!r} is a classifier. Name images with classes.")
    data = open_data(spec, _data_options(model, spec, options))
    how = preparation_of(model, named, options.image_size)
    task = Classification(TrainingConfig())
    prepare = Prepared(how)
    device = next(model.parameters()).device
    from dcafy.training.head import outputs_of

    outputs = outputs_of(model, torch.zeros(2, how.channels, *how.size, device=device))
    theirs, ours = require_task(model, named).classes, tuple(map(printable, data.classes))
    if len(theirs) != outputs:
        if len(ours) != outputs:
            raise InputError(
                f"{named!r} tells {outputs} classes apart, whose names are not known, and --data {spec!r} has "
                f"{len(ours)}. Name the images that it was trained on, or train it on these: dcafy finetune."
            )
        return _Shown(_part(data, options.part), prepare), task, ours, range(outputs)
    missing = [name for name in ours if name not in theirs]
    if missing:
        raise InputError(
            f"--data {spec!r} has classes that {named!r} does not know: {few(missing, 5)}. It knows "
            f"{few([*theirs], 8)}. Rename the folders, or train it on these images: dcafy finetune."
        )
    numbers = [theirs.index(name) for name in ours]
    return _Shown(_part(data, options.part), prepare, numbers), task, theirs, numbers


def _boxed(
    model: nn.Module, spec: str, options: EvaluateOptions, named: str
) -> tuple[_Shown, Task, tuple[str, ...], Sequence[int]]:
    if options.image_size is not None:
        raise UsageError("--image-size is for classifiers; a detector resizes its images itself. Leave it out.")
    data = open_coco(spec, _data_options(model, spec, options))
    parts: tuple[CocoImages, CocoImages] = (data.train, data.val)
    theirs = require_task(model, named).classes
    if theirs:
        for part in parts:
            missing = [name for name in part.known.categories.values() if printable(name) not in theirs]
            if missing:
                raise InputError(
                    f"--data {spec!r} has categories that {named!r} does not know: {few(missing, 5)}. It knows "
                    f"{few([*theirs[1:]], 8)}."
                )
            part.label_of = {key: theirs.index(printable(name)) for key, name in part.known.categories.items()}
    elif labels_for(model, data) != classes_of(model):
        raise InputError(
            f"{named!r} finds {classes_of(model) - 1} kinds of objects, and --data {spec!r} has {len(data.classes)}. "
            "Name the images that it was trained on, or train it on these: dcafy finetune --task detection."
        )
    names = theirs or names_of_labels(data)
    numbers = sorted(parts[0].label_of.values())
    return _Shown(_part(data, options.part), Boxes()), Detection(TrainingConfig()), names, numbers


def _confusion(pairs: Any, classes: int) -> tuple[tuple[int, ...], ...]:
    counts = [[0] * classes for _ in range(classes)]
    for label, seen in pairs:
        counts[label][seen] += 1
    return tuple(map(tuple, counts))


def _scores(confusion: tuple[tuple[int, ...], ...], names: Sequence[str]) -> tuple[ClassScore, ...]:
    scores = []
    for number, name in enumerate(names):
        images, called = sum(confusion[number]), sum(row[number] for row in confusion)
        right = confusion[number][number]
        scores.append(ClassScore(name, images, right / images if images else None, right / called if called else None))
    return tuple(scores)


def _precisions(metric: Any, numbers: Sequence[int], names: Sequence[str]) -> tuple[ClassScore, ...]:
    metric.class_metrics = True
    metric._computed = None  # what it has kept is without them
    measured = metric.compute()
    by_label = dict(zip(measured["classes"].reshape(-1).tolist(), measured["map_per_class"].reshape(-1).tolist(),
                        strict=True))  # fmt: skip
    return tuple(
        ClassScore(names[label], AP=by_label[label] if by_label.get(label, -1.0) >= 0 else None) for label in numbers
    )


def paired(one: Evaluation, other: Evaluation) -> dict[str, Difference]:
    """``one`` minus ``other`` on the images that both could read, with a 95% interval over the images.

    Of losses and accuracies it is Student's t of the images' own differences; of precisions, which images have only
    together, a bootstrap (:mod:`dcafy.detection.resampling`).
    """
    both = sorted(one.rows.keys() & other.rows.keys())
    if both:
        measured = [name for name in one.rows[both[0]] if name in other.rows[both[0]]]
        return {
            name: over_images(
                *([run.rows[i][name] for i in both] for run in (one, other)), lower_is_better=name in LOSSES
            )
            for name in measured
        }
    return {
        name: Difference(mean, low, high, 1, images)
        for name, (mean, low, high, images) in paired_precisions(one.seen, other.seen).items()
    }
