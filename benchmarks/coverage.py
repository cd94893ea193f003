"""How often the 95% intervals of ``dcafy finetune --compare`` cover the true difference.

    python benchmarks/coverage.py [--trials 6000]

Two networks are drawn instead of trained: each image has a difficulty, each seed a strength, and the second network a
gain that may hang on the image. From these follow, image by image, whether a network is right, and its loss. The true
difference is the mean over images and seeds without end. Each trial draws seeds and images anew and looks whether the
interval covers it.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dcafy.runs.evidence import Difference, crossed_difference

SEEDS = (3, 5, 10, 20)


@dataclass(frozen=True)
class World:
    """What is drawn, all in logits: ``gain`` of the second network, and standard deviations.

    ``by_image``: of the gain between images; ``by_seed``: of each network's strength between seeds; ``by_both``: of
    each network's logit between images under one seed, such as the order of the images makes it.
    """

    name: str
    images: int = 1000
    gain: float = 0.1
    by_image: float = 0.5
    by_seed: float = 0.05
    by_both: float = 0.7

    def measured(self, seeds: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(right, loss) of both networks, ``[2, seeds, images]``: the right class wins where its logit is above 0."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        gain = torch.stack([torch.zeros(self.images), self.gain + self.by_image * normal(self.images)])[:, None]
        strength = self.by_seed * normal(2, seeds, 1) + self.by_both * normal(2, seeds, self.images)
        logits = 1.5 + 2 * normal(self.images) + gain + strength
        return (logits > 0).double(), torch.nn.functional.softplus(-logits)

    def truth(self) -> tuple[float, float]:
        """The true differences of accuracy and loss, by integrals over what is normally distributed."""
        variance = 4 + self.by_both**2 + self.by_seed**2
        means, deviations = (1.5, 1.5 + self.gain), (variance**0.5, (variance + self.by_image**2) ** 0.5)
        points = torch.linspace(-9, 9, 20001, dtype=torch.float64)
        weights = torch.exp(-(points**2) / 2)
        weights /= weights.sum()
        right = [0.5 * math.erfc(-mean / spread / math.sqrt(2)) for mean, spread in zip(means, deviations, strict=True)]
        loss = [
            float((weights * torch.nn.functional.softplus(-(mean + spread * points))).sum())
            for mean, spread in zip(means, deviations, strict=True)
        ]
        return right[1] - right[0], loss[1] - loss[0]


WORLDS = (
    World("seeds and images alike"),
    World("seeds hardly matter", by_seed=0.0, by_both=0.2),
    World("seeds are all that matters", by_seed=0.5, by_image=0.0),
    World("seeds matter much", by_seed=0.2),
    World("no gain", gain=0.0),
    World("few images", images=200),
    World("many images", images=5000),
)


def coverage(world: World, seeds: int, trials: int, seed: int = 0) -> tuple[float, float]:
    """How often the intervals of accuracy and of loss cover the truth."""
    generator = torch.Generator().manual_seed(seed)
    truth = world.truth()
    covered = [0, 0]
    for _ in range(trials):
        for i, (values, unit) in enumerate(zip(world.measured(seeds, generator), (1.0, None), strict=True)):
            found: Difference = crossed_difference(values[1], values[0], unit=unit)
            assert found.low is not None
            assert found.high is not None
            covered[i] += found.low <= truth[i] <= found.high
    return covered[0] / trials, covered[1] / trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=6000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "coverage.md")
    options = parser.parse_args()
    error = 100 * math.sqrt(0.95 * 0.05 / options.trials)
    lines = [
        "# Coverage of the intervals of `--compare`",
        "",
        f"Share of {options.trials:,} drawn comparisons whose 95% interval covers the true difference, in percent; the "
        f"standard error is {error:.2f}. Accuracy, then loss. `python benchmarks/coverage.py` makes this table.",
        "",
        "| world | images | " + " | ".join(f"{seeds} seeds" for seeds in SEEDS) + " |",
        "|---|--:|" + "--:|" * len(SEEDS),
    ]
    for world in WORLDS:
        found = [coverage(world, seeds, options.trials) for seeds in SEEDS]
        cells = [f"{100 * accuracy:.1f}, {100 * loss:.1f}" for accuracy, loss in found]
        lines.append(f"| {world.name} | {world.images:,} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
