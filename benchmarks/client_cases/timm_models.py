"""timm's own methods, its feature extractors, its optimizers, its averages."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from client_cases.case import (
    Side,
    all_receive_gradients,
    base_names,
    called,
    case,
    check,
    close,
    equal,
    gradients,
    same_state,
)
from client_cases.networks import pictures, recomputing, step, timm_network

SEVERAL = ("seresnet18", "efficientnet_b0", "regnety_002", "mobilenetv3_small_050", "ecaresnet26t")
"""One of each of timm's families that have the methods examined here."""


@case("timm")
def isinstance_of_its_class(side: Side) -> None:
    """The result is an instance of its network's class (and of fx.GraphModule), has its name and configuration."""
    import timm

    for name in SEVERAL:
        model = timm_network(name)
        d = side.at_start(model, pictures())
        check(isinstance(d, type(model)), f"{name}: not a {type(model).__name__}")
        check(type(d).__name__ == type(model).__name__, f"{name}: its class is called {type(d).__name__}")
        if side is Side.CONVERTED:
            check(isinstance(d, fx.GraphModule), f"{name}: no GraphModule")
        check(d.default_cfg == model.default_cfg, f"{name}: another default_cfg")
        check(timm.data.resolve_data_config(model=d) == timm.data.resolve_data_config(model=model), "data config")
        for block, own in zip(d.modules(), copy.deepcopy(d).modules(), strict=True):
            check(isinstance(own, type(block)), f"{name}: a deepcopy has another {type(block).__name__}")


@case("timm")
def forward_features_and_head(side: Side) -> str:
    """forward_head(forward_features(x)) with forward(x), also with pre_logits and a classifier by hand"""
    for name in SEVERAL:
        model, x = timm_network(name), pictures(3)
        start, d = side.at_start(model, x), side.under_way(model, x)
        with torch.no_grad():
            equal(start.forward_features(x), model.forward_features(x), f"{name}: features at the start")
            features = d.forward_features(x)
            equal(d.forward_head(features), d(x), name)
            equal(d.get_classifier()(d.forward_head(d.forward_features(x), pre_logits=True)), d(x), name)
            if side is Side.CONVERTED:
                check(not torch.equal(features, model.forward_features(x)), f"{name}: features without connections")
    return f"{len(SEVERAL)} networks"


@case("timm")
def forward_intermediates(side: Side) -> str:
    """Last output with forward_features, each intermediate with what a hook on that stage sees in forward(x)"""
    for name in SEVERAL:
        model, x = timm_network(name), pictures(3)
        start, d = side.at_start(model, x), side.under_way(model, x)
        with torch.no_grad():
            equal(start.forward_intermediates(x), model.forward_intermediates(x), f"{name}: at the start")
            last, steps = d.forward_intermediates(x)
            equal(last, d.forward_features(x), name)
            equal(d.forward_intermediates(x, indices=[1, 2], intermediates_only=True), steps[1:3], name)
            short = d.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
            equal(short, steps[1:2], f"{name} stopped early")
            equal(d.forward_head(d.forward_features(x)), d(x), f"{name}: whole after it stopped early")
    seen: list[torch.Tensor] = []
    d = side.under_way(timm_network(), pictures(3))
    for stage in (d.layer1, d.layer2, d.layer3, d.layer4):
        stage.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    called(d, pictures(3))
    check(len(seen) == 4, f"hooks on 4 stages fired {len(seen)} times")
    equal(called(copy.deepcopy(d).forward_intermediates, pictures(3))[1][1:], seen[:4], "stages in a hook")
    return f"{len(SEVERAL)} networks"


@case("timm")
def get_and_reset_classifier(side: Side) -> None:
    """reset_classifier gives 3 classes or pooled features; features stay, the new head is trained"""
    for name in SEVERAL:
        x = pictures(3)
        d = side.under_way(timm_network(name), x)
        check(isinstance(d.get_classifier(), nn.Linear), f"{name}: no classifier")
        features = called(d.forward_features, x)
        d.reset_classifier(3)
        check(d.num_classes == 3 and called(d, x).shape == (3, 3), f"{name}: no 3 classes")
        equal(called(d.forward_features, x), features, name)
        d(x).square().mean().backward()
        check(d.get_classifier().weight.grad is not None, f"{name}: the new head has no gradient")
        all_receive_gradients(side, d)
        d.reset_classifier(0)
        equal(called(d, x), called(d.forward_head, called(d.forward_features, x)), f"{name} without a head")


@case("timm")
def set_grad_checkpointing(side: Side) -> str:
    """Loss and gradients with those without checkpointing; the blocks run twice"""
    for name, block in (
        ("seresnet18", "layer3.1"),
        ("efficientnet_b0", "blocks.3.1"),
        ("regnety_002", "s3.b2"),
        ("mobilenetv3_small_050", "blocks.3.1"),
        ("ecaresnet26t", "layer3.1"),
    ):
        plain = side.under_way(timm_network(name), pictures()).train()
        twice = copy.deepcopy(plain)
        twice.set_grad_checkpointing()
        runs = recomputing(twice, block)
        check(step(plain) == step(twice), f"{name}: another loss")
        check(len(runs) == 2, f"{name}: {block} ran {len(runs)} times")
        same_state(gradients(plain), gradients(twice), f"{name}: gradients")
        all_receive_gradients(side, twice)
        runs.clear()
        twice.set_grad_checkpointing(enable=False)
        step(twice)
        check(len(runs) == 1, f"{name}: switched off, {block} ran {len(runs)} times")
    return "to the bit, 5 networks"


@case("timm")
def group_matcher(side: Side) -> None:
    """group_matcher, no_weight_decay and the groups made of them: the original's for its own parameters"""
    from timm.models import group_parameters

    for name in SEVERAL:
        model = timm_network(name)
        d = side.at_start(model, pictures())
        check(d.group_matcher(coarse=True) == model.group_matcher(coarse=True), f"{name}: another matcher")
        if hasattr(model, "no_weight_decay"):
            check(d.no_weight_decay() == model.no_weight_decay(), f"{name}: another no_weight_decay")
        for coarse in (False, True):
            expected = group_parameters(model, model.group_matcher(coarse), reverse=True)
            groups = group_parameters(d, d.group_matcher(coarse), reverse=True)
            wrong = [key for key in expected if groups[key] != expected[key]]
            check(not wrong, f"{name}: {len(wrong)} parameters in another group, {wrong[:1]}")
            _as_their_blocks(side, d, groups, name)


@case("timm")
def layer_decay(side: Side) -> str:
    """create_optimizer_v2(layer_decay=0.8): the original's rate for its parameters, the block's for its connection"""
    from timm.optim import create_optimizer_v2

    lowest = 1.0
    for name in SEVERAL:
        model = timm_network(name)
        d = side.at_start(model, pictures())
        settings: dict[str, Any] = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.8}
        expected, groups = (_rates(m, create_optimizer_v2(m, **settings)) for m in (model, d))
        check(set(groups) == set(dict(d.named_parameters())), f"{name}: parameters without a group")
        wrong = [f"{key}: {groups[key]} for {expected[key]}" for key in expected if groups[key] != expected[key]]
        check(not wrong, f"{name}: {len(wrong)} other rates, {wrong[:1]}")
        _as_their_blocks(side, d, {key: rate for key, (rate, _) in groups.items()}, name)
        decayed = [k for k, p in d.named_parameters() if "dca" in k.split(".") and p.ndim < 2 and groups[k][1]]
        check(not decayed, f"{name}: weight decay on {decayed[:1]}")
        lowest = min([lowest, *(rate for rate, _ in groups.values())])
    return f"scales from {lowest:.3f} to 1"


def _rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Parameter -> the share of the rate that it is given, and its weight decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _as_their_blocks(side: Side, model: nn.Module, given: dict[str, Any], what: str) -> None:
    """A connection is given what the other parameters of the module that holds it are."""
    for key in given:
        block, found, _ = key.partition(".dca.")
        if side is Side.CONVERTED and "dca" in key.split("."):
            check(found, f"{what}: {key} lies in no block")
            own = {given[name] for name in base_names(given) if name.startswith(f"{block}.")}
            check(given[key] in own, f"{what}: {key} has {given[key]}, its block {sorted(own)}")


@case("timm")
def optimizer_without_decay(side: Side) -> None:
    """create_optimizer_v2(weight_decay=0.05): every parameter once, none of a connection's vectors is decayed"""
    from timm.optim import create_optimizer_v2

    d = side.at_start(timm_network(), pictures())
    optimizer = create_optimizer_v2(d, opt="sgd", lr=0.1, weight_decay=0.05)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    check(len(decay) == len(list(d.parameters())), "not every parameter once")
    wrong = [name for name, p in d.named_parameters() if p.ndim < 2 and decay[id(p)]]
    check(not wrong, f"decay on {wrong[:2]}")


@case("timm")
def prune_intermediate_layers(side: Side) -> str:
    """What is left gives the intermediates that the whole network gave"""
    pruned = 0
    for name in SEVERAL:
        x = pictures(3)
        d = side.under_way(timm_network(name), x)
        expected = called(d.forward_intermediates, x)[1][:4]
        count = len(list(d.parameters()))
        indices = d.prune_intermediate_layers([0, 1, 2, 3])
        equal(d.forward_intermediates(x, indices=indices, intermediates_only=True), expected, name)
        check(len(list(d.parameters())) < count, f"{name}: nothing was pruned")
        pruned += 1
    return f"{pruned} networks"


@case("timm")
def feature_classes_of_a_model(side: Side) -> str:
    """FeatureListNet, FeatureHookNet and FeatureGetterNet around a model: its forward_intermediates"""
    from timm.models._features import FeatureGetterNet, FeatureHookNet, FeatureListNet

    for name in ("seresnet18", "regnety_002"):
        x = pictures(3)
        model = timm_network(name)
        d = side.under_way(model, x)
        expected = called(d.forward_intermediates, x)[1]
        for kind in (FeatureListNet, FeatureHookNet, FeatureGetterNet):
            net = kind(copy.deepcopy(d), out_indices=(0, 1, 2, 3, 4))
            equal(called(net, x), expected, f"{name} in {kind.__name__}")
            equal(called(copy.deepcopy(net), x), expected, f"{name} in a copied {kind.__name__}")
    return "to the bit"


@case("timm")
def features_only(side: Side) -> str:
    """create_model(features_only=True) connected: each feature with the original's at the start, then changed"""
    count = 0
    for name, kind in (
        ("seresnet18", "list"),
        ("seresnet18", "hook"),
        ("seresnet18", "getter"),
        ("efficientnet_b0", None),
        ("mobilenetv3_small_050", "hook"),
        ("regnety_002", "getter"),
    ):
        x = pictures(3)
        model = _features(name, kind)
        start, d = side.at_start(model, x), side.under_way(model, x)
        equal(called(start, x), called(model, x), f"{name} {kind}")
        check(d.feature_info.channels() == model.feature_info.channels(), f"{name} {kind}: another feature_info")
        d.train()(x)[-1].square().mean().backward()
        all_receive_gradients(side, d)
        count += 1
    return f"{count} combinations"


def _features(name: str, kind: str | None) -> nn.Module:
    """A feature network with the weights of the trained-like one."""
    import timm

    options = {"feature_cls": kind} if kind else {}
    model = timm.create_model(name, features_only=True, **options).eval()
    source = timm_network(name).state_dict()
    own = model.state_dict()
    for key in own:
        plain = key.removeprefix("body.").removeprefix("model.")
        match = [k for k in (plain, plain.replace("_", ".", 1), plain.replace("blocks_", "blocks.")) if k in source]
        check(match, f"{name} {kind}: {key} is not in the whole network")
        own[key] = source[match[0]]
    model.load_state_dict(own)
    return model


@case("timm")
def model_ema(side: Side) -> str:
    """ModelEmaV3 after two updates: by hand, and its module computes with the averaged connections"""
    from timm.utils import ModelEmaV3

    x = pictures()
    d = side.under_way(timm_network(), x)
    average = ModelEmaV3(d, decay=0.75)
    by_hand = {name: p.detach().clone() for name, p in d.named_parameters()}
    for _ in range(2):
        with torch.no_grad():
            for parameter in d.parameters():
                parameter.mul_(0.9)
        average.update(d)
        by_hand = {name: torch.lerp(by_hand[name], p.detach(), 0.25) for name, p in d.named_parameters()}
    detail = close([p for _, p in average.module.named_parameters()], list(by_hand.values()), "averages", 1e-6)
    twin = copy.deepcopy(d)
    twin.load_state_dict(average.module.state_dict())
    equal(called(average, x), called(twin.eval(), x))
    check(not torch.equal(called(average, x), called(d, x)), "the average is the model")
    return detail


@case("timm")
def signal_propagation(side: Side) -> None:
    """extract_spp_stats on every block: the original's numbers at the start, others further on"""
    from timm.utils.model import avg_ch_var, avg_sq_ch_mean, extract_spp_stats
    from trained import seeded

    model = timm_network()

    def stats(network: nn.Module) -> list[list[float]]:
        with seeded(3):
            found = extract_spp_stats(
                copy.deepcopy(network), ["layer?.?", "layer?.?"], [avg_sq_ch_mean, avg_ch_var], [2, 3, 64, 64]
            )
        return list(found.values())

    expected = stats(model)
    check([len(values) for values in stats(side.at_start(model, pictures()))] == [8, 8], "not 8 blocks")
    check(stats(side.at_start(model, pictures())) == expected, "other numbers")
    if side is Side.CONVERTED:
        check(stats(side.under_way(model, pictures())) != expected, "connections do not show in the numbers")


@case("timm")
def freeze(side: Side) -> None:
    """timm.utils.freeze and unfreeze of a stage: the original's parameters and norms, no gradient there"""
    from timm.utils import freeze as freeze_parts
    from timm.utils import unfreeze

    model, d = timm_network(), side.under_way(timm_network(), pictures())
    for network in (model, d):
        network.train()
        freeze_parts(network, ["layer1", "bn1"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    found = {name for name, p in d.named_parameters() if not p.requires_grad}
    check(set(base_names(found)) == frozen, "other parameters are frozen")
    check(found == frozen | {n for n, _ in d.named_parameters() if n.startswith("layer1.")}, "connections of layer1")
    before = d.layer1[0].bn1.running_mean.clone()
    step(d)
    check(torch.equal(before, d.layer1[0].bn1.running_mean), "a frozen norm's statistics moved")
    check(all(p.grad is None for p in d.layer1.parameters()), "gradients in a frozen stage")
    unfreeze(d, ["layer1", "bn1"])
    step(d)
    check(all(p.grad is not None for p in d.parameters()), "no gradient after unfreeze")


@case("timm")
def checkpoint_saver(side: Side) -> None:
    """CheckpointSaver, then resume_checkpoint and load_checkpoint into another one: outputs to the bit"""
    from timm.models import load_checkpoint, resume_checkpoint
    from timm.utils import CheckpointSaver

    x = pictures()
    d = side.under_way(timm_network(), x).train()
    optimizer = torch.optim.SGD(d.parameters(), lr=0.01)
    step(d)
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        saver = CheckpointSaver(d, optimizer, checkpoint_dir=folder, recovery_dir=folder)
        saver.save_checkpoint(0, metric=1.0)
        path = str(Path(folder) / "last.pth.tar")
        for load in (lambda model: resume_checkpoint(model, path), lambda model: load_checkpoint(model, path)):
            other = side.at_start(timm_network(), x)
            load(other)
            equal(called(other.eval(), x), called(d.eval(), x))


@case("timm")
def saved_for_the_hub(side: Side) -> None:
    """save_for_hf: weights are the whole state dict, the configuration names the architecture"""
    import json

    from safetensors.torch import load_file
    from timm.models import save_for_hf

    d = side.under_way(timm_network(), pictures())
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(d, folder, safe_serialization=True)
        same_state(load_file(Path(folder) / "model.safetensors"), d.state_dict(), "saved")
        check(json.loads((Path(folder) / "config.json").read_text())["architecture"] == "seresnet18", "architecture")


@case("timm")
def reparameterized(side: Side) -> str:
    """reparameterize_model of RepViT: outputs with those before, fewer parameters"""
    from timm.utils import reparameterize_model

    x = pictures()
    d = side.under_way(timm_network("repvit_m0_9"), x)
    expected = called(d, x)
    fused = reparameterize_model(d)
    check(sum(1 for _ in fused.parameters()) < sum(1 for _ in d.parameters()), "nothing was fused")
    return close(called(fused, x), expected, tolerance=1e-3)


@case("timm")
def sync_batch_norm(side: Side) -> str:
    """convert_sync_batchnorm: outputs in eval mode with those before, no plain norm is left"""
    from timm.layers import convert_sync_batchnorm

    x = pictures()
    d = side.under_way(timm_network("efficientnet_b0"), x)
    expected = called(d, x)
    synced = convert_sync_batchnorm(d)
    check(not any(type(m) is nn.BatchNorm2d for m in synced.modules()), "a plain norm is left")
    return close(called(synced.eval(), x), expected)


@case("timm")
def dropped_paths(side: Side) -> None:
    """drop_path_rate and drop_rate set at creation: losses and gradients with the original's under one seed"""
    model = timm_network(drop_path_rate=0.3, drop_rate=0.2).train()
    start = side.at_start(model, pictures()).train()
    check(step(model) == step(start), "another loss")
    expected = gradients(model)
    same_state({name: g for name, g in gradients(start).items() if name in expected}, expected, "gradients")
