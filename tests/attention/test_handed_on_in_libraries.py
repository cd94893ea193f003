"""rla and dia in networks of torchvision and timm, and under a detector: exact at the start, and alive."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from trained import evaluate, images, seeded, trained

import dcafy

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision resnet": lambda: torchvision.models.resnet50(num_classes=5),
    "torchvision mobilenet": lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.35),
    "timm regnet": lambda: timm.create_model("regnety_002", num_classes=5),
    "timm efficientnet": lambda: timm.create_model("tf_efficientnet_lite0", num_classes=5),
    "timm convnext": lambda: timm.create_model("convnext_atto", num_classes=5),
    "timm resnet": lambda: timm.create_model("resnet26d", num_classes=5),
}


@pytest.mark.zoo
@pytest.mark.parametrize("name", NETWORKS)
def test_exact_and_alive(name: str) -> None:
    x = images(2, 64)
    model = trained(NETWORKS[name], images(4, 64))
    for kind in ("rla", "dia"):
        with seeded(0):
            result = dcafy.insert(model, kind, reduction=4, example_inputs=x)
        for given in (x, images(1, 96)):
            assert torch.equal(evaluate(result.eval(), given), evaluate(model, given))
        original = copy.deepcopy(model).train()
        with seeded(1):
            expected = evaluate(original, x)
        with seeded(1):
            assert torch.equal(evaluate(result.train(), x), expected)
        result.eval()
        own = {key: p for key, p in result.named_parameters() if kind in key.split(".")}
        dcafy.freeze_base(result)
        with seeded(2), torch.no_grad():
            for value in own.values():
                value.add_(torch.randn_like(value), alpha=0.1)
        result(x).square().sum().backward()
        dead = [key for key, p in own.items() if p.grad is None or not p.grad.any()]
        assert dead == []
        assert not torch.equal(evaluate(result, x), evaluate(model, x))


@pytest.mark.zoo
def test_under_a_detector() -> None:
    with seeded(0):
        model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
            weights=None, weights_backbone=None, num_classes=4, min_size=96, max_size=96
        ).eval()
        result = dcafy.insert(model, "rla", where="backbone.*").eval()
    given = [torch.rand(3, 80, 96, generator=torch.Generator().manual_seed(1))]
    before, after = evaluate(model, given)[0], evaluate(result, given)[0]
    assert all(torch.equal(after[key], value) for key, value in before.items())
    own = {key: p for key, p in result.named_parameters() if "rla" in key.split(".")}
    assert all(key.startswith("backbone.") for key in own)

    def maps(network: nn.Module) -> dict[str, Tensor]:
        return network.backbone(torch.stack(given))

    with torch.no_grad(), seeded(2):
        for value in own.values():
            value.add_(torch.randn_like(value), alpha=0.1)
        features = maps(result)
        assert not torch.equal(features["0"], maps(model)["0"])
        assert all(torch.equal(value, features[key]) for key, value in maps(result).items())
    targets = [{"boxes": torch.tensor([[10.0, 10.0, 60.0, 60.0]]), "labels": torch.tensor([1])}]
    result.train()
    sum(result(given, targets).values()).backward()
    assert [key for key, p in own.items() if p.grad is None or not p.grad.any()] == []
