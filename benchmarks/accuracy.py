"""Does connecting attention help? The paper's claim on small data, with the controls that it takes to judge it.

    python benchmarks/accuracy.py                       # digits, and Fashion-MNIST where it is installed
    python benchmarks/accuracy.py --only 'digits se*' --seeds 3 --report out.md

Every row of the results (a JSONL, to which a stopped run adds) is one training of one network under one seed. Arms of
one setting and seed start from the same weights, see the same images in the same order, and have the same budget.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import fnmatch
import functools
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import dcafy
from dcafy.images.data import open_data
from dcafy.images.options import DataOptions
from dcafy.images.order import seeded
from dcafy.images.pictures import with_channels
from dcafy.runs.evidence import paired_difference
from dcafy.training import TrainingConfig, finetune


@dataclass(frozen=True)
class Pictures:
    """Images of ``side`` pixels with Gaussian noise; ``sizes``: how many to train and to validate.

    ``cue``: side in pixels of a square that says which one of two pictures is to be named; 0 for single pictures.
    ``epochs``: of a training from scratch; further training has half of them.
    """

    spec: str
    words: str
    side: int
    noise: float
    sizes: tuple[int, int]
    epochs: int
    cue: int = 0

    @property
    def channels(self) -> int:
        return 3 if self.cue else 1

    @property
    def network(self) -> str:
        if self.cue:
            return "A residual network of six units (16, 32, 64 channels) that sees 7 px around each of its positions"
        return "A residual network of six units (8, 16, 32 channels)"


CUED = (
    "two of {} on top of one another, one in each of two channels; a square in the corner of a third channel says "
    "which one to name, and is out of sight of the convolutions, so that attention alone can bring it to where it is "
    "needed"
)

DATA = {
    "cued": Pictures("digits", CUED.format("scikit-learn's digits"), 16, 0.2, (3000, 1500), epochs=10, cue=5),
    "cued-fashion": Pictures("fashion-mnist", CUED.format("Fashion-MNIST"), 16, 0.2, (3000, 1500), epochs=10, cue=5),
    "digits": Pictures("digits", "scikit-learn's digits", 16, 0.8, (900, 800), epochs=8),
    "fashion": Pictures("fashion-mnist", "Fashion-MNIST", 28, 0.5, (4000, 2000), epochs=6),
}


# --- networks and data --------------------------------------------------------------------------------------


class Unit(nn.Module):
    """A residual unit of two convolutions with these kernels."""

    def __init__(self, inputs: int, outputs: int, stride: int, kernels: tuple[int, int]) -> None:
        super().__init__()
        first, second = kernels
        self.conv1 = nn.Conv2d(inputs, outputs, first, stride, first // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, second, 1, second // 2, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class SmallResNet(nn.Module):
    """Three stages of two units; ``local``: wider, and what is further away than 3 px is seen by attention alone."""

    def __init__(self, classes: int, channels: int, *, local: bool = False) -> None:
        super().__init__()
        widths = (16, 32, 64) if local else (8, 16, 32)
        kernels = ((3, 1), (1, 1), (1, 1)) if local else ((3, 3),) * 3
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        units, inputs = [], widths[0]
        for stage, width in enumerate(widths):
            units += [Unit(inputs, width, 2 if stage else 1, kernels[stage]), Unit(width, width, 1, kernels[stage])]
            inputs = width
        self.units = nn.Sequential(*units)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.units(self.stem(x)).mean((2, 3)))


@functools.cache
def images(name: str, classes: range) -> tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]:
    """Training and validation images of these classes, ``[channels, side, side]``, always with the same noise."""
    about = DATA[name]
    data = open_data(about.spec, DataOptions(val_fraction=0.45))
    parts = []
    for number, (source, most) in enumerate(zip((data.train, data.val), about.sizes, strict=True)):
        rows: list[tuple[Tensor, int]] = []
        with seeded(17, number):
            for picture, label in (source[index] for index in range(len(source))):
                if label not in classes or len(rows) == most:
                    continue
                values = torchvision.transforms.functional.to_tensor(with_channels(picture, 1))
                values = F.interpolate(values[None], size=about.side, mode="bilinear", antialias=True)[0]
                rows.append((2 * values - 1, label - classes.start))
            if about.cue:
                rows = [cued(_any(rows), _any(rows), about.cue) for _ in range(most)]
            rows = [(image + about.noise * torch.randn(image.shape), label) for image, label in rows]
        parts.append(rows)
    return parts[0], parts[1]


def _any(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, int]:
    return rows[int(torch.randint(len(rows), ()))]


def cued(named: tuple[Tensor, int], other: tuple[Tensor, int], square: int) -> tuple[Tensor, int]:
    """Both pictures in channels of their own, in random order, and the cue which of them is to be named."""
    first = bool(torch.rand(()) < 0.5)
    cue = -torch.ones_like(named[0])
    cue[:, :square, :square] = 1.0 if first else -1.0
    pictures = (named[0], other[0]) if first else (other[0], named[0])
    return torch.cat([*pictures, cue]), named[1]


# --- arms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way of training. ``prepare`` changes the network after it was converted, or is ``None`` for none.

    ``order``: added to the seed of the order of the images. ``against``: the arm that it is compared with.
    """

    against: str | None
    attention: bool = True
    connect: bool = True
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    prepare: Callable[[nn.Module], None] | None = None
    order: int = 0
    conversion: dict[str, Any] = dataclasses.field(default_factory=dict)


def beta_at_zero(model: nn.Module) -> None:
    for connection in dcafy.connections(model).values():
        connection.beta.requires_grad_(False)
        connection.match.requires_grad_(False)


def beta_started(model: nn.Module) -> None:
    with torch.no_grad():
        for connection in dcafy.connections(model).values():
            connection.beta.fill_(0.1)


def match_near_identity(model: nn.Module) -> None:
    for connection in dcafy.connections(model).values():
        for layer in connection.match.modules():
            if isinstance(layer, nn.Linear):
                nn.init.eye_(layer.weight)
                nn.init.zeros_(layer.bias)


SCRATCH = {
    "vanilla": Arm(None, connect=False),
    "vanilla, other order": Arm("vanilla", connect=False, order=1000),
    "no attention": Arm("vanilla", attention=False, connect=False),
    "connected": Arm("vanilla"),
    "connected, α alone": Arm("vanilla", prepare=beta_at_zero),
}

TUNED = {
    "continued": Arm(None, connect=False),
    "continued, other order": Arm("continued", connect=False, order=1000),
    "converted, rate x1": Arm("continued", options={"rate": 1}),
    "converted, rate x10": Arm("continued", options={"rate": 10}),
    "converted, rate x50": Arm("continued", options={"rate": 50}),
    "converted, β from 0.1": Arm("continued", prepare=beta_started),
    "converted, warm-up": Arm("continued", options={"warmup_epochs": 1.0}),
    "converted, match near identity": Arm("continued", prepare=match_near_identity),
    "converted, base frozen": Arm("continued", options={"freeze_base": True}),
}

TRANSFER = {
    "continued": Arm(None, connect=False),
    "converted": Arm("continued"),
}


@dataclass(frozen=True)
class Setting:
    """Data, attention, and whether networks are trained anew (``scratch``), further (``tuned``) or on other classes."""

    data: str
    attention: str
    regime: str

    @property
    def epochs(self) -> int:
        return DATA[self.data].epochs if self.regime == "scratch" else DATA[self.data].epochs // 2

    @property
    def name(self) -> str:
        return f"{self.data} {self.attention} {self.regime}"

    @property
    def arms(self) -> dict[str, Arm]:
        return {"scratch": SCRATCH, "tuned": TUNED, "transfer": TRANSFER}[self.regime]


SETTINGS = tuple(
    Setting(data, attention, regime)
    for regime in ("scratch", "tuned", "transfer")
    for data in DATA
    for attention in ("se", "cbam", "eca", "gc")
)


def config(setting: Setting, seed: int, **options: Any) -> TrainingConfig:
    """SGD with Nesterov momentum and a cosine, as in paper 4.1; connections at 10 times the rate where not said."""
    rate = options.pop("rate", 10)
    lr = 0.1 if setting.regime == "scratch" else 0.03
    kept = {"batch_size": 64, "optimizer": "sgd", "epochs": setting.epochs, "lr": lr, "connection_lr": rate * lr}
    return TrainingConfig(**{**kept, "seed": seed, "cpu": not torch.cuda.is_available(), **options})


def fresh(setting: Setting, seed: int, classes: int, *, attention: bool = True) -> nn.Module:
    """An untrained network; what all arms have in common is the same under one seed."""
    about = DATA[setting.data]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = SmallResNet(classes, about.channels, local=about.cue > 0)
        if attention:
            model = dcafy.insert(model, setting.attention, init="paper", reduction=1 if about.cue else 8,
                                 example_inputs=torch.zeros(2, about.channels, about.side, about.side))  # fmt: skip
    return model


def trained_vanilla(setting: Setting, seed: int, kept: dict[Any, Any]) -> nn.Module:
    """A vanilla network, trained on all classes, or on the first half of them for ``transfer``."""
    classes = range(5) if setting.regime == "transfer" else range(10)
    key = (setting.data, setting.attention, classes, seed)
    if key not in kept:
        kept.clear()
        model = fresh(setting, seed, len(classes))
        train, val = images(setting.data, classes)
        finetune(model, train, val, config(dataclasses.replace(setting, regime="scratch"), seed, usage_images=0))
        kept[key] = model
    return copy.deepcopy(kept[key])


def run(setting: Setting, name: str, seed: int, kept: dict[Any, Any]) -> dict[str, Any]:
    """One training: what it measured."""
    arm = setting.arms[name]
    classes = range(5, 10) if setting.regime == "transfer" else range(10)
    train, val = images(setting.data, classes)
    if setting.regime == "scratch":
        model = fresh(setting, seed, len(classes), attention=arm.attention)
    else:
        model = trained_vanilla(setting, seed, kept)
    new: tuple[str, ...] = ()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        if setting.regime == "transfer":
            model.fc = nn.Linear(model.fc.in_features, len(classes))
            new = ("fc",)
        if arm.connect:
            model = dcafy.convert(model, example_inputs=train[0][0].repeat(2, 1, 1, 1), **arm.conversion)
        if arm.prepare is not None:
            arm.prepare(model)
    start = time.perf_counter()
    history = finetune(model, train, val, config(setting, seed + arm.order, **arm.options), new_layers=new)
    row = {
        "setting": setting.name,
        "arm": name,
        "seed": seed,
        "top1": history.metrics["top1"],
        "loss": history.metrics["loss"],
        "seconds": round(time.perf_counter() - start, 2),
    }
    if history.usage is not None:
        own = history.usage.connections
        row["beta"] = sum(abs(c.beta) for c in own) / len(own)
        row["contribution"] = sum(c.contribution for c in own) / len(own)
        row["message_share"] = sum(c.message_share for c in own) / len(own)
        row["cut_top1"] = history.usage.accuracy_change
        row["cut_loss"] = history.usage.loss_change
    return row


# --- the table --------------------------------------------------------------------------------------------------


def points(values: Sequence[float], others: Sequence[float]) -> str:
    found = paired_difference(values, others)
    if found.low is None or found.high is None:
        return f"{100 * found.mean:+.2f}"
    mark = " **" if found.verdict in ("better", "worse") else ""
    return f"{100 * found.mean:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]{mark}"


def report(rows: list[dict[str, Any]], note: str = "") -> str:
    """Every setting as a table: means over the seeds, paired differences with 95% intervals; ``note`` goes first."""
    lines = [
        "# Does connecting attention help?",
        "",
        f"{time.strftime('%Y-%m-%d')}; dcafy {dcafy.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {_device()}. Made by `python benchmarks/accuracy.py`.",
        "",
        "Top-1 accuracy on validation images in %, means over seeds; differences are paired by seed, in points, with "
        "95% intervals (Student's t), marked ** where the interval excludes zero. *cut* is what setting β = 0 after "
        "the training changes. A setting in which removing the attention costs nothing cannot judge connections.",
        "",
        *([note.strip(), ""] if note else []),
    ]
    for setting in SETTINGS:
        own = [row for row in rows if row["setting"] == setting.name]
        if not own:
            continue
        lines += [f"## {setting.name}", "", _about(setting), ""]
        lines += ["| arm | seeds | top1 | difference to | points | mean abs β | message share | cut, points |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for name, arm in setting.arms.items():
            mine = {row["seed"]: row for row in own if row["arm"] == name}
            if not mine:
                continue
            theirs = {row["seed"]: row for row in own if row["arm"] == arm.against}
            both = sorted(mine.keys() & theirs.keys())
            cells = [name, str(len(mine)), f"{100 * _mean(mine.values(), 'top1'):.2f}", arm.against or ""]
            cells.append(points([mine[s]["top1"] for s in both], [theirs[s]["top1"] for s in both]) if both else "")
            if "beta" in next(iter(mine.values())):
                cells += [f"{_mean(mine.values(), 'beta'):.4f}", f"{100 * _mean(mine.values(), 'message_share'):.1f}%"]
                cut = [row["cut_top1"] for row in mine.values()]
                cells.append(points(cut, [0.0] * len(cut)))
            lines.append("| " + " | ".join(cells + [""] * (8 - len(cells))) + " |")
        lines.append("")
    return "\n".join(lines)


def _device() -> str:
    return f"GPU {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "CPU"


def _about(setting: Setting) -> str:
    about = DATA[setting.data]
    train, val = about.sizes
    return (
        f"{about.words[0].upper()}{about.words[1:]}; {train} images to train and {val} to validate, {about.side} px, "
        f"Gaussian noise of {about.noise}. {about.network}, with {setting.attention.upper()} in each unit; "
        f"{setting.epochs} epochs of SGD."
    )


def _mean(rows: Any, name: str) -> float:
    values = [row[name] for row in rows]
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="GLOB", help="settings such as 'digits se*'")
    parser.add_argument("--seeds", type=int, default=10, help="on digits; half of them elsewhere")
    parser.add_argument("--results", type=Path, default=Path("accuracy.jsonl"))
    parser.add_argument("--report", type=Path, help="write the tables here, as Markdown")
    parser.add_argument("--note", type=Path, help="Markdown to put at the head of the report")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    done = {(row["setting"], row["arm"], row["seed"]) for row in rows}
    kept: dict[Any, Any] = {}
    globs = options.only or ["*"]
    chosen = dict.fromkeys(s for glob in globs for s in SETTINGS if fnmatch.fnmatch(s.name, glob))
    for setting in chosen:
        for seed in range(max(options.seeds // 2, 1) if setting.data != "digits" else options.seeds):
            for name in setting.arms:
                if (setting.name, name, seed) in done:
                    continue
                row = run(setting, name, seed, kept)
                rows.append(row)
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{setting.name}, {name}, seed {seed}: {row['top1']:.2%} in {row['seconds']} s", flush=True)
    if options.report:
        options.report.write_text(report(rows, options.note.read_text() if options.note else "") + "\n")


if __name__ == "__main__":
    main()
