"""Parts of a connected network are connected, and act as the user's own: called alone, hooked, patched, wrapped.

What a part gives is held against what a hook sees inside the whole, with every beta away from 0.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from networks import CBAM, Block, SELinear, conv_norm, with_attention
from subjects import cases, subject
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from trained import evaluate, images, moved, seeded, trained, with_betas
from zoo import BY_NAME, EVERY_HOST, HAND_WRITTEN_NETWORKS

import dcafy

IMAGE = 32


def batch(count: int = 2, seed: int = 1) -> Tensor:
    return images(count, IMAGE, seed)


class Staged(nn.Module):
    """A residual network as libraries build them: in stages, with methods for its two halves."""

    def __init__(self, attention: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 16, stride=2), nn.ReLU())
        self.layer1 = nn.Sequential(Block(16, 16, 1, attention(16)), Block(16, 16, 1, attention(16)))
        self.layer2 = nn.Sequential(Block(16, 24, 2, attention(24)), Block(24, 24, 1, attention(24)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(24, 10)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.stem(x)))

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Segmenter(nn.Module):
    """A head on a map that is taken from inside a backbone, as torchvision's segmenters are built."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = IntermediateLayerGetter(backbone, {"layer1": "low", "layer2": "out"})
        self.classifier = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.backbone(x)["out"])


class Wrapper(nn.Module):
    """What users put around a backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def mobilenet() -> nn.Module:
    """Torchvision's class with four blocks."""
    rows = [
        (16, 3, 32, 16, True, "RE", 1, 1, 1.0),
        (16, 3, 32, 24, True, "HS", 2, 1, 1.0),
        (24, 3, 48, 24, True, "HS", 1, 1, 1.0),
        (24, 5, 48, 32, True, "HS", 2, 1, 1.0),
    ]
    return MobileNetV3([InvertedResidualConfig(*row) for row in rows], 64, num_classes=10)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "se": lambda: Staged(SELinear),
    "cbam": lambda: Staged(CBAM),
    "segmenter": lambda: Segmenter(Staged(SELinear)),
    "wrapper": lambda: Wrapper(Staged(SELinear)),
    "mobilenet": mobilenet,
}


@functools.cache
def _made(name: str) -> tuple[nn.Module, Any]:
    model = trained(NETWORKS[name], batch(8))
    return model, dcafy.convert(model, example_inputs=batch())


def original(name: str = "se") -> nn.Module:
    """The network before it was connected, in eval mode; a copy of one's own."""
    return copy.deepcopy(_made(name)[0]).eval()


def at_the_start(name: str = "se") -> Any:
    """The network just after it was connected, in eval mode; a copy of one's own."""
    return copy.deepcopy(_made(name)[1]).eval()


def under_way(name: str = "se") -> Any:
    """The network some way into training: every connection counts."""
    return with_betas(moved(at_the_start(name)), 0.6, 0.1)


def inside(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """What the module at ``path`` gives while the whole runs."""
    given: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _module, _inputs, output: given.append(output))
    evaluate(model, x)
    handle.remove()
    (value,) = given
    return value.clone()


# Parts on their own ------------------------------------------------------------------------------


def blocks_by_hand(d: Any, x: Tensor) -> Tensor:
    for part in (d.stem, *d.layer1, *d.layer2):
        x = part(x)
    return x


PARTS: dict[str, tuple[str, Callable[[Any, Tensor], Tensor], str]] = {
    # what is called -> the network, the call, and the module inside the whole that gives the same
    "the half before the head": ("se", lambda d, x: d.forward_features(x), "layer2"),
    "both halves": ("se", lambda d, x: d.forward_head(d.forward_features(x)), "fc"),
    "forward itself": ("se", lambda d, x: d.forward(x), "fc"),
    "stage after stage": ("se", lambda d, x: d.layer2(d.layer1(d.stem(x))), "layer2"),
    "block after block": ("se", blocks_by_hand, "layer2"),
    "a slice of a stage": ("se", lambda d, x: d.layer2[:1](d.layer1(d.stem(x))), "layer2.0"),
    "a stage in a new container": ("se", lambda d, x: nn.Sequential(d.stem, *d.layer1)(x), "layer1"),
    "a copied stage": ("se", lambda d, x: copy.deepcopy(d.layer1)(d.stem(x)), "layer1"),
    "all children": ("se", lambda d, x: nn.Sequential(*children(d))(x), "fc"),
    "children without the head": ("se", lambda d, x: nn.Sequential(*children(d)[:-1])(x), "flatten"),
    "children that have names": (
        "se",
        lambda d, x: nn.Sequential(*[m for _, m in d.named_children()][:3])(x),
        "layer2",
    ),
    "a getter of layers": ("se", lambda d, x: IntermediateLayerGetter(d, {"layer2": "out"})(x)["out"], "layer2"),
    "an extractor of features": ("se", lambda d, x: create_feature_extractor(d, ["layer2"])(x)["layer2"], "layer2"),
    "an extractor of layers": ("se", lambda d, x: create_feature_extractor(d, {"pool": "p"})(x)["p"], "pool"),
    "channel and spatial attention": ("cbam", lambda d, x: d.layer2(d.layer1(d.stem(x))), "layer2"),
    "channel and spatial, children": ("cbam", lambda d, x: nn.Sequential(*children(d)[:-1])(x), "flatten"),
    "channel and spatial, extracted": (
        "cbam",
        lambda d, x: create_feature_extractor(d, ["layer2"])(x)["layer2"],
        "layer2",
    ),
    "a getter inside the network": ("segmenter", lambda d, x: d.backbone(x)["out"], "backbone.layer2"),
    "a stage of a getter": ("segmenter", lambda d, x: d.backbone(x)["low"], "backbone.layer1"),
    "a wrapped backbone": ("wrapper", lambda d, x: d.backbone(x), "backbone"),
    "a half of a wrapped backbone": ("wrapper", lambda d, x: d.backbone.forward_features(x), "backbone.layer2"),
    "features": ("mobilenet", lambda d, x: d.features(x), "features"),
    "a slice of features": ("mobilenet", lambda d, x: d.features[:4](x), "features.3"),
    "features and classifier": (
        "mobilenet",
        lambda d, x: d.classifier(torch.flatten(d.avgpool(d.features(x)), 1)),
        "classifier",
    ),
    "extracted from torchvision's": (
        "mobilenet",
        lambda d, x: create_feature_extractor(d, ["features.3"])(x)["features.3"],
        "features.3",
    ),
}


def children(model: nn.Module) -> list[nn.Module]:
    return list(model.children())


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_connected(part: str) -> None:
    """It gives what it gives inside the whole: not what it gives with every beta at 0. So does the whole afterwards."""
    name, call, path = PARTS[part]
    d, x = under_way(name), batch()
    whole = evaluate(d, x)
    value = inside(d, path, x)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(call(d, x), value)
            assert torch.equal(d(x), whole), "the whole heard what the part had told"
        silent = call(with_betas(copy.deepcopy(d), 0.0), x)
    assert (silent - value).abs().max() > 1e-4, "beta is not heard in it: nothing is shown"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_the_originals_at_the_start(part: str) -> None:
    name, call, _ = PARTS[part]
    with torch.no_grad():
        assert torch.equal(call(at_the_start(name), batch(3)), call(original(name), batch(3)))


def test_children_are_the_users() -> None:
    """``list(model.children())[:-1]`` is how people take a head off: it has to be the head that is the last."""
    for name in NETWORKS:
        assert [key for key, _ in under_way(name).named_children()] == [
            key for key, _ in original(name).named_children()
        ]


def test_gradients_through_parts_are_those_of_the_whole() -> None:
    gradients = []
    for call in (lambda d, x: d(x), lambda d, x: d.forward_head(blocks_by_hand(d, x))):
        d = under_way().train()
        call(d, batch(4)).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in d.named_parameters()})
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())
    assert all(gradients[0][name].any() for name in gradients[0] if name.endswith(".beta"))


def test_a_part_that_nobody_spoke_to_hears_nothing() -> None:
    """Its first block computes as with beta 0, its others hear one another."""
    d, x = under_way(), batch()
    value = inside(d, "layer1", x)
    with dcafy.run(d):
        alone = evaluate(d.layer2, value)
    unheard = copy.deepcopy(d)
    nn.init.zeros_(dcafy.connections(unheard)["layer2.0.attention"].beta)
    assert torch.equal(alone, inside(unheard, "layer2", x))
    assert not torch.equal(alone, inside(d, "layer2", x))


def test_a_part_that_ran_alone_before_hears_what_runs_just_before_it() -> None:
    """What was run of a network earlier, in whatever order, does not show."""
    d, x = under_way(), batch()
    value = inside(d, "layer2", x)
    stem = inside(d, "stem", x)
    evaluate(d.layer2, inside(d, "layer1", batch(seed=5)))
    assert torch.equal(evaluate(d.layer2, evaluate(d.layer1, stem)), value)
    evaluate(d.layer2[1], inside(d, "layer2.0", batch(seed=6)))
    evaluate(d.layer1, inside(d, "stem", batch(seed=7)))
    assert torch.equal(evaluate(d.layer2, evaluate(d.layer1, stem)), value)


# Hooks -------------------------------------------------------------------------------------------

Event = tuple[str, str, tuple[Tensor, ...]]


def hooked(model: nn.Module, paths: list[str]) -> list[Event]:
    """What hooks on all these modules will see: (kind, path, tensors), in the order of the calls."""
    events: list[Event] = []

    def note(kind: str, path: str, *values: Any) -> None:
        given = [value for value in values if isinstance(value, Tensor)]
        events.append((kind, path, tuple(value.detach().clone() for value in given)))

    for path in paths:
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda _module, given, path=path: note("before", path, *given))
        module.register_forward_hook(lambda _module, given, output, path=path: note("after", path, output))
    return events


@pytest.mark.parametrize("name", cases(HAND_WRITTEN_NETWORKS, EVERY_HOST))
def test_hooks_on_every_module_see_what_they_saw(name: str) -> None:
    """Containers, blocks, attention and the layers in it: called in the same order, with the same values."""
    model, converted = subject(name).pair()
    paths = [path for path, _ in model.named_modules()]
    expected, events = hooked(model, paths), hooked(converted, paths)
    for _ in range(2):
        evaluate(model, BY_NAME[name].images())
        evaluate(converted, BY_NAME[name].images())
    assert [event[:2] for event in events] == [event[:2] for event in expected] != []
    for (kind, path, given), (_, _, wanted) in zip(events, expected, strict=True):
        assert len(given) == len(wanted), (kind, path)
        assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True)), (kind, path)


HOOKABLE = ("layer1", "layer1.1", "layer1.1.attention", "layer2", "layer2.0", "layer2.0.attention")


@pytest.mark.parametrize("path", HOOKABLE)
@pytest.mark.parametrize("name", ["se", "cbam"])
def test_full_backward_hooks(name: str, path: str) -> None:
    """They fire once for each backward, with the gradients that the original's see."""
    seen: list[tuple[Tensor, Tensor]] = []
    for model in (original(name), at_the_start(name), under_way(name)):
        module = model.get_submodule(path)
        before: list[Tensor] = []
        module.register_full_backward_pre_hook(lambda _module, outwards, before=before: before.append(outwards[0]))
        module.register_full_backward_hook(
            lambda _module, inwards, outwards: seen.append((inwards[0].clone(), outwards[0].clone()))
        )
        model(batch()).square().mean().backward()
        assert len(before) == 1
        assert torch.equal(before[0], seen[-1][1])
    assert len(seen) == 3
    for (inwards, outwards), (wanted_in, wanted_out) in zip(seen[1:2], seen[:1], strict=True):
        torch.testing.assert_close(outwards, wanted_out, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(inwards, wanted_in, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(seen[2][0], seen[0][0], rtol=1e-3), "beta does nothing: nothing is shown"


def doubled(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output * 2


def halved(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0] / 2,)


CHANGING: dict[str, tuple[str, str]] = {
    "a stage's output": ("layer1", "output"),
    "a stage's input": ("layer2", "input"),
    "a block's output": ("layer1.1", "output"),
    "an attention's output": ("layer1.1.attention", "output"),
    "an attention's input": ("layer1.1.attention", "input"),
    "an attention's context": ("layer1.1.attention.squeeze", "output"),
    "an attention's map": ("layer1.1.attention.excite", "output"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("hook", CHANGING)
def test_hooks_that_change_values(hook: str, when: str) -> None:
    """Registered before or after the conversion, they change what they changed, and cost no connection."""
    path, end = CHANGING[hook]

    def register(model: nn.Module) -> None:
        module = model.get_submodule(path)
        module.register_forward_hook(doubled) if end == "output" else module.register_forward_pre_hook(halved)

    model = original()
    plain = evaluate(model, batch())
    if when == "before":
        register(model)
        d = dcafy.convert(model, example_inputs=batch()).eval()
    else:
        d = at_the_start()
        register(model)
        register(d)
    output = evaluate(model, batch())
    assert not torch.equal(output, plain)
    assert torch.equal(evaluate(d, batch()), output)
    assert list(dcafy.connections(d)) == list(dcafy.connections(at_the_start()))
    for name, connection in dcafy.connections(d).items():
        nn.init.constant_(connection.beta, 0.5)
        assert not torch.equal(evaluate(d, batch()), output), name
        nn.init.zeros_(connection.beta)


# Patches, wrappers, other classes ----------------------------------------------------------------


def set_at(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent).register_module(name, module)


class Around(nn.Module):
    """A module around a user's module."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner = inner
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.factor


def by_method(model: nn.Module, path: str, factor: float) -> None:
    module = model.get_submodule(path)
    module.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * factor, module)


def by_closure(model: nn.Module, path: str, factor: float) -> None:
    module = model.get_submodule(path)
    old = module.forward
    module.forward = lambda x: old(x) * factor


def by_partial(model: nn.Module, path: str, factor: float) -> None:
    def forward(old: Callable[[Tensor], Tensor], factor: float, x: Tensor) -> Tensor:
        return old(x) * factor

    module = model.get_submodule(path)
    module.forward = functools.partial(forward, module.forward, factor)


def by_wrapper(model: nn.Module, path: str, factor: float) -> None:
    set_at(model, path, Around(model.get_submodule(path), factor))


def by_class(model: nn.Module, path: str, factor: float) -> None:
    module = model.get_submodule(path)
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, x: kind.forward(self, x) * factor})


PATCHES: dict[str, Callable[[nn.Module, str, float], None]] = {
    "a method": by_method,
    "a closure": by_closure,
    "a partial": by_partial,
    "a wrapper": by_wrapper,
    "a class": by_class,
}
PATCHED = pytest.mark.parametrize("path", ["layer1", "layer1.1", "layer1.1.attention"])


@PATCHED
@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_acts_as_on_the_original(patch: str, path: str) -> None:
    model, d = original(), at_the_start()
    plain = evaluate(model, batch())
    for one in (model, d):
        PATCHES[patch](one, path, 0.25)
    assert not torch.equal(evaluate(model, batch()), plain)
    assert torch.equal(evaluate(d, batch()), evaluate(model, batch()))


@PATCHED
@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_costs_no_connection(patch: str, path: str) -> None:
    """One that passes on what the module gives leaves everything as it was, and training as well."""
    d = under_way()
    expected = evaluate(d, batch())
    names = list(dcafy.connections(d))
    PATCHES[patch](d, path, 1.0)
    assert torch.equal(evaluate(d, batch()), expected)
    assert len(dcafy.connections(d)) == len(names)
    d.train()(batch(4)).square().mean().backward()
    assert all(connection.beta.grad.any() for connection in dcafy.connections(d).values())


def test_a_forward_of_the_users_own_in_an_attention() -> None:
    """Nobody asks a connection of a block that no longer extracts anything."""
    model, d = original(), at_the_start()
    for one in (model, d):
        attention = one.layer1[1].attention
        attention.forward = types.MethodType(lambda self, x: x * self.excite[0].weight.mean(), attention)
    assert torch.equal(evaluate(d, batch()), evaluate(model, batch()))


def test_an_attention_that_gets_its_old_class_back() -> None:
    model, d = original(), at_the_start()
    d.layer1[1].attention.__class__ = SELinear
    assert torch.equal(evaluate(d, batch()), evaluate(model, batch()))


def test_a_forward_that_held_the_originals_block_is_refused() -> None:
    """A closure over a method is copied as it is, and would run the source's block in the result."""
    model = original()
    by_closure(model, "layer1.1", 1.0)
    try:
        d = dcafy.convert(model, example_inputs=batch())
    except dcafy.DcafyError as error:
        assert "layer1.1" in str(error)  # noqa: PT017 (either way is right)
        return
    assert any(skipped.name.startswith("layer1.1") for skipped in d.dca.recipe.plan.skipped)
    called: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, _inputs, _output: called.append(module))
    evaluate(d, batch())
    assert called == [], "the result runs modules of its source"


# Blocks that the user replaces -------------------------------------------------------------------


def row() -> nn.Module:
    """Four blocks of one width, so that any may hear any."""
    return trained(lambda: with_attention(SELinear, (16, 16, 16, 16)), batch(8))


def fresh() -> nn.Module:
    with seeded(9):
        return SELinear(16)


def replace(model: Any, number: int, attention: Callable[[], nn.Module]) -> None:
    model.blocks[number].attention = attention()


def without(model: Any, *numbers: int) -> None:
    model.blocks = nn.Sequential(*(block for i, block in enumerate(model.blocks) if i not in numbers))


CHANGES: dict[str, tuple[Callable[[Any], object], tuple[int, ...]]] = {
    # what the user does -> the blocks that are no longer connected
    "an identity in the middle": (lambda m: replace(m, 1, nn.Identity), (1,)),
    "a fresh one in the middle": (lambda m: replace(m, 1, fresh), (1,)),
    "an identity at the end": (lambda m: replace(m, 3, nn.Identity), (3,)),
    "a fresh one at the end": (lambda m: replace(m, 3, fresh), (3,)),
    "two of them": (lambda m: (replace(m, 1, nn.Identity), replace(m, 2, fresh)), (1, 2)),
    "a whole block": (lambda m: m.blocks.__setitem__(1, nn.Identity()), (1,)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_replaced_attention_is_passed_over(change: str) -> None:
    """Its connection is gone, and the next block hears the one before: as if it had been left out from the start."""
    act, gone = CHANGES[change]
    model = row()
    d = with_betas(dcafy.convert(model, example_inputs=batch()).eval(), 0.5, 0.1)
    act(d)
    left = [f"blocks.{i}.attention" for i in (1, 2, 3) if i not in gone]
    assert list(dcafy.connections(d)) == left

    act(model)
    plan = dcafy.inspect(model, example_inputs=batch())
    plan = plan.without(*(b.name for b in plan.blocks if b.name in {f"blocks.{i}.attention" for i in gone}))
    expected = dcafy.convert(model, example_inputs=batch(), plan=plan).eval()
    assert list(dcafy.connections(expected)) == left
    quiet = evaluate(expected, batch())
    expected.load_state_dict(d.state_dict(), strict=True)
    assert torch.equal(evaluate(d, batch()), evaluate(expected, batch()))
    assert not torch.equal(evaluate(d, batch()), quiet)

    d.train()(batch(4)).square().mean().backward()
    assert all(connection.beta.grad.any() for connection in dcafy.connections(d).values())


def test_a_replaced_first_attention_is_heard_by_nobody() -> None:
    d = with_betas(dcafy.convert(row(), example_inputs=batch()).eval(), 0.5)
    silent = copy.deepcopy(d)
    nn.init.zeros_(dcafy.connections(silent)["blocks.1.attention"].beta)
    for one in (d, silent):
        replace(one, 0, nn.Identity)
    assert torch.equal(evaluate(d, batch()), evaluate(silent, batch()))


def test_a_replaced_attention_between_other_widths() -> None:
    """The next block has learned to hear another width: it goes on in a clear state, and nothing old is heard."""
    model, d = original(), with_betas(at_the_start(), 0.5)
    names = list(dcafy.connections(d))
    for one in (model, d):
        one.layer2[0].attention = nn.Identity()
    first, second = evaluate(d, batch()), evaluate(d, batch(seed=7))
    assert torch.equal(evaluate(d, batch()), first)
    assert not torch.equal(first, second)
    assert "layer2.0.attention" not in dcafy.connections(d)
    assert set(dcafy.connections(d)) <= set(names)
    assert torch.equal(evaluate(with_betas(d, 0.0), batch()), evaluate(model, batch()))


def test_blocks_that_are_taken_out() -> None:
    model, d = row(), with_betas(dcafy.convert(row(), example_inputs=batch()).eval(), 0.5)
    for one in (model, d):
        without(one, 3)
    assert torch.equal(evaluate(with_betas(copy.deepcopy(d), 0.0), batch()), evaluate(model, batch()))
    assert list(dcafy.connections(d)) == ["blocks.1.attention", "blocks.2.attention"]


# Whole networks of torchvision -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("build", ["efficientnet_b0", "mobilenet_v3_large", "regnet_y_400mf"])
def test_features_of_torchvisions_networks(build: str) -> None:
    model = trained(functools.partial(torchvision.models.get_model, build, weights=None), images(8, 64))
    d = with_betas(moved(dcafy.convert(model, example_inputs=images(2, 64)).eval()), 0.5)
    body = "trunk_output" if build.startswith("regnet") else "features"
    value = inside(d, body, images(2, 64))
    assert type(d).__name__ == type(model).__name__
    assert torch.equal(evaluate(IntermediateLayerGetter(d, {body: "out"}), images(2, 64))["out"], value)
    assert torch.equal(evaluate(create_feature_extractor(d, [body]), images(2, 64))[body], value)
    assert torch.equal(evaluate(nn.Sequential(*children(d)[:-1]), images(2, 64)), inside(d, "avgpool", images(2, 64)))
    assert not torch.equal(inside(dcafy.revert(d).eval(), body, images(2, 64)), value)


@pytest.mark.slow
def test_an_island_of_torchvisions_detector() -> None:
    """A detector's backbone on its own gives what it gives inside the detector."""
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    with seeded(0):
        model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 0.9)
    d = with_betas(dcafy.convert(model, verify=False).eval(), 0.5)
    given: list[Tensor] = []
    handle = d.backbone.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0].clone()))
    found: list[Tensor] = []
    other = d.backbone.register_forward_hook(lambda _module, _inputs, output: found.extend(output.values()))
    with seeded(1):
        evaluate(d, [torch.rand(3, 64, 64)])
    handle.remove()
    other.remove()
    maps = list(evaluate(d.backbone, given[0]).values())
    assert all(torch.equal(a, b) for a, b in zip(maps, found, strict=True))
    silent = evaluate(with_betas(copy.deepcopy(d), 0.0).backbone, given[0])
    assert not torch.equal(maps[0], silent["0"])
