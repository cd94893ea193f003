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

import dcafy

WRITTEN = Path(__file__).parent / "formats"
COMMITS = sorted(path.parent.name for path in WRITTEN.glob("*/plan.json"))


WIDE = (16, 16, 24)
"""Channels of the units with CBAM, whose spatial part was found wrongly in fewer."""


def with_base_of(folder: Path) -> nn.Module:
    """The network whose connections are in a folder by themselves. Another CPU would give it other statistics."""
    network = with_attention(CBAM, WIDE)
    stored = load_file(folder / "model.safetensors")
    network.load_state_dict({key: stored[key] for key in network.state_dict()})
    return network


MODELS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "channel_and_spatial": lambda _: {"model": with_attention(CBAM, WIDE)},
    "connections_only": lambda written: {"model": with_base_of(written / "channel_and_spatial")},
    "dense": lambda _: {"model": with_attention(SELinear, (8, 8, 12))},
    "inserted": lambda _: {},
    "run": lambda _: {},
    "zoo": lambda _: {},
}
"""Folder -> what ``dcafy.load`` is given besides it, by the place where all of them are."""


FIRST = {"021c8b3"}
"""Those of format 1: connections stand under one ``dca``, and not in the modules that hear."""


def keys_now(description: dict[str, Any]) -> Callable[[str], str]:
    """The key that stands for one of ``dcafy.json`` as it was written: ``dca.BLOCK.x`` has become ``BLOCK.dca.x``."""
    first = description["format_version"] == 1
    blocks = sorted((block["name"] for block in description["plan"]["blocks"]), key=len, reverse=True)

    def now(key: str) -> str:
        if not first or not key.startswith("dca."):
            return key
        block = next(block for block in blocks if key.startswith(f"dca.{block}."))
        return f"{block}.dca.{key.removeprefix(f'dca.{block}.')}"

    return now


@pytest.fixture(params=COMMITS)
def written(request: pytest.FixtureRequest) -> Path:
    return WRITTEN / str(request.param)


def test_something_was_written() -> None:
    assert "021c8b3" in COMMITS
    for commit in COMMITS:
        for name in MODELS:
            description = json.loads((WRITTEN / commit / name / "dcafy.json").read_text())
            assert description["format_version"] == (1 if commit in FIRST else 2)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"run"}))
def test_a_folder_computes_what_it_did(name: str, written: Path) -> None:
    model = dcafy.load(written / name, **MODELS[name](written)).eval()
    expected = load_file(written / name / "expected.safetensors")
    with torch.no_grad():
        assert torch.allclose(model(expected["images"]), expected["outputs"], rtol=1e-4, atol=1e-5)
        for connection in dcafy.connections(model).values():
            connection.beta.zero_()
        assert not torch.allclose(model(expected["images"]), expected["outputs"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_folder_says_again_what_it_said(name: str, written: Path, tmp_path: Path) -> None:
    """Everything but the versions of the packages and of the format, in which connections have other keys."""
    before, given = json.loads((written / name / "dcafy.json").read_text()), MODELS[name](written)
    now, file = keys_now(before), before["weights"]["file"]
    model = dcafy.load(written / name, **given)
    dcafy.save(model, tmp_path / "again", base=file == "model.safetensors")
    after = json.loads((tmp_path / "again" / "dcafy.json").read_text())
    stored, again = load_file(written / name / file), load_file(tmp_path / "again" / file)
    assert {now(key): value.tolist() for key, value in stored.items()} == {k: v.tolist() for k, v in again.items()}
    connected = {key for key in again if "dca" in key.split(".")}
    assert len(connected) >= 2 * (len(dcafy.connections(model)) - (name == "dense"))
    assert all(key in model.state_dict() for key in again)
    assert (after["format_version"], after["weights"]["keyed_by"]) == (3, "module")
    # What is known of a zoo's network besides itself is written since format 3.
    assert (after.pop("about") is None) == (before["model"] is None)
    if before["format_version"] == 1:
        before["weights"]["keyed_by"] = "module"
        before["weights"]["sha256"] = after["weights"]["sha256"]  # of the file, which has the keys
    if name == "inserted":  # which counted as base
        before["weights"]["base_sha256"] = after["weights"]["base_sha256"]
    weights = before["weights"]
    weights["tied"] = {now(key): now(value) for key, value in weights["tied"].items()}
    weights["layouts"] = {now(key): value for key, value in weights["layouts"].items()}
    before["insertions"] = [] if before["model"] is None else before["model"].pop("insertions")
    for key in ("versions", "format_version"):
        del before[key], after[key]
    assert after == before
    dcafy.save(dcafy.load(tmp_path / "again", **given), tmp_path / "twice", base=file == "model.safetensors")
    for part in ("dcafy.json", file):
        assert (tmp_path / "twice" / part).read_bytes() == (tmp_path / "again" / part).read_bytes()


def test_inspect_prints_what_it_printed(written: Path, dcafy_command: Callable[..., tuple[int, str, str]]) -> None:
    """But for what topologies that there were not then would add."""
    code, out, _ = dcafy_command("inspect", "torchvision:mobilenet_v3_small", "--json")
    now, then = json.loads(out), json.loads((written / "plan.json").read_text())
    now["costs"] = [cost for cost in now["costs"] if cost["topology"] in ("chain", "dense")]
    for cost in now["costs"]:
        assert cost.pop("multiply_adds") > 0
    assert (code, json.dumps(now)) == (0, json.dumps(then))
    assert len(dcafy.Plan.from_dict(json.loads(out)).links) == 8


def test_a_run_is_gone_on_with(
    written: Path, tmp_path: Path, dcafy_command: Callable[..., tuple[int, str, str]]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(written / "run", run)
    code, out, err = dcafy_command("finetune", run, "--resume")
    assert code == 0, err
    assert "stages.2.0.attn_last" in out
    now = keys_now(json.loads((written / "run" / "dcafy.json").read_text()))
    before = load_file(written / "run" / "model.safetensors")
    state = dcafy.load(run).state_dict()
    assert all(torch.equal(value, state[now(key)]) for key, value in before.items())
    assert len(state) == len(before)


def test_exit_codes(written: Path) -> None:
    assert json.loads((written / "exit_codes.json").read_text()).items() <= exit_codes().items()


def test_a_narrow_spatial_part() -> None:
    """It heard at another place than it should have: a folder of that is not what it was by another formula."""
    with pytest.raises(dcafy.CheckpointError, match="convert the original network anew"):
        dcafy.load(WRITTEN / "narrow_spatial", model=with_attention(CBAM, (8, 8, 12)))
