"""A detector on a connected backbone, trained on a small synthetic set: torchvision's RetinaNet in plain PyTorch.

torchvision's own function builds the backbone and its feature pyramid; dcafy puts attention into the residual units
and connects it. Right after that the detector finds exactly what it found before, and its losses are the same. Then it
is trained for a few steps and measured by average precision.

    python examples/detector.py [--epochs 2] [--images 24] [--seed 0]

A trained detector is connected in the same way: ``dcafy.convert(retinanet_resnet50_fpn(weights="DEFAULT"),
attention="se")``; its frozen batch norms and frozen layers stay frozen. ``dcafy finetune --task detection`` does the
training so that it can be stopped and gone on with.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import dcafy
from dcafy.detection import AveragePrecision, Boxes, Detection, open_coco, write_shapes
from dcafy.images.order import Sample
from dcafy.training import DataOptions, TrainingConfig

SIDE = 64
BATCH_SIZE = 4


@dataclass(frozen=True)
class Outcome:
    """What a run showed: sameness right after conversion, the epochs' mean losses, AP and AP50, and every β."""

    same_detections: bool
    same_losses: bool
    losses: tuple[float, ...]
    precision: dict[str, float]
    betas: dict[str, float]


def detector(classes: int) -> RetinaNet:
    """An untrained RetinaNet on ResNet-18, built as torchvision builds it without weights."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=nn.BatchNorm2d,  # with trained weights: the default, which is frozen, and trainable_layers=3
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    anchors = AnchorGenerator(tuple((8.0 * 2**level,) for level in range(5)), ((0.5, 1.0, 2.0),) * 5)
    return RetinaNet(backbone, classes, anchor_generator=anchors, min_size=SIDE * 3 // 4, max_size=SIDE)


def batches(pictures: Any, transform: Boxes, task: Detection) -> list[Any]:
    """All pictures, made ready, as lists of images and of targets."""
    samples = [Sample(*transform(*pictures[index]), (0, index)) for index in range(len(pictures))]
    groups = [samples[start : start + BATCH_SIZE] for start in range(0, len(samples), BATCH_SIZE)]
    return [task.collate(group, training=True) for group in groups]


def losses(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The detector's own losses under one seed."""
    torch.manual_seed(0)
    found: dict[str, Tensor] = model.train()(batch.inputs, batch.labels)
    return found


@torch.no_grad()
def same_detections(one: nn.Module, other: nn.Module, images: list[Tensor]) -> bool:
    """Whether both find bit-identical boxes, scores and labels in images of several sizes."""
    first, second = one.eval()(images), other.eval()(images)
    return all(torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a)


@torch.no_grad()
def precision(model: nn.Module, shown: list[Any]) -> dict[str, float]:
    """COCO's average precisions."""
    from accelerate import Accelerator

    meter = AveragePrecision()
    for batch in shown:
        meter.update(model.eval(), batch)
    return meter.result(Accelerator(cpu=True))


def run(epochs: int, images: int, seed: int, folder: str) -> Outcome:
    """Builds, connects, trains and measures, with data written into ``folder``."""
    made = write_shapes(folder, images, side=SIDE, most=2, sizes=(0.3, 0.7), seed=seed)
    data = open_coco(made.spec, DataOptions(val_fraction=0.25))
    task = Detection(TrainingConfig())
    torch.manual_seed(seed)
    attended = dcafy.insert(detector(len(data.classes) + 1), "se", init="paper")
    connected = dcafy.convert(attended)

    train, val = (batches(part, Boxes(), task) for part in (data.train, data.val))
    same = same_detections(attended, connected, [image for batch in val[:2] for image in batch.inputs])
    before, after = losses(attended, train[0]), losses(connected, train[0])
    same_losses = all(torch.equal(before[key], after[key]) for key in before)

    groups = dcafy.parameter_groups(connected, lr=3e-4, connection_lr=1e-2, weight_decay=1e-4)
    optimizer = torch.optim.AdamW(groups)
    means = []
    for _ in range(epochs):
        total = 0.0
        connected.train()
        for batch in train:
            loss = torch.stack(list(connected(batch.inputs, batch.labels).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        means.append(total / len(train))
    betas = {name: connection.beta.item() for name, connection in dcafy.connections(connected).items()}
    return Outcome(same, same_losses, tuple(means), precision(connected, val), betas)


def main(arguments: Sequence[str] | None = None) -> Outcome:
    """What a run showed, after printing it; ``arguments`` are those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=24, help="synthetic images, of which a quarter to validate on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.images < 8:
        parser.error("--epochs must be at least 1, and --images at least 8")
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(options.epochs, options.images, options.seed, folder)
    identical = {True: "bit-identical", False: "NOT identical"}
    console.print(f"Detections right after conversion: {identical[outcome.same_detections]}")
    console.print(f"Training losses under one seed: {identical[outcome.same_losses]}")
    console.print(f"Loss of each epoch: {', '.join(f'{value:.3f}' for value in outcome.losses)}")
    console.print(f"AP {outcome.precision['AP']:.2%}, AP50 {outcome.precision['AP50']:.2%}")
    table = Table(title="β of every connection", title_justify="left")
    table.add_column("receiving block")
    table.add_column("β", justify="right")
    for name, beta in outcome.betas.items():
        table.add_row(name, f"{beta:+.5f}")
    console.print(table)
    console.print(
        "A run of this size on synthetic shapes proves the mechanics. It says nothing about average precision on real "
        "images."
    )
    return outcome


if __name__ == "__main__":
    main()
