"""The drawing of a plan: blocks in lanes, connections as arcs, and names that are only text."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ElementTree

import timm
import torchvision

import dcafy
from dcafy.analysis import Lane, contributions, draw
from dcafy.plan.drawing import lanes_by_name

SVG = "{http://www.w3.org/2000/svg}"


def groups(svg: str, kind: str) -> list[ElementTree.Element]:
    return [group for group in ElementTree.fromstring(svg).iter(f"{SVG}g") if group.get("class") == kind]


def test_drawing_has_every_block_and_connection() -> None:
    connected = dcafy.convert(dcafy.insert(torchvision.models.resnet18(), "cbam"), verify=False)
    rows = contributions(connected)
    shares = {row.name: i / len(rows) for i, row in enumerate(rows)}
    plan = connected.dca.recipe.plan
    svg = draw(plan, contributions=rows, shares=shares).svg
    assert len(groups(svg, "block")) == len(plan.blocks) == 16
    arcs = {group.get("data-tip", "").partition("\n")[0]: group for group in groups(svg, "arc")}
    assert set(arcs) == {f"{link.source} → {link.target}" for link in plan.links}
    widths = [
        float(next(p for p in arcs[f"{r.source} → {r.target}"] if p.get("class") == "line").get("stroke-width", "0"))
        for r in rows
    ]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]
    for row in rows:
        tip = arcs[f"{row.source} → {row.target}"].get("data-tip", "")
        assert f"α {row.alpha:.4g}, β {row.beta:.4g}" in tip
        assert f"{row.parameters:,} parameters" in tip
        assert f"message share {shares[row.name]:.1%}" in tip
    # layer1 -> layer2: 64 to 128 channels, 56x56 to 28x28
    marks = {kind: sum(bool(g.findall(f"{SVG}{tag}")) for g in arcs.values()) for kind, tag in MARKS.items()}
    assert marks == {"channels": 3, "sizes": 3}


MARKS = {"channels": "rect", "sizes": "polygon"}


def test_drawing_of_a_plan_in_a_notebook() -> None:
    plan = dcafy.inspect(timm.create_model("efficientnet_b0"))
    svg = plan._repr_svg_()
    assert len(groups(svg, "lane")) == 7  # blocks.0 to blocks.6
    assert len(groups(svg, "arc")) == 15
    assert draw(plan)._repr_svg_() == svg == str(draw(plan))


def test_lanes_by_name_are_few() -> None:
    plan = dcafy.inspect(torchvision.models.mobilenet_v3_large())
    assert [lane.title for lane in lanes_by_name(plan)] == [f"features.{i}" for i in (4, 5, 6, 11, 12, 13, 14, 15)]
    plan = dcafy.inspect(torchvision.models.mobilenet_v3_small())  # nine blocks in nine containers
    assert lanes_by_name(plan) == (Lane("features", tuple(block.name for block in plan.blocks)),)


def test_drawing_escapes_names() -> None:
    """Of a plan from anywhere: a model with such names is refused."""
    hostile = '<script>alert("1")</script>&\x1b[31m'
    block = dcafy.inspect(timm.create_model("efficientnet_b0")).blocks[0]
    blocks = tuple(dataclasses.replace(block, name=f"{hostile}.{i}") for i in range(3))
    svg = draw(dcafy.Plan(blocks, (dcafy.Chain("channel", tuple(b.name for b in blocks)),))).svg
    assert "<script" not in svg
    assert "\x1b" not in svg
    assert len(groups(svg, "block")) == 3


def test_drawing_of_a_hundred_blocks_keeps_its_width() -> None:
    block = dcafy.inspect(timm.create_model("efficientnet_b0")).blocks[0]
    blocks = tuple(dataclasses.replace(block, name=f"stage.{i}.{'x' * 80}") for i in range(100))
    plan = dcafy.Plan(blocks, (dcafy.Chain("channel", tuple(b.name for b in blocks)),))
    root = ElementTree.fromstring(draw(plan).svg)
    _, _, width, height = map(float, root.get("viewBox", "").split())
    assert width == 440
    assert height > 100 * 24
    texts = [text for group in groups(draw(plan).svg, "block") for text in group.iter(f"{SVG}text")]
    assert len(texts) == 100
    assert all(len(text.text or "") < 55 for text in texts)
