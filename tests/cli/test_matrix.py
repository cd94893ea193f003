"""Every command that writes a folder x every command that reads one: without further words."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import dcafy

Run = Callable[..., tuple[int, str, str]]

NET = "timm:test_efficientnet"
TRAINING = ("--epochs", 1, "--batch-size", 4, "--image-size", 32, "--cpu")
NAMES = ["bright", "dark", "striped"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of five noisy pictures."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for kind, name in enumerate(NAMES):
        (root / name).mkdir()
        for number in range(5):
            values = rng.integers(0, 60, (40 + number, 50, 3)) + 90 * kind
            values[:: 4 if kind == 2 else 99] = 255
            Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(root / name / f"{number}.png")
    return root


def _converted(*options: object) -> Callable[[Run, Path, Path], Path]:
    def write(command: Run, place: Path, pictures: Path) -> Path:
        code, _, err = command("convert", *options, "-o", place / "out")
        assert code == 0, err
        return place / "out"

    return write


def _trained(*options: object, at: str = "out") -> Callable[[Run, Path, Path], Path]:
    def write(command: Run, place: Path, pictures: Path) -> Path:
        data = ("--data", f"imagefolder:{pictures}")
        code, _, err = command("finetune", *options, *data, *TRAINING, "-o", place / "out")
        assert code == 0, err
        return place / at

    return write


def _trained_on(command: Run, place: Path, pictures: Path) -> Path:
    first = _converted(NET)(command, place / "first", pictures)
    return _trained(first)(command, place, pictures)


def _saved(command: Run, place: Path, pictures: Path) -> Path:
    model = timm.create_model("test_resnet", block_args={"attn_layer": "eca"}, num_classes=3, in_chans=1)
    dcafy.save(dcafy.convert(model, verify=False), place / "out")
    return place / "out"


SETTINGS = ("--set", 'block_args={"attn_layer": "se"}', "--set", "num_classes=3")

WRITERS: dict[str, tuple[Callable[[Run, Path, Path], Path], bool]] = {
    "convert": (_converted(NET, "--set", "num_classes=3"), False),
    "convert --attention": (_converted("timm:test_resnet", "--attention", "se", "--set", "num_classes=3"), False),
    "convert --set": (_converted("timm:test_resnet", *SETTINGS), False),
    "save": (_saved, False),
    "finetune": (_trained(NET), True),
    "finetune FOLDER": (_trained_on, True),
    "finetune --compare, connected": (_trained("timm:test_resnet", "--attention", "eca", "--compare"), True),
    "finetune --compare, its original": (
        _trained("timm:test_resnet", "--attention", "eca", "--compare", at="out/seeds/0-original"), True,
    ),
    "finetune --set": (_trained("timm:test_resnet", *SETTINGS[:2]), True),
}  # fmt: skip
"""Who writes a folder -> how, and whether the network in it was trained there."""


QUICK = {"save"}


@pytest.mark.parametrize(
    "writer", [pytest.param(writer, marks=() if writer in QUICK else pytest.mark.slow) for writer in WRITERS]
)
def test_whatever_is_written_is_read(writer: str, dcafy_command: Run, tmp_path: Path, pictures: Path) -> None:
    write, trained = WRITERS[writer]
    folder = write(dcafy_command, tmp_path, pictures)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    model = dcafy.load(folder)
    about = dcafy.about(model)
    ready = dcafy.transforms(model)(str(pictures / "dark" / "0.png"))
    assert about.preparation is not None
    assert tuple(ready.shape) == (about.preparation.channels, *about.preparation.size)
    assert (list(about.classes), about.trained is not None) == ((NAMES, True) if trained else ([], False))
    assert model.eval()(ready[None]).shape == (1, 3)

    def run(*arguments: object) -> str:
        code, out, err = dcafy_command(*arguments)
        assert code == 0, (arguments, err)
        return out

    document = json.loads(run("inspect", folder, "--json"))
    connected = "original" not in writer
    assert ("connected" in document) == connected
    assert document["about"]["task"] == "classification"
    shown = run("inspect", folder)
    assert ("It is connected" in shown) == connected
    assert ("trained for 1 epoch on imagefolder:" in shown) == trained
    seen = json.loads(run("predict", folder, pictures / "dark", "--json", "--cpu"))
    assert [Path(row["file"]).name for row in seen] == [f"{number}.png" for number in range(5)]
    assert sum(top["probability"] for top in seen[0]["top"]) == pytest.approx(1)
    assert {top["class"] for top in seen[0]["top"]} == (set(NAMES) if trained else {"0", "1", "2"})
    rows = list(csv.DictReader(io.StringIO(run("predict", folder, pictures / "dark", "--csv", "--cpu"))))
    assert float(rows[0]["probability"]) == seen[0]["top"][0]["probability"]
    data = () if trained else ("--data", f"imagefolder:{pictures}")
    measured = json.loads(run("evaluate", folder, *data, "--json", "--cpu", "--part", "all"))
    assert measured["metrics"]["images"] == 15
    assert sum(map(sum, measured["confusion"]["images"])) == 15
    page = tmp_path / "page.html"
    text = run("report", folder, "--images", pictures / "dark", "--most", 2, "--text", "-o", page)
    assert ("connections" in text, page.read_text().count("<html")) == (connected, 1)
    run("export", folder, "-o", tmp_path / "model.pt2", "--images", pictures, "--fixed")
    card = (folder / "README.md").read_text()
    assert ("Trained for 1 epoch on imagefolder:" in card, f"{document['about']['task']}" in card) == (trained, True)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before, "only read"
    again = _trained(folder)(dcafy_command, tmp_path / "again", pictures)
    kept = dcafy.about(dcafy.load(again))
    assert (list(kept.classes), kept.trained is not None) == (NAMES, True)
    assert kept.preparation == about.preparation or not trained
    code, _, err = dcafy_command("convert", folder, "-o", tmp_path / "converted")
    if connected:
        assert (code, "is connected already" in err) == (2, True)
    else:
        assert code == 0, err
        same = dcafy.about(dcafy.load(tmp_path / "converted"))
        assert (same.classes, same.preparation) == (about.classes, about.preparation)


def test_what_is_there_is_not_written_over(dcafy_command: Run, tmp_path: Path) -> None:
    convert = ("convert", NET, "-o", tmp_path / "out", "--no-verify")
    assert dcafy_command(*convert)[0] == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    code, _, err = dcafy_command(*convert)
    assert code == 2
    assert "already. Name another folder, or add --overwrite" in err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert dcafy_command(*convert, "--overwrite")[0] == 0
    (tmp_path / "out" / "finetune.json").write_text("{}")
    code, _, err = dcafy_command(*convert, "--overwrite")
    assert (code, "There is a run in" in err) == (2, True)


def test_pictures_are_made_ready_as_in_training(dcafy_command: Run, tmp_path: Path, pictures: Path) -> None:
    """Not as the library would with its own size: the folder says 32 pixels."""
    folder = _trained(NET)(dcafy_command, tmp_path, pictures)
    how = dcafy.about(dcafy.load(folder)).preparation
    assert how is not None
    assert how.size == (32, 32)
    assert torch.equal(dcafy.transforms(dcafy.load(folder))(pictures / "dark" / "1.png"),
                       dcafy.transforms(dcafy.load(folder))(Image.open(pictures / "dark" / "1.png")))  # fmt: skip
