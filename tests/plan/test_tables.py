"""How plans are shown. The golden files are written anew by ``pytest --rewrite-golden tests/plan/test_tables.py``."""

from __future__ import annotations

import inspect
import io

import pytest
from rich.console import Console

import dcafy
from dcafy import AttentionBlock, Chain, Link, Plan, Skipped
from dcafy.plan.blocks import Cost
from dcafy.plan.tables import (
    as_text,
    link_matches,
    node_table,
    plan_tables,
    written,
)
from dcafy.wording import printable


def block(name, dimension="channel", channels=64, size=None, gate="sigmoid", fusion_kind="mul"):
    node = name.replace(".", "_")
    return AttentionBlock(
        name,
        dimension,
        channels,
        size,
        gate,
        fusion_kind,
        (f"{node}_pool",),
        (f"{node}_fc1", f"{node}_fc2"),
        (f"{node}_mul",),
    )


PLANS = {
    "chain": Plan(
        blocks=(block("layer1.0.se"), block("layer1.1.se"), block("layer2.0.se", channels=128)),
        chains=(
            Chain(
                "channel",
                ("layer1.0.se", "layer1.1.se", "layer2.0.se"),
                (Link("layer1.0.se", "layer1.1.se"), Link("layer1.1.se", "layer2.0.se")),
            ),
        ),
        model="a plain chain",
    ),
    "everything": Plan(
        blocks=(
            block("stem.se"),
            block("stage1.cbam.spatial", "spatial", channels=2, size=(56, 56)),
            block("stage2.left", channels=96, gate="hard_sigmoid"),
            block("stage2.right", channels=64, gate="softmax"),
            block("stage3.cbam.spatial", "spatial", channels=1, size=(28, 28), gate="tanh"),
            block("stage3.join", channels=256, gate="none", fusion_kind="add"),
            block("head.gate", gate="clamp"),
        ),
        chains=(
            Chain(
                "channel",
                ("stem.se", "stage2.left", "stage2.right", "stage3.join"),
                (
                    Link("stem.se", "stage2.left"),
                    Link("stem.se", "stage2.right"),
                    Link("stage2.left", "stage3.join", channel_match="fc1"),
                    Link("stage2.right", "stage3.join", schema="softmax"),
                ),
            ),
            Chain(
                "spatial",
                ("stage1.cbam.spatial", "stage3.cbam.spatial"),
                (Link("stage1.cbam.spatial", "stage3.cbam.spatial"),),
            ),
            Chain("channel", ("head.gate",)),
        ),
        skipped=(
            Skipped("stage4.bn_gate", "its extraction updates statistics (BatchNorm), which must not happen twice"),
            Skipped("stage4.mix", "left out with Plan.without"),
        ),
        islands=("backbone", "neck.fpn"),
        costs=(Cost("chain", 5, 41_234), Cost("dense", 6, 1_234_567)),
        model="every kind of row",
    ),
    "strangers": Plan(
        blocks=(block("[bold red]x[/]"), block("a\x1b[31mb\x07\u202ec" + "d" * 60, channels=128)),
        chains=(
            Chain(
                "channel",
                ("[bold red]x[/]", "a\x1b[31mb\x07\u202ec" + "d" * 60),
                (Link("[bold red]x[/]", "a\x1b[31mb\x07\u202ec" + "d" * 60),),
            ),
        ),
        skipped=(Skipped("[/]", "[link=file:///etc/passwd]reason[/link]\nsecond line"),),
        model="[blink]\x1b]0;title\x07",
    ),
    "nothing": Plan((), (), model="no attention"),
}


@pytest.mark.parametrize("name", PLANS)
def test_plan_as_text(name, golden):
    golden(f"{name}.txt", as_text(PLANS[name], nodes=True))


@pytest.mark.parametrize("name", PLANS)
def test_text_is_narrow_plain_and_without_trailing_blanks(name):
    text = as_text(PLANS[name])
    assert text == str(PLANS[name])
    for line in text.splitlines():
        assert len(line) <= 120
        assert line == line.rstrip()
        assert line.isprintable()


def test_every_name_and_reason_is_shown():
    plan = PLANS["everything"]
    text = as_text(plan)
    for name in [b.name for b in plan.blocks] + [s.name for s in plan.skipped] + list(plan.islands):
        assert name in text
    assert "7 attention blocks, 3 chains, 5 connections, 2 skipped" in text


def test_one_block_is_not_several():
    plan = Plan((block("se"),), (Chain("channel", ("se",)),), model="m")
    assert as_text(plan).startswith("m: 1 attention block, 1 chain, 0 connections, 0 skipped\n")


def test_markup_in_names_stays_text():
    assert "[bold red]x[/]" in as_text(PLANS["strangers"])
    assert "[blink]" in as_text(PLANS["strangers"])


def test_names_cannot_steer_the_terminal():
    hostile = PLANS["strangers"]
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="truecolor", width=120)
    console.print(hostile)
    shown = stream.getvalue()
    assert "\x1b[31mb" not in shown
    assert "\x1b]0;" not in shown
    assert "\x07" not in shown
    assert "\u202e" not in shown
    assert "a\\x1b[31mb" in shown


@pytest.mark.parametrize(
    ("name", "shown"),
    [("layer1.0.se", "layer1.0.se"), ("α.β", "α.β"), ("a\nb", "a\\nb"), ("\x1b[0m", "\\x1b[0m"), ("\u202e", "\\u202e")],
)
def test_printable(name, shown):
    assert printable(name) == shown


def test_matches_are_those_where_channels_or_sizes_differ():
    plan = PLANS["everything"]
    assert {(link.source, link.target): link_matches(plan, link) for link in plan.links} == {
        ("stem.se", "stage2.left"): ("fc2", None),
        ("stem.se", "stage2.right"): (None, None),
        ("stage2.left", "stage3.join"): ("fc1", None),
        ("stage2.right", "stage3.join"): ("fc2", None),
        # One map is broadcast over the channels of the other: nothing has to be matched but the size.
        ("stage1.cbam.spatial", "stage3.cbam.spatial"): (None, "avg"),
    }


def test_matches_are_what_convert_does_by_default():
    defaults = {name: p.default for name, p in inspect.signature(dcafy.convert).parameters.items()}
    shown = {
        link_matches(plan, link)
        for plan in PLANS.values()
        for link in plan.links
        if link.channel_match is link.spatial_match is None
    }
    assert (defaults["channel_match"], None) in shown
    assert (None, defaults["spatial_match"]) in shown
    assert shown <= {(defaults["channel_match"], None), (None, defaults["spatial_match"]), (None, None)}


def test_nodes_are_all_there_with_their_roles():
    plan = PLANS["everything"]
    console = Console(file=io.StringIO(), width=120)
    console.print(node_table(plan))
    lines = console.file.getvalue().splitlines()
    nodes = [node for b in plan.blocks for node in b.extraction + b.transformation + b.fusion]
    assert [line.split()[-1] for line in lines if len(line.split()) == 3][1:] == nodes
    for role, node in (("extraction", "stem_se_pool"), ("transformation", "stem_se_fc2"), ("fusion", "stem_se_mul")):
        assert any({"stem.se", role, node} <= set(line.split()) for line in lines)
    assert "stem_se_pool" not in as_text(plan)


def test_in_a_pipe_no_name_is_folded():
    long = "backbone." + ".".join(["features"] * 12)
    plan = Plan(
        (block(long), block(f"{long}.2")),
        (Chain("channel", (long, f"{long}.2"), (Link(long, f"{long}.2"),)),),
        model="m",
    )
    assert not any(f"{long}.2" in line and long in line.split() for line in as_text(plan).splitlines())
    assert any({long, f"{long}.2"} <= set(line.split()) for line in written(plan).splitlines())


def test_on_a_terminal_its_width_counts(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    lines = written(PLANS["everything"], terminal=True).splitlines()
    assert max(map(len, lines)) <= 70


def test_tables_are_rich_renderables():
    console = Console(file=io.StringIO(), width=100)
    for renderable in plan_tables(PLANS["everything"]):
        console.print(renderable)
    assert "stage3.join" in console.file.getvalue()
