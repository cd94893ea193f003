"""A report of a small network: trained as in the quickstart, connected, fine-tuned, and looked at on digits images.

What comes out is one HTML file: the blocks and their connections, their attention values before and after, where both
networks look, and what the connections contributed over the epochs. Nothing is downloaded.

    python examples/report.py [-o report.html] [--epochs 4] [--seed 0]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import quickstart
import torch
from rich.console import Console
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

import dcafy
from dcafy.analysis import contributions
from dcafy.images.preparation import Preparation
from dcafy.report import EpochLog, Findings, make_report

AS_TRAINED = Preparation((32, 32), 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""The quickstart trains on 32x32 pixels with values from 0 to 1, which are not normalised."""

IMAGES = 8


def fine_tuned(converted: torch.fx.GraphModule, data: quickstart.Digits, epochs: int, seed: int) -> EpochLog:
    """Trains ``converted`` in place; what each connection contributed and said after every epoch."""
    groups = dcafy.parameter_groups(
        converted,
        lr=quickstart.FINE_TUNING_LR,
        connection_lr=quickstart.CONNECTION_LR,
        weight_decay=quickstart.WEIGHT_DECAY,
    )
    optimizer = torch.optim.AdamW(groups)
    ratios: dict[str, tuple[float, ...]] = {}
    for epoch in range(epochs):
        with quickstart.progress_on(Console(stderr=True)) as bars:
            quickstart.train(
                converted, optimizer, data, epochs=1, seed=seed + epoch, progress=bars, description="fine-tuning"
            )
        for row in contributions(converted):
            ratios[row.name] = (*ratios.get(row.name, ()), row.ratio)
    return EpochLog(tuple(range(1, epochs + 1)), ratios)


def saved(images: Tensor, folder: Path) -> None:
    """Writes images ``[N, 3, H, W]`` as PNG files."""
    for number, image in enumerate(images):
        to_pil_image(image).save(folder / f"digit {number}.png")


def main(arguments: Sequence[str] | None = None) -> Findings:
    """What was found, after writing the report; ``arguments`` are those of the command line."""
    parser = argparse.ArgumentParser(description="Report on a small network trained on digits.")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), help="the page (default: report.html)"
    )
    parser.add_argument("--epochs", type=int, default=4, help="epochs of both trainings (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and dropout (default: 0)")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error("--epochs: at least 1")

    data = quickstart.digits()
    torch.manual_seed(options.seed)
    original = quickstart.small_mobilenet()
    optimizer = torch.optim.AdamW(quickstart.usual_groups(original), lr=quickstart.PRETRAINING_LR)
    with quickstart.progress_on(Console(stderr=True)) as bars:
        budget = {"epochs": options.epochs, "seed": options.seed}
        quickstart.train(original, optimizer, data, **budget, progress=bars, description="pretraining")

    converted = dcafy.convert(original, example_inputs=data.test_images[:2])
    log = fine_tuned(converted, data, options.epochs, options.seed)

    with tempfile.TemporaryDirectory() as folder:
        saved(data.test_images[:IMAGES], Path(folder))
        found = make_report(
            converted,
            Path(folder),
            options.output,
            title="small MobileNetV3 on digits",
            against=original,
            how=AS_TRAINED,
            epochs=log,
        )
    print(f"{options.output}: {len(found.plan.blocks)} attention blocks, {len(found.contributions)} connections")
    return found


if __name__ == "__main__":
    main()
