"""torchvision's models in parts, its feature extractors, and what its detection and segmentation make of a backbone."""

from __future__ import annotations

import copy

import torch
import torchvision
from torch import nn
from trained import trained_like

from client_cases.case import Side, all_receive_gradients, called, case, check, equal
from client_cases.networks import pictures, torchvision_network

SEVERAL = ("mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf")


@case("torchvision")
def in_parts(side: Side) -> str:
    """d.features(x), pooled and classified by hand, and the stages one by one: the whole's output"""
    for name in SEVERAL[:2]:
        x = pictures(3)
        d = side.under_way(torchvision_network(name), x)
        with torch.no_grad():
            equal(d.classifier(d.avgpool(d.features(x)).flatten(1)), d(x), name)
            maps = x
            for layer in d.features:
                maps = layer(maps)
            equal(d.classifier(d.avgpool(maps).flatten(1)), d(x), f"{name} layer by layer")
    x = pictures(3)
    d = side.under_way(torchvision_network("regnet_y_400mf"), x)
    with torch.no_grad():
        equal(d.fc(d.avgpool(d.trunk_output(d.stem(x))).flatten(1)), d(x), "regnet")
    return f"{len(SEVERAL)} networks"


@case("torchvision")
def sequential_of_children(side: Side) -> None:
    """nn.Sequential(*d.children()) without its head, on maps flattened by hand: the whole's output"""
    x = pictures(3)
    for name, heads in (("mobilenet_v3_small", ("classifier",)), ("regnet_y_400mf", ("fc",))):
        d = side.under_way(torchvision_network(name), x)
        parts = [child for path, child in d.named_children() if path not in (*heads, "dca")]
        body = nn.Sequential(*parts)
        equal(d.get_submodule(heads[0])(called(body, x).flatten(1)), called(d, x), name)
        equal(d.get_submodule(heads[0])(called(copy.deepcopy(body), x).flatten(1)), called(d, x), f"{name} copied")


@case("torchvision")
def intermediate_layer_getter(side: Side) -> None:
    """IntermediateLayerGetter: maps with what hooks on those modules see in the whole"""
    from torchvision.models._utils import IntermediateLayerGetter

    x = pictures(3)
    d = side.under_way(torchvision_network("mobilenet_v3_small").features, x)
    seen = _hooked(d, ["1", "6", "12"], x)
    equal(called(IntermediateLayerGetter(d, {"1": "a", "6": "b", "12": "c"}), x), seen)


@case("torchvision")
def feature_extractor(side: Side) -> str:
    """create_feature_extractor, in eval and in train mode: maps with what hooks see, gradients for connections"""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    for name, nodes in (
        ("mobilenet_v3_small", ["features.1", "features.6", "features.12", "classifier"]),
        ("efficientnet_b0", ["features.3", "features.8"]),
        ("regnet_y_400mf", ["trunk_output.block2", "trunk_output.block4"]),
    ):
        x = pictures(3)
        d = side.under_way(torchvision_network(name), x)
        get_graph_node_names(d)
        extractor = create_feature_extractor(d, nodes)
        equal(called(extractor.eval(), x), _hooked(d, nodes, x), name)
        check(extractor.train()(x)[nodes[-1]].isfinite().all(), f"{name} in train mode")
        extractor(x)[nodes[-1]].square().mean().backward()
        if side is Side.CONVERTED:
            got = [p.grad is not None for key, p in extractor.named_parameters() if "dca" in key.split(".")]
            check(got and all(got), f"{name}: connections without a gradient")
    return f"{len(SEVERAL)} networks"


def _hooked(model: nn.Module, paths: list[str], x: torch.Tensor) -> list[torch.Tensor]:
    """What modules of a copy return in a forward of the whole, in the order of the paths."""
    twin, seen = copy.deepcopy(model), {}
    for path in paths:
        twin.get_submodule(path).register_forward_hook(lambda _m, _x, output, path=path: seen.update({path: output}))
    called(twin, x)
    check(len(seen) == len(paths), f"hooks fired on {list(seen)} only")
    return [seen[path].clone() for path in paths]


@case("torchvision")
def backbone_with_fpn(side: Side) -> None:
    """BackboneWithFPN around d.features: maps with the FPN of what hooks see, gradients for connections"""
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    x = pictures(3)
    model = side.under_way(torchvision_network("mobilenet_v3_large"), x)
    backbone = BackboneWithFPN(model.features, {"6": "0", "15": "1"}, [40, 160], 32).eval()
    maps = dict(zip("01", _hooked(model.features, ["6", "15"], x), strict=True))
    equal(called(backbone, x), called(backbone.fpn, (maps,)))
    backbone.train()(x)["pool"].square().mean().backward()
    reached = {name for name, c in side.connections(model).items() if all(p.grad is not None for p in c.parameters())}
    last = [name for name in side.connections(model) if name.startswith("features.15")]
    check(reached.issuperset(last), f"{last} has no gradient")


class Backbone(nn.Module):
    """Maps of a usual size, which a detector with random weights makes boxes of."""

    out_channels = 576

    def __init__(self) -> None:
        super().__init__()
        self.features = torchvision_network("mobilenet_v3_small").features
        self.norm = nn.GroupNorm(1, self.out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.features(x))


@case("torchvision")
def detector_on_a_backbone(side: Side) -> str:
    """Faster R-CNN on a connected backbone: the original's boxes at the start, a step trains the connections"""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    x = pictures(2, 192)
    model = Backbone().eval()

    def detector(backbone: nn.Module) -> nn.Module:
        anchors = AnchorGenerator(((16, 32, 64),), ((0.5, 1.0, 2.0),))
        pool = MultiScaleRoIAlign(["0"], 3, 2)
        torch.manual_seed(0)
        parts = {"rpn_anchor_generator": anchors, "box_roi_pool": pool}
        return FasterRCNN(backbone, 3, min_size=192, max_size=192, box_score_thresh=0.0, **parts)

    start = side.at_start(model, x)
    expected, found = (called(detector(m).eval(), (list(x),)) for m in (model, start))
    equal(found, expected, "boxes")
    whole = detector(side.under_way(model, x)).train()
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 60.0, 70.0]]), "labels": torch.tensor([1])} for _ in range(2)]
    sum(whole(list(x), targets).values()).backward()
    all_receive_gradients(side, whole.backbone)
    return f"{sum(len(one['boxes']) for one in found)} boxes"


@case("torchvision")
def segmentation_on_a_backbone(side: Side) -> None:
    """lraspp_mobilenet_v3_large connected as a whole: the original's maps at the start, d.backbone in parts"""

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
                weights=None, weights_backbone=None, num_classes=6
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)["out"]

    torch.manual_seed(0)
    model, x = trained_like(Maps(), pictures(8)).inner, pictures(2)
    equal(called(side.at_start(model, x), x), called(model, x))
    d = side.under_way(model, x)
    maps = torch.nn.functional.interpolate(
        called(d.classifier, (called(d.backbone, x),)), size=x.shape[-2:], mode="bilinear", align_corners=False
    )
    equal(maps, called(d, x), "backbone and classifier by hand")
