"""Train, connect, fine-tune: dcafy's main job on images that ship with scikit-learn.

A small MobileNetV3 with five squeeze-and-excitation blocks is trained on the digits images: the "pretrained
checkpoint". dcafy connects its blocks; the outputs stay bit-identical. Then the original and the converted network
are fine-tuned with the same seed and the same budget, and what the connections have learned is printed.

    python examples/quickstart.py [--epochs 4] [--seed 0]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

import dcafy

BATCH_SIZE = 32
WEIGHT_DECAY = 1e-2
PRETRAINING_LR = 4e-3
FINE_TUNING_LR = 2e-3
CONNECTION_LR = 1e-2
"""α and β start at 1 and 0 whatever the network is, and have some hundred steps here to move."""

RESIDUALS = (
    # input, kernel, expanded, output, activation, stride; an SE block acts on the expanded channels
    (16, 3, 32, 16, "RE", 2),
    (16, 3, 48, 16, "RE", 1),
    (16, 5, 64, 24, "HS", 2),
    (24, 5, 96, 24, "HS", 1),
    (24, 5, 96, 24, "HS", 1),
)


@dataclass(frozen=True)
class Digits:
    """Images of shape ``[N, 3, 32, 32]`` with values in [0, 1], and their labels 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Learned:
    """What one connection has learned: f = α·G + β·match(T̃)."""

    block: str
    hears: str
    alpha: float
    beta: float
    contribution: float


@dataclass(frozen=True)
class Outcome:
    """What a run of the quickstart showed; accuracies are fractions of the test images."""

    identical: bool
    pretrained_accuracy: float
    original_accuracy: float
    converted_accuracy: float
    connections: tuple[Learned, ...]


def digits() -> Digits:
    """scikit-learn's 1,797 digits of 8x8 pixels, enlarged and split: three quarters to train on, the rest to test."""
    data = load_digits()
    grey = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(grey, size=32, mode="bilinear").repeat(1, 3, 1, 1)
    labels = torch.tensor(data.target)
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=data.target)
    return Digits(images[train], labels[train], images[test], labels[test])


def small_mobilenet() -> MobileNetV3:
    """An untrained MobileNetV3 of torchvision's own parts, with five squeeze-and-excitation blocks."""
    rows = [
        InvertedResidualConfig(i, kernel, expanded, o, True, activation, stride, dilation=1, width_mult=1.0)
        for i, kernel, expanded, o, activation, stride in RESIDUALS
    ]
    # torchvision's momentum of 0.01 is made for thousands of steps; nn.BatchNorm2d's own 0.1 suits a hundred.
    return MobileNetV3(rows, last_channel=128, num_classes=10, norm_layer=nn.BatchNorm2d)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Digits,
    *,
    epochs: int,
    seed: int,
    progress: Progress,
    description: str,
) -> None:
    """Trains ``model`` in place; batches and dropout follow from ``seed`` alone."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    bar = progress.add_task(description, total=epochs * -(-len(data.train_labels) // BATCH_SIZE))
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_labels), generator=order).split(BATCH_SIZE):
            loss = nn.functional.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.advance(bar)
    model.eval()


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """The model's outputs in eval mode, ``[N, 10]``."""
    return torch.cat([model(part) for part in images.split(BATCH_SIZE)])


def accuracy(model: nn.Module, data: Digits) -> float:
    """The fraction of the test images that the model names rightly."""
    return (logits(model, data.test_images).argmax(dim=1) == data.test_labels).double().mean().item()


def learned(converted: torch.fx.GraphModule, plan: dcafy.Plan) -> tuple[Learned, ...]:
    """α, β and the contribution ratio of every connection, in the order data meets them."""
    source = {link.target: link.source for link in plan.links}
    return tuple(
        Learned(name, source[name], connection.alpha.item(), connection.beta.item(), connection.contribution())
        for name, connection in dcafy.connections(converted).items()
    )


def same_outputs(original: nn.Module, converted: nn.Module, data: Digits, console: Console) -> bool:
    """Whether both give bit-identical outputs on every test image, after printing it."""
    before, after = logits(original, data.test_images), logits(converted, data.test_images)
    identical = torch.equal(before, after)
    console.print(
        f"Outputs on {len(before)} test images: {'bit-identical' if identical else 'NOT identical'}, "
        f"largest difference {(before - after).abs().max().item():g}\n"
    )
    return identical


def usual_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Optimizer groups that spare norms and biases from weight decay, as dcafy.parameter_groups does."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]


def progress_on(console: Console) -> Progress:
    """A progress bar for trainings, in batches."""
    return Progress(
        TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def show(outcome: Outcome, *, epochs: int, seed: int, console: Console) -> None:
    """Prints accuracies, what the connections learned, and what a run of this size can and cannot say."""
    accuracies = Table(title=f"Accuracy on the test images (seed {seed})", title_justify="left")
    accuracies.add_column("network")
    accuracies.add_column("accuracy", justify="right")
    for name, value in (
        ("pretrained checkpoint", outcome.pretrained_accuracy),
        (f"original, {epochs} more epochs", outcome.original_accuracy),
        (f"converted, {epochs} more epochs", outcome.converted_accuracy),
    ):
        accuracies.add_row(name, f"{value:.1%}")

    connections = Table(title="Connections after fine-tuning", title_justify="left")
    connections.add_column("receiving block")
    connections.add_column("hears")
    for column in ("α", "β", "contribution"):
        connections.add_column(column, justify="right")
    for row in outcome.connections:
        connections.add_row(row.block, row.hears, f"{row.alpha:.4f}", f"{row.beta:+.4f}", f"{row.contribution:.1%}")

    console.print(accuracies)
    console.print(connections)
    console.print("contribution = |β| / (|α| + |β|), the earlier block's share\n")
    console.print(
        "One run of this size proves the mechanics: identity at the start, gradients in every connection, an ordinary "
        "training loop. It does not prove an accuracy gain; that takes several seeds and a real data set."
    )


def main(arguments: Sequence[str] | None = None) -> Outcome:
    """What a run showed, after printing it; ``arguments`` are those of the command line."""
    parser = argparse.ArgumentParser(description="Train, connect and fine-tune a small network on digits.")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of each of the three trainings (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and dropout (default: 0)")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error("--epochs: at least 1")

    console = Console()
    budget = {"epochs": options.epochs, "seed": options.seed}
    data = digits()

    torch.manual_seed(options.seed)
    original = small_mobilenet()
    optimizer = torch.optim.AdamW(usual_groups(original), lr=PRETRAINING_LR)
    with progress_on(console) as bars:
        train(original, optimizer, data, **budget, progress=bars, description="pretraining")
    pretrained_accuracy = accuracy(original, data)

    plan = dcafy.inspect(original, example_inputs=data.train_images[:2])
    converted = dcafy.convert(original, example_inputs=data.train_images[:2], plan=plan)
    console.print(f"Found {len(plan.blocks)} attention blocks, made {len(plan.links)} connections.")
    identical = same_outputs(original, converted, data, console)

    connected_groups = dcafy.parameter_groups(
        converted, lr=FINE_TUNING_LR, connection_lr=CONNECTION_LR, weight_decay=WEIGHT_DECAY
    )
    with progress_on(console) as bars:
        optimizer = torch.optim.AdamW(usual_groups(original), lr=FINE_TUNING_LR)
        train(original, optimizer, data, **budget, progress=bars, description="fine-tuning original")
        optimizer = torch.optim.AdamW(connected_groups)
        train(converted, optimizer, data, **budget, progress=bars, description="fine-tuning converted")

    outcome = Outcome(
        identical, pretrained_accuracy, accuracy(original, data), accuracy(converted, data), learned(converted, plan)
    )
    show(outcome, epochs=options.epochs, seed=options.seed, console=console)
    return outcome


if __name__ == "__main__":
    main()
