"""The paper's parameter and GFLOPs columns, from the very code that prints them (benchmarks/paper_tables.py)."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torchvision

import dcafy
from dcafy.plan.options import Conversion
from dcafy.runs.options import RunOptions, chosen
from dcafy.training import DataOptions, TrainingConfig

SOURCE = Path(__file__).parents[1] / "benchmarks" / "paper_tables.py"


def _benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper_tables", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["paper_tables"] = module
    spec.loader.exec_module(module)
    return module


paper_tables = _benchmark()

PARAMETERS = {
    ("MobileNetV2", "none", "base"): 3504872,
    ("MnasNet1_0", "none", "base"): 4383312,
    ("ResNet50", "none", "base"): 25557032,
    ("ResNet101", "none", "base"): 44549160,
    ("ResNet152", "none", "base"): 60192808,
    ("MobileNetV2", "SE", "vanilla"): 3563492,
    ("MobileNetV2", "SK", "vanilla"): 5277248,
    ("MobileNetV2", "GE-theta-minus", "vanilla"): 3504872,
    ("MobileNetV2", "CBAM", "vanilla"): 3565192,
    ("MnasNet1_0", "SE", "vanilla"): 4421688,
    ("MnasNet1_0", "GE-theta-minus", "vanilla"): 4383312,
    ("ResNet50", "SE", "vanilla"): 28088024,
    ("ResNet50", "SK", "vanilla"): 37118080,
    ("ResNet50", "GE-theta-minus", "vanilla"): 25557032,
    ("ResNet50", "CBAM", "vanilla"): 28089624,
    ("ResNet50", "GC", "vanilla"): 28105032,
    ("ResNet101", "SE", "vanilla"): 49326872,
    ("ResNet152", "SE", "vanilla"): 66821848,
    ("MnasNet1_0", "CBAM", "vanilla"): 4423288,
    ("MobileNetV2", "SE", "DCA"): 3641516,
    ("MobileNetV2", "SK", "DCA"): 5883204,
    ("MobileNetV2", "GE-theta-minus", "DCA"): 3582896,
    ("MobileNetV2", "CBAM", "DCA"): 3643248,
    ("MnasNet1_0", "SE", "DCA"): 4474943,
    ("MnasNet1_0", "GE-theta-minus", "DCA"): 4477238,
    ("MnasNet1_0", "CBAM", "DCA"): 4554298,
    ("ResNet50", "SE", "DCA (2FC r=16), Tables 1,2a,2d,2e"): 28615574,
    ("ResNet50", "SE", "DCA 1FC (2e)"): 30851318,
    ("ResNet50", "SE", "DCA 2FC r=8 (2e)"): 29132342,
    ("ResNet50", "SE", "DCA 2FC r=4 (2e)"): 30165878,
    ("ResNet101", "SE", "DCA"): 49854456,
    ("ResNet152", "SE", "DCA"): 67349466,
    ("ResNet50", "SK", "DCA"): 37467580,
    ("ResNet50", "GE-theta-minus", "DCA"): 26084582,
    ("ResNet50", "CBAM", "DCA-All"): 30852948,
    ("ResNet50", "CBAM", "DCA-C (2b)"): 30852918,
    ("ResNet50", "CBAM", "DCA-S (2b,2c)"): 28089654,
    ("ResNet50", "GC", "DCA (README)"): 28632567 + 15,
}
"""What the paper's formula gives with the matching that each row used, to the integer."""

PUBLISHED = {
    ("MobileNetV2", "SE", "DCA"): (3644492, 611),
    ("MobileNetV2", "SK", "DCA"): (5911620, 166),
    ("MobileNetV2", "GE-theta-minus", "DCA"): (3585872, 611),
    ("MobileNetV2", "CBAM", "DCA"): (3646288, 600),
    ("MnasNet1_0", "SE", "DCA"): (4478319, 267),
    ("MnasNet1_0", "GE-theta-minus", "DCA"): (4480614, 522),
    ("MnasNet1_0", "CBAM", "DCA"): (4557734, 512),
    ("ResNet50", "SE", "DCA (2FC r=16), Tables 1,2a,2d,2e"): (28645270, 6466),
    ("ResNet50", "SE", "DCA 1FC (2e)"): (30881014, 17682),
    ("ResNet50", "SE", "DCA 2FC r=8 (2e)"): (29858598, 11634),
    ("ResNet50", "SE", "DCA 2FC r=4 (2e)"): (32285254, 21970),
    ("ResNet101", "SE", "DCA"): (49918968, 6483),
    ("ResNet152", "SE", "DCA"): (67444698, 6500),
    ("ResNet50", "SK", "DCA"): (37482428, 292),
    ("ResNet50", "GE-theta-minus", "DCA"): (26114278, 6466),
    ("ResNet50", "CBAM", "DCA-All"): (30882704, 17672),
    ("ResNet50", "CBAM", "DCA-C (2b)"): (30882614, 17666),
    ("ResNet50", "CBAM", "DCA-S (2b,2c)"): (28089714, 6),
    ("ResNet50", "GC", "DCA (README)"): (28625399, 5425),
}
"""What a working network of the published code has, and what is counted in the paper's cells besides."""

TOTALS = {
    ("ResNet50", "SE", "DCA (2FC r=16), Tables 1,2a,2d,2e"): 28_651_736,
    ("ResNet101", "SE", "DCA"): 49_925_451,
    ("ResNet152", "SE", "DCA"): 67_451_198,
    ("ResNet50", "SE", "DCA 1FC (2e)"): 30_898_696,
    ("ResNet50", "SE", "DCA 2FC r=8 (2e)"): 29_870_232,
    ("ResNet50", "SE", "DCA 2FC r=4 (2e)"): 32_307_224,
    ("ResNet50", "GE-theta-minus", "DCA"): 26_120_744,
    ("ResNet50", "SK", "DCA"): 37_482_720,
    ("ResNet50", "CBAM", "DCA-All"): 30_900_376,
    ("ResNet50", "GC", "DCA (README)"): 28_630_824,
}
"""The parameters of the networks that the published code builds, counted apart from dcafy."""

DISAGREE = {("MobileNetV2", "SK", "DCA"): 0.35, ("MobileNetV2", "CBAM", "DCA"): 0.32}
"""GFLOPs cells that the counting of all others does not give, with what it gives; both have a footnote."""

CONNECTIONS = {"SE": 1, "GE-theta-minus": 1, "GC": 1, "SK": 2, "CBAM": 2}
"""Connections per pair of neighbouring blocks; one where CBAM connects one dimension only."""

LINKS = {"MobileNetV2": 16, "MnasNet1_0": 15, "ResNet50": 15, "ResNet101": 32, "ResNet152": 49}


def key(row: paper_tables.Row) -> tuple[str, str, str]:
    return row.base, row.attention, row.variant


def test_every_row_is_there() -> None:
    assert [key(row) for row in paper_tables.ROWS] == list(PARAMETERS)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=[] if row.base in ("MobileNetV2", "MnasNet1_0") else pytest.mark.zoo)
        for row in paper_tables.ROWS
    ],
    ids=lambda row: "-".join(key(row)).replace(" ", "_"),
)
def test_row(row: paper_tables.Row) -> None:
    model = row.build()
    assert paper_tables.parameters(model) == PARAMETERS[key(row)]
    expected = DISAGREE.get(key(row), row.paper[1])
    assert f"{paper_tables.operations(model) / 1e9:.2f}" == f"{expected:.2f}"
    assert (expected != row.paper[1]) == (key(row) in DISAGREE)
    if row.options is not None:
        per_pair = 1 if "dimension" in row.options else CONNECTIONS[row.attention]
        assert len(dcafy.connections(model)) == LINKS[row.base] * per_pair


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=[] if row.base in ("MobileNetV2", "MnasNet1_0") else pytest.mark.zoo)
        for row in paper_tables.ROWS
        if row.options is not None
    ],
    ids=lambda row: "-".join(key(row)).replace(" ", "_"),
)
def test_published(row: paper_tables.Row) -> None:
    """Every cell of the paper, to its last digit; with what is in no working network."""
    working, unused = paper_tables.parameters(row.build_published()), row.unused()
    assert (working, unused) == PUBLISHED[key(row)]
    assert f"{(working + unused) / 1e6:.2f}" == f"{row.paper[0]:.2f}"
    assert working + unused == TOTALS.get(key(row), working + unused)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=[] if row.base == "MobileNetV2" else pytest.mark.zoo)
        for row in paper_tables.ROWS
        if row.command()
    ],
    ids=lambda row: "-".join(key(row)).replace(" ", "_"),
)
@pytest.mark.filterwarnings("ignore:.* in its paper's own form is not the identity")
def test_the_command_of_a_row_trains_its_network(row: paper_tables.Row) -> None:
    """By what the recipe makes of its options, as ``dcafy finetune`` does."""
    network, *words = shlex.split(row.command())[2:]
    assert torchvision.models.get_model_builder(network.removeprefix("torchvision:")) is paper_tables.BASES[row.base]
    given = {name[2:].replace("-", "_"): value for name, value in itertools.pairwise(words) if name.startswith("--")}
    own = {item.name: item.type for item in dataclasses.fields(Conversion)}
    typed = {name: int(given[name]) if "int" in str(own[name]) else given[name] for name in given.keys() & own}
    run = RunOptions(recipe=given["recipe"])
    conversion = chosen(run, TrainingConfig(), DataOptions(), Conversion(**typed), given).conversion
    assert conversion.message == "plain"
    with torch.device("meta"):
        model = paper_tables.BASES[row.base]().eval()
    if row.options is not None:
        model = dcafy.convert(model, verify=False, copy=False, **dataclasses.asdict(conversion))
    elif row.insertions:
        inserted = {"reduction": conversion.attention_reduction, "init": conversion.attention_init}
        model = dcafy.insert(model, str(conversion.attention), copy=False, **inserted)
    assert paper_tables.parameters(model) == PARAMETERS[key(row)]


def test_rows_with_two_insertions_are_the_only_ones_without_a_command() -> None:
    without = [row for row in paper_tables.ROWS if not row.command()]
    assert [(row.base, row.attention) for row in without] == [("MnasNet1_0", "SE")]
    assert len({row.command() for row in paper_tables.ROWS}) == len(paper_tables.ROWS)


def test_what_is_unused_of_the_first_block() -> None:
    """In SE-ResNet-50: 515 of its f, 5,936 of a match from 64 to 256, and a b of the 15 others."""
    assert PUBLISHED["ResNet50", "SE", "DCA (2FC r=16), Tables 1,2a,2d,2e"][1] == (2 * 256 + 3) + 5936 + 15


def test_every_connected_row_is_published() -> None:
    assert [key(row) for row in paper_tables.ROWS if row.options is not None] == list(PUBLISHED)
    assert set(TOTALS) <= set(PUBLISHED)
    for name, total in TOTALS.items():
        assert sum(PUBLISHED[name]) == total


def test_cells_that_differ_have_a_footnote() -> None:
    """A parameter cell that the formula does not give is explained, and so is each of the GFLOPs cells above."""
    for row in paper_tables.ROWS:
        if f"{PARAMETERS[key(row)] / 1e6:.2f}" != f"{row.paper[0]:.2f}" or key(row) in DISAGREE:
            assert row.notes, key(row)


def test_the_table_shows_every_row_and_note() -> None:
    rows = [row for row in paper_tables.ROWS if row.base == "MobileNetV2" and row.attention in ("none", "SK")]
    shown, notes = paper_tables.table(paper_tables.measured(rows))
    assert len(rows) == 3
    assert shown.row_count == len(rows) + 1  # of the connected one, what is in no working network
    assert paper_tables.SK_FLOPS in notes


def test_the_yardstick_where_it_is() -> None:
    """The integers above are those of the yardstick that the tables were taken from, where a checkout has it."""
    path = Path(__file__).parents[2] / "shared" / "yardstick" / "paper_tables.json"
    if not path.exists():
        pytest.skip("no yardstick beside this checkout")
    rows = json.loads(path.read_text())["rows"]
    found = {(r["base"], r["attention"], r["variant"]): r for r in rows}
    assert set(found) == set(PARAMETERS)
    for row in paper_tables.ROWS:
        extra = 15 if (row.attention, row.options is None) == ("GC", False) else 0
        assert found[key(row)]["formula_params"] + extra == PARAMETERS[key(row)], key(row)
        assert (found[key(row)]["paper_params_M"], found[key(row)]["paper_gflops"]) == row.paper, key(row)
