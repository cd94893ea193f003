"""What a network is trained for: how samples become a batch, what the loss is, and what is measured."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcafy.errors import InputError
from dcafy.images.order import Sample, seeded
from dcafy.training.head import outputs_of
from dcafy.training.options import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


class Batch(NamedTuple):
    """Samples together; ``labels`` are class numbers ``[N]``, or weights of the classes ``[N, classes]`` once mixed."""

    inputs: Any
    labels: Any
    indices: Tensor
    unreadable: tuple[str, ...]


class Meter(Protocol):
    """What is measured over the validation images.

    ``by_image``: once there is a result, each metric that is a mean over images, image by image, and under ``index``
    which image each value is of; empty where nothing is measured image by image.
    """

    by_image: Mapping[str, Tensor]

    def update(self, model: nn.Module, batch: Batch) -> None:
        """Adds a batch."""

    def result(self, accelerator: Accelerator) -> dict[str, float]:
        """What all processes have measured together, by name."""


class Task(Protocol):
    """What the loop has to know about what it trains for."""

    headline: str
    """The metric that stands for the others."""

    def check(self, model: nn.Module, sample: Sample) -> None:
        """Nothing; ``InputError`` where the model cannot be trained on such samples."""

    def collate(self, samples: Sequence[Sample], *, training: bool) -> Batch:
        """The samples as a batch."""

    def batched(self, inputs: Any, labels: Any, samples: Sequence[Sample], *, training: bool) -> Batch:
        """The batch that a DataLoader of the user's has made of the samples."""

    def balance(self, labels: Sequence[int]) -> None:
        """Weighs the classes in the loss by how rare they are among the labels of the training images."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The loss, and how many images were classified rightly, where that means anything."""

    def meter(self) -> Meter:
        """A new meter."""


def _of_samples(samples: Sequence[Sample]) -> tuple[Tensor, tuple[str, ...]]:
    """The indices of the samples, and what could not be read."""
    indices = torch.tensor([sample.key[1] for sample in samples])
    return indices, tuple(name for sample in samples for name in sample.unreadable)


def class_number(label: Any) -> int:
    """The label as a number; ``InputError`` where it is none."""
    try:
        return operator.index(label)
    except TypeError as error:
        raise InputError(f"A label is {label!r}, not a class number.") from error


class Classification:
    """Cross-entropy, top-1 and top-5 accuracy; label smoothing, mixup and CutMix as configured."""

    headline = "top1"

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.classes = 0
        self.weights: Tensor | None = None

    def check(self, model: nn.Module, sample: Sample) -> None:
        image = sample.image
        if not isinstance(image, Tensor) or image.ndim != 3:
            raise InputError(
                f"The data set gives {type(image).__name__}, not an image tensor [C, H, W] and a class number."
            )
        first = next(model.parameters())
        self.classes = outputs_of(model, torch.stack([image, image]).to(first.device))

    def collate(self, samples: Sequence[Sample], *, training: bool) -> Batch:
        sizes = {tuple(sample.image.shape) for sample in samples}
        if len(sizes) > 1:
            raise InputError(
                f"The data set gives images of different sizes: {', '.join(map(str, sorted(sizes)[:3]))}. Resize "
                "them to one size, so that they go into one batch."
            )
        inputs = torch.stack([sample.image for sample in samples])
        labels: Tensor = torch.tensor([class_number(sample.label) for sample in samples])
        return self._ready(inputs, labels, samples, training)

    def batched(self, inputs: Any, labels: Any, samples: Sequence[Sample], *, training: bool) -> Batch:
        for name, value in (("images", inputs), ("labels", labels)):
            if not isinstance(value, Tensor) or len(value) != len(samples):
                what = f"{len(value)} of them" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise InputError(
                    f"The DataLoader makes {what} where a tensor with {len(samples)} {name} should be. Give it a "
                    "collate_fn that makes one of every sample."
                )
        if labels.is_floating_point():  # mixed already
            if not training or labels.ndim != 2 or labels.shape[1] != self.classes or self.config.mixes:
                raise InputError(
                    f"The DataLoader gives labels of {str(labels.dtype).removeprefix('torch.')}, {list(labels.shape)}. "
                    "They should be class numbers; weights of all classes, [N, classes], do in training without "
                    "--mixup and --cutmix."
                )
            return Batch(inputs, labels, *_of_samples(samples))
        if labels.ndim != 1:
            raise InputError(f"The DataLoader gives labels of shape {list(labels.shape)}, not one class number each.")
        standing_in = torch.tensor([sample.label == -1 for sample in samples])
        return self._ready(inputs, labels.long().masked_fill(standing_in, -1), samples, training)

    def _ready(self, inputs: Tensor, labels: Tensor, samples: Sequence[Sample], training: bool) -> Batch:
        if training and labels.min() < 0:
            raise InputError(f"A label is {int(labels.min())}. Classes are counted from 0.")
        if labels.max() >= self.classes:
            raise InputError(
                f"A label is {int(labels.max())}, but the network has {self.classes} classes, counted from 0. Give "
                "it a classifier for all of them."
            )
        if training and self.config.mixes and len(samples) > 1:
            inputs, labels = self._mixed(inputs, labels, samples[0])
        return Batch(inputs, labels, *_of_samples(samples))

    def balance(self, labels: Sequence[int]) -> None:
        counts = torch.bincount(torch.tensor(labels), minlength=self.classes).double()
        # Over all training images their mean is 1, so that rates mean what they do without.
        shares = len(labels) / (counts * int((counts > 0).sum()))
        self.weights = torch.where(counts > 0, shares, 0.0).float()

    def _mixed(self, inputs: Tensor, labels: Tensor, first: Sample) -> tuple[Tensor, Tensor]:
        from torchvision.transforms import v2

        strengths = ((v2.MixUp, self.config.mixup), (v2.CutMix, self.config.cutmix))
        ways: list[Any] = [kind(alpha=alpha, num_classes=self.classes) for kind, alpha in strengths if alpha]
        # Of the whole batch, and not of one image: a number that no image has goes with the key.
        with seeded(self.config.seed, *first.key, -1):
            mixed: tuple[Tensor, Tensor] = v2.RandomChoice(ways)(inputs, labels)
        return mixed

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        outputs = model(batch.inputs)
        if not isinstance(outputs, Tensor):
            raise InputError(
                f"In training the network gives {type(outputs).__name__}, not one tensor of class scores. Build it "
                "without auxiliary classifiers, for instance with --set aux_logits=false."
            )
        scores, smoothing = outputs.float(), self.config.label_smoothing
        if self.weights is None:
            loss = F.cross_entropy(scores, batch.labels, label_smoothing=smoothing)
        else:  # the mean over the images, not over their weights: however a batch is split, it is the same
            weights = self.weights.to(scores.device)
            each = F.cross_entropy(scores, batch.labels, weights, reduction="none", label_smoothing=smoothing)
            loss = each.mean()
        best = batch.labels if batch.labels.ndim == 1 else batch.labels.argmax(1)
        return loss, (outputs.argmax(1) == best).sum()

    def meter(self) -> Meter:
        return _Accuracy()


class _Accuracy:
    """Loss, top-1 and, of more than five classes, top-5, image by image; what padding repeats is counted once."""

    measured: tuple[str, ...] = ("loss", "top1", "top5")

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.by_image: Mapping[str, Tensor] = {}

    def update(self, model: nn.Module, batch: Batch) -> None:
        outputs = model(batch.inputs).float()
        self.measured = ("loss", "top1", "top5")[: 3 if outputs.shape[1] > 5 else 2]
        losses = F.cross_entropy(outputs, batch.labels, reduction="none", ignore_index=-1).double()
        ranks = outputs.topk(min(5, outputs.shape[1])).indices == batch.labels[:, None]
        columns = (batch.indices, batch.labels >= 0, losses, ranks[:, 0], ranks.any(1))
        self.rows.append(torch.stack([column.double() for column in columns], dim=1))

    def result(self, accelerator: Accelerator) -> dict[str, float]:
        rows = torch.cat(self.rows) if self.rows else torch.zeros(0, 5, dtype=torch.float64, device=accelerator.device)
        if accelerator.num_processes > 1:
            padded = accelerator.pad_across_processes(rows, dim=0, pad_index=-1)
            rows = accelerator.gather(padded)
        rows = rows.cpu()
        seen: Mapping[int, Tensor] = {int(row[0]): row for row in rows if row[0] >= 0}
        counted = [seen[index] for index in sorted(seen) if seen[index][1]]
        if not counted:
            raise InputError("None of the validation images can be read.")
        whole = torch.stack(counted)
        columns = {name: whole[:, place] for place, name in enumerate(self.measured, start=2)}
        self.by_image = {"index": whole[:, 0], **columns}
        means = whole.mean(0).tolist()
        return {**dict(zip(self.measured, means[2:], strict=False)), "images": float(len(counted))}
