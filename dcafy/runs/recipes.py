"""What ``--task`` chooses: how the data is opened, how a network is made ready for it, and what it is trained for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dcafy.detection.classes import labels_for, names_of_labels, needs, with_classes
from dcafy.detection.coco import open_coco
from dcafy.detection.task import Boxes, Detection
from dcafy.errors import UsageError
from dcafy.images.about import About, preparation_of, put_about
from dcafy.images.data import Data
from dcafy.images.options import DataOptions
from dcafy.images.order import Sample, Seeded
from dcafy.images.preparation import Prepared, augmentation, with_resize
from dcafy.images.sources import open_data
from dcafy.training.head import reheaded
from dcafy.training.options import TrainingConfig
from dcafy.training.tasks import Batch, Classification, Task
from dcafy.wording import printable

if TYPE_CHECKING:
    from dcafy.runs.request import Request


@dataclass(frozen=True)
class Ready:
    """Data made ready for a network whose head fits it.

    ``example``: inputs to convert the network with, or ``None`` where those that are guessed will do. ``new_layers``:
    paths of the layers that were replaced.
    """

    train: Any
    val: Any
    example: torch.Tensor | None
    new_layers: tuple[str, ...]


@dataclass(frozen=True)
class Purpose:
    """``open_data``: of a spec; ``ready``: gives the network, in place, a head for the data; ``task``: for the loop.

    ``batch``: so many samples, to count and to time a training step with.
    """

    open_data: Callable[[str, DataOptions], Data]
    ready: Callable[[nn.Module, Data, Request], Ready]
    task: Callable[[TrainingConfig], Task]
    batch: Callable[[Ready, Task, int], Batch]


class _Shown:
    """Pictures with the way in which they are made ready."""

    def __init__(self, pictures: Any, transform: Callable[..., Any]) -> None:
        self.pictures, self.transform_sample = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        return self.pictures[index]


# --- classification -------------------------------------------------------------------------------------


def _classifier(network: nn.Module, data: Data, request: Request) -> Ready:
    images = request.images
    how = preparation_of(network, request.arch or request.model, images.image_size)
    how = how if images.val_resize is None else with_resize(how, images.val_resize)
    example = torch.zeros(2, how.channels, *how.size)
    new = reheaded(network, len(data.classes), example)
    put_about(network, About(classes=tuple(map(printable, data.classes)), preparation=how))
    crops = {"scale": images.crop_scale, "ratio": images.crop_ratio}
    varied = Prepared(how, augmentation(images, drawn=data.drawn), **crops)
    return Ready(_Shown(data.train, varied), _Shown(data.val, Prepared(how)), example, new)


def _random_images(ready: Ready, task: Task, size: int) -> Batch:
    assert ready.example is not None
    indices = torch.arange(size)
    return Batch(torch.rand(size, *ready.example.shape[1:]), torch.zeros(size, dtype=torch.long), indices, ())


# --- detection ------------------------------------------------------------------------------------------


def _detector(network: nn.Module, data: Data, request: Request) -> Ready:
    if request.images.image_size is not None:
        raise UsageError(
            "--image-size is for classifiers; a detector resizes its images itself. Choose the size where it is built: "
            "--set min_size=400 --set max_size=600."
        )
    needs(network, data)
    new = with_classes(network, labels_for(network, data))
    put_about(network, About("detection", names_of_labels(data)))
    varied = Boxes(request.images.augment)
    return Ready(_Shown(data.train, varied), _Shown(data.val, Boxes()), None, new)


def _first_images(ready: Ready, task: Task, size: int) -> Batch:
    shown = Seeded(ready.train, seed=0, transform=ready.train.transform_sample)
    samples: list[Sample] = [shown[(0, index % len(shown))] for index in range(size)]
    return task.collate(samples, training=True)


PURPOSES: dict[str, Purpose] = {
    "classification": Purpose(open_data, _classifier, Classification, _random_images),
    "detection": Purpose(open_coco, _detector, Detection, _first_images),
}
"""What ``--task`` takes (the names are also in ``dcafy.runs.options``, which the command reads without torch)."""
