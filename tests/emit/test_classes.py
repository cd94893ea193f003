"""The result is the user's model: of the user's classes, copied as they say, and a ``GraphModule`` besides.

``users_classes.py`` has the classes: with their own ways of being copied, made, read and called.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import itertools
import operator
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import einops
import networks
import pytest
import torch
import users_classes
from networks import Classifier, SELinear, with_attention
from subjects import cases, subject
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.optimization import fuse
from trained import evaluate, images, moved, seeded, trained, with_betas
from users_classes import ATTENTIONS, ROOTS, WITHOUT_GRAPH, SEReading, blocks, inline_reading, trained_network
from zoo import BY_NAME, EVERY_HOST, HAND_WRITTEN_NETWORKS

import dcafy
from dcafy.emit import wire
from dcafy.errors import TracingError
from dcafy.trace import patches

LATER = ("blocks.1.attention", "blocks.2.attention", "blocks.3.attention")
"""The blocks that hear another, in every network of four blocks."""


def batch(count: int = 2, seed: int = 1) -> Tensor:
    return images(count, 32, seed)


@functools.cache
def _made(build: Callable[[], nn.Module]) -> tuple[Any, Any]:
    model = trained_network(build)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return model, dcafy.convert(model, example_inputs=batch())


def pair(build: Callable[[], nn.Module]) -> tuple[Any, Any]:
    """The network and its conversion, in eval mode; the conversion is a copy, so that a test may change it."""
    model, converted = _made(build)
    return model.eval(), copy.deepcopy(converted).eval()


def started(model: nn.Module) -> tuple[Any, Any]:
    """The model and its conversion where no copy is to stand between them."""
    return model, dcafy.convert(model, example_inputs=batch()).eval()


@functools.cache
def _with(attention: type[SELinear]) -> Callable[[], nn.Module]:
    return lambda: with_attention(attention)


@functools.cache
def _root(kind: type[Classifier]) -> Callable[[], nn.Module]:
    return lambda: kind(blocks())


def value(model: nn.Module, x: Tensor | None = None) -> Tensor:
    output = evaluate(model, batch() if x is None else x)
    return torch.stack(output) if isinstance(output, list) else output


def named(classes: tuple[type, ...]) -> Any:
    return pytest.mark.parametrize("kind", classes, ids=lambda kind: kind.__name__)


# Copies ------------------------------------------------------------------------------------------


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


def replica(model: nn.Module) -> nn.Module:
    """What ``torch.nn.parallel.replicate`` does, on one device."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}  # type: ignore[operator]
    for module, twin in replicas.items():
        for key, child in module._modules.items():
            twin._modules[key] = None if child is None else replicas[child]
        for key, parameter in module._parameters.items():
            if parameter is None:
                twin._parameters[key] = None
            else:
                setattr(twin, key, parameter.view_as(parameter))
        for key, buffer in module._buffers.items():
            twin._buffers[key] = buffer
    return replicas[model]


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": saved,
    "replica": replica,
    "copies of copies": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(saved(model)))),
}


@named(ATTENTIONS)
def test_attention_of_any_class(kind: type[SELinear]) -> None:
    """It is connected or it is said why not; the result is of its class, and computes what the original does."""
    model, d = started(trained_network(_with(kind)))
    assert list(dcafy.connections(d)) == list(LATER)
    assert torch.equal(value(d), value(model))
    for block, original in zip(d.blocks, model.blocks, strict=True):
        assert isinstance(block.attention, kind)
        assert type(block.attention).__name__ == kind.__name__
        assert type(block) is type(original)
        assert type(original.attention) is kind, "the class of the source changed"
    assert not torch.equal(value(with_betas(d, 0.5)), value(model))


@pytest.mark.slow
@named(ATTENTIONS)
def test_copies_of_attention_of_any_class(kind: type[SELinear]) -> None:
    model, d = started(trained_network(_with(kind)))
    moved(d)
    expected = value(d)
    assert (expected - value(model)).abs().max() > 1e-3
    for copied, make in COPIES.items():
        twin = make(d)
        assert torch.equal(value(twin), expected), copied
        assert torch.equal(value(d), expected), copied
        for ours, theirs in zip(d.blocks, twin.blocks, strict=True):
            assert isinstance(theirs.attention, kind), copied
            assert type(theirs.attention).__name__ == kind.__name__, copied
            assert (theirs.attention is ours.attention) == (copied == "copy"), copied
        if copied != "replica":
            assert list(dcafy.connections(twin)) == list(LATER), copied
            assert list(twin.state_dict()) == list(d.state_dict()), copied


@named(ROOTS)
def test_a_network_of_any_class(kind: type[Classifier]) -> None:
    """An instance of its class and of ``GraphModule``, with the forward that the user wrote."""
    model, d = started(trained_network(_root(kind)))
    assert isinstance(d, kind)
    assert isinstance(d, fx.GraphModule)
    assert type(d).__name__ == kind.__name__
    assert type(model) is kind, "the class of the source changed"
    assert inspect.signature(d.forward) == inspect.signature(model.forward)
    assert list(dcafy.connections(d)) == list(LATER)
    assert d.dca.recipe.plan.links
    assert torch.equal(value(d), value(model))
    assert not torch.equal(value(with_betas(d, 0.5)), value(model))


@pytest.mark.slow
@named(ROOTS)
def test_copies_of_a_network_of_any_class(kind: type[Classifier]) -> None:
    model, d = started(trained_network(_root(kind)))
    moved(d)
    expected = value(d)
    assert (expected - value(model)).abs().max() > 1e-3
    for copied, make in COPIES.items():
        twin = make(d)
        assert isinstance(twin, kind), copied
        assert isinstance(twin, fx.GraphModule), copied
        assert type(twin).__name__ == kind.__name__, copied
        assert torch.equal(value(twin), expected), copied
        assert torch.equal(value(d), expected), copied
        if copied != "replica":
            assert list(twin.state_dict()) == list(d.state_dict()), copied
            assert list(dcafy.connections(twin)) == list(LATER), copied
            assert twin.dca.recipe == d.dca.recipe, copied
            shared = next(twin.parameters()) is next(d.parameters())
            assert shared == (copied == "copy"), copied
    with torch.no_grad():
        assert torch.equal(fx.Interpreter(copy.deepcopy(d)).run(batch()), expected)


def test_what_the_users_classes_do_is_done() -> None:
    """Their own ways of being copied and made are taken, and what they count is counted."""
    _, d = started(trained_network(_root(users_classes.NetByDict)))
    copies = d.copied
    assert copy.deepcopy(d).copied == copies + 1
    _, d = started(trained_network(_with(users_classes.SEByDict)))
    copies = d.blocks[1].attention.copied
    assert copy.deepcopy(d).blocks[1].attention.copied == copies + 1
    _, d = started(trained_network(_with(users_classes.SEByState)))
    twin = pickle.loads(pickle.dumps(d))
    assert twin.blocks[1].attention.restored
    assert twin.blocks[1].attention.cache == {}
    _, d = started(trained_network(_with(users_classes.SEWithSlot)))
    for twin in (d, copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert twin.blocks[1].attention.note == "kept in a slot"
    _, d = started(trained_network(_with(users_classes.SEFinished)))
    assert d.blocks[1].attention.finished
    assert isinstance(type(d.blocks[1].attention), users_classes.Finishing)
    for build in (_with(users_classes.SECalling), _root(users_classes.NetCalling)):
        model, d = started(trained_network(build))
        counts = []
        for one in (model, d):
            counted = one if hasattr(one, "calls") else one.blocks[1].attention
            before = counted.calls
            value(one)
            value(one)
            counts.append(counted.calls - before)
        assert counts == [2, 2]


def test_a_registry_of_classes_holds_the_users_only() -> None:
    known = dict(users_classes.Registered.known)
    for build in (_with(users_classes.SERegistered), _root(users_classes.NetRegistered)):
        _, d = started(trained_network(build))
        pickle.loads(pickle.dumps(d))
        copy.deepcopy(d)
    assert users_classes.Registered.known == known


def test_class_attributes_properties_and_methods() -> None:
    model, d = started(trained_network(_with(users_classes.SEDescribed)))
    ours, theirs = d.blocks[1].attention, model.blocks[1].attention
    assert (ours.expansion, ours.width, ours.name(), ours.twice(3)) == (2, theirs.width, "sedescribed", 6)
    ours.registry.append("seen")
    assert theirs.registry.pop() == "seen"
    model, d = started(trained_network(_root(users_classes.NetDescribed)))
    assert (d.expansion, d.width, d.name(), d.twice(3)) == (2, model.width, "netdescribed", 6)


@pytest.mark.parametrize("method", ["fresh", "of_its_type"])
def test_an_attention_that_makes_another_of_its_class(method: str) -> None:
    """``self.__class__(...)`` makes a new one as the user's class does: connected to nothing."""
    model, d = started(trained_network(_with(users_classes.SEDescribed)))
    made = []
    for one in (model, d):
        with seeded(3):
            made.append(operator.methodcaller(method)(one.blocks[1].attention))
    with seeded(4):
        x = torch.randn(2, 16, 8, 8)
    assert made[1].state_dict().keys() == made[0].state_dict().keys()
    assert isinstance(made[1], users_classes.SEDescribed)
    evaluate(d.blocks[0], torch.randn(2, 16, 8, 8))
    assert torch.equal(evaluate(made[1], x), evaluate(made[0], x))


def test_a_network_that_makes_another_of_its_class() -> None:
    model, d = started(trained_network(_root(users_classes.NetDescribed)))
    made = []
    for one in (model, d):
        with seeded(3):
            made.append(one.fresh().eval())
    assert isinstance(made[1], users_classes.NetDescribed)
    assert torch.equal(value(made[1]), value(made[0]))
    with seeded(3):
        other = type(d)(blocks()).eval()
    with seeded(3):
        assert torch.equal(value(other), value(users_classes.NetDescribed(blocks()).eval()))


def test_a_module_that_looks_for_its_attributes_elsewhere() -> None:
    """A block whose ``__getattr__`` finds ``dca`` in its attention is not taken for one with connections."""
    model = trained_network(lambda: Classifier(blocks()))
    for i, block in enumerate(model.blocks):
        block.__class__ = users_classes.ForwardingBlock
        assert block.excite is block.attention.excite, i
    model, d = started(model)
    assert list(dcafy.connections(d)) == list(LATER)
    assert len(dcafy.parameter_groups(d, lr=0.1)) > 0
    twin = pickle.loads(pickle.dumps(moved(d)))
    assert list(dcafy.connections(twin)) == list(LATER)
    assert torch.equal(value(twin), value(d))
    assert torch.equal(value(dcafy.revert(d)), value(model))


def test_a_block_between_may_ask_for_its_type() -> None:
    """Only the root and what holds an attention's layers get another class."""
    model = trained_network(lambda: Classifier(blocks()))
    for block in model.blocks:
        block.__class__ = users_classes.BlockBySuperOfType
    model, d = started(model)
    assert list(dcafy.connections(d)) == list(LATER)
    assert torch.equal(value(d), value(model))


def residual(channels: int) -> nn.Module:
    return networks.Block(channels, channels, 1, SELinear(channels))


# Which classes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases(HAND_WRITTEN_NETWORKS, EVERY_HOST))
def test_every_module_is_of_its_class(name: str) -> None:
    """What holds connections is of a class made for it; everything else, and every container, of the very class."""
    model, d = subject(name).pair()
    result = dict(d.named_modules())
    assert isinstance(d, type(model))
    assert isinstance(d, fx.GraphModule)
    for path, module in model.named_modules():
        ours = result.pop(path)
        assert isinstance(ours, type(module)), path
        assert type(ours).__name__ == type(module).__name__, path
        holds = any(key.split(".")[0] == "dca" for key in ours.state_dict())
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or not (holds or path == "" or module):
            assert type(ours) is type(module), path
        children = [child for child, _ in ours.named_children() if child != "dca"]
        assert children == [child for child, _ in module.named_children()], path
    assert all("dca" in path.split(".") for path in result)


def test_attention_of_one_class_and_one_code_shares_a_class() -> None:
    """So that compiling block by block meets one class; also in copies, and in another conversion."""
    model, d = started(trained_network(lambda: Classifier([residual(16) for _ in range(6)], features=16)))
    middle = {type(block.attention) for block in list(d.blocks)[1:-1]}
    assert len(middle) == 1
    assert middle.isdisjoint({SELinear})
    again = dcafy.convert(model, example_inputs=batch())
    for twin in (again, copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert {type(block.attention) for block in list(twin.blocks)[1:-1]} == middle


def test_nothing_is_shared_but_the_class() -> None:
    """Two results of one class are two models: what is done to one shows in no other."""
    build = _root(Classifier)
    model, one = started(trained_network(build))
    other = dcafy.convert(model, example_inputs=batch()).eval()
    expected = value(other)
    negated(one)
    with_betas(one, 0.5)
    one.blocks[1].attention.note = "mine"
    assert torch.equal(value(other), expected)
    assert torch.equal(value(model), expected)
    assert not hasattr(other.blocks[2].attention, "note")


@pytest.mark.parametrize("shared", [False, True], ids=["copied", "shared"])
def test_the_sources_classes_are_left_alone(shared: bool) -> None:
    model = trained_network(_with(users_classes.SEDescribed))
    before = [type(module) for module in model.modules()]
    members = [dict(vars(kind)) for kind in dict.fromkeys(before)]
    expected = value(model)
    d = with_betas(dcafy.convert(model, example_inputs=batch(), copy=not shared).eval(), 0.5)
    assert not torch.equal(value(d), expected)
    assert [type(module) for module in model.modules()] == before
    assert [dict(vars(kind)) for kind in dict.fromkeys(before)] == members
    assert torch.equal(value(model), expected)
    assert not {id(module) for module in model.modules()} & {id(module) for module in d.modules()}
    assert (next(d.parameters()) is next(model.parameters())) == shared


# Containers --------------------------------------------------------------------------------------


CONTAINERS = {
    "blocks of a stage": (SELinear, lambda m: m.blocks),
    "layers of an attention": (users_classes.HoldsSequential, lambda m: m.blocks[1].attention.se),
    "an attention itself": (users_classes.SequentialSE, lambda m: m.blocks[1].attention),
    "a branch of an attention": (networks.BAM, lambda m: m.blocks[1].attention.channel),
    "a perceptron of an attention": (networks.CBAM, lambda m: m.blocks[1].attention.channel.mlp),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_stay_containers(container: str) -> None:
    kind, find = CONTAINERS[container]
    model, d = started(trained_network(_with(kind)))
    dimensions = 2 if kind in (networks.BAM, networks.CBAM) else 1
    assert len(dcafy.connections(d)) == 3 * dimensions
    ours, theirs = find(d), find(model)
    assert type(ours) is type(theirs)
    assert len(ours) == len(theirs)
    assert list(ours._modules) == list(theirs._modules)
    assert all(isinstance(a, type(b)) for a, b in zip(ours, theirs, strict=True))
    if type(ours) is nn.Sequential:
        assert type(ours[:1]) is nn.Sequential
        assert [len(ours[:1]), len(ours[1:]), len(ours[-1:])] == [1, len(theirs) - 1, 1]


@pytest.mark.parametrize("kind", [users_classes.HoldsSequential, users_classes.SequentialSE])
def test_slices_of_an_attentions_layers(kind: type) -> None:
    """They compute what the original's slices do, and after the block before what they do inside the whole."""
    model, d = started(trained_network(_with(kind)))
    layers = [one.blocks[1].attention for one in (model, d)]
    layers = [getattr(one, "se", one) for one in layers]
    with seeded(3):
        x = torch.randn(2, 16, 8, 8)
    for part in (slice(0, 1), slice(0, 3), slice(0, 5)):
        parts = [nn.Sequential(*list(one)[part]) for one in layers]
        assert torch.equal(evaluate(parts[1], x), evaluate(parts[0], x))

    moved(d)
    given: list[Tensor] = []
    handles = [
        d.blocks[1].attention.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0].clone())),
        layers[1][2].register_forward_hook(lambda _module, _inputs, output: given.append(output.clone())),
    ]
    value(d)
    for handle in handles:
        handle.remove()
    fed, inside = given
    with dcafy.run(d):
        evaluate(d.blocks[0], evaluate(d.stem, batch()))
        assert torch.equal(evaluate(nn.Sequential(*list(layers[1])[:3]), fed), inside)
    assert not torch.equal(evaluate(nn.Sequential(*list(layers[0])[:3]), fed), inside)


# What cannot be subclassed -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [users_classes.SEBySuperOfType, users_classes.SEBySuperOfClass])
def test_an_attention_that_asks_for_the_super_of_its_type(kind: type[SELinear]) -> None:
    """In a subclass that would run for ever: it keeps its class, and its layers hear and tell in its place."""
    model = trained_network(_with(SELinear))
    model.blocks[1].attention.__class__ = kind
    model, d = started(model)
    assert type(d.blocks[1].attention) is kind
    assert torch.equal(value(d), value(model))
    assert list(dcafy.connections(d)) == list(LATER)
    for name, connection in dcafy.connections(d).items():
        nn.init.constant_(connection.beta, 0.5)
        assert not torch.equal(value(d), value(model)), name
        nn.init.zeros_(connection.beta)
    moved(d)
    for copied, make in COPIES.items():
        assert torch.equal(value(make(d)), value(d)), copied
    assert type(dcafy.revert(d).blocks[1].attention) is kind


@pytest.mark.parametrize("kind", [users_classes.FunctionalBySuperOfType, users_classes.FunctionalBySuperOfClass])
def test_one_of_functions_that_does_so_is_left_out(kind: type[nn.Module]) -> None:
    """Its block is left alone, with the reason, and passed over."""
    model = trained_network(_with(users_classes.FunctionalSE))
    model.blocks[1].attention.__class__ = kind
    for plan in (
        dcafy.inspect(model, example_inputs=batch()),
        dcafy.convert(model, example_inputs=batch()).dca.recipe.plan,
    ):
        reasons = {skipped.name: skipped.reason for skipped in plan.skipped}
        assert "super(" in reasons["blocks.1.attention"]
        assert kind.__name__ in reasons["blocks.1.attention"]
        assert {(link.source, link.target) for link in plan.links} == {
            ("blocks.0.attention", "blocks.2.attention"),
            ("blocks.2.attention", "blocks.3.attention"),
        }
    model, d = started(model)
    assert type(d.blocks[1].attention) is kind
    assert torch.equal(value(d), value(model))
    assert not torch.equal(value(with_betas(d, 0.5)), value(model))


def test_a_network_of_nothing_else() -> None:
    model = trained_network(_with(users_classes.FunctionalBySuperOfType))
    with pytest.raises(dcafy.DcafyError, match=r"super\("):
        dcafy.convert(model, example_inputs=batch())


@pytest.mark.parametrize("kind", [users_classes.NetBySuperOfType, users_classes.NetBySuperOfClass])
def test_a_network_that_asks_for_the_super_of_its_type(kind: type[Classifier]) -> None:
    """It keeps its class, without a graph of the whole, and is connected all the same; its plan says why."""
    model, d = started(trained_network(_root(kind)))
    assert type(d) is type(model) is kind
    assert any(kind.__name__ in item.reason and "super(" in item.reason for item in d.dca.recipe.plan.skipped)
    assert list(dcafy.connections(d)) == list(LATER)
    assert torch.equal(value(d), value(model))
    assert not d.train().eval().training
    moved(d)
    assert not torch.equal(value(d), value(model))
    for copied, make in COPIES.items():
        assert torch.equal(value(make(d)), value(d)), copied
    as_it_was(dcafy.revert(d).eval(), model)


# What a forward reads of its module --------------------------------------------------------------

Change = tuple[Callable[[], nn.Module], Callable[[Any], object], Callable[[Any], object]]


def _setting(name: str, new: Any, old: Any, at: str = "attention") -> tuple[Callable[[Any], object], ...]:
    find = operator.attrgetter(at) if at else lambda block: block
    return (lambda m: setattr(find(m.blocks[1]), name, new), lambda m: setattr(find(m.blocks[1]), name, old))


def _shifted(m: Any, by: float) -> None:
    m.blocks[1].attention.settings["shift"] = by


CHANGED: dict[str, Change] = {
    # what changes after the conversion -> the network, the change, and the way back
    "a number": (_with(SEReading), *_setting("scale", 2.0, 1.0)),  # type: ignore[dict-item]
    "a flag": (_with(SEReading), *_setting("act_on", False, True)),  # type: ignore[dict-item]
    "a word": (_with(SEReading), *_setting("mode", "max", "mean")),  # type: ignore[dict-item]
    "a function": (_with(SEReading), *_setting("gate", torch.tanh, torch.sigmoid)),  # type: ignore[dict-item]
    "a value in a dictionary": (_with(SEReading), lambda m: _shifted(m, 0.5), lambda m: _shifted(m, 0.0)),
    "a layer where there was none": (
        _with(SEReading),
        lambda m: setattr(m.blocks[1].attention, "norm", nn.Hardtanh(0.0, 0.5)),
        lambda m: (delattr(m.blocks[1].attention, "norm"), setattr(m.blocks[1].attention, "norm", None)),
    ),
    "a number of the class": (
        inline_reading,
        lambda m: setattr(m.blocks[1], "strength", 0.5),
        lambda m: delattr(m.blocks[1], "strength"),
    ),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_plain_attribute_that_changes_afterwards(change: str) -> None:
    """The user's own forward runs where a value that it reads is another one, and it is said; and back again."""
    build, act, back = CHANGED[change]
    model, d = started(trained_network(build))
    plain = value(model)
    assert torch.equal(value(d), plain)
    act(model)
    act(d)
    expected = value(model)
    assert not torch.equal(expected, plain)
    with pytest.warns(UserWarning, match=r"blocks\.1|SEReading|InlineReading"):
        output = value(d)
    assert torch.equal(output, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether it is said once or each time
        with_betas(d, 0.5)
        twin = copy.deepcopy(d)
        assert torch.equal(value(twin), value(d))
        back(d)
        back(model)
    assert torch.equal(value(with_betas(d, 0.0)), value(model))
    connected = value(with_betas(d, 0.5))
    nn.init.zeros_(next(iter(dcafy.connections(d).values())).beta)
    assert not torch.equal(value(d), connected), "the block that is as it was hears nothing any more"


def test_an_attribute_that_changes_concerns_its_block_only() -> None:
    """Blocks of one class share it: the others stay connected."""
    model, d = started(trained_network(_with(SEReading)))
    for one in (model, d):
        one.blocks[1].attention.scale = 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = value(d)
        nn.init.constant_(dcafy.connections(d)["blocks.3.attention"].beta, 0.5)
        assert not torch.equal(value(d), before)
        assert torch.equal(before, value(model))


class Scaling:
    """A function that is an object, and is copied with what holds it."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor


class SECalling(SELinear):
    """Squeeze-excitation that keeps a function of its own making: in every copy it is another object."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.function: Callable[[Tensor], Tensor] = self.made()

    def made(self) -> Callable[[Tensor], Tensor]:
        return functools.partial(nn.functional.leaky_relu, negative_slope=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(self.function(x.mean((2, 3))))[..., None, None]


class SECallingObject(SECalling):
    def made(self) -> Callable[[Tensor], Tensor]:
        return Scaling(0.5)


class SECallingMethod(SECalling):
    def made(self) -> Callable[[Tensor], Tensor]:
        return self.half

    def half(self, x: Tensor) -> Tensor:
        return x / 2


OTHER_FUNCTIONS: dict[type[SECalling], Any] = {
    SECalling: functools.partial(nn.functional.leaky_relu, negative_slope=0.2),
    SECallingObject: Scaling(0.25),
    SECallingMethod: SECallingMethod(8).half,
}


@named((SECalling, SECallingObject, SECallingMethod))
def test_a_function_of_a_blocks_own_making_is_the_same_in_copies(kind: type[SECalling]) -> None:
    """Blocks of one class have one each, and are connected in copies and in the graph; another function is another."""
    _, d = started(trained_network(_with(kind)))
    moved(d)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = value(d)
        for twin in (copy.deepcopy(d), pickle.loads(pickle.dumps(d)), fx.GraphModule(d, d.graph), dcafy.flat(d).eval()):
            assert torch.equal(value(twin), expected)
        for connection in dcafy.connections(d).values():
            before = value(d)
            nn.init.constant_(connection.beta, 2.0)
            assert not torch.equal(value(d), before)
        d.blocks[2].attention.function = OTHER_FUNCTIONS[kind]
        with pytest.warns(UserWarning, match=rf"{kind.__name__}\.function(\.\w+)* is no longer what it was"):
            value(d)


# The graph of the whole --------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases(HAND_WRITTEN_NETWORKS, EVERY_HOST))
def test_the_graph_computes_what_the_network_does(name: str) -> None:
    """Traced by fx, interpreted by fx, in eval and in training: always the connected network."""
    network = BY_NAME[name]
    x = network.images()
    d = moved(subject(name).pair()[1])
    expected = evaluate(d, x)
    assert not torch.equal(expected, evaluate(subject(name).pair()[0], x))
    assert torch.equal(evaluate(fx.symbolic_trace(d), x), expected)
    with torch.no_grad():
        assert torch.equal(fx.Interpreter(d).run(x), expected)
    assert torch.equal(evaluate(d, x), expected), "tracing left something behind"
    outputs = []
    for run in (lambda m: m(x), lambda m: fx.Interpreter(m).run(x), lambda m: fx.symbolic_trace(m)(x)):
        twin = copy.deepcopy(d).train()
        with seeded(5), torch.no_grad():
            outputs.append(run(twin))
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, FakeTensorMode, lambda: torch.autocast("cpu")])
def test_the_graph_is_the_same_in_every_mode(mode: Callable[[], Any]) -> None:
    """An export runs a ``GraphModule`` by its graph: what writes it must not become part of the program."""
    _, d = started(with_attention(SELinear))
    _, twin = started(with_attention(SELinear))
    with mode():
        written = twin.graph
    assert str(written) == str(d.graph)


def test_the_graph_has_the_connections_as_plain_edges() -> None:
    _, d = pair(_root(Classifier))
    moved(d)
    targets = {str(node.target) for node in d.graph.nodes if node.op in ("call_module", "get_attr")}
    for name, connection in dcafy.connections(d).items():
        path = next(path for path, module in d.named_modules() if module is connection)
        assert any(target == path or target.startswith(f"{path}.") for target in targets), name
    d.graph.lint()
    assert "dca" in d.code
    assert "dca" in d.print_readable(print_output=False)
    assert d.graph is d.graph, "what is edited in place is lost"


def negated(d: Any) -> None:
    """The graph of ``d`` with a minus sign at its end, assigned."""
    graph = fx.Graph()
    output = graph.graph_copy(d.graph, {})
    graph.output(graph.call_function(torch.neg, (output,)))
    d.graph = graph


def negated_in_place(d: Any) -> None:
    (output,) = (node for node in d.graph.nodes if node.op == "output")
    with d.graph.inserting_before(output):
        output.args = (d.graph.call_function(torch.neg, output.args),)
    d.graph.lint()
    d.recompile()


@pytest.mark.parametrize("edit", [negated, negated_in_place])
def test_an_edited_graph_runs(edit: Callable[[Any], None]) -> None:
    _, d = pair(_root(Classifier))
    moved(d)
    expected, state = -value(d), list(d.state_dict())
    edit(d)
    assert torch.equal(value(d), expected)
    assert "neg" in d.code
    assert isinstance(d, Classifier)
    assert list(d.state_dict()) == state
    for copied in COPIES:
        twin = COPIES[copied](d)
        assert torch.equal(value(twin), expected), copied
        assert isinstance(twin, Classifier), copied
    with torch.no_grad():
        for connection in dcafy.connections(d).values():
            connection.beta.add_(0.5)
    assert not torch.equal(value(d), expected), "the edited graph has no connections"


def test_passes_of_fx_work_on_the_result() -> None:
    """Folding batch norms into convolutions, as one of them."""
    _, d = pair(_root(Classifier))
    moved(d)
    fused = fuse(d)
    assert not any(isinstance(node, nn.BatchNorm2d) for node in fused.modules())
    torch.testing.assert_close(value(fused), value(d), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(value(fused), value(dcafy.revert(d).eval()), rtol=1e-3, atol=1e-3)


# Functions that take no proxies ------------------------------------------------------------------


@torch.jit.script
def scripted_swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def particular(x: Any) -> Tensor:
    """Takes tensors, and nothing that stands for one."""
    if type(x) is not Tensor and not isinstance(x, FakeTensor):
        raise TypeError("a tensor, please")
    return x * 0.5


def dropped(x: Tensor, p: float, training: bool) -> Tensor:
    """Another path in training than in eval, as EfficientNet-PyTorch has it."""
    if not training:
        return x
    return x / (1 - p) * torch.floor(1 - p + torch.rand([x.shape[0], 1], dtype=x.dtype, device=x.device))


class EinopsSE(SELinear):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(einops.reduce(x, "n c h w -> n c", "mean"))[..., None, None]


class ScriptedSE(SELinear):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(scripted_swish(self.excite(x.mean((2, 3)))))[..., None, None]


class ParticularSE(SELinear):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(particular(x.mean((2, 3))))[..., None, None]


class DroppingSE(SELinear):
    def forward(self, x: Tensor) -> Tensor:
        return x * dropped(self.excite(x.mean((2, 3))), 0.2, self.training)[..., None, None]


PARTICULAR: tuple[type[SELinear], ...] = (EinopsSE, ScriptedSE, ParticularSE, DroppingSE)


def mixed(kind: type[SELinear], *, first: bool) -> Classifier:
    """Blocks of that kind and plain ones in turns."""
    kinds = itertools.cycle((kind, SELinear) if first else (SELinear, kind))
    return with_attention(lambda channels: next(kinds)(channels))


@pytest.mark.parametrize("first", [True, False])
@named(PARTICULAR)
def test_the_graph_has_connections_beside_functions_that_take_no_proxies(kind: type[SELinear], first: bool) -> None:
    """What was a node when the block was recorded is one when the whole is."""
    model, d = started(trained_network(lambda: mixed(kind, first=first)))
    assert len(dcafy.connections(d)) == 3
    moved(d)
    for twin in (d, copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        expected = value(twin)
        assert not torch.equal(expected, value(model))
        assert torch.equal(value(fx.GraphModule(twin, twin.graph)), expected)
        if kind is not ScriptedSE:  # which only dcafy's own function can call and pickle
            assert torch.equal(value(dcafy.flat(twin).eval()), expected)
    outputs = []
    for run in (d, fx.GraphModule(d, d.graph)):
        with seeded(5), torch.no_grad():
            outputs.append(copy.deepcopy(run).train()(batch()))
    assert torch.equal(*outputs)


@pytest.mark.slow
@named(PARTICULAR)
def test_an_export_has_connections_beside_functions_that_take_no_proxies(kind: type[SELinear]) -> None:
    model, d = started(trained_network(lambda: mixed(kind, first=False)))
    moved(d)
    exported = torch.export.export(d, (batch(),)).module()
    with torch.no_grad():
        assert torch.equal(exported(batch()), value(d))
    assert not torch.equal(value(d), value(model))


def test_a_graph_that_would_lack_a_connection_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a recording cannot enter, and for whatever reason: it is said, with its name."""
    _, d = started(trained_network(lambda: mixed(EinopsSE, first=False)))
    monkeypatch.setattr(patches, "written_globals", lambda module: iter(()))
    for ask in (lambda: d.graph, lambda: dcafy.flat(d), lambda: torch.export.export(d, (batch(),))):
        with pytest.raises(TracingError, match=r"blocks\.1\.attention: what is connected in it"):
            ask()
    monkeypatch.undo()
    assert d.graph is d.graph


def test_a_message_that_a_recording_loses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    _, d = started(with_attention(SELinear))
    monkeypatch.setattr(wire, "_is_for", lambda message, G, *_: not isinstance(G, fx.Proxy))
    with pytest.raises(TracingError, match=r"blocks\.1\.attention: what blocks\.1\.attention hears would be lost"):
        _ = d.graph


# Hooks -------------------------------------------------------------------------------------------


def doubles(_module: nn.Module, _given: Any, output: Tensor) -> Tensor:
    return output * 2


def halves(_module: nn.Module, given: Any) -> Any:
    return (given[0] / 2,)


PAST = ("", "blocks", "blocks.1", "blocks.1.attention")
"""Modules whose calls the graph goes past; the others are called in it."""


@pytest.mark.parametrize("hook", [doubles, halves])
@pytest.mark.parametrize("path", [*PAST, "stem", "blocks.1.conv1", "head"])
def test_hooks_that_were_there_act_in_an_export(path: str, hook: Callable[..., Any]) -> None:
    """A network with hooks that a graph would not have is no ``GraphModule``: an export runs it as it is."""
    model = trained_network(_with(SELinear))
    module = model.get_submodule(path)
    (module.register_forward_hook if hook is doubles else module.register_forward_pre_hook)(hook)
    _, d = started(model)
    assert isinstance(d, fx.GraphModule) is (path not in PAST)
    reasons = [item.reason for item in d.dca.recipe.plan.skipped]
    assert [f"{path or 'Classifier'} has a forward hook" in reason for reason in reasons] == [True] * (path in PAST)
    moved(d)
    assert not torch.equal(value(d), value(dcafy.revert(d)))
    with torch.no_grad():
        assert torch.equal(torch.export.export(d, (batch(),)).module()(batch()), value(d))


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("path", PAST)
def test_hooks_put_on_a_result_are_in_its_graph_or_there_is_none(path: str, asked: bool) -> None:
    """Also where the graph was written before; it is there again once the hook is off."""
    _, d = started(trained_network(_with(SELinear)))
    moved(d)
    assert not asked or d.graph is not None
    handle = d.get_submodule(path).register_forward_hook(doubles)
    for ask in (lambda: d.graph, lambda: d.code, lambda: dcafy.flat(d), lambda: torch.export.export(d, (batch(),))):
        with pytest.raises(TracingError, match=f"{path or 'the network itself'} has a forward hook.*strict=True"):
            ask()
    handle.remove()
    assert torch.equal(value(fx.GraphModule(d, d.graph)), value(d))


def test_hooks_on_what_the_graph_calls_act_in_it() -> None:
    _, d = started(trained_network(_with(SELinear)))
    moved(d)
    before = value(d)
    for path in ("stem", "blocks.1.conv1", "blocks.1.attention.excite"):
        d.get_submodule(path).register_forward_hook(doubles)
    assert not torch.equal(value(d), before)
    assert torch.equal(value(fx.GraphModule(d, d.graph)), value(d))
    assert torch.equal(value(dcafy.flat(d).eval()), value(d))


def test_a_graph_that_was_assigned_runs_whatever_hooks_there_are() -> None:
    """Then the network is that graph, and hooks act on its calls."""
    _, d = started(trained_network(_with(SELinear)))
    d.graph = d.graph
    expected = value(d)
    d.register_forward_hook(doubles)
    assert d.graph is d.graph
    assert torch.equal(value(d), expected * 2)


# Without a graph of the whole --------------------------------------------------------------------


@pytest.mark.parametrize("name", WITHOUT_GRAPH)
def test_a_network_without_a_graph_is_the_users_class_only(name: str) -> None:
    """Connected all the same, without a warning; its plan says why there is no graph."""
    model, d = pair(WITHOUT_GRAPH[name])
    assert isinstance(d, type(model))
    assert not isinstance(d, fx.GraphModule)
    assert type(d).__name__ == type(model).__name__
    assert len(dcafy.connections(d)) == 3
    plan = d.dca.recipe.plan
    own = type(model).__name__
    assert any(item.name in ("", "root", own) or own in item.reason for item in plan.skipped), plan.skipped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (batch(), batch(5, seed=3)):
            assert torch.equal(value(d, x), value(model, x))
        for connection in dcafy.connections(d).values():
            nn.init.constant_(connection.beta, 0.5)
            assert not torch.equal(value(d), value(model))
            nn.init.zeros_(connection.beta)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_GRAPH)
def test_copies_of_a_network_without_a_graph(name: str) -> None:
    model, d = pair(WITHOUT_GRAPH[name])
    moved(d)
    expected = value(d)
    for copied, make in COPIES.items():
        twin = make(d)
        assert torch.equal(value(twin), expected), copied
        assert torch.equal(value(d), expected), copied
        assert isinstance(twin, type(model)), copied
        if copied != "replica":
            assert list(dcafy.connections(twin)) == list(dcafy.connections(d)), copied
            assert list(twin.state_dict()) == list(d.state_dict()), copied
            assert twin.dca.recipe == d.dca.recipe, copied


def test_what_the_user_calls_graph_is_the_users() -> None:
    _, d = pair(WITHOUT_GRAPH["a part named graph"])
    assert type(d.graph) is nn.Linear
    _, d = pair(WITHOUT_GRAPH["an attribute named graph"])
    assert d.graph == {"edges": (1, 2)}
    d.graph = "another"
    assert d.graph == "another"
    _, d = pair(WITHOUT_GRAPH["a method named graph"])
    assert d.graph() == "the user's"


@pytest.mark.parametrize("name", ["a container", "a container of the user's", "a list", "a dictionary"])
def test_a_container_as_a_network(name: str) -> None:
    """It has as many elements as before, under their names, and can be cut and grown."""
    model, d = pair(WITHOUT_GRAPH[name])
    assert type(d) is type(model)
    assert len(d) == len(model)
    assert [key for key, _ in d.named_children()] == [key for key, _ in model.named_children()]
    moved(d)
    x = batch()
    if isinstance(model, nn.ModuleDict):
        assert list(d) == list(model)
        layers = list(d.values())
    else:
        layers = list(d)
        assert len(d[1:4]) == 3
    assert [type(layer).__name__ for layer in layers] == [type(layer).__name__ for layer in model.children()]
    by_hand = x
    for layer in layers:
        by_hand = evaluate(layer, by_hand)
    assert torch.equal(by_hand, value(d))
    if isinstance(model, nn.Sequential):
        assert torch.equal(evaluate(nn.Sequential(*d), x), value(d))
        expected = value(d).relu()
        d.append(nn.ReLU())
        assert torch.equal(value(d), expected)


# The way back ------------------------------------------------------------------------------------


def as_it_was(reverted: nn.Module, model: nn.Module) -> None:
    assert reverted.state_dict().keys() == model.state_dict().keys()
    ours, theirs = dict(reverted.named_modules()), dict(model.named_modules())
    assert list(ours) == list(theirs)
    for path, module in theirs.items():
        assert type(ours[path]) is type(module), path
        assert vars(ours[path]).keys() == vars(module).keys(), path
        for key in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            assert len(getattr(ours[path], key)) == len(getattr(module, key)), (path, key)


@pytest.mark.parametrize("name", cases(HAND_WRITTEN_NETWORKS, EVERY_HOST))
def test_revert_gives_the_very_classes_back(name: str) -> None:
    model, d = subject(name).pair()
    reverted = dcafy.revert(moved(d)).eval()
    as_it_was(reverted, model)
    x = BY_NAME[name].images()
    assert torch.equal(evaluate(reverted, x), evaluate(model, x))
    assert dcafy.connections(d)


@pytest.mark.slow
@named((*ATTENTIONS, *ROOTS))
def test_revert_of_any_class(kind: type[Any]) -> None:
    model, d = started(trained_network(_with(kind) if issubclass(kind, SELinear) else _root(kind)))
    reverted = dcafy.revert(pickle.loads(pickle.dumps(moved(d)))).eval()
    assert [type(module) for module in reverted.modules()] == [type(module) for module in model.modules()]
    assert reverted.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(value(reverted), value(model))
    assert torch.equal(value(copy.deepcopy(reverted)), value(model))
    again = dcafy.convert(reverted, example_inputs=batch()).eval()
    assert list(dcafy.connections(again)) == list(LATER)


@pytest.mark.parametrize("name", WITHOUT_GRAPH)
def test_revert_without_a_graph(name: str) -> None:
    model, d = pair(WITHOUT_GRAPH[name])
    reverted = dcafy.revert(moved(d)).eval()
    as_it_was(reverted, model)
    assert torch.equal(value(reverted), value(model))


def test_revert_of_an_edited_graph() -> None:
    """The forward that the user wrote is back: the edit was of the connected network."""
    model, d = pair(_root(Classifier))
    negated(d)
    reverted = dcafy.revert(d).eval()
    as_it_was(reverted, model)
    assert torch.equal(value(reverted), value(model))


def test_a_network_that_is_a_graph_stays_one() -> None:
    """A ``GraphModule`` has the connected graph for its own, recompiles to it, and gets its former one back."""
    model = trained(functools.partial(with_attention, SELinear))
    given = images(2)
    traced = torch.fx.symbolic_trace(model)
    connected = with_betas(dcafy.convert(traced, example_inputs=given), 0.5)
    wanted = evaluate(connected, given)
    assert not torch.equal(wanted, evaluate(traced, given))
    connected.recompile()
    for one in (connected, copy.deepcopy(connected), pickle.loads(pickle.dumps(connected)), dcafy.flat(connected)):
        assert torch.equal(evaluate(one, given), wanted)
    assert torch.equal(evaluate(dcafy.revert(connected), given), evaluate(traced, given))
