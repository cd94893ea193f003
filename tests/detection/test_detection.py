"""Detectors with connected backbones: they compute what they did, and train as they did."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detection_data import pictures, with_statistics
from torch import Tensor, nn
from torchvision.models import detection, get_model_builder, list_models, resnet, segmentation
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops import boxes as box_ops
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from trained import seeded

import dcafy
from dcafy.detection import with_backbone
from dcafy.detection.classes import classes_of, with_classes
from dcafy.errors import InputError, NoAttentionError

pytestmark = pytest.mark.xdist_group("detectors")

UNTRAINED: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 4}
SMALL: dict[str, Any] = {"min_size": 64, "max_size": 96}
FEW: dict[str, Any] = {"rpn_post_nms_top_n_test": 20, "rpn_post_nms_top_n_train": 20, "box_detections_per_img": 10}


def targets(count: int) -> list[dict[str, Tensor]]:
    masks = torch.zeros(1, 90, 90, dtype=torch.uint8)
    masks[:, 8:50, 8:40] = 1
    box = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([1]), "masks": masks}
    return [dict(box) for _ in range(count)]


def small_body(frozen: bool = True) -> resnet.ResNet:
    """A ResNet of bottlenecks as resnet50 is, with one unit in each stage and narrow."""
    norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    return resnet.ResNet(resnet.Bottleneck, [1, 2, 1, 1], width_per_group=8, norm_layer=norm)


def small_retinanet(trainable: int = 3, returned: tuple[int, ...] = (2, 3, 4), frozen: bool = True) -> nn.Module:
    """RetinaNet as torchvision builds it, on the small body, with its frozen batch norms and frozen first layers."""
    body = small_body(frozen)
    kept = ["layer4", "layer3", "layer2", "layer1", "conv1"][:trainable]
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(any(name.startswith(layer) for layer in kept))
    layers = {f"layer{number}": str(place) for place, number in enumerate(returned)}
    widths = [256 * 2 ** (number - 1) for number in returned]
    backbone = BackboneWithFPN(body, layers, widths, 16, extra_blocks=LastLevelP6P7(16, 16))
    levels = len(returned) + 2
    anchors = AnchorGenerator(tuple((8.0 * 2**n,) for n in range(levels)), ((1.0,),) * levels)
    return detection.RetinaNet(backbone, 4, anchor_generator=anchors, score_thresh=0.0, **SMALL)


def found(model: nn.Module, images: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [value for picture in model.eval()(images) for value in picture.values()]


def losses(model: nn.Module, count: int = 2) -> dict[str, Tensor]:
    with seeded(3):
        return dict(model.train()(pictures(*[(90, 90)] * count), targets(count)))


# --- every detector of torchvision ----------------------------------------------------------------------

CONNECTIONS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": (None, 7),
    "fasterrcnn_mobilenet_v3_large_fpn": (None, 7),
    "fasterrcnn_resnet50_fpn": ("se", 15),
    "fasterrcnn_resnet50_fpn_v2": ("se", 15),
    "fcos_resnet50_fpn": ("gc", 15),
    "keypointrcnn_resnet50_fpn": ("se", 15),
    "maskrcnn_resnet50_fpn": ("cbam", 30),
    "maskrcnn_resnet50_fpn_v2": ("se", 15),
    "retinanet_resnet50_fpn": ("gc", 15),
    "retinanet_resnet50_fpn_v2": ("se", 15),
    "ssd300_vgg16": ("se", "no residual or bottleneck units"),
    "ssdlite320_mobilenet_v3_large": (None, 7),
}
"""Builder -> the attention to insert (none where it has its own), and the connections, or why there are none."""


def built(name: str) -> nn.Module:
    settings: dict[str, Any] = {
        **UNTRAINED,
        **({} if name.startswith("ssd") else SMALL),
        **(FEW if "rcnn" in name else {}),
    }
    with seeded(0):
        return with_statistics(get_model_builder(name)(**settings))


def test_the_table_has_every_detector() -> None:
    assert set(CONNECTIONS) == set(list_models(module=detection))


@pytest.mark.zoo
@pytest.mark.parametrize("name", CONNECTIONS)
def test_every_detector_converts_or_says_why_not(name: str) -> None:
    attention, expected = CONNECTIONS[name]
    model = built(name)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            dcafy.convert(model, attention=attention)
        with pytest.raises(NoAttentionError, match="no attention block"):
            dcafy.convert(model)
        return
    converted = dcafy.convert(model, attention=attention, verify=False)
    assert isinstance(converted, type(model))
    assert len(dcafy.connections(converted)) == expected
    images = pictures((60, 90), (90, 64), (33, 47))
    assert all(torch.equal(a, b) for a, b in zip(found(converted, images), found(model, images), strict=True))


# --- what has to hold -----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["se", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gc", "cbam"))])
def test_a_retinanet_with_a_connected_backbone(attention: str) -> None:
    with seeded(0):
        model = with_statistics(dcafy.insert(small_retinanet(), attention, init="paper"))
    converted = dcafy.convert(model)
    assert converted.anchor_generator.sizes == model.anchor_generator.sizes

    images = pictures((90, 60), (64, 96), (50, 50))
    assert all(torch.equal(a, b) for a, b in zip(found(converted, images), found(model, images), strict=True))
    with torch.no_grad():
        next(iter(dcafy.connections(converted).values())).beta.fill_(2.0)
    after = found(converted, images)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(after, found(model, images), strict=True))
    with torch.no_grad():
        next(iter(dcafy.connections(converted).values())).beta.zero_()

    ours, theirs = losses(converted), losses(copy.deepcopy(model))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    torch.autograd.backward(sum(ours.values()))
    for connection in dcafy.connections(converted).values():
        for value in (connection.alpha, connection.beta):
            assert value.grad is not None
            assert value.grad.item() != 0


def test_frozen_batch_norms_stay_frozen_and_frozen_layers_keep_their_meaning() -> None:
    model = with_statistics(small_retinanet(trainable=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("layer2" in name or "conv1" in name.split(".")[2:3] for name in trained)

    converted = dcafy.convert(dcafy.insert(model, "se"))
    optimizer = torch.optim.SGD(dcafy.parameter_groups(converted, lr=0.01), momentum=0.9)
    torch.autograd.backward(sum(losses(converted).values()))
    optimizer.step()
    after = converted.state_dict()
    norms = [path for path, module in model.named_modules() if isinstance(module, FrozenBatchNorm2d)]
    assert len(norms) == 20
    for path in norms:
        assert type(converted.get_submodule(path)) is FrozenBatchNorm2d
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed <= trained
    assert any("layer4" in name for name in changed)


@pytest.mark.parametrize("returned", [(1, 2), pytest.param((2, 3, 4), marks=pytest.mark.slow)])
def test_returned_layers_are_kept(returned: tuple[int, ...]) -> None:
    model = small_retinanet(returned=returned)
    converted = dcafy.convert(dcafy.insert(model, "se"), verify=False)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = converted.backbone(images), model.eval().backbone(images)
    assert list(ours) == list(theirs) == [*map(str, range(len(returned))), "p6", "p7"]
    assert len(dcafy.connections(converted)) == (2 if returned == (1, 2) else 4)


@pytest.mark.slow
def test_a_segmenter_on_a_connected_resnet() -> None:
    with seeded(0):
        plain = segmentation.deeplabv3_resnet50(**{**UNTRAINED, "aux_loss": True})
        model = with_statistics(dcafy.insert(plain, "gc", where="backbone.*", init="paper"))
    converted = dcafy.convert(model, verify=False)
    assert len(dcafy.connections(converted)) == 15
    images = torch.stack(pictures((64, 80)))
    with torch.no_grad():
        ours, theirs = converted.eval()(images), model(images)
    assert list(ours) == ["out", "aux"]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_save_load_and_revert(tmp_path: Any) -> None:
    with seeded(0):
        model = with_statistics(dcafy.insert(small_retinanet(), "se"))
    converted = dcafy.convert(model, verify=False)
    with torch.no_grad():
        for connection in dcafy.connections(converted).values():
            connection.beta.fill_(0.3)
    dcafy.save(converted, tmp_path / "detector")
    loaded = dcafy.load(tmp_path / "detector", model=dcafy.insert(small_retinanet(), "se"))
    images = pictures((64, 96), (80, 64))
    assert all(torch.equal(a, b) for a, b in zip(found(loaded, images), found(converted, images), strict=True))
    reverted = dcafy.revert(converted)
    assert reverted.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(found(reverted, images), found(model, images), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention"),
    [("ssdlite320_mobilenet_v3_large", None), ("retinanet_resnet50_fpn", "se")],
)
def test_a_detector_of_torchvision_with_a_new_head_is_loaded_by_itself(
    name: str, attention: str | None, tmp_path: Any
) -> None:
    with seeded(0):
        model = get_model_builder(name)(weights=None, weights_backbone=None)
        with_classes(model, 7)
    converted = dcafy.convert(model, attention=attention, verify=False)
    dcafy.save(converted, tmp_path / "detector")
    loaded = dcafy.load(tmp_path / "detector")
    assert classes_of(loaded) == 7
    images = pictures((64, 64))
    assert all(torch.equal(a, b) for a, b in zip(found(loaded, images), found(converted, images), strict=True))


@pytest.mark.slow
def test_a_report_of_a_detector(tmp_path: Any) -> None:
    for package in ("matplotlib", "jinja2", "captum"):
        pytest.importorskip(package)
    from detection_data import retinanet

    from dcafy.report import make_report

    connected = dcafy.convert(retinanet(4), verify=False)
    findings = make_report(connected, torch.rand(2, 3, 48, 48), tmp_path / "report.html")
    assert len(findings.contributions) == len(dcafy.connections(connected)) == 2
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in dcafy.connections(connected))


# --- a trained classifier under a detector --------------------------------------------------------------


def classifier(frozen: bool = False) -> nn.Module:
    """A connected SE classifier whose values are none that a fresh network has."""
    with seeded(5):
        model = with_statistics(dcafy.insert(small_body(frozen), "se", init="paper"))
        converted = dcafy.convert(model, example_inputs=torch.rand(2, 3, 64, 64), verify=False)
        with torch.no_grad():
            for connection in dcafy.connections(converted).values():
                connection.alpha.fill_(0.8)
                connection.beta.fill_(0.4)
    return converted.eval()


def stages(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The maps after layer2 to layer4."""
    seen: list[Tensor] = []
    body = model.get_submodule("backbone") if hasattr(model, "backbone") else model
    handles = [
        module.register_forward_hook(lambda _, __, output: seen.append(output))
        for name, module in body.named_modules()
        if name.removeprefix("body.") in ("layer2.1.relu", "layer3.0.relu", "layer4.0.relu")
    ]
    with torch.no_grad():
        body(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.slow
def test_a_connected_classifier_becomes_the_backbone(tmp_path: Any) -> None:
    dcafy.save(classifier(), tmp_path / "run")  # what dcafy finetune leaves
    trained = dcafy.load(tmp_path / "run", model=dcafy.insert(small_body(frozen=False), "se", init="paper")).eval()
    images = torch.rand(2, 3, 64, 64)
    expected = stages(trained, images)
    assert len(expected) > 3
    for frozen in (False, True):
        detector = with_backbone(small_retinanet(frozen=frozen), trained).eval()
        given = stages(detector, images)
        assert len(given) == len(expected)
        for ours, theirs in zip(given, expected, strict=True):
            # A frozen batch norm multiplies and adds in another order.
            torch.testing.assert_close(ours, theirs, rtol=1e-4 if frozen else 0, atol=1e-4 if frozen else 0)
        assert all(c.beta.item() == pytest.approx(0.4) for c in dcafy.connections(detector).values())


def test_what_lies_in_frozen_layers_of_the_detector_is_not_trained() -> None:
    detector = with_backbone(small_retinanet(trainable=2), classifier())
    for name, parameter in detector.named_parameters():
        frozen = any(f"{layer}." in name for layer in ("layer1", "layer2", "body.conv1", "body.bn1"))
        assert parameter.requires_grad is not frozen, name
    torch.autograd.backward(sum(losses(detector).values()))
    assert all(p.grad is not None for p in detector.parameters() if p.requires_grad)


def test_an_unconnected_classifier_becomes_the_backbone() -> None:
    plain = with_statistics(small_body(frozen=False))
    detector = with_backbone(small_retinanet(), plain)
    assert torch.equal(detector.backbone.body.layer3[0].conv2.weight, plain.layer3[0].conv2.weight)
    assert not any("dca" in key for key in detector.state_dict())


def test_a_classifier_of_another_architecture_is_refused() -> None:
    with pytest.raises(InputError, match="no part with the layers"):
        with_backbone(small_retinanet(), resnet.resnet18())
    with pytest.raises(InputError, match="connected already"):
        with_backbone(dcafy.convert(dcafy.insert(small_retinanet(), "se"), verify=False), classifier())


@pytest.mark.slow
def test_the_recipe_with_frozen_batch_norms_of_torchvision() -> None:
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, trainable_layers=3, returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )  # fmt: skip
    model = dcafy.convert(detection.RetinaNet(backbone, 4, **SMALL), attention="se", verify=False)
    assert len(dcafy.connections(model)) == 15
    assert sum(isinstance(module, FrozenBatchNorm2d) for module in model.modules()) == 53
    assert not any(p.requires_grad for n, p in model.named_parameters() if "layer1" in n and "se" not in n.split("."))


# --- a cascade of box heads -----------------------------------------------------------------------------


class Cascade(nn.Module):
    """A small Cascade R-CNN (Cai and Vasconcelos, 2018): three of torchvision's box heads in a row."""

    def __init__(self, backbone: nn.Module, classes: int = 4) -> None:
        super().__init__()
        self.transform = GeneralizedRCNNTransform(64, 96, [0.5] * 3, [0.25] * 3)
        self.backbone = backbone
        anchors = AnchorGenerator(tuple((16.0 * 2**n,) for n in range(4)), ((1.0,),) * 4)
        top = {"training": 12, "testing": 12}
        self.rpn = RegionProposalNetwork(anchors, RPNHead(16, 1), 0.7, 0.3, 16, 0.5, top, top, 0.7)
        self.pool = MultiScaleRoIAlign(["0", "1", "2"], 4, 2)
        self.heads = nn.ModuleList(TwoMLPHead(16 * 16, 32) for _ in range(3))
        self.predictors = nn.ModuleList(FastRCNNPredictor(32, classes) for _ in range(3))

    def forward(self, images: list[Tensor], given: Any = None) -> list[Tensor]:
        batch, _ = self.transform(images)
        features = self.backbone(batch.tensors)
        proposals, _ = self.rpn(batch, features)
        scores: list[Tensor] = []
        for head, predictor in zip(self.heads, self.predictors, strict=True):
            logits, moves = predictor(head(self.pool(features, proposals, batch.image_sizes)))
            scores.append(logits)
            steps = moves.view(len(logits), -1, 4)[:, 1].split([len(p) for p in proposals])
            proposals = [
                box_ops.clip_boxes_to_image(p + 0.1 * step, size).detach()
                for p, step, size in zip(proposals, steps, batch.image_sizes, strict=True)
            ]
        return [*proposals, *scores]


def test_convert_finds_the_backbone_of_a_cascade() -> None:
    with seeded(0):
        layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
        backbone = BackboneWithFPN(small_body(), layers, [512, 1024, 2048], 16)
        model = with_statistics(dcafy.insert(Cascade(backbone), "se", init="paper"))
    converted = dcafy.convert(model)
    assert isinstance(converted, Cascade)
    assert len(dcafy.connections(converted)) == 4
    images = pictures((90, 60), (64, 96))
    with torch.no_grad():
        ours, theirs = converted(images), model(images)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    sum(value.square().sum() for value in converted(images)[2:]).backward()
    assert all(c.beta.grad is not None and c.beta.grad.item() != 0 for c in dcafy.connections(converted).values())


# --- heads for other classes ----------------------------------------------------------------------------

HEADS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "retinanet": (small_retinanet, 1),
    "fcos": (lambda: detection.fcos_resnet50_fpn(**UNTRAINED, **SMALL), 1),
    "fasterrcnn": (lambda: detection.fasterrcnn_mobilenet_v3_large_fpn(**UNTRAINED, **SMALL, **FEW), 2),
    "maskrcnn": (lambda: detection.maskrcnn_resnet50_fpn(**UNTRAINED, **SMALL, **FEW), 3),
    "ssdlite": (lambda: detection.ssdlite320_mobilenet_v3_large(**UNTRAINED), 6),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_for_other_classes(name: str) -> None:
    build, layers = HEADS[name]
    model = build()
    assert classes_of(model) == 4
    assert with_classes(model, 4) == ()
    changed = with_classes(model, 7)
    assert len(changed) == layers
    assert classes_of(model) == 7
    images = pictures((90, 90), (90, 90))
    labelled = [{**target, "labels": torch.tensor([6])} for target in targets(2)]
    with seeded(0):
        assert all(loss.isfinite() for loss in model.train()(images, labelled).values())
    assert max((int(value.max()) for value in found(model, images)[1::3] if value.numel()), default=0) <= 96


def test_a_network_without_such_a_head_is_refused() -> None:
    with pytest.raises(InputError, match="none of the heads"):
        classes_of(resnet.resnet18())
