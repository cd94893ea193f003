"""What connections cost a training step: converted over original, in turns, beside the machine's own noise.

    python benchmarks/training_step.py --report benchmarks/results/training_step.md

Original, its copy (A/A) and the converted network make a step each in every round, in an order that rotates; the ratios
are of the same round. The A/A spread is what equal networks differ by.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch

import dcafy
from dcafy.runs.timing import step_times
from dcafy.sources import open_model

MODELS = (
    "torchvision:efficientnet_b0",
    "torchvision:mobilenet_v3_large",
    "torchvision:mobilenet_v3_small",
    "torchvision:regnet_y_400mf",
    "timm:seresnet50",
)


def measured(spec: str, *, rounds: int, batch: int, size: int) -> str:
    """One row of the table."""
    model = open_model(spec).model
    converted = dcafy.convert(model)
    images, labels = torch.randn(batch, 3, size, size), torch.arange(batch) % 10
    times = step_times({"original": model, "A/A": model, "converted": converted}, images, labels, rounds=rounds)
    ratios = {
        name: sorted(a / b for a, b in zip(times[name], times["original"], strict=True))
        for name in ("A/A", "converted")
    }
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    quarter = len(ratios["A/A"]) // 4
    spread = {name: (values[quarter], values[-1 - quarter]) for name, values in ratios.items()}
    low, high = spread["A/A"]
    held = medians["converted"] <= 1.02 or low <= medians["converted"] <= high
    cells = [spec, str(len(dcafy.connections(converted))), f"{1000 * statistics.median(times['original']):.0f} ms"]
    cells += [f"{medians['A/A']:.3f} ({low:.3f} to {high:.3f})"]
    cells += [f"{medians['converted']:.3f} ({spread['converted'][0]:.3f} to {spread['converted'][1]:.3f})"]
    return "| " + " | ".join([*cells, "yes" if held else "no"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    lines = [
        "# A training step, converted over original",
        "",
        f"{time.strftime('%Y-%m-%d')}; dcafy {dcafy.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, CPU with {torch.get_num_threads()} threads; {options.batch} images of "
        f"{options.size} px, {options.rounds} rounds in turns. Median and quartiles of the ratios. Made by "
        "`python benchmarks/training_step.py`. Goal: at most 1.02, or within the A/A spread.",
        "",
        "| network | connections | original | A/A | converted | goal held |",
        "|---|---|---|---|---|---|",
    ]
    for spec in MODELS:
        lines.append(measured(spec, rounds=options.rounds, batch=options.batch, size=options.size))
        print(lines[-1], flush=True)
    if options.report:
        options.report.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
