"""What users' models have besides attention: hooks, aliases, optional arguments, outputs with names."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

import networks
import pytest
import torch
import torchvision
from networks import with_attention
from torch import Tensor, nn
from torch.nn.utils import prune
from trained import evaluate, images, seeded, trained

import dcafy


def se_network() -> networks.Classifier:
    return trained(lambda: with_attention(networks.SELinear))


# Hooks -------------------------------------------------------------------------------------------


def test_hooks_of_the_user_see_tensors_only() -> None:
    """Tracing passes them by; those on modules that are still called fire in the result, on its own modules."""
    model = se_network()
    seen: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert type(output) is Tensor
        assert not output.is_meta
        seen.append((module, output))

    model.stem.register_forward_hook(note)
    model.blocks[2].conv2.register_forward_hook(note)
    converted = dcafy.convert(model, example_inputs=images())
    seen.clear()
    evaluate(converted.eval(), images())
    assert [module for module, _ in seen] == [converted.stem, converted.blocks[2].conv2]
    assert converted.stem is not model.stem


HOOKED = ("", "blocks", "blocks.1", "blocks.1.attention", "blocks.1.attention.excite", "blocks.1.attention.excite.0")
"""The root, a container, a block, the module that hears, one of its containers, one of its layers."""


def test_hooks_fire_wherever_they_are() -> None:
    """Once for each run, in the order of the original, on the modules of the result: in copies and pickles, too."""
    model = se_network()
    seen: list[tuple[nn.Module, str]] = []
    Noting.seen = seen
    for path in HOOKED:
        module = model.get_submodule(path)
        module.register_forward_pre_hook(Noting("before"))
        module.register_forward_hook(Noting("after"))
        if ".excite" not in path:  # what backward hooks have seen may not be changed in place, as its ReLU does
            module.register_full_backward_hook(Noting("backward"))

    def fired(network: nn.Module) -> list[tuple[str, str]]:
        seen.clear()
        network(images().requires_grad_()).sum().backward()
        paths = {module: path for path, module in network.named_modules()}
        return [(paths[module], when) for module, when in seen]

    expected = fired(model.eval())
    assert len(expected) == 3 * len(HOOKED) - 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = dcafy.convert(model, example_inputs=images()).eval()
    for twin in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted)), dcafy.revert(converted)):
        assert fired(twin) == expected


class Noting:
    """A hook that notes its module; it can be pickled."""

    seen: ClassVar[list[tuple[nn.Module, str]]] = []

    def __init__(self, when: str) -> None:
        self.when = when

    def __call__(self, module: nn.Module, *_: object) -> None:
        Noting.seen.append((module, self.when))


@pytest.mark.parametrize("path", HOOKED)
def test_hooks_that_change_what_a_module_gives_go_on_doing_so(path: str) -> None:
    """What is verified, and computed, is the original with its hooks."""
    model = se_network().eval()
    plain = evaluate(model, images(3))
    handle = model.get_submodule(path).register_forward_hook(lambda _module, _inputs, output: output * 2)
    expected = evaluate(model, images(3))
    assert not torch.equal(expected, plain)
    converted = dcafy.convert(model, example_inputs=images()).eval()
    assert len(dcafy.connections(converted)) == 3
    assert torch.equal(evaluate(converted, images(3)), expected)
    handle.remove()
    assert torch.equal(evaluate(converted, images(3)), expected)
    assert torch.equal(evaluate(dcafy.convert(model, example_inputs=images()).eval(), images(3)), plain)


# The module tree ---------------------------------------------------------------------------------


def test_aliases_ties_and_unused_modules() -> None:
    """Every key of the state dict stays: of a module under two names, of a tied weight, of a part nobody calls."""
    model = se_network()
    model.first = model.blocks[0]
    model.unused = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model.twin = nn.Linear(32, 10)
    model.twin.weight = model.head.weight
    model.register_buffer("step", torch.tensor(3))
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    model.note = {"trained on": "digits"}
    converted = dcafy.convert(model, example_inputs=images()).eval()
    state = converted.state_dict()
    assert [key for key in state if "dca" not in key.split(".")] == list(model.state_dict())
    assert converted.first is converted.blocks[0]
    assert converted.twin.weight is converted.head.weight
    assert torch.equal(converted.scratch, torch.ones(2))
    assert converted.note == {"trained on": "digits"}
    twin = copy.deepcopy(converted)
    assert twin.first is twin.blocks[0]
    assert twin.twin.weight is twin.head.weight
    assert torch.equal(evaluate(model, images()), evaluate(twin, images()))


def test_parametrized_and_frozen_parts() -> None:
    """Weight norm computes a weight at each call; it goes on doing so."""
    model = se_network()
    nn.utils.parametrizations.weight_norm(model.blocks[1].attention.excite[0])
    nn.utils.parametrizations.spectral_norm(model.blocks[0].conv1[0])
    model.stem.requires_grad_(False)
    model.eval()
    converted = dcafy.convert(model, example_inputs=images()).eval()
    assert torch.equal(evaluate(model, images(3)), evaluate(converted, images(3)))
    converted.train()(images(4)).square().mean().backward()
    inner = converted.blocks[1].attention.excite[0].parametrizations.weight
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in inner.parameters())
    assert all(parameter.grad is None for parameter in converted.stem.parameters())


class NormedConv(nn.Module):
    """A layer of the user's own, whose weight old weight norm computes at each call, and an attention after it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 1, 1))
        self.attention = networks.SELinear(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(torch.conv2d(x, self.weight))


class Notes:
    """An object that is no module, with a tensor."""

    def __init__(self, value: Tensor) -> None:
        self.values = [{"kept": value}]


def weight_norm(module: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(module)


def kept_output(model: nn.Module) -> None:
    model.last = model(images())
    model.notes = Notes(model.last)


def normed_conv(model: nn.Module) -> None:
    model.blocks[1].attention = NormedConv(16)
    weight_norm(model.blocks[1].attention)


HISTORIES: dict[str, Callable[[nn.Module], object]] = {
    "weight-norm": lambda model: weight_norm(model.blocks[1].conv1[0]),
    "weight-norm-in-attention": lambda model: weight_norm(model.blocks[1].attention.excite[0]),
    "weight-norm-on-own-layer": normed_conv,
    "pruned": lambda model: prune.l1_unstructured(model.blocks[1].conv1[0], "weight", 0.3),
    "pruned-in-attention": lambda model: prune.l1_unstructured(model.blocks[1].attention.excite[2], "weight", 0.3),
    "kept-output": kept_output,
}


@pytest.mark.parametrize("shared", [False, True], ids=["copied", "shared"])
@pytest.mark.parametrize("name", HISTORIES)
def test_tensors_with_a_history(name: str, shared: bool, tmp_path: Path) -> None:
    """Weights that are computed before each call, activations that were kept: both train alike afterwards."""

    def build() -> nn.Module:
        model = se_network()
        with seeded(5):
            HISTORIES[name](model)
        return model

    model, twin = build(), build()
    converted = dcafy.convert(model, example_inputs=images(), copy=not shared)
    assert torch.equal(evaluate(converted.eval(), images(3)), evaluate(model.eval(), images(3)))
    for network in (converted, twin):
        with seeded(6):
            network.train()(images(4)).square().mean().backward()
        base = [p for key, p in network.named_parameters() if "dca" not in key.split(".")]
        torch.optim.SGD(base, lr=0.1).step()
    assert torch.equal(evaluate(converted.eval(), images(3)), evaluate(twin.eval(), images(3)))
    dcafy.save(converted, tmp_path)
    loaded = dcafy.load(tmp_path, model=build())
    assert torch.equal(evaluate(loaded.eval(), images(3)), evaluate(twin, images(3)))
    assert torch.equal(evaluate(dcafy.revert(converted), images(3)), evaluate(twin, images(3)))


# Signatures and outputs --------------------------------------------------------------------------


class Prediction(NamedTuple):
    scores: Tensor
    features: Tensor


class Record(OrderedDict):
    """As transformers' ``ModelOutput`` is: items that are attributes too, and a place for each by number."""

    def __post_init__(self) -> None:
        for name in (field.name for field in dataclasses.fields(self)):
            if getattr(self, name) is not None:
                super().__setitem__(name, getattr(self, name))

    def __getitem__(self, key: str | int) -> object:
        return super().__getitem__(list(self)[key] if isinstance(key, int) else key)

    def __setitem__(self, key: str, value: object) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


@dataclasses.dataclass
class Outputs(Record):
    scores: Tensor | None = None
    loss: Tensor | None = None
    features: Tensor | None = None


class AnyOutputs(dict):
    """A dictionary with attributes, made by a constructor that takes no dictionary."""

    def __init__(self, scores: Tensor, features: Tensor) -> None:
        super().__init__(scores=scores, features=features)
        self.scores, self.features, self.loss = scores, features, None


class Task(nn.Module):
    """A model with an optional argument, a flag with a default, and several outputs."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.network = se_network()
        self.kind = kind

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> object:
        features = self.network.blocks(self.network.stem(x))
        if mask is not None:
            features = features * mask
        scores = self.network.head(features.mean((2, 3))) * scale
        if self.kind is Prediction:
            return Prediction(scores, features)
        if self.kind is tuple:
            return scores, [features]
        return self.kind(scores=scores, features=features)


@pytest.mark.parametrize("kind", [dict, OrderedDict, tuple, Prediction])
def test_output_is_of_the_same_type(kind: type) -> None:
    model = Task(kind).eval()
    converted = dcafy.convert(model, example_inputs=images()).eval()
    expected, output = evaluate(model, images(3)), evaluate(converted, images(3))
    assert type(output) is type(expected) is kind
    pairs = zip(*(tree.values() if isinstance(tree, dict) else tree for tree in (expected, output)), strict=True)
    for one, other in pairs:
        assert torch.equal(one[0], other[0])
    if kind is not Prediction:
        assert type(expected).__name__ == type(output).__name__
    twin = copy.deepcopy(converted)
    assert type(evaluate(twin, images())) is kind


class Scaled(nn.Module):
    """A task whose outputs are read and changed by the module around it."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.task = Task(kind)
        self.head = nn.Linear(10, 3)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> object:
        outputs = self.task(pixels)
        outputs["features"] = outputs.features.mean((2, 3))
        return type(outputs)(scores=self.head(outputs.scores), features=outputs["features"])


@pytest.mark.parametrize("kind", [Outputs, AnyOutputs])
@pytest.mark.parametrize("around", [Task, Scaled])
def test_outputs_with_names_of_their_own(around: type, kind: type, tmp_path: Path) -> None:
    """The class of the original's outputs comes back, with its items and its attributes."""
    model = around(kind).eval()
    converted = dcafy.convert(model, example_inputs=images()).eval()
    dcafy.save(converted, tmp_path)
    loaded = dcafy.load(tmp_path, model=around(kind)).eval()
    expected = evaluate(model, images(3))
    for twin in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted)), loaded):
        output = evaluate(twin, images(3))
        assert type(output) is kind
        assert list(output) == list(expected) == ["scores", "features"]
        assert vars(output).keys() == vars(expected).keys()
        assert output.loss is None
        assert output["scores"] is output.scores
        assert torch.equal(output.scores, expected.scores)
        assert torch.equal(output.features, expected.features)


def test_example_by_name() -> None:
    """A dict gives the forward's parameters where its keys are their names; else it is the input."""
    model = Scaled(Outputs).eval()
    plan = dcafy.inspect(model, example_inputs=images())
    assert dcafy.inspect(model, example_inputs={"pixels": images()}) == plan
    converted = dcafy.convert(model, example_inputs={"pixels": images()}).eval()
    with torch.no_grad():
        assert torch.equal(converted(pixels=images(3)).scores, model(images(3)).scores)
    with pytest.raises(dcafy.DcafyError, match="'pixels'"):
        dcafy.inspect(model, example_inputs={"labels": torch.zeros(2)})


class Batch(nn.Module):
    """A network that takes a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.network = se_network()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.network(batch["pixels"])


def test_example_that_is_a_dict() -> None:
    model = Batch().eval()
    converted = dcafy.convert(model, example_inputs={"pixels": images()}).eval()
    assert torch.equal(evaluate(converted, {"pixels": images(3)}), evaluate(model, {"pixels": images(3)}))


def test_defaulted_arguments_can_be_given_as_their_default() -> None:
    model = Task(tuple).eval()
    converted = dcafy.convert(model, example_inputs=images()).eval()
    expected = evaluate(model, images())[0]
    assert torch.equal(evaluate(converted, images(), None)[0], expected)
    assert torch.equal(evaluate(converted, images(), None, 1.0)[0], expected)
    with torch.no_grad():
        assert torch.equal(converted(images(), mask=None)[0], expected)
        assert torch.equal(converted(x=images())[0], expected)


def test_defaulted_arguments_may_be_given_another_value() -> None:
    """The example left them out; the forward is the original's all the same, and its connections are heard."""
    model = Task(tuple).eval()
    converted = dcafy.convert(model, example_inputs=images()).eval()
    with seeded(4):
        mask = torch.rand(2, 1, 16, 16)
    calls = [{"mask": torch.zeros(2, 1, 1, 1)}, {"mask": mask}, {"scale": 3.0}, {"mask": mask, "scale": 0.5}]
    for named in calls:
        with torch.no_grad():
            scores, (features,) = converted(images(), **named)
            expected = model(images(), **named)
        assert torch.equal(scores, expected[0])
        assert torch.equal(features, expected[1][0])
    for connection in dcafy.connections(converted).values():
        nn.init.constant_(connection.beta, 0.5)
    with torch.no_grad():
        for named in calls[1:]:
            assert not torch.equal(converted(images(), **named)[0], model(images(), **named)[0])


def test_optional_argument_in_the_example_is_an_input() -> None:
    model = Task(tuple).eval()
    with seeded(4):
        mask = torch.rand(2, 1, 16, 16)
    converted = dcafy.convert(model, example_inputs=(images(), mask)).eval()
    expected = evaluate(model, images(), 0.5 * mask)[0]
    assert torch.equal(evaluate(converted, images(), 0.5 * mask)[0], expected)


# Parts that are wrapped --------------------------------------------------------------------------


class PartsInParallel(nn.Module):
    """Attention inside ``DataParallel`` and outside of it, in a network that is a graph or is none."""

    def __init__(self, traceable: bool, outside: bool) -> None:
        super().__init__()
        self.outside = se_network() if outside else nn.Flatten()
        self.features = nn.DataParallel(se_network())
        self.traceable = traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() < -1e9:
            return x
        return torch.cat((self.outside(x), self.features(x)), dim=1)


@pytest.mark.parametrize("traceable", [True, False], ids=["graph", "no-graph"])
@pytest.mark.parametrize("outside", [True, False], ids=["attention-outside", "none-outside"])
def test_data_parallel_parts_are_looked_through(traceable: bool, outside: bool, tmp_path: Path) -> None:
    """What they hold is connected on its own; they, and their keys, stay."""
    model = PartsInParallel(traceable, outside).eval()
    converted = dcafy.convert(model, example_inputs=images()).eval()
    plan = dcafy.inspect(model, example_inputs=images())
    parts = ["features.module", *(["outside"] if outside else [])]
    expected = {f"{part}.blocks.{i}.attention" for part in parts for i in (1, 2, 3)}
    assert {link.target for link in plan.links} == set(dcafy.connections(converted)) == expected
    assert "features" in {skipped.name for skipped in plan.skipped}
    assert isinstance(converted.features, nn.DataParallel)
    assert model.state_dict().keys() <= converted.state_dict().keys()
    assert torch.equal(evaluate(model, images(3)), evaluate(converted, images(3)))
    for connection in dcafy.connections(converted).values():
        nn.init.constant_(connection.beta, 0.5)
    dcafy.save(converted, tmp_path)
    loaded = dcafy.load(tmp_path, model=PartsInParallel(traceable, outside))
    assert torch.equal(evaluate(loaded.eval(), images(3)), evaluate(converted, images(3)))
    assert not torch.equal(evaluate(model, images(3)), evaluate(converted, images(3)))


# Circumstances -----------------------------------------------------------------------------------


def test_plan_does_not_depend_on_the_mode() -> None:
    model = se_network()
    plan = dcafy.inspect(model.eval(), example_inputs=images())
    assert dcafy.inspect(model.train(), example_inputs=images()) == plan
    assert dcafy.inspect(model, example_inputs=images(4, 96)).links == plan.links


def test_without_example_inputs() -> None:
    """The guess: 224, then other usual sizes; three channels, or what the first convolution asks for."""
    model = se_network()
    assert dcafy.inspect(model).links == dcafy.inspect(model, example_inputs=images()).links
    model.stem[0][0] = nn.Conv2d(1, 16, 3, 2, 1, bias=False)
    converted = dcafy.convert(model.eval()).eval()
    gray = images()[:, :1]
    assert torch.equal(evaluate(model, gray), evaluate(converted, gray))


def test_converted_where_no_gradients_are_made() -> None:
    """A conversion in a notebook cell under ``no_grad`` trains all the same."""
    model = se_network()
    with torch.no_grad():
        converted = dcafy.convert(model, example_inputs=images())
    converted.train()(images(4)).square().mean().backward()
    for connection in dcafy.connections(converted).values():
        assert connection.beta.grad is not None
        assert connection.beta.grad.any()


def test_small_example_does_not_hide_blocks() -> None:
    """At 32 px the last maps are smaller than 4x4 and pooling them looks like nothing; a larger probe decides."""
    model = torchvision.models.efficientnet_b0()
    assert len(dcafy.inspect(model, example_inputs=torch.randn(2, 3, 32, 32)).blocks) == 16
    assert len(dcafy.inspect(model, example_inputs=torch.randn(1, 3, 32, 32)).blocks) == 16
