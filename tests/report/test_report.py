"""``dcafy report``: what is in the page, what a terminal is shown, and what becomes of bad input."""

from __future__ import annotations

import base64
import csv
import dataclasses
import functools
import io
import itertools
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from family import Plain
from PIL import Image
from rich.console import Console
from torch import nn

import dcafy
from dcafy.analysis import attention_values, contributions
from dcafy.analysis.listening import ConnectionUsage, Effect, Usage
from dcafy.analysis.usage import message_shares
from dcafy.analysis.values import ValuesOfBlocks
from dcafy.checkpoint.saving import store
from dcafy.disk import replaced
from dcafy.errors import CheckpointError, InputError, SourceError, UsageError
from dcafy.images.about import About, Trained, put_about
from dcafy.images.options import DataOptions
from dcafy.images.preparation import Preparation
from dcafy.plan.blocks import Chain, Contents, Contribution, Link, Skipped
from dcafy.plan.drawing import Lane
from dcafy.report import EpochLog, RunLog, make_report, prepared_for, read_epochs, read_run
from dcafy.report.answer import answers, verdict
from dcafy.report.downloads import download
from dcafy.report.findings import Findings, Score
from dcafy.report.labelled import labelled
from dcafy.report.looks import looks
from dcafy.report.page import page as written_page
from dcafy.report.pictures import read_pictures
from dcafy.report.room import Room, weightiest
from dcafy.report.text import print_findings, sparkline
from dcafy.runs.compare import Comparison, Contender, Pair
from dcafy.runs.evidence import Difference
from dcafy.sources import open_model

SMALL = "torchvision:mobilenet_v3_small"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(dcafy_command: Run) -> Run:
    """Run ``dcafy report``: arguments -> exit code, stdout, stderr."""
    return functools.partial(dcafy_command, "report")


def picture(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images."""
    root = tmp_path_factory.mktemp("images")
    for i in range(3):
        picture(i).save(root / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def connected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A connected network with connections that say something, in a folder."""
    model = dcafy.convert(torchvision.models.mobilenet_v3_small(), verify=False)
    with torch.no_grad():
        for i, connection in enumerate(dcafy.connections(model).values()):
            connection.beta.fill_(0.1 * (i + 1))
    root = tmp_path_factory.mktemp("connected") / "model"
    dcafy.save(model.eval(), root)
    return root


class Page(HTMLParser):
    """The parts of a page that tests ask for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.files: dict[str, list[list[str]]] = {}
        self.addresses: list[str] = []
        self.images: list[str] = []
        self.drawings: list[str] = []
        self.scripts = 0
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.addresses += [given[name] for name in ("src", "href", "xlink:href", "srcset", "action") if name in given]
        self.scripts += tag == "script"
        if tag == "section":
            self.sections.append(given["id"])
        if "download" in given:
            content = base64.b64decode(given["href"].partition("base64,")[2]).decode()
            assert given["download"] not in self.files
            self.files[given["download"]] = list(csv.reader(io.StringIO(content)))
        if tag == "img":
            self.images.append(given["alt"])
        if tag == "svg":
            self.drawings.append(given["aria-label"])

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(folder: Path, connected: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    model = dcafy.load(connected)
    output = tmp_path_factory.mktemp("page") / "report.html"
    make_report(model, folder, output, title="my network", how=prepared_for(model, image_size=64), command="dcafy x")
    return Page(output)


SECTIONS = ["answer", "network", "words", "values", "where", "connections", "numbers"]


def test_page_has_every_section(page: Page) -> None:
    assert page.sections == SECTIONS
    assert "9 attention blocks, 8 connections,\n3 images" in page.text
    assert f"torch {torch.__version__.partition('+')[0]}" in page.text
    assert "dcafy x" in page.text


def test_page_needs_nothing_but_itself(page: Page) -> None:
    assert [address for address in page.addresses if not address.startswith(("data:", "#"))] == []
    assert page.scripts == 1


def test_every_figure_has_a_text_and_its_data(page: Page, folder: Path, connected: Path) -> None:
    # the network in two directions, the words, a histogram for each of nine blocks, contribution and message share
    assert len(page.drawings) == 2 + 1 + 9 + 2
    assert all(page.drawings)
    # of each of three images: itself, and four stages of two networks and of their difference
    assert len(page.images) == 3 * (1 + 3 * 4)
    assert all(page.images)
    assert len(page.files) == 1 + 9 + 3 + 2 + 1
    model = dcafy.load(connected).eval()
    rows = page.files["connections.csv"]
    assert rows[0] == [
        "connection", "source", "target", "dimension", "alpha", "beta", "contribution", "message share", "parameters",
    ]  # fmt: skip
    images = read_pictures(folder, prepared_for(model, image_size=64), most=9).tensor
    for number in set(model(images).argmax(1).tolist()):  # both networks are asked about what the connected one sees
        both = [page.text.count(f"{side}, class {number}\n") for side in ("connections off", "connected")]
        assert both[0] == both[1] > 0
    shares = message_shares(model, [images])
    for row, known in zip(rows[1:], contributions(model), strict=True):
        assert row[0] == known.name
        assert [float(value) for value in row[4:8]] == pytest.approx(
            [known.alpha, known.beta, known.ratio, shares[known.name]], rel=1e-4
        )
    for side, network in (("connections off", dcafy.revert(model)), ("connected", model)):
        for block in attention_values(network, images):
            table = page.files[f"attention-values-{block.name}.csv"]
            column = [float(row[table[0].index(f"share of {side}")]) for row in table[1:]]
            low, high = float(table[1][0]), float(table[-1][1])
            assert column == pytest.approx(block.histogram(low, high).shares, rel=1e-4)
            assert sum(column) == pytest.approx(1, rel=1e-3)  # nothing lies outside of an axis that was drawn closer
            assert f"{side}: spread {block.spread:.3f}, {100 * block.near_half:.1f}% near 0.5" in page.text


def named(value: Any, before: str, after: str) -> Any:
    """``value`` with one name in the place of another wherever text has it: no model with such a name is let in."""
    if isinstance(value, str):
        return value.replace(before, after)
    if isinstance(value, tuple | list):
        items = [named(item, before, after) for item in value]
        return type(value)(items)
    if isinstance(value, dict):
        return {named(key, before, after): named(item, before, after) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: named(getattr(value, f.name), before, after) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return value


def test_names_are_text(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    images = tmp_path / "images"
    images.mkdir()
    picture(0).save(images / f"{hostile}.png")
    (images / "$x_{broken}$<b>.png").write_bytes(b"no image")
    (images / "=1+1.png").write_bytes(picture(1).tobytes())
    model = nn.Sequential()
    model.add_module("inner", torchvision.models.mobilenet_v3_small())
    connected = dcafy.convert(model, verify=False)
    log = EpochLog((1, 2), {"</svg><script>": (0.1, 0.2)})
    output = tmp_path / "report.html"
    how = Preparation((64, 64), 64, (0.5,) * 3, (0.5,) * 3)
    command = "dcafy report '</pre><script>'"
    looked = make_report(connected, images, output, title="</title><script>x", how=how, epochs=log, command=command)
    output.write_text(written_page(named(looked, "inner", "<script>alert(2)</script>")), encoding="utf-8")
    found = Page(output)
    assert found.scripts == 1
    assert found.sections == SECTIONS
    assert any(hostile in text for text in found.images)
    assert "onerror" not in re.sub(r'"[^"]*"', "", re.sub(r">[^<]*<", "><", output.read_text(encoding="utf-8")))
    assert "$x_{broken}$<b>.png" in found.text
    assert command in found.text
    assert "<script>alert(2)</script>.features" in found.text


class Excited(nn.Module):
    """Squeeze-and-excitation in front of a strided convolution, or of one that makes maps larger again."""

    def __init__(self, channels: int, after: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Sigmoid())
        self.after = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        after: torch.Tensor = self.after(x * self.gate(x))
        return after


def test_stages_are_split_where_the_stride_changes() -> None:
    model = nn.Sequential()
    for name, after in {
        "stem": nn.Conv2d(3, 4, 3, padding=1),
        "one": Excited(4, nn.Conv2d(4, 4, 3, padding=1)),  # 32
        "two": Excited(4, nn.Conv2d(4, 8, 3, 2, padding=1)),  # 32, and 16 behind it
        "three": Excited(8, nn.Conv2d(8, 8, 3, 2, padding=1)),  # 16, and 8 behind it
        "up": Excited(8, nn.ConvTranspose2d(8, 4, 2, 2)),  # 8, and 16 behind it
        "four": Excited(4, nn.Conv2d(4, 4, 3, padding=1)),  # 16
    }.items():
        model.add_module(name, after)
    found = make_report(model, torch.rand(2, 3, 32, 32), how=Preparation((32, 32), 32, (0.0,) * 3, (1.0,) * 3))
    works_on = {name.partition(".")[0]: lane.size for lane in found.lanes for name in lane.blocks}
    assert works_on == {"one": (32, 32), "two": (32, 32), "three": (16, 16), "up": (8, 8), "four": (16, 16)}
    # on maps this small attention is told from other layers on larger images; the sizes are those of these images
    small = make_report(model, torch.rand(2, 3, 8, 8), how=Preparation((8, 8), 8, (0.0,) * 3, (1.0,) * 3))
    works_on = {name.partition(".")[0]: lane.size for lane in small.lanes for name in lane.blocks}
    assert works_on == {"one": (8, 8), "two": (8, 8), "three": (4, 4), "up": (2, 2), "four": (4, 4)}
    placed = [name for lane in found.lanes for name in lane.blocks]
    assert placed == [block.name for block in found.plan.blocks]  # in the order of the data


def test_spreadsheets_get_no_formulas() -> None:
    href = download("../=x", ("name", "value"), [("=1+1", 1.5), ("@a", -2.0), ("plain", 1)]).href
    rows = base64.b64decode(href.partition("base64,")[2]).decode().splitlines()
    assert rows == ["name,value", "'=1+1,1.5", "'@a,-2", "plain,1"]
    assert download("../=x", (), ()).name == "x.csv"


def test_spatial_maps_are_shown(tmp_path: Path, folder: Path) -> None:
    model = dcafy.convert(dcafy.insert(torchvision.models.resnet18(), "cbam", init="paper"), verify=False)
    output = tmp_path / "report.html"
    make_report(model, folder, output, how=prepared_for(model, image_size=64))
    found = Page(output)
    maps = [text for text in found.images if "attention map of" in text]
    assert len(maps) == 3 * 2 * 4  # images, networks, stages
    assert "connections off: attention map of layer1.1.cbam.spatial on 0.png" in maps
    assert "attention-maps-1-0.png.csv" in found.files


def test_a_network_that_had_no_attention_is_the_other_side(tmp_path: Path, folder: Path) -> None:
    plain = torchvision.models.resnet18()
    model = dcafy.convert(plain, attention="se")
    output = tmp_path / "report.html"
    found = make_report(model, folder, output, against=plain, how=prepared_for(model, image_size=64))
    assert found.drift is not None
    assert found.drift.identical
    assert [len(side.values) for side in found.sides] == [0, 8]
    cams = [side.cams for side in found.sides]
    assert cams[0] is not None
    assert cams[1] is not None
    for before, after in zip(cams[0].stages, cams[1].stages, strict=True):
        assert before.name == after.name
        torch.testing.assert_close(before.maps, after.maps)


def test_two_different_networks_stand_side_by_side(tmp_path: Path, folder: Path) -> None:
    model, other = torchvision.models.mobilenet_v3_small(), torchvision.models.mobilenet_v3_large(num_classes=7)
    output = tmp_path / "report.html"
    found = make_report(model, folder, output, title="small", against=other, how=prepared_for(model, image_size=64))
    assert found.drift is None  # of 1000 and of 7 classes
    assert [side.title for side in found.sides] == ["original", "small"]
    assert [side.cams is not None and len(side.cams.stages) for side in found.sides] == [3, 4]
    page = Page(output)
    assert "original, features.16: where it looks" in "".join(page.images)
    assert "small, features.12: where it looks" in "".join(page.images)


@pytest.mark.slow
def test_a_detector_has_values_and_no_grad_cam(tmp_path: Path, folder: Path) -> None:
    from torchvision.models import detection

    model = detection.fasterrcnn_mobilenet_v3_large_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96
    )
    output = tmp_path / "report.html"
    how = Preparation((64, 64), 64, (0.0,) * 3, (1.0,) * 3)
    found = make_report(dcafy.convert(model), folder, output, how=how, most=2)
    assert [len(side.values) for side in found.sides] == [8, 8]
    assert "no classifier" in found.no_cams
    assert "There are no Grad-CAM maps: the network is no classifier" in Page(output).text


def test_half_precision(folder: Path) -> None:
    model = dcafy.convert(torchvision.models.mobilenet_v3_small(), verify=False).bfloat16()
    found = make_report(model, folder, how=prepared_for(model, image_size=64))
    assert found.sides[0].values[0].values.dtype is torch.bfloat16
    assert found.drift is not None
    assert found.drift.identical


# -- the command -----------------------------------------------------------------------------------------


def test_command_writes_a_page(command: Run, tmp_path: Path, folder: Path, connected: Path) -> None:
    output = tmp_path / "report.html"
    code, out, err = command(connected, "--images", folder, "-o", output, "--image-size", 64, "--target", 7)
    assert (code, "Traceback" in err) == (0, False)
    assert re.fullmatch(r".*report\.html: 9 attention blocks, 8 connections, 3 images, \d\.\d MB\.\n", out)
    found = Page(output)
    assert found.text.count("connections off, class 7\n") == found.text.count("connected, class 7\n") == 3
    assert f"dcafy report {connected}" in found.text
    assert "Drift: the outputs on these images differ by up to" in found.text
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.slow
def test_command_takes_the_original(command: Run, tmp_path: Path, folder: Path, connected: Path) -> None:
    output = tmp_path / "report.html"
    code, _, _ = command(connected, "--against", SMALL, "--images", folder, "-o", output, "--image-size", 64)
    assert code == 0
    numbers = re.findall(r"(original|connected)\s*(\d,\d{3},\d{3})\s*\d+\.\d+", Page(output).text)
    assert numbers[0] == ("original", "2,542,856")
    assert int(numbers[1][1].replace(",", "")) > 2_542_856


def test_text_shows_chains_values_and_connections(command: Run, folder: Path, connected: Path) -> None:
    code, out, _ = command(connected, "--images", folder, "--text", "--image-size", 64)
    assert code == 0
    assert not Path("report.html").exists()
    assert "9 blocks, 8 connections" in out
    assert re.search(r"features\.1\.block\.1 +connected +[ ▁-█]+ +\d\.\d{3} +[\d.]+%", out)
    assert re.search(r"features\.11\.block\.2 +1\.0000 +\+0\.8000 +44\.4% +█{9} ", out)


def test_text_needs_no_extra(command: Run, folder: Path, connected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "jinja2", "captum", "captum.attr"):
        monkeypatch.setitem(sys.modules, name, None)
    assert command(connected, "--images", folder, "--text", "--image-size", 64)[0] == 0
    code, _, err = command(connected, "--images", folder, "-o", "r.html", "--image-size", 64)
    assert code == 2
    assert "matplotlib, jinja2, captum, which are not installed: pip install 'dcafy[report]'" in err


def test_random_weights_are_told(command: Run, tmp_path: Path, folder: Path, connected: Path) -> None:
    """In the text, on the page and in the log; not of a network from a folder."""
    told = "weights: random (add @DEFAULT for trained ones)"
    given = ("--images", folder, "--text", "--image-size", 32, "--most", 1)
    code, out, err = command("timm:test_efficientnet", *given, "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert (code, out.count(told), page.count(told), err.count(told)) == (0, 1, 1, 1)
    code, out, err = command(connected, *given)
    assert (code, told in out + err) == (0, False)
    code, out, err = command(connected, *given, "--against", SMALL)
    assert (code, f"original: {told}" in out, err.count(told)) == (0, True, 1)


def test_no_attention_still_gives_numbers(command: Run, tmp_path: Path, folder: Path) -> None:
    output = tmp_path / "report.html"
    code, out, _ = command("torchvision:resnet18", "--images", folder, "-o", output, "--image-size", 64)
    assert code == 0
    assert "no attention blocks, so only numbers" in out
    found = Page(output)
    assert "This network has no attention blocks" in found.text
    assert "11,689,512" in found.text
    assert found.images == []


def test_cutting_connections_on_labelled_images(command: Run, tmp_path: Path, folder: Path, connected: Path) -> None:
    data = tmp_path / "data"
    for label in ("a", "b"):
        (data / label).mkdir(parents=True)
        for i in range(5):
            picture(i).save(data / label / f"{i}.png")
    code, out, err = command(
        connected, "--images", folder, "--text", "--image-size", 64, "--data", f"imagefolder:{data}"
    )
    assert code == 0, err
    assert re.search(r"all of them( +[+-]\d\.\d{4} ± \d\.\d{4}){3} *\n( +[+-]\d+\.\d\d ± \d+\.\d\d){3}", out)


def test_classes_are_named(tmp_path: Path, folder: Path) -> None:
    for name in ("cat", "<b>dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(5):
            picture(i).save(tmp_path / "data" / name / f"{i}.png")
    model = dcafy.convert(torchvision.models.mobilenet_v3_small(num_classes=2), verify=False)
    output, data = tmp_path / "r.html", f"imagefolder:{tmp_path / 'data'}"
    found = make_report(model, folder, output, how=prepared_for(model, image_size=64), target=0, data=data)
    assert found.usage is not None
    assert found.usage.images == 2
    page = Page(output)
    assert page.text.count("connected, class 0, <b>dog\n") == 3
    assert "What the network makes of each connection" in page.text
    assert "changed-connections.csv" in page.files


def test_run_of_finetune_is_shown_over_epochs(tmp_path: Path, folder: Path, connected: Path) -> None:
    names = list(dcafy.connections(dcafy.load(connected)))
    rows = [
        {"event": "begin"},
        *(
            {
                "event": "epoch",
                "epoch": epoch,
                "connections": {
                    name: {"alpha": 1, "beta": 0, "contribution": epoch / 10, "message_share": epoch / 100}
                    for name in names
                },
            }
            for epoch in (1, 2, 2, 3)
        ),
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"event": "ep')
    log = read_epochs(tmp_path)
    assert log is not None
    assert log.epochs == (1, 2, 3)
    assert log.contribution[names[0]] == (0.1, 0.2, 0.3)
    model = dcafy.load(connected)
    make_report(model, folder, tmp_path / "r.html", how=prepared_for(model, image_size=64), epochs=log)
    found = Page(tmp_path / "r.html")
    assert found.files["Contribution-ratio-over-epochs.csv"][2] == ["2", *["0.2"] * 8]
    assert len([label for label in found.drawings if "over 3 epochs" in label]) == 1


@pytest.mark.parametrize(
    "line", ["no json", "[]", '{"event": "epoch", "epoch": 1}', '{"event": "epoch", "epoch": "x", "connections": {}}']
)
def test_damaged_log_is_told(tmp_path: Path, line: str) -> None:
    (tmp_path / "log.jsonl").write_text(f"{line}\n")
    with pytest.raises(SourceError, match=r"log\.jsonl"):
        read_epochs(tmp_path)


def test_no_log_is_none(tmp_path: Path) -> None:
    assert read_epochs(tmp_path) is None
    assert read_run(tmp_path) == RunLog()


# -- what stands first -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison as ``dcafy finetune --compare`` leaves it: two networks of two classes, trained apart."""
    root = tmp_path_factory.mktemp("compared") / "run"
    torch.manual_seed(1)
    plain = open_model(SMALL, settings={"num_classes": 2}).model
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.1)  # as training would, so that the weights are not those that it was made with
    model = dcafy.convert(plain, verify=False)
    with torch.no_grad():
        for connection in dcafy.connections(model).values():
            connection.beta.fill_(0.5)
        plain.get_parameter("classifier.3.bias").add_(torch.tensor([9.0, 0.0]))  # it sees the first class only
        model.get_parameter("classifier.3.bias").add_(torch.tensor([0.0, 9.0]))
    trained = Trained("imagefolder:nowhere", 2, {"loss": 0.5, "top1": 0.75, "images": 4})
    for network, place in ((model, root), (plain, root / "seeds" / "0-original"), (model, root / "seeds/0-connected")):
        put_about(network, About(classes=("cat", "dog"), trained=trained))
        store(network.eval(), place)
    rows = [
        {"event": "epoch", "epoch": epoch, "loss": 1 / epoch, "metrics": {"loss": 0.6, "top1": 0.25 * epoch}}
        for epoch in (1, 2)
    ]
    for arm in ("original", "connected"):
        lines = "".join(json.dumps({**row, "connections": {}}) + "\n" for row in rows)
        (root / "seeds" / f"0-{arm}" / "log.jsonl").write_text(lines)
    (root / "compare.json").write_text(json.dumps(COMPARISON.to_dict()))
    return root


SIZES = {"parameters": 100, "gflops": 0.1, "step_seconds": 0.02}
COMPARISON = Comparison(
    (0,),
    {
        "original": Contender(({"loss": 0.6, "top1": 0.5, "images": 4},), **SIZES),  # type: ignore[arg-type]
        "connected": Contender(({"loss": 0.5, "top1": 0.75, "images": 4},), **SIZES),  # type: ignore[arg-type]
    },
    (Pair("connected", "original", {"top1": Difference(0.25, None, None, 1, 4)}),),
    (None,),
)


def test_comparison_shows_the_real_original(
    command: Run, tmp_path: Path, compared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            picture(i).save(tmp_path / "data" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    code, _, err = command(compared, "--images", "data", "-o", "r.html", "--image-size", 64)
    assert code == 0, err
    page = Page(tmp_path / "r.html")
    assert page.sections == [SECTIONS[0], "training", *SECTIONS[1:]]
    assert "connections off" not in page.text
    assert "weights: random" not in page.text
    assert "50.0% → 75.0%" in page.text
    assert "+25.00 points: one seed says nothing about chance" in page.text
    assert "A training step took 20 ms → 20 ms (+0.0%)" in page.text
    # each network sees one class, whatever it is shown: all images are changed, and what is wrong is said
    assert page.text.count("original: class 0, cat, ") == page.text.count("connected: class 1, dog, ") == 8
    assert page.text.count("truth: class 0, cat") == page.text.count("truth: class 1, dog") == 4
    labels = [label for label in page.drawings if "over the epochs of 2 trainings" in label]
    assert [label.partition(" over")[0] for label in labels] == [
        "Training loss", "Validation loss", "Validation accuracy",
    ]  # fmt: skip
    rows = page.files["validation-accuracy-over-epochs.csv"]
    assert rows[1] == ["original", "1", "1", "0.25"]
    # what the folder names is opened only where nothing else is named, and here it is not there
    code, _, err = command(compared, "-o", "r.html")
    assert code == 2
    assert "nowhere" in one_line(err)


@pytest.mark.parametrize("text", ["no json", "[]", "{}", '{"seeds": [0], "pairs": [], "usage": []}'])
def test_damaged_comparison_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "compare.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"compare\.json' is no comparison"):
        read_run(tmp_path)


def test_histograms_zoom_where_all_is_near_a_half(tmp_path: Path, folder: Path) -> None:
    model = torchvision.models.mobilenet_v3_small()
    make_report(model, folder, tmp_path / "r.html", how=prepared_for(model, image_size=64), most=1)
    page = Page(tmp_path / "r.html")
    assert "zoomed: the axis is" in page.text  # nobody has moved its values away from 0.5
    assert "difference" not in "".join(page.images)


def test_labels_are_the_numbers_of_the_networks_own_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog", "emu"):
        (tmp_path / name).mkdir()
        for i in range(5):
            picture(i).save(tmp_path / name / f"{i}.png")
    spec, options = f"imagefolder:{tmp_path}", DataOptions()
    found = labelled(spec, HOW, options, known=("emu", "dog", "ant", "cat"))
    named = {found.classes[label] for label in found.labels.tolist()}
    assert named == {"cat", "dog", "emu"}
    for name, label in zip(found.names, found.labels.tolist(), strict=True):
        assert name.startswith(f"{found.classes[label]}/")
    with pytest.raises(InputError, match="does not know: emu"):
        labelled(spec, HOW, options, known=("cat", "dog"))
    # pictures in a folder of a class's name are of that class, and others of none
    pictures = read_pictures(tmp_path, HOW, most=15, classes=("emu", "cat"))
    assert [(name[:3], truth) for name, truth in zip(pictures.names, pictures.truth, strict=True)][::5] == [
        ("cat", 1), ("dog", None), ("emu", 0),
    ]  # fmt: skip
    assert read_pictures(tmp_path / "cat", HOW, most=1, classes=("cat",)).truth == (None,)


class Bright(nn.Module):
    """Two classes: darker or brighter than ``threshold``."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.excited, self.threshold = Excited(3, nn.Identity()), threshold
        nn.init.zeros_(self.excited.gate[1].weight)
        nn.init.zeros_(self.excited.gate[1].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (2 * self.excited(x).mean((2, 3))[:, :1] - self.threshold) * torch.tensor([-1.0, 1.0])


class Yields(nn.Module):
    """Two blocks, and whatever ``made`` makes of their maps."""

    def __init__(self, made: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.one, self.two, self.made = Excited(3, nn.Conv2d(3, 3, 1)), Excited(3, nn.Conv2d(3, 3, 1)), made

    def forward(self, x: torch.Tensor) -> Any:
        return self.made(self.two(self.one(x)))


@pytest.mark.parametrize(
    "made", [lambda x: x, lambda x: {"out": x}, lambda x: [x.mean(), {"boxes": x}]], ids=["maps", "dict", "list"]
)
def test_what_is_no_classifier_is_reported_too(tmp_path: Path, made: Callable[[torch.Tensor], Any]) -> None:
    model = dcafy.convert(Yields(made), example_inputs=torch.rand(2, 3, 8, 8))
    how = Preparation((8, 8), 8, (0.0,) * 3, (1.0,) * 3)
    found = make_report(model, torch.rand(2, 3, 8, 8), tmp_path / "r.html", how=how)
    assert [len(side.values) for side in found.sides] == [2, 2]
    assert [side.predictions for side in found.sides] == [(), ()]
    page = Page(tmp_path / "r.html")
    assert "There are no Grad-CAM maps: the network is no classifier" in page.text
    assert "truth" not in page.text


def test_changed_and_wrong_predictions_stand_first(tmp_path: Path) -> None:
    for i in range(10):
        folder = tmp_path / ("light" if i > 5 or i == 2 else "dark")  # the third is dark, whatever its folder says
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (25 * i + 15,) * 3).save(folder / f"{i}.png")
    model, other = Bright(0.5), Bright(0.75)
    put_about(model, About(classes=("dark", "light")))
    how = Preparation((8, 8), 8, (0.0,) * 3, (1.0,) * 3)
    found = make_report(model, tmp_path, how=how, against=other)
    shown = [found.pictures.names[i] for i in found.chosen]
    assert shown[:3] == ["dark/5.png", "light/6.png", "light/7.png"]  # changed, of which one is wrong
    assert shown[3] == "light/2.png"  # wrong, by both
    assert len(shown) == 8


def test_nothing_to_look_at_is_told(command: Run, connected: Path) -> None:
    code, _, err = command(connected, "-o", "r.html")
    assert code == 2
    assert "--images FOLDER, or labelled ones, --data DATA" in one_line(err)


NOTHING = Effect(0.0, 0.0, 0.0, 0.0, 100)


def used(cut: Effect, mean: Effect = NOTHING, shuffled: Effect = NOTHING, beta: float = 0.1) -> Usage:
    row = ConnectionUsage("x", "channel", 1.0, beta, 0.1, 0.1, 0.5, 0.1, cut, shuffled, mean)
    return Usage(100, 0.5, 0.8, (row,), cut, shuffled, mean)


COSTS, CHANCE = Effect(0.1, 0.01, -0.02, 0.005, 100), Effect(0.1, 0.09, -0.02, 0.05, 100)


@pytest.mark.parametrize(
    ("usage", "word", "sentences"),
    [
        (used(COSTS, COSTS, COSTS), "yes", ("rises by 0.1000", "with the average one it rises", "another image's, by")),
        (used(COSTS, COSTS), "yes", ("another image's, only by what chance can do",)),
        (used(COSTS), "yes", ("mostly a constant", "1 of 1 connection cost")),
        (used(CHANCE), "it cannot be told", ("which chance can do", "0 of 1 connection cost")),
        (used(Effect(0.0001, 0.0001, 0.0, 0.0, 100)), "no", ("stays what it is",)),
        (used(Effect(-0.1, 0.01, 0.01, 0.0, 100)), "they do harm", ("falls by 0.1000",)),
        (used(Effect(0.1, None, 0.0, None, 1)), "it cannot be told", ("changes by +0.1000 on 100 images",)),
        (used(NOTHING, beta=0.0), "no", ("Every β is 0",)),
    ],
)
def test_whether_connections_are_used(usage: Usage, word: str, sentences: tuple[str, ...]) -> None:
    found, told = verdict(usage)
    assert found == word
    for sentence in sentences:
        assert sentence in " ".join(told)


def test_times_of_a_busy_machine_are_not_compared(tmp_path: Path, folder: Path) -> None:
    model = dcafy.convert(Yields(lambda x: x.mean((2, 3))), example_inputs=torch.rand(2, 3, 8, 8))
    how = Preparation((8, 8), 8, (0.0,) * 3, (1.0,) * 3)
    found = make_report(model, torch.rand(2, 3, 8, 8), how=how)

    def told(unsteady: float) -> str:
        sides = tuple(dataclasses.replace(side, seconds=0.002, unsteady=unsteady) for side in found.sides)
        return answers(dataclasses.replace(found, sides=sides))[2].because[-1]

    assert told(1.1) == "2 images took 2 ms → 2 ms (+0.0%) just now."
    assert "(+0.0%)" not in told(2.5)
    assert "as a rule the same network took 2.5 times as long as at best" in told(2.5)


def test_intervals_by_hand() -> None:
    # Wilson (1927) for 8 of 10
    score = Score(8, 10)
    assert (score.low, score.high) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert (Score(0, 5).low, Score(5, 5).high) == (0.0, 1.0)


def test_pictures_are_as_large_as_a_page_can_have_them(tmp_path: Path, folder: Path) -> None:
    model = torchvision.models.mobilenet_v3_small()
    found = make_report(model, folder, tmp_path / "r.html", how=prepared_for(model, image_size=64), most=2)
    large = looks(found, Room())
    small = looks(found, Room(pictures=30_000, maps=100))
    assert len(small.cams[0].picture.uri) < 20_000 < sum(len(shown.uri) for shown in large.cams[0].rows[0].thumbnails)
    assert large.cams[0].data is not None
    assert small.cams[0].data is None
    least = looks(found, Room(pictures=1))
    assert (len(large.cams), len(least.cams), least.left_out) == (2, 1, 1)


def enormous(found: Findings, blocks: int, connections: int) -> Findings:
    """Findings of a network that has so many blocks, each of which hears several before it."""
    names = [f"a_network.that_is.as_deep_as_this.{place}.attention" for place in range(blocks)]
    block, values = found.plan.blocks[0], found.sides[0].values[0]
    far = ((names[at], names[at + step]) for step in range(1, blocks) for at in range(blocks - step))
    pairs = itertools.islice(far, connections)
    links = tuple(Link(source, target) for source, target in pairs)
    rows = [
        Contribution(f"{link.target}.{place}", link.source, link.target, "channel", 1.0, 0.5, 1 / 3, 99)
        for place, link in enumerate(links)
    ]
    plan = Contents(
        tuple(dataclasses.replace(block, name=name) for name in names),
        (Chain("channel", tuple(names), links),),
        tuple(Skipped(f"{name}.x", "a reason that takes a line " * 4) for name in names),
        model="enormous",
    )
    effects = [Effect(1e-6 * place, 0.1, 0.0, 0.1, 100) for place in range(connections)]
    usage = Usage(300, 1.0, 0.5, tuple(
        ConnectionUsage(row.name, "channel", 1.0, 0.5, 1 / 3, 0.2, 0.1, 1.5, effect, effect, effect)
        for row, effect in zip(rows, effects, strict=True)
    ), *effects[:3])  # fmt: skip
    each = ValuesOfBlocks(dataclasses.replace(values, name=name) for name in names)
    return dataclasses.replace(
        found,
        plan=plan,
        lanes=tuple(Lane(f"stage {place}", tuple(names[place::9]), (8, 8), 8) for place in range(9)),
        contributions=tuple(rows),
        sides=tuple(dataclasses.replace(side, values=each) for side in found.sides),
        usage=usage,
        run=RunLog(EpochLog((1, 2), {row.name: (0.1, 0.2) for row in rows})),
    )


def test_a_page_is_under_5_megabytes_whatever_the_network(tmp_path: Path, folder: Path) -> None:
    model = torchvision.models.mobilenet_v3_small()
    found = make_report(model, folder, how=prepared_for(model, image_size=64), most=1)
    huge = enormous(found, blocks=900, connections=4000)
    (tmp_path / "r.html").write_text(written_page(huge))
    assert (tmp_path / "r.html").stat().st_size < 5_000_000
    page = Page(tmp_path / "r.html")
    told = " ".join(page.text.split())
    assert told.count("There is room for 300 of the 4,000 connections: those whose cutting changes the loss most.") == 2
    assert "The picture has 600 of the 900 attention blocks." in told
    assert "There is room for 200 of the 900 blocks" in told
    assert "There are 800 more: dcafy inspect MODEL lists them." in told
    assert len(page.files["connections.csv"]) > 600  # more than are shown, and it says what is missing
    assert f"(without the last {4000 - len(page.files['connections.csv']) + 1:,} rows)" in told
    shown = weightiest(huge, Room())
    assert [place for place, _ in shown] == list(range(3701, 4001))  # cutting the last ones changes most
    # where that is too much still, all of it is halved until it is not
    assert [room.histograms for room in itertools.islice(Room().smaller(), 3)] == [200, 100, 50]
    assert list(Room().smaller())[-1] == Room(1, 1, 1, 1, 1, 1, 1)


# -- images ----------------------------------------------------------------------------------------------

HOW = Preparation((32, 32), 32, (0.0,) * 3, (1.0,) * 3)


def test_every_kind_of_picture_is_read(tmp_path: Path) -> None:
    grey = np.linspace(0, 255, 40 * 40).reshape(40, 40).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "a grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "b sixteen.png")
    Image.merge("RGB", [Image.fromarray(grey)] * 3).save(tmp_path / "c colour.png")
    Image.merge("RGB", [Image.fromarray(grey)] * 3).convert("CMYK").save(tmp_path / "d cmyk.tiff")
    Image.fromarray(grey).convert("P").save(tmp_path / "e palette.gif")
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(grey)]).save(tmp_path / "f alpha.png")
    (tmp_path / "g notes.txt").write_text("no image")
    found = read_pictures(tmp_path, HOW, most=9)
    assert [name[0] for name in found.names] == list("abcdef")
    assert found.skipped == ()
    assert found.tensor.shape == (6, 3, 32, 32)
    for image in found.tensor[1:]:
        torch.testing.assert_close(image, found.tensor[0], rtol=0, atol=0.03)
    for shown, image in zip(found.shown, found.tensor, strict=True):
        seen = torch.from_numpy(np.array(shown)).permute(2, 0, 1) / 255
        torch.testing.assert_close(seen, image, rtol=0, atol=0.01)


def test_broken_pictures_are_named_and_skipped(command: Run, tmp_path: Path, connected: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    picture(0).save(images / "b.png")
    (images / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (images / "c.jpg").write_bytes((images / "b.png").read_bytes()[:300])
    output = tmp_path / "report.html"
    code, out, err = command(connected, "--images", images, "-o", output, "--image-size", 64)
    assert code == 0
    assert "8 connections, 1 image," in out
    assert "left out a.png" in err
    assert "left out c.jpg" in err
    assert "a.png" in Page(output).text


def test_most_images_says_how_many_are_left_out(folder: Path) -> None:
    found = read_pictures(folder, HOW, most=2)
    assert (len(found), found.left_out) == (2, 1)


def one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("dcafy: error")]
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


def test_bad_input_is_one_clear_line(command: Run, tmp_path: Path, folder: Path, connected: Path) -> None:
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "x.png").write_bytes(b"no image")
    kept = tmp_path / "kept.html"
    kept.write_text("the old one")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--images", empty, "-o", kept), "has no images in it"),
        (("--images", tmp_path / "nowhere", "-o", kept), "is no folder"),
        (("--images", broken, "-o", kept), "can be read; x.png"),
        (("--images", folder, "-o", tmp_path), "is a folder"),
        (("--images", folder, "-o", tmp_path / "no" / "report.html"), "cannot be written: No such file"),
        (("--images", folder, "-o", kept, "--target", 1000, "--image-size", 64), "There is no class 1000"),
        (("--images", folder, "-o", kept, "--data", "imagenet"), "--data 'imagenet' is not known"),
    ]
    for arguments, message in cases:
        code, out, err = command(connected, *arguments)
        assert (code, out) == (2, ""), arguments
        assert message in one_line(err)
    assert kept.read_text() == "the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "empty", "kept.html"]


def test_a_full_disk_leaves_no_half_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("the old one")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UsageError, match="No space left"), replaced(path) as write:
        write("new")
    assert path.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_preparation_is_that_of_the_run(tmp_path: Path) -> None:
    from dcafy.plan.options import Conversion
    from dcafy.runs.request import Request, write_request
    from dcafy.training import DataOptions, TrainingConfig

    request = Request(SMALL, "digits", None, {}, Conversion(), DataOptions(image_size=96), TrainingConfig(), 0)
    write_request(tmp_path, request)
    how = prepared_for(torchvision.models.mobilenet_v3_small(), str(tmp_path))
    assert how.size == (96, 96)
    assert how.mean == pytest.approx((0.485, 0.456, 0.406))


def test_sparklines_by_hand() -> None:
    assert sparkline([0, 0.5, 1.0], 1.0) == " ▄█"


def test_of_a_network_whose_units_hand_a_state_on(tmp_path: Path) -> None:
    """No block to connect, and all the same told what is in it, who hears whom, and what that is worth."""
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(5):
            picture(number).save(tmp_path / "data" / label / f"{number}.png")
    model = dcafy.insert(Plain(), "rla", init="paper", example_inputs=torch.zeros(2, 3, 24, 24)).eval()
    how, output = prepared_for(model, image_size=24), tmp_path / "page.html"
    found = make_report(model, None, output, how=how, data=f"imagefolder:{tmp_path / 'data'}")
    assert found.usage is not None
    assert found.usage.states is not None
    page, modules = Page(output), [row.name for row in found.usage.states.units]
    assert modules == [*(f"units.{number}.rla" for number in range(1, 5)), "head.rla"]
    assert "rla in 6 modules" in page.text
    assert "arXiv 2110.11852" in page.text
    assert "Attention can be added" not in page.text
    asked = [each.question for each in answers(found)]
    assert asked == ["How good is it, before and after?", "Is the state used that units hand on?", "What do they cost?"]
    _, *rows = page.files["changed-connections.csv"]
    assert [row[0] for row in rows] == [*modules, "all states"]
    assert float(rows[0][1]) == pytest.approx(found.usage.states.units[0].cut.loss)
    console = Console(file=io.StringIO(), width=140)
    print_findings(found, console)
    assert "head.rla" in console.file.getvalue()  # type: ignore[attr-defined]
    without = make_report(model, torch.rand(2, 3, 24, 24), output, how=how)
    assert without.usage is None
    assert "units.3.rla" in Page(output).text  # whom each hears is told all the same
