"""``dcafy convert``: every option reaches the conversion, and what it writes can be loaded."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision

import dcafy

SMALL = "torchvision:mobilenet_v3_small"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(dcafy_command: Run) -> Run:
    """Run ``dcafy convert``: arguments -> exit code, stdout, stderr."""
    return functools.partial(dcafy_command, "convert")


def test_writes_a_folder_that_loads(command: Run, tmp_path: Path) -> None:
    folder = tmp_path / "connected"
    code, out, err = command(SMALL, "-o", folder, "--input-size", "3x64x64")
    assert code == 0
    loaded = dcafy.load(folder)
    connections = dcafy.connections(loaded)
    own = sum(p.numel() for name, p in loaded.named_parameters() if "dca" in name.split("."))
    assert own == sum(p.numel() for connection in connections.values() for p in connection.parameters()) > 0
    assert f"chain: {len(connections)} connections with {own:,} new parameters" in err
    assert out == f"{len(connections)} connections with {own:,} parameters, saved in {folder}.\n"


def test_every_option_arrives(command: Run, tmp_path: Path) -> None:
    folder = tmp_path / "connected"
    options = ["--schema", "weighted", "--channel-match", "fc1", "--reduction", "8", "--min-hidden", "4"]
    options += ["--spatial-match", "max", "--dimension", "channel", "--topology", "dense", "--connections-only"]
    code, _, _ = command(SMALL, "-o", folder, "--input-size", "3x64x64", "--no-verify", *options)
    assert code == 0
    written = json.loads((folder / "dcafy.json").read_text())["options"]
    expected = {"schema": "weighted", "channel_match": "fc1", "reduction": 8, "min_hidden": 4, "spatial_match": "max"}
    assert expected.items() <= written.items()
    assert not (folder / "model.safetensors").exists()
    loaded = dcafy.load(folder, model=_same_weights())
    assert any("<-" in name for name in dcafy.connections(loaded))


def _same_weights() -> torch.nn.Module:
    """The network that the command built: it leaves the random state alone, so that a seed decides."""
    from dcafy.sources import open_model

    return open_model(SMALL).model


def test_attention_in_the_papers_own_form_is_what_is_compared_with(command: Run, tmp_path: Path) -> None:
    """It is no no-op, so that the network before it computes something else, and the connections still nothing."""
    folder = tmp_path / "connected"
    code, out, err = command("torchvision:resnet18", "-o", folder, "--attention", "se", "--attention-init", "paper")
    assert (code, out.partition(" connections")[0]) == (0, "7"), err
    assert len(dcafy.connections(dcafy.load(folder))) == 7


def test_attention_is_inserted_first(command: Run, tmp_path: Path) -> None:
    folder = tmp_path / "connected"
    arguments = ["--attention", "se", "--attention-reduction", "8", "--input-size", "3x64x64"]
    code, out, _ = command("torchvision:resnet18", "--set", "num_classes=10", "-o", folder, *arguments)
    assert code == 0
    assert out.startswith("7 connections with ")
    assert ", se with " in out
    base = dcafy.insert(torchvision.models.resnet18(num_classes=10), "se", reduction=8)
    assert len(dcafy.connections(dcafy.load(folder, model=base))) == 7


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["torchvision:resnet18"], 3, "attention='se'"),
        (["torchvision:vgg11", "--attention", "se"], 2, "no residual or bottleneck units"),
        ([SMALL, "--schema", "mean"], 2, "--schema 'mean'"),
        ([SMALL, "--topology", "ring"], 2, "--topology 'ring'"),
        (["torchvision:resnet18", "--attention", "sk"], 2, "init='paper'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_mistakes(command: Run, tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    folder = tmp_path / "none"
    ended, out, err = command(*arguments, "-o", folder, "--input-size", "3x64x64")
    assert (ended, out) == (code, "")
    assert says in err
    assert "Traceback" not in err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--where", "layer9.*"), "--where is for attention that is put in"),
        (("--init", "paper"), "--attention-init is for attention that is put in"),
        (("--topology", "own", "--message", "plain"), "a plain message is G once more"),
    ],
)
def test_an_option_that_nothing_would_go_by_is_refused(
    options: tuple[str, ...], named: str, dcafy_command: Run, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    commands = [("convert", "-o", made), ("finetune", "--data", "digits", "-o", made)]
    for command, *more in commands + [("inspect",)] * (options[0] != "--topology"):
        code, out, err = dcafy_command(command, SMALL, *options, *more)
        assert (code, out) == (2, "")
        assert named in " ".join(err.split())
    assert not made.exists()
