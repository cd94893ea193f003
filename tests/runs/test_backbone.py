"""``--backbone RUN``: what a run has trained lies under a detector, whatever arm it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from networks import SELinear
from safetensors.torch import save_model
from torch import nn
from trained import moved, seeded

import dcafy
from dcafy.attention.inserted import inserted
from dcafy.detection import write_shapes
from dcafy.detection.backbone import with_settled_backbone
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
    network = subject(asked, seed=0).network
    _require_settled(network.train(), arm)
    state = network.state_dict()
    assert len(list(inserted(network))) == len(list(inserted(model))), "no attention is put in twice"
    assert any("dca" in key.split(".") for key in state) == (arm == "connected")
    compared = 0
    for key, value in model.state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(state[f"backbone.body.{key}"], value), key
            compared += 1
    assert compared > 300


def _require_settled(detector: nn.Module, arm: str) -> None:
    """Nothing where the stem and first stage stand still, and statistics everywhere in the backbone."""
    body: Any = detector.backbone.body
    norms = [m for m in body.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    assert norms
    assert not any(norm.training for norm in norms)
    for name, parameter in body.named_parameters():
        first = name.startswith(("conv1", "bn1", "layer1."))
        assert parameter.requires_grad != first, (name, arm)


class _Body(nn.Module):
    """What torchvision's ResNets have, in small."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        for number in range(1, 5):
            unit = nn.Sequential(SELinear(channels), nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))
            self.add_module(f"layer{number}", unit)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class _Head(nn.Module):
    """A detector without its boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.ModuleDict({"body": _Body()}), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone["body"](x))


class _Named(_Body):
    """A classifier with that body at its root."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(super().forward(x).mean((2, 3)))


@pytest.mark.parametrize("connected", [False, True])
def test_what_stands_still_under_a_detector(connected: bool) -> None:
    """With the connections into it; one step moves all of the rest, and no statistics."""
    x = torch.rand(2, 3, 8, 8)
    classifier: Any = _Named()
    if connected:
        classifier = dcafy.convert(classifier, example_inputs=x, message="centred")
        for connection in dcafy.connections(classifier).values():
            nn.init.constant_(connection.beta, 0.3)
    detector = _Head()
    made = with_settled_backbone(detector, classifier).train()
    assert all(parameter.requires_grad for parameter in detector.parameters()), "the detector is as it was"
    before = {key: value.clone() for key, value in made.state_dict().items()}
    made(x).square().mean().backward()
    torch.optim.SGD([p for p in made.parameters() if p.grad is not None], lr=0.1).step()
    moved = {key for key, value in made.state_dict().items() if not torch.equal(value, before[key])}
    still = ("running", "num_batches", "body.conv1", "body.bn1", "body.layer1.")
    assert moved
    assert {key for key in moved if any(part in key for part in still)} == set()
    assert {key.split(".")[2] for key in moved if "body" in key} >= {"layer2", "layer3", "layer4"}
    assert any("dca" in key.split(".") for key in moved) == connected


def test_a_detector_that_chooses_what_it_trains_goes_by_that() -> None:
    detector = _Head()
    detector.backbone["body"].layer3.requires_grad_(False)
    made = with_settled_backbone(detector, _Named())
    named = dict(made.named_parameters())
    assert {key.split(".")[2] for key, p in named.items() if not p.requires_grad} == {"layer3"}
