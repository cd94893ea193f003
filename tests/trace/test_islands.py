"""Torchvision's detectors and segmenters: converted with no help from the user, alike in eval, trained a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detection_data import pictures, with_statistics
from torch import Tensor, nn
from torchvision.models import detection, segmentation
from trained import seeded

import dcafy

pytestmark = pytest.mark.xdist_group("detectors")

SMALL: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 4}


def boxes(count: int) -> list[dict[str, Tensor]]:
    return [{"boxes": torch.tensor([[8.0, 8.0, 60.0, 70.0]]), "labels": torch.tensor([1])} for _ in range(count)]


DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "fasterrcnn": lambda: detection.fasterrcnn_mobilenet_v3_large_fpn(min_size=96, max_size=128, **SMALL),
    "ssdlite": lambda: detection.ssdlite320_mobilenet_v3_large(**SMALL),
}
SEGMENTERS: dict[str, Callable[[], nn.Module]] = {
    "deeplabv3": lambda: segmentation.deeplabv3_mobilenet_v3_large(aux_loss=True, **SMALL),
    "lraspp": lambda: segmentation.lraspp_mobilenet_v3_large(**SMALL),
}


def moved_by_beta(model: nn.Module, outputs: Callable[[nn.Module], list[Tensor]]) -> None:
    """β of the first connection moves what the network gives."""
    before = outputs(model)
    first = next(iter(dcafy.connections(model).values()))
    with torch.no_grad():
        first.beta.fill_(2.0)
    after = outputs(model)
    with torch.no_grad():
        first.beta.zero_()
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", [pytest.param("fasterrcnn", marks=pytest.mark.slow), "ssdlite"])
def test_detectors(name: str) -> None:
    model = with_statistics(DETECTORS[name]())
    converted = dcafy.convert(model)
    assert isinstance(converted, type(model))
    assert type(converted).__name__ == type(model).__name__
    assert not isinstance(converted, torch.fx.GraphModule)
    assert dcafy.inspect(model).islands == ("backbone",)
    assert type(converted.backbone) is type(model.backbone)
    assert getattr(converted.backbone, "out_channels", None) == getattr(model.backbone, "out_channels", None)
    assert len(dcafy.connections(converted)) == 7

    images = pictures((96, 80), (64, 128), (100, 100))

    def found(network: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return [value for picture in network.eval()(images) for value in picture.values()]

    assert all(torch.equal(a, b) for a, b in zip(found(converted), found(model), strict=True))
    moved_by_beta(converted.backbone, lambda network: _maps(network, torch.stack(pictures((96, 96)))))

    losses = []
    for network in (copy.deepcopy(model).train(), converted.train()):
        with seeded(3):
            losses.append(network(pictures((96, 80), (64, 128)), boxes(2)))
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(losses[0][key], losses[1][key]) for key in losses[0])
    sum(losses[1].values()).backward()
    optimizer = torch.optim.SGD(dcafy.parameter_groups(converted, lr=0.01, weight_decay=1e-4))
    optimizer.step()
    assert all(c.beta.grad is not None and c.beta.item() != 0 for c in dcafy.connections(converted).values())


def _maps(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(backbone.eval()(images).values())


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmenters(name: str) -> None:
    model = with_statistics(SEGMENTERS[name]())
    converted = dcafy.convert(model)
    assert len(dcafy.connections(converted)) == {"deeplabv3": 7, "lraspp": 8}[name]
    with seeded(2):
        images = torch.rand(2, 3, 96, 128)

    def masks(network: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return list(network.eval()(images).values())

    assert list(converted.eval()(images)) == list(model.eval()(images))
    assert type(converted(images)) is type(model(images))
    assert all(torch.equal(a, b) for a, b in zip(masks(converted), masks(model), strict=True))
    moved_by_beta(converted, masks)
    with seeded(3):
        expected = copy.deepcopy(model).train()(images)
    with seeded(3):
        actual = converted.train()(images)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    sum(value.square().mean() for value in actual.values()).backward()
    assert all(c.beta.grad is not None and c.beta.grad.item() != 0 for c in dcafy.connections(converted).values())


@pytest.mark.slow
def test_save_load_and_revert_through_an_island(tmp_path: Any) -> None:
    model = with_statistics(DETECTORS["fasterrcnn"]())
    converted = dcafy.convert(model, verify=False)
    with torch.no_grad():
        for connection in dcafy.connections(converted).values():
            connection.beta.fill_(0.3)
    dcafy.save(converted, tmp_path / "detector")
    loaded = dcafy.load(tmp_path / "detector", model=DETECTORS["fasterrcnn"]()).eval()
    images = pictures((96, 96))
    with torch.no_grad():
        ours, theirs = converted.eval()(images), loaded(images)
    assert all(torch.equal(ours[0][key], theirs[0][key]) for key in ours[0])
    reverted = dcafy.revert(converted).eval()
    assert reverted.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(reverted(images)[0]["boxes"], model(images)[0]["boxes"])
