"""Tables 1, 2a to 2e and the GC row of DCANet (arXiv 2007.05099), rebuilt: parameters and GFLOPs beside the paper's.

    python benchmarks/paper_tables.py
    python benchmarks/paper_tables.py --commands         # each row as a training by the paper's recipe

Every network is a torchvision base with dcafy.insert and dcafy.convert, on the meta device: nothing is computed.

Connected networks are counted twice. *eq. 3*: f(αG, βT̃) = αG + βT̃, as the paper has it. *published*: as the code does
that was published with it, f = ReLU(LayerNorm(w1·G + w2·T̃ + b)) (dcafy's schema ``normalised``; BN and ReLU for
CBAM's spatial maps; for GC alone the plain sum G + pT̃, with a match that has a LayerNorm in its middle only). That code
has an f in the first block as well, which hears nothing, and a match in front of it where widths differ; and b does
nothing, for LayerNorm takes it out again. The paper's cells count them: a working network does not have them, and they
stand in a row of their own. With them, every cell is exact.

Counting, as it reproduces the paper's cells: convolution multiply-adds plus one per bias, Linear in x out without
bias, batch norm 2 per element, ReLU 1 per output, pooling 1 per input element, LayerNorm, sigmoid and products 0;
eval mode, one image of 224 x 224; 1 GFLOP is 1e9 of these.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dcafy
from dcafy.emit.matching import channel_match

BASES: dict[str, Callable[[], nn.Module]] = {
    "MobileNetV2": torchvision.models.mobilenet_v2,
    "MnasNet1_0": torchvision.models.mnasnet1_0,
    "ResNet50": torchvision.models.resnet50,
    "ResNet101": torchvision.models.resnet101,
    "ResNet152": torchvision.models.resnet152,
}

NAMES = {"SE": "se", "SK": "sk", "GE-theta-minus": "ge", "CBAM": "cbam", "GC": "gc"}
"""The paper's attention -> dcafy's."""

FC1 = {"channel_match": "fc1"}
R16, R8, R4 = ({"channel_match": "fc2", "reduction": reduction} for reduction in (16, 8, 4))

ONE_FC = "The paper says 'two FC, r=16 in all experiments'; its own parameter column needs one FC here, or r=8."
OWN_REDUCTION = (
    "The paper's r=8 and r=4 cells changed SE's own reduction along with the match's, in the first block of each stage "
    "only: so does the published column. With SE at 16, as the text has it, there are fewer parameters."
)
UNEQUAL = "The paper compares r=16 (vanilla) with r=8 (DCA): the difference is not the connections' alone."
PUBLISHED = (
    "The paper's numbers were not made with its eq. 3: its cells are those of the published f, with what is never used."
)
CBAM_FLOPS = "The paper's CBAM GFLOPs cells do not agree with one another; no one way of counting gives them all."
SK_FLOPS = "The paper's 0.36 GFLOPs are not what the counting of all other cells gives: 0.3548."
PLAIN_SUM = (
    "GC is published as G + pT̃, with one scalar, and a match with a LayerNorm in its middle only; eq. 3 has α and β, "
    "and two LayerNorms (paper 3.3)."
)


@dataclass(frozen=True)
class Row:
    """One row of the paper, and how it is built here.

    ``paper``       the cells: parameters in millions, GFLOPs
    ``insertions``  arguments of successive calls of ``dcafy.insert``
    ``options``     of ``dcafy.convert``; ``None`` for a network that is not connected
    ``published``   the insertions of the published column, where they are others
    """

    base: str
    attention: str
    variant: str
    paper: tuple[float, float]
    insertions: tuple[dict[str, Any], ...] = ()
    options: dict[str, Any] | None = None
    notes: tuple[str, ...] = field(default=())
    published: tuple[dict[str, Any], ...] = ()

    def build(self, **options: Any) -> nn.Module:
        """The network, without data; ``options``: of the conversion, besides its own."""
        with torch.device("meta"):
            model = BASES[self.base]().eval()
        for arguments in (options and self.published) or self.insertions:
            model = dcafy.insert(model, NAMES[self.attention], init="paper", copy=False, **arguments)
        if self.options is not None:
            model = dcafy.convert(model, min_hidden=1, verify=False, copy=False, **self.options, **options)
        return model.eval()

    def build_published(self) -> nn.Module:
        """The connected network as the published code has it, as far as it works."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The schema 'normalised' is not the identity")
            model = self.build(schema="direct" if self.attention == "GC" else "normalised")
        if self.attention == "GC":
            for connection in dcafy.connections(model).values():
                connection.match = _without_last_norm(connection.match)
                alpha = connection._parameters.pop("alpha")
                connection.register_buffer("alpha", alpha)
        return model

    def command(self) -> str:
        """The training of this row by the paper's recipe; empty where it takes two insertions, which are Python's."""
        if len(self.insertions) > 1:
            return ""
        recipe = "paper" if self.base.startswith("ResNet") else "paper-mobile"
        options: dict[str, Any] = {"recipe": recipe}
        for arguments in self.insertions:
            options |= {"attention": NAMES[self.attention], "attention_reduction": arguments["reduction"]}
        options |= self.options or {}
        flags = [f"--{name.replace('_', '-')} {value}" for name, value in options.items()]
        arm = "" if self.options is not None else " --compare attention" if self.insertions else " --plain"
        name = "-".join(
            [self.base, *(NAMES[self.attention] for _ in self.insertions), *map(str, (self.options or {}).values())]
        )
        network, data = f"torchvision:{BASES[self.base].__name__}", "--data imagefolder:imagenet"
        return f"dcafy finetune {network} {' '.join(flags)}{arm} {data} -o runs/{name}"

    def unused(self) -> int:
        """How many parameters the published code has besides, which nothing depends on."""
        plan = self.build().dca.recipe.plan
        first = {c.dimension: plan.block(c.blocks[0]) for c in plan.chains if c.links}
        found = 6 if "spatial" in first else 0  # p1, p2, and a BN over two maps
        if "channel" not in first:
            return found
        width, branches = first["channel"].channels, 2 if self.attention == "SK" else 1
        chain = next(c for c in plan.chains if c.dimension == "channel" and c.links)
        match = channel_match(
            str(chain.links[0].channel_match),
            FRONT[self.base] if self.attention != "SK" else width,
            width,
            reduction=int(chain.links[0].reduction),
            min_hidden=1,
            device="meta",
        )
        if self.attention == "GC":
            return found + 1 + parameters(_without_last_norm(match))
        biases = 0 if self.attention == "CBAM" else len(chain.blocks)
        return found + branches * (2 + 2 * width + biases) + parameters(match)


FRONT = {"ResNet50": 64, "ResNet101": 64, "ResNet152": 64, "MobileNetV2": 32, "MnasNet1_0": 16}
"""Base -> the width of what goes into its first unit; SK, in the middle of a unit, has its own in front of it."""


def _without_last_norm(match: nn.Module) -> nn.Module:
    if not isinstance(match, nn.Sequential):
        return match
    *layers, _, last = match
    return nn.Sequential(*layers, last)


def vanilla(base: str, attention: str, paper: tuple[float, float], reduction: int = 16, *notes: str) -> Row:
    return Row(base, attention, "vanilla", paper, ({"reduction": reduction},), None, notes)


def dca(
    base: str,
    attention: str,
    paper: tuple[float, float],
    options: dict[str, Any],
    *notes: str,
    reduction: int = 16,
    variant: str = "DCA",
    insertions: tuple[dict[str, Any], ...] = (),
    published: tuple[dict[str, Any], ...] = (),
) -> Row:
    own = insertions or ({"reduction": reduction},)
    return Row(base, attention, variant, paper, own, options, (*notes, PUBLISHED), published)


def stages(reduction: int) -> tuple[dict[str, Any], ...]:
    """Insertions with another reduction in the first block of each stage of a ResNet."""
    return {"reduction": reduction, "where": "layer*.0"}, {"reduction": 16, "where": "layer*.[1-9]*"}


FIRST_AND_OTHERS = ({"reduction": 8, "where": "layers.*.0"}, {"reduction": 16, "where": "layers.*.[1-9]"})
"""MnasNet's SE: reduction 8 in the first block of each stack, 16 in the others."""

ROWS = (
    Row("MobileNetV2", "none", "base", (3.5, 0.32)),
    Row("MnasNet1_0", "none", "base", (4.38, 0.33)),
    Row("ResNet50", "none", "base", (25.56, 4.12)),
    Row("ResNet101", "none", "base", (44.55, 7.85)),
    Row("ResNet152", "none", "base", (60.19, 11.58)),
    vanilla("MobileNetV2", "SE", (3.56, 0.32), 8),
    vanilla("MobileNetV2", "SK", (5.28, 0.35), 8),
    vanilla("MobileNetV2", "GE-theta-minus", (3.5, 0.32)),
    vanilla("MobileNetV2", "CBAM", (3.57, 0.32), 8, CBAM_FLOPS),
    vanilla("MnasNet1_0", "SE", (4.42, 0.33), 16, UNEQUAL),
    vanilla("MnasNet1_0", "GE-theta-minus", (4.38, 0.33)),
    vanilla("ResNet50", "SE", (28.09, 4.13)),
    vanilla("ResNet50", "SK", (37.12, 5.98)),
    vanilla("ResNet50", "GE-theta-minus", (25.56, 4.13)),
    vanilla("ResNet50", "CBAM", (28.09, 4.14), 16, CBAM_FLOPS),
    vanilla("ResNet50", "GC", (28.11, 4.13)),
    vanilla("ResNet101", "SE", (49.33, 7.86)),
    vanilla("ResNet152", "SE", (66.82, 11.6)),
    vanilla("MnasNet1_0", "CBAM", (4.42, 0.33), 16, UNEQUAL, CBAM_FLOPS),
    dca("MobileNetV2", "SE", (3.65, 0.32), FC1, ONE_FC, reduction=8),
    dca("MobileNetV2", "SK", (5.91, 0.36), R8, ONE_FC, SK_FLOPS, reduction=8),
    dca("MobileNetV2", "GE-theta-minus", (3.59, 0.32), FC1, ONE_FC),
    dca("MobileNetV2", "CBAM", (3.65, 0.34), FC1, ONE_FC, CBAM_FLOPS, reduction=8),
    dca("MnasNet1_0", "SE", (4.48, 0.33), R8, ONE_FC, UNEQUAL, insertions=FIRST_AND_OTHERS),
    dca("MnasNet1_0", "GE-theta-minus", (4.48, 0.33), FC1, ONE_FC),
    dca("MnasNet1_0", "CBAM", (4.56, 0.33), FC1, ONE_FC, UNEQUAL, CBAM_FLOPS, reduction=8),
    dca("ResNet50", "SE", (28.65, 4.13), R16, variant="DCA (2FC r=16), Tables 1,2a,2d,2e"),
    dca("ResNet50", "SE", (30.9, 4.13), FC1, variant="DCA 1FC (2e)"),
    dca("ResNet50", "SE", (29.87, 4.13), R8, OWN_REDUCTION, variant="DCA 2FC r=8 (2e)", published=stages(8)),
    dca("ResNet50", "SE", (32.31, 4.13), R4, OWN_REDUCTION, variant="DCA 2FC r=4 (2e)", published=stages(4)),
    dca("ResNet101", "SE", (49.93, 7.86), R16),
    dca("ResNet152", "SE", (67.45, 11.6), R16),
    dca("ResNet50", "SK", (37.48, 5.98), FC1, ONE_FC),
    dca("ResNet50", "GE-theta-minus", (26.12, 4.13), R16),
    dca("ResNet50", "CBAM", (30.9, 4.14), FC1, ONE_FC, CBAM_FLOPS, variant="DCA-All"),
    dca("ResNet50", "CBAM", (30.9, 4.14), {**FC1, "dimension": "channel"}, ONE_FC, CBAM_FLOPS, variant="DCA-C (2b)"),
    dca("ResNet50", "CBAM", (28.09, 4.14), {"dimension": "spatial"}, CBAM_FLOPS, variant="DCA-S (2b,2c)"),
    dca("ResNet50", "GC", (28.63, 4.13), R16, PLAIN_SUM, variant="DCA (README)"),
)


def parameters(model: nn.Module) -> int:
    """How many parameters the model has."""
    return sum(parameter.numel() for parameter in model.parameters())


# -- operations -----------------------------------------------------------------------------------------


def _convolution(layer: Any, x: Tensor, y: Tensor) -> int:
    return y.numel() * (layer.weight[0].numel() + (layer.bias is not None))


def _linear(layer: Any, x: Tensor, y: Tensor) -> int:
    return y.numel() * int(layer.in_features)


COUNTED: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], int]] = {
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Linear: _linear,
    nn.BatchNorm2d: lambda layer, x, y: 2 * x.numel(),
    nn.ReLU: lambda layer, x, y: y.numel(),
    nn.ReLU6: lambda layer, x, y: y.numel(),
    nn.MaxPool2d: lambda layer, x, y: x.numel(),
    nn.AvgPool2d: lambda layer, x, y: x.numel(),
    nn.AdaptiveAvgPool2d: lambda layer, x, y: x.numel(),
    nn.AdaptiveMaxPool2d: lambda layer, x, y: x.numel(),
}
"""Layer -> what one call of it counts; every other layer, and what is no layer, counts nothing."""


def operations(model: nn.Module) -> int:
    """What one image of 224 x 224 takes, counted as the module's docstring says."""
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += COUNTED[type(layer)](layer, inputs[0], output)

    handles = [module.register_forward_hook(count) for module in model.modules() if type(module) in COUNTED]
    try:
        with torch.no_grad():
            model(torch.empty(1, 3, 224, 224, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return total


# -- the tables -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A row with what dcafy's network has."""

    row: Row
    parameters: int
    operations: int
    published: int | None
    unused: int


def measured(rows: Sequence[Row] = ROWS) -> list[Measured]:
    """Every row, built and counted."""
    built = []
    for row in rows:
        model, connected = row.build(), row.options is not None
        published, unused = (parameters(row.build_published()), row.unused()) if connected else (None, 0)
        built.append(Measured(row, parameters(model), operations(model), published, unused))
    return built


COLUMNS = (
    "network",
    "attention",
    "variant",
    "Params [M]",
    "eq. 3",
    "diff",
    "published",
    "diff",
    "GFLOPs",
    "eq. 3",
    "diff",
)


def table(results: Sequence[Measured]) -> tuple[Table, list[str]]:
    """The paper's cells, eq. 3, the published code, differences, and the footnotes."""
    shown = Table(title="DCANet, Tables 1 and 2: the paper, eq. 3, the published code", title_justify="left")
    for name in (*COLUMNS, "notes"):
        shown.add_column(name, justify="left" if name in ("network", "attention", "variant", "notes") else "right")
    notes = list(dict.fromkeys(note for result in results for note in result.row.notes))
    for result in results:
        row, giga = result.row, result.operations / 1e9
        total = None if result.published is None else result.published + result.unused
        shown.add_row(
            *(row.base, row.attention, row.variant, f"{row.paper[0]:.2f}"),
            *(f"{result.parameters:,}", _difference(result.parameters, row)),
            *(("", "") if total is None else (f"{total:,}", _difference(total, row))),
            *(f"{row.paper[1]:.2f}", f"{giga:.3f}", f"{round(giga, 2) - row.paper[1]:+.2f}"),
            ",".join(str(notes.index(note) + 1) for note in row.notes),
        )
        if result.unused:
            shown.add_row("", "", "  in no working network", "", "", "", f"{result.unused:,}")
    return shown, notes


def _difference(parameters: int, row: Row) -> str:
    return f"{round(parameters / 1e6, 2) - row.paper[0]:+.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", action="store_true", help="print each row as a training, and count nothing")
    if parser.parse_args().commands:
        for row in ROWS:
            print(row.command() or f"# {row.base} {row.attention}: dcafy.insert twice, with {row.insertions}")
        return
    console = Console(width=180)
    shown, notes = table(measured())
    console.print(shown)
    for number, note in enumerate(notes, start=1):
        console.print(f"{number:>2}  {note}", highlight=False)


if __name__ == "__main__":
    main()
