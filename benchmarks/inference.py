"""What connections cost one image at inference: the connected model and its flat graph, over the original, in turns.

    python benchmarks/inference.py --report benchmarks/results/inference.md

Original, a copy of it (A/A), the connected model and ``dcafy.flat`` of it see one image each in every round, in an
order that changes; the ratios are of the same round. The A/A spread is what equal networks differ by.
"""

from __future__ import annotations

import argparse
import copy
import platform
import random
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import dcafy
from dcafy.sources import open_model

MODELS = ("timm:seresnet50", "torchvision:efficientnet_b0", "torchvision:regnet_y_400mf")


def measured(spec: str, rounds: int, size: int) -> str:
    """One row of the table."""
    model = open_model(spec).model.eval()
    connected = dcafy.convert(model, verify=False).eval()
    models: dict[str, nn.Module] = {
        "original": model,
        "A/A": copy.deepcopy(model),
        "connected": connected,
        "flat": dcafy.flat(connected),
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    image, order = torch.rand(1, 3, size, size), list(models)
    with torch.no_grad():
        for done in range(-3, rounds):
            random.Random(done).shuffle(order)
            for name in order:
                start = time.process_time()
                models[name](image)
                if done >= 0:
                    times[name].append(time.process_time() - start)
    cells = [spec, str(len(dcafy.connections(connected))), f"{1000 * statistics.median(times['original']):.1f} ms"]
    for name in ("A/A", "connected", "flat"):
        ratios = sorted(a / b for a, b in zip(times[name], times["original"], strict=True))
        quarter = len(ratios) // 4
        cells.append(f"{statistics.median(ratios):.3f} ({ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f})")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--size", type=int, default=224, help="side of the image in pixels")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# One image at inference, over the original",
        "",
        f"{time.strftime('%Y-%m-%d')}; dcafy {dcafy.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, CPU, one thread; one image of {options.size} px, {options.rounds} rounds in "
        "turns, processor time. Median and quartiles of the ratios. Made by `python benchmarks/inference.py`. Goal: "
        "connected no slower than flat.",
        "",
        "| network | connections | original | A/A | connected | flat |",
        "|---|---|---|---|---|---|",
    ]
    for spec in MODELS:
        lines.append(measured(spec, options.rounds, options.size))
        print(lines[-1], flush=True)
    if options.report:
        options.report.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
