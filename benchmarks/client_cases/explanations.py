"""What looks into a model: pytorch-grad-cam, captum, torchinfo."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor, nn

from client_cases.case import Side, base_names, called, case, check, close, equal
from client_cases.networks import pictures, timm_network


def activations_and_gradients(model: nn.Module, layer: nn.Module, x: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """What a layer returns in a forward, and the gradient of a score by it, by a hook of our own."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    score = model(x)[:, target].sum()
    handle.remove()
    check(len(seen) == 1, f"the layer ran {len(seen)} times")
    (gradient,) = torch.autograd.grad(score, seen)
    return seen[0].detach(), gradient


@case("grad-cam")
def on_the_last_block(side: Side) -> str:
    """GradCAM on layer4[-1]: the original's map at the start; then what our own hook sees, and another map"""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, x = timm_network(), pictures(2, 128)
    targets = [ClassifierOutputTarget(2)] * 2

    def heat(network: nn.Module) -> numpy.ndarray:
        with GradCAM(model=network, target_layers=[network.layer4[-1]]) as cam:
            return numpy.array(cam(input_tensor=x, targets=targets))

    expected = heat(model)
    check(numpy.array_equal(heat(side.at_start(model, x)), expected), "another map at the start")
    d = side.under_way(model, x)
    with GradCAM(model=d, target_layers=[d.layer4[-1]]) as cam:
        found = cam(input_tensor=x, targets=targets)
        maps, slopes = cam.activations_and_grads.activations[0], cam.activations_and_grads.gradients[0]
    ours = activations_and_gradients(d, d.layer4[-1], x, 2)
    close([maps, slopes], ours, "activations and gradients", 1e-6)
    if side is Side.CONVERTED:
        check(numpy.abs(found - expected).max() > 1e-3, "connections do not show in the map")
    return f"maps of {found.shape[1]} px"


@case("grad-cam")
def several_methods(side: Side) -> str:
    """GradCAM++, LayerCAM, EigenCAM and AblationCAM on a stage and on an attention block: the original's maps"""
    import pytorch_grad_cam as cams
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, x = timm_network(), pictures(2, 128)
    start = side.at_start(model, x)
    for name in ("GradCAMPlusPlus", "LayerCAM", "EigenCAM", "AblationCAM"):
        for path in ("layer4", "layer3.1.se") if name != "AblationCAM" else ("layer4",):
            maps = []
            for network in (model, start):
                with getattr(cams, name)(model=network, target_layers=[network.get_submodule(path)]) as cam:
                    maps.append(numpy.array(cam(input_tensor=x, targets=[ClassifierOutputTarget(2)] * 2)))
            check(numpy.allclose(maps[0], maps[1], atol=1e-5), f"{name} on {path}: another map")
    return "4 methods"


@case("captum")
def layer_grad_cam(side: Side) -> str:
    """LayerGradCam and LayerActivation on layer4[-1]: the original's at the start, then what our own hook gives"""
    from captum.attr import LayerActivation, LayerGradCam

    model, x = timm_network(), pictures(2, 128)
    start, d = side.at_start(model, x), side.under_way(model, x)
    expected, found = (LayerGradCam(m, m.layer4[-1]).attribute(x, target=2) for m in (model, start))
    equal(found.detach(), expected.detach())
    maps, slopes = activations_and_gradients(d, d.layer4[-1], x, 2)
    equal(LayerActivation(d, d.layer4[-1]).attribute(x).detach(), maps, "activations")
    by_hand = (slopes.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True)
    return close(LayerGradCam(d, d.layer4[-1]).attribute(x, target=2), by_hand)


@case("captum")
def other_attributions(side: Side) -> str:
    """IntegratedGradients, GuidedBackprop, DeepLift, NeuronGradient: the original's at the start"""
    from captum.attr import DeepLift, GuidedBackprop, IntegratedGradients, NeuronGradient

    model, x = timm_network(), pictures(2)
    start = side.at_start(model, x)
    for name, attribute in (
        ("IntegratedGradients", lambda m: IntegratedGradients(m).attribute(x, target=2, n_steps=8)),
        ("GuidedBackprop", lambda m: GuidedBackprop(m).attribute(x.clone(), target=2)),
        ("NeuronGradient", lambda m: NeuronGradient(m, m.layer3[-1]).attribute(x.clone(), (0, 0, 0))),
        ("DeepLift", lambda m: DeepLift(m).attribute(x.clone(), target=2)),
    ):
        close(attribute(start).detach(), attribute(model).detach(), name, 1e-5)
    return "4 methods"


@case("captum")
def completeness(side: Side) -> str:
    """IntegratedGradients of a model some way into training: attributions add up to the change of the score"""
    from captum.attr import IntegratedGradients

    x = pictures(2)
    d = side.under_way(timm_network(), x)
    found, delta = IntegratedGradients(d).attribute(  # a sum over steps, which nears the integral
        x, target=2, n_steps=1000, internal_batch_size=100, return_convergence_delta=True
    )
    change = (called(d, x) - called(d, torch.zeros_like(x)))[:, 2]
    share = (delta.abs() / change.abs().clamp(min=0.1)).max().item()
    check(share < 0.25 and found.abs().max() > 0, f"off by {share:.2f}")
    return f"within {share:.2f}"


@case("torchinfo")
def summary(side: Side) -> str:
    """summary: every row of the original (name, class, output size), connections' parameters besides"""
    from torchinfo import summary as summarize

    model, x = timm_network(), pictures()
    d = side.at_start(model, x)
    rows, totals = [], []
    for network in (model, d):
        info = summarize(network, input_data=x, verbose=0, depth=6)
        rows.append({(row.depth, row.var_name, row.class_name, tuple(row.output_size)) for row in info.summary_list})
        totals.append(info.total_params)
    lost = sorted(row[1] for row in rows[0] - rows[1])
    check(not lost, f"{len(lost)} of {len(rows[0])} rows are missing: {lost[:3]}")
    more = sum(p.numel() for c in side.connections(d).values() for p in c.parameters())
    check(totals[1] - totals[0] == more, f"{totals[1] - totals[0]} parameters more, not {more}")
    check(base_names(dict(d.named_parameters())) == list(dict(model.named_parameters())), "other parameters")
    return f"{len(rows[0])} rows"
