"""The examples run, and show what they say they show."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torchvision

import dcafy

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    """The example as a module, without running its ``main``."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    return example("quickstart")


@pytest.mark.slow
def test_quickstart_shows_identity_and_moves_every_connection(
    quickstart: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = quickstart.main(["--epochs", "2", "--seed", "1"])
    printed = capsys.readouterr().out

    assert outcome.identical
    assert "bit-identical, largest difference 0\n" in printed
    # Five blocks in one chain give four connections, and two epochs move each of them.
    assert len(outcome.connections) == 4
    for row in outcome.connections:
        assert row.beta != 0
        assert row.alpha != 1
        assert row.contribution == pytest.approx(abs(row.beta) / (abs(row.alpha) + abs(row.beta)), rel=1e-5)
        assert row.block in printed
        assert row.hears in printed
    # Four epochs in all leave the 10 % of guessing far behind.
    assert outcome.original_accuracy > 0.5
    assert outcome.converted_accuracy > 0.5
    assert "does not prove an accuracy gain" in " ".join(printed.split())


def test_quickstart_trains_and_tests_on_different_images(quickstart: ModuleType) -> None:
    data = quickstart.digits()
    assert len(data.train_labels) + len(data.test_labels) == 1797
    assert data.test_images.shape[1:] == (3, 32, 32)
    together = torch.cat([data.train_images, data.test_images]).flatten(1)
    assert len(torch.unique(together, dim=0)) == 1797


def test_quickstart_refuses_no_epochs(quickstart: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        quickstart.main(["--epochs", "0"])
    assert refused.value.code == 2
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_report_is_of_the_quickstarts_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    output = tmp_path / "report.html"
    found = example("report").main(["-o", str(output), "--epochs", "1", "--seed", "1"])

    assert len(found.plan.blocks) == 5
    assert [side.title for side in found.sides] == ["original", "connected"]
    assert found.drift is not None
    assert not found.drift.identical  # the connected network was trained on
    assert found.run.own is not None
    assert found.run.own.epochs == (1,)
    assert found.pictures.names == tuple(f"digit {number}.png" for number in range(8))
    text = output.read_text(encoding="utf-8")
    assert "small MobileNetV3 on digits" in text
    assert len(text) < 5_000_000


def test_a_torchvision_checkpoint_is_fine_tuned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "weights.pth"
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), file)
    arguments = ["--weights", str(file), "--size", "32", "--epochs", "2", "--steps", "2"]
    accuracy, model = example("finetune_torchvision").main(arguments)
    assert 0 <= accuracy <= 1
    assert all(connection.beta.item() != 0 for connection in dcafy.connections(model).values())
    assert f"accuracy on 359 images: {accuracy:.2%}" in capsys.readouterr().out


def test_a_timm_checkpoint_is_fine_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    history = example("finetune_timm").main(["test_efficientnet", "--untrained", "--images", "48", "--epochs", "1"])
    assert history.epochs[0].steps == 1
    assert history.usage is not None
    assert history.usage.images == 48
    assert "loss if cut" in capsys.readouterr().out


def test_a_network_of_ones_own_is_connected(capsys: pytest.CaptureFixture[str]) -> None:
    connected = example("custom_model").main(["--steps", "20"])
    assert list(dcafy.connections(connected)) == ["stages.1.3", "stages.2.3"]
    assert all(connection.beta.item() != 0 for connection in dcafy.connections(connected).values())
    assert "with all connections cut" in capsys.readouterr().out


@pytest.mark.slow
def test_detector_is_the_same_after_conversion_and_every_connection_moves(capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("accelerate", "torchmetrics", "pycocotools"):
        pytest.importorskip(package)
    outcome = example("detector").main(["--epochs", "1", "--images", "12"])
    printed = capsys.readouterr().out
    assert outcome.same_detections
    assert outcome.same_losses
    assert "NOT identical" not in printed
    assert len(outcome.betas) == 7
    assert all(beta != 0 for beta in outcome.betas.values())
    assert {"AP", "AP50"} <= set(outcome.precision)
    assert "synthetic" in printed
