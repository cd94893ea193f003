"""``--backbone RUN``: what a run has trained lies under a detector, whatever arm it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_model
from torch import nn
from trained import moved, seeded

import dcafy
from dcafy.detection import write_shapes
from dcafy.errors import CheckpointError, UsageError
from dcafy.plan.options import Conversion
from dcafy.runs.request import Request, write_request
from dcafy.runs.run import subject, trained_in
from dcafy.training import TrainingConfig

SE = Conversion(attention="se", attention_init="paper")


def classifier(kind: str = "resnet18", *, attention: bool) -> nn.Module:
    """A classifier of seven classes with weights of its own."""
    with seeded(3):
        model: nn.Module = getattr(torchvision.models, kind)(num_classes=7)
        return dcafy.insert(model, "se", init="paper") if attention else model


def kept(folder: Path, model: nn.Module, arm: str, /, **changes: Any) -> Path:
    """The folder of a run that has trained ``model``."""
    folder.mkdir(parents=True, exist_ok=True)
    conversion = SE if arm != "plain" else Conversion()
    asked = Request("torchvision:resnet18", "digits", conversion=conversion, arm=arm)
    write_request(folder, dataclasses.replace(asked, **changes))
    if arm == "connected":
        dcafy.save(model, folder)
    else:
        save_model(model, str(folder / "model.safetensors"))
    return folder


@pytest.mark.parametrize("arm", ["plain", "attention"])
def test_an_unconnected_network_comes_back_but_for_its_head(tmp_path: Path, arm: str) -> None:
    model = classifier(attention=arm == "attention")
    found = trained_in(kept(tmp_path / "run", model, arm), arm)
    state = found.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert state["fc.weight"].shape == (1000, 512)
    for key, value in model.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, state[key]), key


def test_a_connected_network_comes_back(tmp_path: Path) -> None:
    model = moved(dcafy.convert(classifier(attention=True), verify=False)).eval()
    found = trained_in(kept(tmp_path / "run", model, "connected"))
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in model.state_dict().items())


def test_each_arm_of_a_comparison_has_its_own(tmp_path: Path) -> None:
    run, arms = tmp_path / "run", ("plain", "attention")
    for arm in arms:
        model = classifier(attention=arm == "attention")
        kept(run / "seeds" / f"0-{arm}", model, arm)
        kept(run, model, arm, arms=arms, seeds=1, conversion=SE)
    for arm in arms:
        assert ("layer1.0.se.reduce.weight" in trained_in(run, arm).state_dict()) == (arm == "attention")
    with pytest.raises(UsageError, match="no connected"):
        trained_in(run)


def test_runs_that_are_no_backbone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run was started"):
        trained_in(tmp_path)
    run = kept(tmp_path / "run", classifier(attention=False), "plain")
    request = json.loads((run / "finetune.json").read_text())
    (run / "finetune.json").write_text(json.dumps({**request, "model": "os:getcwd"}))
    with pytest.raises(UsageError, match="built by code"):
        trained_in(run, "plain")
    (run / "finetune.json").write_text(json.dumps({**request, "model": "torchvision:mobilenet_v3_small"}))
    with pytest.raises(CheckpointError, match="do not fit"):
        trained_in(run, "plain")
    (run / "finetune.json").write_text(json.dumps(request))
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="are damaged"):
        trained_in(run, "plain")
    (run / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="--resume"):
        trained_in(run, "plain")


def test_a_classifier_has_no_backbone(tmp_path: Path) -> None:
    asked = Request("torchvision:resnet18", "digits", backbone=str(tmp_path))
    with pytest.raises(UsageError, match="--task detection"):
        subject(asked, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["plain", "attention", "connected"])
def test_it_lies_under_the_detector(tmp_path: Path, arm: str) -> None:
    model = classifier("resnet50", attention=arm != "plain")
    if arm == "connected":
        model = moved(dcafy.convert(model, verify=False)).eval()
        connections = dcafy.connections(model)
        model = dcafy.drop(model, next(iter(connections)))  # which keeps its α, under the detector as well
    run = kept(tmp_path / "run", model, arm, model="torchvision:resnet50")
    shapes = write_shapes(tmp_path / "shapes", 8, side=48)
    asked = Request(
        "torchvision:retinanet_resnet50_fpn", shapes.spec, settings={"min_size": 64, "max_size": 64}, task="detection",
        training=TrainingConfig(optimizer="sgd", cpu=True), arm=arm, backbone=str(run),
        conversion=SE if arm == "attention" else Conversion(),
    )  # fmt: skip
    state = subject(asked, seed=0).network.state_dict()
    assert any("dca" in key.split(".") for key in state) == (arm == "connected")
    compared = 0
    for key, value in model.state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(state[f"backbone.body.{key}"], value), key
            compared += 1
    assert compared > 300
