"""Detection as the training loop sees it: a detector's own losses, and the average precisions of COCO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dcafy.draws import OwnDraws
from dcafy.errors import InputError, UsageError
from dcafy.graph.modes import evaluating
from dcafy.images.order import Sample
from dcafy.training.options import TrainingConfig
from dcafy.training.tasks import Batch, Meter
from dcafy.wording import needing

if TYPE_CHECKING:
    from accelerate import Accelerator

_NAMES = {"AP": "map", "AP50": "map_50", "AP75": "map_75", "APS": "map_small", "APM": "map_medium", "APL": "map_large"}
"""The columns of the paper's Table 3 -> torchmetrics' names."""

IOUS: list[float] = np.linspace(0.5, 0.95, 10).tolist()
RECALLS: list[float] = np.linspace(0, 1, 101).tolist()
"""Where COCO measures: overlaps from which a box counts, and recalls at which the precision is read off."""

_UNUSED = ("mixup", "cutmix", "label_smoothing", "balance")


class Boxes:
    """(picture, target) -> (tensor ``[3, H, W]`` of values from 0 to 1, target with boxes ``[N, 4]`` as plain tensors).

    A detector resizes and normalises its images itself. ``augment``: ``standard`` flips half of them, ``none`` none.
    """

    def __init__(self, augment: str = "none") -> None:
        from torchvision.transforms import v2

        ways: dict[str, list[Any]] = {"none": [], "standard": [v2.RandomHorizontalFlip(0.5)]}
        ways["auto"] = ways["standard"]
        if augment not in ways:
            raise UsageError(
                f"--augment {augment} cuts pictures to one size and knows of no boxes. With --task detection it is "
                "none or standard (a flip)."
            )
        self.steps = v2.Compose([*ways[augment], v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def __call__(self, picture: Any, target: Any) -> tuple[Tensor, dict[str, Tensor]]:
        image, shown = self.steps(picture, target)
        # The loop compares, gathers and indexes plain tensors, whose subclasses would check boxes at every step.
        return image.as_subclass(Tensor), {name: value.as_subclass(Tensor) for name, value in shown.items()}


class Detection:
    """The sum of a detector's own losses, measured by average precision (the columns of the paper's Table 3).

    The model is one of torchvision's detectors, or takes the same: a list of images ``[3, H, W]`` and, in training, a
    list of targets with ``boxes`` (XYXY, pixels) and ``labels``. In training it gives a dictionary of losses, otherwise
    a list of ``boxes``, ``scores`` and ``labels``.
    """

    headline = "AP"

    def __init__(self, config: TrainingConfig) -> None:
        for name in _UNUSED:
            if getattr(config, name):
                raise UsageError(f"--{name.replace('_', '-')} is for classifiers. Leave it out with --task detection.")

    def check(self, model: nn.Module, sample: Sample) -> None:
        image, target = sample.image, sample.label
        if not isinstance(image, Tensor) or image.ndim != 3 or not isinstance(target, Mapping):
            raise InputError("The data set gives no image tensor [C, H, W] with a target that has boxes and labels.")
        _target(target)
        with evaluating(model), torch.no_grad(), OwnDraws():
            try:
                found = model([image.to(next(model.parameters()).device)])
            except (RuntimeError, TypeError, ValueError, AttributeError) as error:
                raise InputError(
                    f"{type(model).__name__} is no detector: it does not run on a list of images "
                    f"({' '.join(str(error).split())[:160]}). Name one such as torchvision:retinanet_resnet50_fpn."
                ) from error
        if not isinstance(found, list) or not found or not {"boxes", "scores", "labels"} <= set(found[0]):
            raise InputError(f"{type(model).__name__} is no detector: it gives no list of boxes, scores and labels.")

    def collate(self, samples: Sequence[Sample], *, training: bool) -> Batch:
        targets = [{} if sample.label == -1 else _target(sample.label) for sample in samples]
        indices = torch.tensor([sample.key[1] for sample in samples])
        unreadable = tuple(name for sample in samples for name in sample.unreadable)
        return Batch([sample.image for sample in samples], targets, indices, unreadable)

    def batched(self, inputs: Any, labels: Any, samples: Sequence[Sample], *, training: bool) -> Batch:
        images, targets = (list(part) if isinstance(part, list | tuple | Tensor) else [] for part in (inputs, labels))
        for name, given, found in (("images", inputs, images), ("targets", labels, targets)):
            if len(found) != len(samples) or not samples:
                raise InputError(
                    f"The DataLoader makes {_kind(given)} where a list of {len(samples)} {name} should be. Give it "
                    "collate_fn=lambda samples: tuple(zip(*samples))."
                )
        made = zip(images, targets, samples, strict=True)
        whole = [one._replace(image=image, label=-1 if one.label == -1 else label) for image, label, one in made]
        return self.collate(whole, training=training)

    def balance(self, labels: Sequence[int]) -> None:
        raise UsageError("--balance is for classifiers. Leave it out with --task detection.")

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, None]:
        losses = model(batch.inputs, batch.labels)
        if not isinstance(losses, dict):
            raise InputError(f"In training the network gives {type(losses).__name__}, not a dictionary of losses.")
        return torch.stack([value.float() for value in losses.values()]).sum(), None

    def meter(self) -> Meter:
        return AveragePrecision()


def _target(given: Any) -> dict[str, Tensor]:
    """A target with all that is measured: areas are those of the boxes, and nothing is a crowd, unless it says so."""
    if not isinstance(given, Mapping) or not {"boxes", "labels"} <= set(given):
        raise InputError(f"The data set gives {_kind(given)} as a target, not a dictionary with boxes and labels.")
    boxes, labels = given["boxes"], given["labels"]
    if not isinstance(boxes, Tensor) or not isinstance(labels, Tensor) or boxes.shape != (len(labels), 4):
        raise InputError(
            f"The data set gives {_kind(boxes)} as boxes and {_kind(labels)} as labels; they should be tensors [N, 4] "
            "and [N]."
        )
    plain = {name: value.as_subclass(Tensor) if isinstance(value, Tensor) else value for name, value in given.items()}
    sides = plain["boxes"][:, 2:] - plain["boxes"][:, :2]
    return {"area": sides.prod(1), "iscrowd": torch.zeros_like(labels), **plain}


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return f"{len(value)} of them" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


class AveragePrecision:
    """AP, AP50, AP75 and AP of small, medium and large objects (under 32², under 96² pixels, and the rest).

    They are COCO's, by torchmetrics and pycocotools: fractions, over IoU thresholds 0.50 to 0.95 but for AP50 and AP75,
    with the 100 best detections of an image. What the data has no objects of is left out.
    """

    def __init__(self) -> None:
        with needing("Measuring detectors", "detection", "torchmetrics and pycocotools"):
            from torchmetrics.detection import MeanAveragePrecision

            # The processes gather images themselves: some have one twice, to make their batches even. The thresholds
            # are COCO's own: torchmetrics has them in float32, where a recall of 3/5 is less than 0.6.
            self.metric = MeanAveragePrecision(
                iou_thresholds=IOUS, rec_thresholds=RECALLS, backend="pycocotools", sync_on_compute=False
            )
        self.metric.warn_on_many_detections = False  # detectors give more; COCO counts the best 100
        self.by_image: Mapping[str, Tensor] = {}  # no precision is a mean over images
        self.seen: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]] = []

    def update(self, model: nn.Module, batch: Batch) -> None:
        """Adds what ``model`` finds in a batch."""
        for index, found, target in zip(batch.indices.tolist(), model(batch.inputs), batch.labels, strict=True):
            if target:
                kept = {name: found[name].float() if name != "labels" else found[name] for name in _FOUND}
                self.seen.append((index, _on_cpu(kept), _on_cpu(target)))

    def result(self, accelerator: Accelerator) -> dict[str, float]:
        """The precisions over the images of all processes."""
        from accelerate.utils import gather_object

        images = {index: (found, target) for index, found, target in gather_object(self.seen)}
        if not images:
            raise InputError("None of the validation images can be read.")
        self.metric.reset()
        for index in sorted(images):
            found, target = images[index]
            self.metric.update([found], [{name: target[name] for name in _MEASURED}])
        scores = self.metric.compute()
        named = {name: float(scores[theirs]) for name, theirs in _NAMES.items()}
        return {**{name: value for name, value in named.items() if value >= 0}, "images": float(len(images))}


_FOUND = ("boxes", "scores", "labels")
_MEASURED = ("boxes", "labels", "area", "iscrowd")


def _on_cpu(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in values.items()}
