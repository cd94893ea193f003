"""What earlier versions of dcafy wrote is read as it was meant; ``formats/write.py`` wrote it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from formats.write import exit_codes
from networks import CBAM, SELinear, with_attention
from safetensors.torch import load_file
from torch import nn
from trained import seeded, trained_like

import dcafy

WRITTEN = Path(__file__).parent / "formats"
COMMITS = sorted(path.parent.name for path in WRITTEN.glob("*/plan.json"))


def rebuilt(attention: Callable[[int], nn.Module]) -> nn.Module:
    """The network as ``formats/write.py`` builds it: its weights are not in the folder of connections."""
    with seeded(1):
        images = torch.randn(2, 3, 48, 48)
    with seeded(0):
        return trained_like(with_attention(attention, (8, 8, 12)), images)


MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "channel_and_spatial": lambda: {"model": with_attention(CBAM, (8, 8, 12))},
    "connections_only": lambda: {"model": rebuilt(CBAM)},
    "dense": lambda: {"model": with_attention(SELinear, (8, 8, 12))},
    "inserted": dict,
    "run": dict,
    "zoo": dict,
}
"""Folder -> what ``dcafy.load`` is given besides it."""


@pytest.fixture(params=COMMITS)
def written(request: pytest.FixtureRequest) -> Path:
    return WRITTEN / str(request.param)


def test_something_was_written() -> None:
    assert "021c8b3" in COMMITS


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"run"}))
def test_a_folder_computes_what_it_did(name: str, written: Path) -> None:
    model = dcafy.load(written / name, **MODELS[name]()).eval()
    expected = load_file(written / name / "expected.safetensors")
    with torch.no_grad():
        assert torch.allclose(model(expected["images"]), expected["outputs"], rtol=1e-4, atol=1e-5)
        for connection in dcafy.connections(model).values():
            connection.beta.zero_()
        assert not torch.allclose(model(expected["images"]), expected["outputs"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_folder_says_again_what_it_said(name: str, written: Path, tmp_path: Path) -> None:
    """Everything but the versions of the packages."""
    before = json.loads((written / name / "dcafy.json").read_text())
    model = dcafy.load(written / name, **MODELS[name]())
    dcafy.save(model, tmp_path, base="model.safetensors" in before["weights"]["file"])
    after = json.loads((tmp_path / "dcafy.json").read_text())
    del before["versions"], after["versions"]
    assert after == before


def test_inspect_prints_what_it_printed(written: Path, dcafy_command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = dcafy_command("inspect", "torchvision:mobilenet_v3_small", "--json")
    assert (code, out) == (0, (written / "plan.json").read_text())
    assert len(dcafy.Plan.from_dict(json.loads(out)).links) == 8


def test_a_run_is_gone_on_with(
    written: Path, tmp_path: Path, dcafy_command: Callable[..., tuple[int, str, str]]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(written / "run", run)
    code, out, err = dcafy_command("finetune", run, "--resume")
    assert code == 0, err
    assert "stages.2.0.attn_last" in out
    assert load_file(run / "model.safetensors").keys() == load_file(written / "run" / "model.safetensors").keys()


def test_exit_codes(written: Path) -> None:
    assert json.loads((written / "exit_codes.json").read_text()).items() <= exit_codes().items()
