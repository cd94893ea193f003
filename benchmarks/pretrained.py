"""Does connecting attention help a network that others trained? PP-OCR's, taught to look at one of two words.

    pip download --no-deps rapidocr==3.10.0
    python benchmarks/pretrained.py --weights rapidocr-3.10.0-py3-none-any.whl
    python benchmarks/pretrained.py --report             # the tables alone, from the rows that there are

The network is a MobileNetV3 with nine squeeze-and-excitation blocks, trained by others to tell lines of text that are
upright from those that are upside down; its weights (Apache-2.0) are in the wheel, as ONNX. It is fine-tuned to a task
in which its attention carries: two words are drawn on one another, one in the red channel and one in the blue one, each
upright or upside down, and a mark in the margin says which of them is asked for. The margin is as wide as the network
sees to either side, so that only attention brings the mark to the words; without that, 75% is the most. Contrasts and
noise are drawn anew for every image, and which two of 6,000 words meet.

Given up before: naming typefaces (attention is worth +0.1 points, five seeds), a cue that is the mean of noise
over the whole image (+0.4, one seed), and a narrower mark, which not every network found. This task was chosen by one
seed of *vanilla* and of *no attention*. The rates are those of ``dcafy finetune --optimizer sgd``, 0.01 and ten times
that: at five times as much, where that command caps what connections have, one seed of *centred* had a β of 6 and gates
that were all open or closed, and fell to 72%. Arm *centred x50* is there for that.

Rows, arms, controls and intervals are those of ``benchmarks/accuracy.py``; the same command goes on where a stopped one
was. It is exploratory, with five seeds; ``--seeds`` makes more. What is expected, written down before any run that
counts (one seed of four arms was seen when the rates were chosen): *connected* is *vanilla* within half a point,
*centred* and *own message* are not above it, and *centred x50* is far below.

In ``pretrained, adamw`` it is fine-tuned with the optimizer and the rates that ``dcafy finetune`` has where it is told
nothing: AdamW, 0.0005, and ten times that. What is expected, written down when ``pretrained`` was there and none of
these: no arm is above *vanilla*; *centred* is below it by less than with SGD, for no step of AdamW is long.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import random
import sys
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))

from accuracy import BY_ADAMW, CONTROLS, MAIN, OPTIONS, Garments, Setting, Study, carried_on, read
from accuracy_report import maps, spreads, table

import dcafy
from dcafy.training.options import LEARNING_RATES

RESULTS = Path(__file__).parent / "results" / "pretrained.jsonl"

# --- the trained network -------------------------------------------------------------------------------------------


class HardSigmoid(nn.Module):
    """0.2z + 0.5, between 0 and 1: PP-OCR's, of another slope than PyTorch's."""

    def forward(self, z: Tensor) -> Tensor:
        return F.relu6(1.2 * z + 3) / 6


class Squeeze(nn.Module):
    """Squeeze-and-excitation, with biases and a hard sigmoid."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.gate = HardSigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Bottleneck(nn.Sequential):
    """MobileNetV3's, with a shortcut where nothing changes size."""

    shortcut = False

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x) if self.shortcut else super().forward(x)


STRIDED = (2, 3, 5, 10)
"""The units that halve the height of a map; none halves its width."""

PLAIN = (2, 3, 4)
"""The units with ReLU; all others have hard-swish."""

Weights = dict[str, np.ndarray[Any, Any]]


def weights_of(wheel: Path) -> Weights:
    """The trained weights by their names; nothing of the wheel is run."""
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if "mobile_v2.0_cls" in name and name.endswith(".onnx")]
        graph = onnx.load_from_string(archive.read(name)).graph
    nodes = (node for node in graph.node if node.op_type == "Constant")
    return {node.output[0]: numpy_helper.to_array(node.attribute[0].t) for node in nodes}


class Angle(nn.Module):
    """PP-OCR's classifier: maps ``[N, 3, H, W]`` from -1 to 1 to ``classes``, by default to upright or not."""

    def __init__(self, weights: Weights, *, attention: bool = True) -> None:
        super().__init__()
        self.weights = weights
        self.stem = nn.Sequential(*self._layers("conv1", stride=(2, 2)), nn.Hardswish())
        self.units = nn.Sequential(*(self._unit(number, attention) for number in range(2, 13)))
        self.last = nn.Sequential(*self._layers("conv_last"), nn.Hardswish(), nn.MaxPool2d(2))
        self.fc = nn.Linear(*weights["fc_0.w_0"].shape)
        self.fc.weight.data = torch.tensor(weights["fc_0.w_0"]).T.contiguous()
        self.fc.bias.data = torch.tensor(weights["fc_0.b_0"])
        del self.weights

    def _layers(self, name: str, stride: tuple[int, int] = (1, 1)) -> list[nn.Module]:
        kernel = torch.tensor(self.weights[f"{name}_weights"])
        outputs, inputs, size, _ = kernel.shape
        groups = outputs if name.endswith("depthwise") else 1
        convolution = nn.Conv2d(groups * inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        convolution.weight.data = kernel
        norm = nn.BatchNorm2d(outputs, eps=1e-5)
        names = {"weight": "scale", "bias": "offset", "running_mean": "mean", "running_var": "variance"}
        norm.load_state_dict(
            {ours: torch.tensor(self.weights[f"{name}_bn_{theirs}"]) for ours, theirs in names.items()}, strict=False
        )
        return [convolution, norm]

    def _unit(self, number: int, attention: bool) -> Bottleneck:
        name, act = f"conv{number}", nn.ReLU if number in PLAIN else nn.Hardswish
        expand = self._layers(f"{name}_expand")
        depthwise = self._layers(f"{name}_depthwise", (2, 1) if number in STRIDED else (1, 1))
        linear = self._layers(f"{name}_linear")
        attend = [self._squeeze(f"{name}_se")] if attention and f"{name}_se_1_weights" in self.weights else []
        unit = Bottleneck(*expand, act(), *depthwise, act(), *attend, *linear)
        unit.shortcut = number not in STRIDED and expand[0].in_channels == linear[0].out_channels
        return unit

    def _squeeze(self, name: str) -> Squeeze:
        hidden, channels, *_ = self.weights[f"{name}_1_weights"].shape
        made = Squeeze(channels, hidden)
        for layer, part in ((made.reduce, 1), (made.expand, 2)):
            layer.weight.data = torch.tensor(self.weights[f"{name}_{part}_weights"])
            layer.bias.data = torch.tensor(self.weights[f"{name}_{part}_offset"])
        return made

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.units(self.stem(x))).mean((2, 3)))


# --- drawn words ---------------------------------------------------------------------------------------------------

FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold", "LiberationSans-Regular"),
    *("LiberationSans-Italic", "LiberationSansNarrow-Regular", "LiberationMono-Regular", "LiberationSerif-Regular"),
    *("LiberationSerif-Bold", "LiberationSerif-Italic"),
)
"""Files of Debian's fonts-dejavu and fonts-liberation, without their ending."""

SIZE = 36, 52
"""Of a word's part of an image, in pixels."""

MARGIN, MARK = 60, 18
"""Widths in pixels, at the left: the network sees 39 to either side."""

DRAWN = {"train": (1, 6000), "t10k": (2, 2400)}
"""Part -> the seed and the number of its words."""


def drawn(fonts: Path, part: str) -> Garments:
    """Ink ``[N, 1, *SIZE]`` from 0 to 1 of made-up words, half of them upside down, and which are: 0 or 1.

    The typefaces take turns; sizes, places and angles differ a little.
    """
    from PIL import Image, ImageDraw, ImageFont

    files = [next(fonts.rglob(f"{face}.ttf")) for face in FACES]
    seed, count = DRAWN[part]
    chance, images = random.Random(seed), []
    height, width = SIZE
    for number in range(count):
        letters = [chance.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(chance.randint(3, 6))]
        word = "".join(letters).capitalize() if chance.random() < 0.3 else "".join(letters)
        font = ImageFont.truetype(str(files[number % len(files)]), chance.randint(14, 20))
        image = Image.new("L", (2 * width, 2 * height))
        place = chance.randint(width // 2 - 4, width // 2 + 6), chance.randint(height // 2, height // 2 + 8)
        ImageDraw.Draw(image).text(place, word, font=font, fill=255)
        image = image.rotate(chance.uniform(-3, 3), resample=Image.Resampling.BILINEAR)
        images.append(np.asarray(image)[height // 2 : height // 2 + height, width // 2 : width // 2 + width])
    ink = torch.from_numpy(np.stack(images)).float()[:, None] / 255
    turned = torch.arange(count) // len(files) % 2
    return torch.where(turned.view(-1, 1, 1, 1) == 1, ink.flip(2, 3), ink), turned


def two_words(one: Tensor, other: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """One in the red channel, the other in the blue one; a mark in the green one's margin says which is asked for."""

    def level(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand((len(one), 1, 1, 1), generator=chance)

    asked = torch.randint(0, 2, (len(one),), generator=chance)
    red, blue = (2 * (level(0.8, 1.0) - level(0.4, 0.8) * ink) - 1 for ink in (one, other))
    x = F.pad(torch.cat((red, torch.zeros_like(red), blue), 1), (MARGIN, 0))
    x[:, 1, :, :MARK] = (2.0 * asked - 1).view(-1, 1, 1)
    return x + level(0.0, 0.2) * torch.randn(x.shape, generator=chance), asked


# --- the study -----------------------------------------------------------------------------------------------------

ARMS = (
    *("vanilla", "no attention", "connected", "centred", "own message", "shuffled"),
    *("centred x1", "centred x50"),
)
"""Those of ``accuracy.py`` that are made here."""

WORDS = "two words in two colours, a mark in the margin says which is upright or not; PP-OCR's classifier, fine-tuned"

SETTING = Setting(
    "pretrained",
    f"{WORDS} by SGD",
    two_words,
    lambda channels, classes, attend: nn.Identity(),
    steps=800,
    lr=LEARNING_RATES["sgd"],
    batch=32,
    classes=range(2),
    arms={name: arm for name, arm in {**MAIN, **CONTROLS, **OPTIONS}.items() if name in ARMS},
)

SETTINGS = {
    setting.name: setting
    for setting in (
        SETTING,
        dataclasses.replace(
            SETTING,
            name="pretrained, adamw",
            words=f"{WORDS} by AdamW",
            lr=LEARNING_RATES["adamw"],
            optimizer="adamw",
            arms=BY_ADAMW,
        ),
    )
}


class Lines(Study):
    """Drawn words, and the trained network that all arms are fine-tuned from."""

    gates = (HardSigmoid,)

    def __init__(self, wheel: Path, fonts: Path) -> None:
        super().__init__(fonts)
        self.weights = weights_of(wheel)

    def garments(self, part: str, classes: range) -> Garments:
        if part not in self._garments:
            self._garments[part] = drawn(self.folder, part)
        return self._garments[part]

    def validation(self, setting: Setting) -> Iterator[tuple[Tensor, Tensor]]:
        chance = torch.Generator().manual_seed(5)
        return (self.batch(setting, "t10k", 500, chance) for _ in range(8))

    def start(self, setting: Setting, seed: int, *, attention: bool) -> nn.Module:
        network = Angle(self.weights, attention=attention)
        torch.manual_seed(seed)
        network.fc = nn.Linear(network.fc.in_features, len(setting.classes))
        return self._placed(network)


def report(rows: list[dict[str, Any]]) -> str:
    """The tables as Markdown; what is incomplete says so."""
    asked = sum(len(setting.seeds(arm)) for setting in SETTINGS.values() for arm in setting.arms)
    lines = [
        "# A network that others trained, fine-tuned",
        "",
        f"**Incomplete**: {len(rows)} runs are here, and {asked - len(rows)} are still to come.\n"
        if len(rows) < asked
        else "",
        f"dcafy {dcafy.__version__}, torch {torch.__version__}, Python {platform.python_version()}, one core of a CPU. "
        "Made by `python benchmarks/pretrained.py` from `pretrained.jsonl`; the columns are explained in "
        "[accuracy.md](accuracy.md).",
        "",
        (__doc__ or "").partition("python benchmarks/pretrained.py --report")[2].partition("\n\n")[2].strip(),
        "",
        "## Can it show anything?",
        "",
        spreads(rows, list(SETTINGS.values())),
        "",
        "## What came out",
        "",
        "4,000 images to validate on.",
        "",
    ]
    for setting in SETTINGS.values():
        said = f"{setting.words[0].upper()}{setting.words[1:]}; {setting.steps} steps."
        lines += [f"### {setting.name}", "", said, "", *table(setting, rows), ""]
    return "\n".join([*lines, "## Attention values (paper Fig. 1)", "", *maps(rows, list(SETTINGS.values())), ""])


def valid(row: dict[str, Any]) -> bool:
    """Whether a row is of a setting that there is, with the budget that it has now."""
    setting = SETTINGS.get(row["setting"])
    return setting is not None and row["arm"] in setting.arms and setting.budget.items() <= row.items()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, metavar="WHEEL", help="rapidocr-3.10.0-py3-none-any.whl")
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts/truetype"), help="where the fonts lie")
    parser.add_argument("--only", default="*", metavar="GLOB", help="runs such as 'pretrained/*' or '*/centred'")
    parser.add_argument("--seeds", type=int, default=len(SETTING.seeds("vanilla")), help="how many of them")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="write the tables, and run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for row in read(options.results) if valid(row)]
    if not options.report:
        if options.weights is None:
            parser.error("--weights is missing: pip download --no-deps rapidocr==3.10.0 gives the wheel")
        runs = [(name, arm) for name, setting in SETTINGS.items() for arm in setting.arms]
        chosen = [run for run in runs if fnmatch("/".join(run), options.only)]
        keys = ((*run, seed) for seed in range(options.seeds) for run in chosen)
        carried_on(Lines(options.weights, options.fonts), options.results, rows, keys, SETTINGS)
    options.results.with_suffix(".md").write_text(report(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
