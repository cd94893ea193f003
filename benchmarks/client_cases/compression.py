"""Quantization and pruning: torchao and Torch-Pruning."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from client_cases.case import Side, all_receive_gradients, called, case, check, difference, equal, scale
from client_cases.networks import CLASSES, pictures, timm_network


def quantized(model: nn.Module, x: torch.Tensor) -> Any:
    """PT2E: exported, calibrated on two batches, converted to int8 for x86."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    for seed in range(2):
        called(prepared, pictures(len(x), seed=seed))
    called(prepared, x)
    return convert_pt2e(prepared)


@case("torchao")
def static_quantization(side: Side) -> str:
    """PT2E static quantization: int8 outputs near the model's own, nearer than to those of other connections"""
    x = pictures(4)
    model = timm_network()
    d = side.under_way(model, x)
    expected = called(d, x)
    small = quantized(d, x)
    found = called(small, x)
    nodes = sum("quantize_per" in str(node.target) for node in small.graph.nodes)
    check(nodes > 40, f"only {nodes} nodes quantize")
    share = difference(found, expected) / scale(expected)
    check(share < 0.25, f"off by {share:.2f} of the largest value")
    if side is Side.CONVERTED:
        away = difference(found, called(model, x)) / scale(expected)
        check(share < away, f"off by {share:.2f}, and by {away:.2f} from the model without connections")
        start = quantized(side.at_start(model, x), x)
        plain = quantized(copy.deepcopy(model), x)
        near = difference(called(start, x), called(plain, x)) / scale(expected)
        check(near < 0.1, f"at the start off by {near:.2f} from the quantized original")
    return f"off by {share:.3f}, {nodes} nodes"


@case("torchao")
def weights_of_linear_layers(side: Side) -> str:
    """quantize_ with int8 weights, in place: every linear layer (matches too) has them, outputs near the model's own"""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    x = pictures(4)
    d = side.under_way(timm_network("legacy_seresnet18"), x)
    expected = called(d, x)
    quantize_(d, Int8WeightOnlyConfig())
    linear = [m for m in d.modules() if isinstance(m, nn.Linear)]
    check(linear and all(type(m.weight.data) is not torch.Tensor for m in linear), "a linear layer was left out")
    share = difference(called(d, x), expected) / scale(expected)
    check(share < 0.05, f"off by {share:.3f}")
    return f"{len(linear)} layers, off by {share:.4f}"


@case("torch-pruning")
def structured(side: Side) -> str:
    """MagnitudePruner at half the channels with the dependency graph: it runs, is smaller, and trains"""
    import torch_pruning

    x = pictures(2)
    d = side.under_way(timm_network(), x)
    count = sum(p.numel() for p in d.parameters())
    pruner = torch_pruning.pruner.BasePruner(
        d, x, importance=torch_pruning.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
        ignored_layers=[d.fc], round_to=8,
    )  # fmt: skip
    pruner.step()
    left = sum(p.numel() for p in d.parameters()) / count
    check(left < 0.4, f"{left:.2f} of the parameters are left")
    check(called(d, x).shape == (2, CLASSES), "another shape")
    d.train()(pictures(4)).square().mean().backward()
    all_receive_gradients(side, d)
    equal(called(copy.deepcopy(d).eval(), x), called(d.eval(), x), "a copy")
    return f"{left:.2f} of the parameters left"
