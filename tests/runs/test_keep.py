"""``--keep``: the best epoch beside the last, and which one the folder gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dcafy

Run = Callable[..., tuple[int, str, str]]

RUN = ("timm:test_efficientnet", "--epochs", 3, "--batch-size", 4, "--image-size", 32, "--cpu", "--lr", 0.05)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for kind, name in enumerate(("bright", "dark", "grey")):
        (root / name).mkdir()
        for number in range(10):
            values = rng.integers(0, 255, (40, 50, 3)) // (kind + 1)
            Image.fromarray(values.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


def epochs(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row["metrics"]["top1"] for row in rows if row["event"] == "epoch"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    here, there = weights(one), weights(other)
    return here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)


@pytest.mark.slow
def test_which_epoch_the_folder_gives(dcafy_command: Run, tmp_path: Path, pictures: Path) -> None:
    data = ("--data", f"imagefolder:{pictures}", "--val-fraction", 0.4)
    for keep in ("last", "best", "both"):
        code, _, err = dcafy_command("finetune", *RUN, *data, "-o", tmp_path / keep, "--keep", keep)
        assert code == 0, err
    measured = epochs(tmp_path / "last")
    assert measured == epochs(tmp_path / "best") == epochs(tmp_path / "both")
    best = measured.index(max(measured)) + 1
    assert best < 3, "or this shows nothing"
    assert not (tmp_path / "last" / "best").exists()
    assert same(tmp_path / "last", tmp_path / "both")
    assert same(tmp_path / "best", tmp_path / "both" / "best")
    assert not same(tmp_path / "last", tmp_path / "best")
    for folder, epoch in (("last", 3), ("best", best), ("both", 3), ("both/best", best)):
        trained = dcafy.about(dcafy.load(tmp_path / folder)).trained
        assert trained is not None
        assert (trained.epochs, trained.metrics["top1"]) == (epoch, measured[epoch - 1])
        options = ("--json", "--cpu", "--batch-size", 4)
        code, out, err = dcafy_command("evaluate", tmp_path / folder, *options)
        assert code == 0, err
        assert json.loads(out)["metrics"] == dict(trained.metrics)
    before = weights(tmp_path / "best")
    code, _, err = dcafy_command("finetune", tmp_path / "best", "--resume")
    assert code == 0, err
    assert "finished already: all 3 epochs are done" in err
    assert all(torch.equal(value, before[key]) for key, value in weights(tmp_path / "best").items())


def test_a_finished_run_says_so(dcafy_command: Run, tmp_path: Path, pictures: Path) -> None:
    data = ("--data", f"imagefolder:{pictures}")
    run = [argument if argument != 3 else 1 for argument in RUN]
    assert dcafy_command("finetune", *run, *data, "-o", tmp_path / "run", "--keep", "best")[0] == 0
    assert json.loads((tmp_path / "run" / "finetune.json").read_text())["keep"] == "best"
    assert same(tmp_path / "run", tmp_path / "run" / "best")
    code, _, err = dcafy_command("finetune", tmp_path / "run", "--resume", "--keep", "last")
    assert (code, "was started with --keep best" in err) == (2, True)
    code, _, err = dcafy_command("finetune", tmp_path / "run", "--resume")
    assert (code, "finished already: all 1 epochs are done" in err) == (0, True)
