"""What users pass by mistake: the error is one of the package's own, says what to do, and the model is as it was."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from networks import with_attention
from snapshot import differences, snapshot
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from trained import trained

import dcafy
from dcafy.errors import InputError, NoAttentionError, PlanError, TracingError

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def se_network() -> nn.Module:
    """A network with attention, in the mixed modes of somebody who is in the middle of something."""
    model = with_attention(networks.SELinear).train()
    model.blocks[1].eval()
    model.stem.register_forward_hook(lambda _module, _inputs, _output: None)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    return model


def refused(
    door: Callable[..., Any], model: Any, kind: type[dcafy.DcafyError] | tuple[type, ...], **options: Any
) -> str:
    """The message with which ``door`` refuses; the model has to be as it was."""
    before = snapshot(model) if isinstance(model, nn.Module) else {}
    with pytest.raises(dcafy.DcafyError) as caught:
        door(model, **options)
    after = snapshot(model) if isinstance(model, nn.Module) else {}
    assert isinstance(caught.value, kind), f"{type(caught.value).__name__}: {caught.value}"
    assert differences(before, after) == []
    message = str(caught.value)
    assert len(message) > 30, message
    assert message.rstrip().endswith((".", ")", "`")), "a message is whole sentences"
    return message


BOTH_DOORS = pytest.mark.parametrize("door", [dcafy.inspect, dcafy.convert], ids=["inspect", "convert"])


# Not a model -------------------------------------------------------------------------------------


@BOTH_DOORS
@pytest.mark.parametrize(
    ("thing", "says"),
    [
        (None, r"nn\.Module"),
        ("resnet18", r"nn\.Module"),
        (torchvision.models.resnet18, r"nn\.Module"),
        (nn.Identity, r"instance"),
        ({"conv.weight": torch.zeros(1)}, r"load_state_dict|nn\.Module"),
        ([nn.Identity()], r"nn\.Module"),
        (torch.zeros(2, 3), r"nn\.Module"),
    ],
    ids=["none", "name", "factory", "class", "state-dict", "list", "tensor"],
)
def test_not_a_module(door: Callable[..., Any], thing: Any, says: str) -> None:
    message = refused(door, thing, InputError, example_inputs=IMAGES)
    assert re.search(says, message), message


# Wrapped, compiled, scripted ---------------------------------------------------------------------


@BOTH_DOORS
def test_data_parallel(door: Callable[..., Any]) -> None:
    assert ".module" in refused(door, DataParallel(se_network()), InputError, example_inputs=IMAGES)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@BOTH_DOORS
@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel(door: Callable[..., Any]) -> None:
    assert ".module" in refused(door, DistributedDataParallel(se_network()), InputError, example_inputs=IMAGES)


@BOTH_DOORS
def test_compiled(door: Callable[..., Any]) -> None:
    compiled = torch.compile(se_network(), backend="eager")
    assert "_orig_mod" in refused(door, compiled, InputError, example_inputs=IMAGES)


@BOTH_DOORS
def test_compiled_part(door: Callable[..., Any]) -> None:
    model = se_network()
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    assert "model.blocks.1._orig_mod" in refused(door, model, InputError, example_inputs=IMAGES)


@BOTH_DOORS
def test_scripted(door: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(se_network().eval(), IMAGES)
    message = refused_script(door, scripted)
    assert "TorchScript" in message or "ScriptModule" in message


def refused_script(door: Callable[..., Any], scripted: nn.Module) -> str:
    """As :func:`refused`; a script module shows its tensors and modes only."""
    state = {key: value.clone() for key, value in scripted.state_dict().items()}
    modes = [module.training for module in scripted.modules()]
    with pytest.raises(InputError) as caught:
        door(scripted, example_inputs=IMAGES)
    assert modes == [module.training for module in scripted.modules()]
    assert all(torch.equal(value, state[key]) for key, value in scripted.state_dict().items())
    return str(caught.value)


@BOTH_DOORS
def test_exported(door: Callable[..., Any]) -> None:
    program = torch.export.export(with_attention(networks.SELinear).eval(), (IMAGES,))
    assert "nn.Module" in refused(door, program, InputError, example_inputs=IMAGES)


class QuantizedHead(nn.Module):
    """A network with attention whose head was quantised."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize = torch.ao.quantization.quantize_dynamic
            self.network = quantize(with_attention(networks.SELinear).eval(), {nn.Linear}, dtype=torch.qint8)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


@BOTH_DOORS
def test_quantized(door: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = QuantizedHead()
        modes = [module.training for module in model.modules()]
        with pytest.raises(InputError, match=r"(?i)quanti[sz]") as caught:
            door(model, example_inputs=IMAGES)
    assert re.search(r"before|first", str(caught.value))
    assert modes == [module.training for module in model.modules()]
    assert model(IMAGES).isfinite().all()


@BOTH_DOORS
def test_lazy(door: Callable[..., Any]) -> None:
    model = se_network()
    model.head = nn.LazyLinear(10)
    message = refused(door, model, InputError, example_inputs=IMAGES)
    assert "head" in message
    assert "lazy" in message.lower() or "initial" in message.lower()


def louder(module: nn.Module) -> None:
    old = module.forward
    module.forward = lambda x: 2 * old(x)


def stubborn(module: nn.Module) -> None:
    module.train = lambda mode=True: nn.Module.train(module, False)


@BOTH_DOORS
@pytest.mark.parametrize(("patch", "name"), [(louder, "forward"), (stubborn, "train")], ids=["forward", "train"])
@pytest.mark.parametrize("path", ["blocks.1.attention", "stem.1"])
def test_methods_that_are_bound_to_the_model(
    door: Callable[..., Any], patch: Callable[[nn.Module], None], name: str, path: str
) -> None:
    """A copy of the model would compute with the model that was given, and train that."""
    model = se_network()
    patch(model.get_submodule(path))
    with pytest.raises(InputError, match=rf"^{re.escape(path)}\.{name} was replaced.*MethodType"):
        door(model, example_inputs=IMAGES)


def test_methods_that_are_bound_to_nothing() -> None:
    """The other side: a head that was switched off, and a method that is bound to the module it is of."""
    model = se_network().eval()
    model.head.forward = lambda x: x
    attention = model.blocks[1].attention
    attention.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), attention)
    converted = dcafy.convert(model, example_inputs=IMAGES).eval()
    assert converted(IMAGES).shape == (2, 32)
    assert torch.equal(converted(IMAGES), model(IMAGES))


@BOTH_DOORS
def test_what_cannot_be_copied(door: Callable[..., Any]) -> None:
    model = se_network()
    model.stem.lock = threading.Lock()
    with pytest.raises(InputError, match=r"^stem\.lock cannot be copied"):
        door(model, example_inputs=IMAGES)


# Wrong example inputs ----------------------------------------------------------------------------


@BOTH_DOORS
@pytest.mark.parametrize(
    "example",
    [torch.zeros(0, 3, 64, 64), torch.zeros(2, 3, 0, 0), torch.zeros(2, 0, 64, 64)],
    ids=["no-image", "no-pixel", "no-channel"],
)
def test_zero_size(door: Callable[..., Any], example: Tensor) -> None:
    message = refused(door, se_network(), InputError, example_inputs=example)
    assert "example_inputs" in message
    assert str(tuple(example.shape)) in message or "x".join(map(str, example.shape)) in message


@BOTH_DOORS
@pytest.mark.parametrize(
    "example",
    ["3x224x224", 224, (3, 224, 224), [None], {"x": 1}, ()],
    ids=["text", "size", "shape", "list", "dict", "empty"],
)
def test_not_a_tensor(door: Callable[..., Any], example: Any) -> None:
    assert "example_inputs" in refused(door, se_network(), InputError, example_inputs=example)


@BOTH_DOORS
@pytest.mark.parametrize(
    ("example", "says"),
    [
        (torch.zeros(2, 1, 64, 64), "1"),
        (torch.zeros(2, 3), "2, 3"),
        ((torch.zeros(2, 3, 64, 64), torch.zeros(2)), ""),
    ],
    ids=["channels", "dimensions", "arguments"],
)
def test_example_does_not_fit(door: Callable[..., Any], example: Any, says: str) -> None:
    message = refused(door, se_network(), (InputError, TracingError), example_inputs=example)
    assert "example_inputs" in message
    assert says in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16], ids=str)
def test_example_of_another_dtype(dtype: torch.dtype) -> None:
    """Shapes do not tell; the comparison of the outputs does, and says what was wrong."""
    message = refused(dcafy.convert, se_network(), dcafy.DcafyError, example_inputs=IMAGES.to(dtype))
    assert "example_inputs" in message


class TwoImages(nn.Module):
    """No guess runs: it wants two inputs, of sizes that nobody guesses."""

    def __init__(self) -> None:
        super().__init__()
        self.network = with_attention(networks.SELinear)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.network(torch.cat((left, right), dim=1))


@BOTH_DOORS
def test_no_guess_runs(door: Callable[..., Any]) -> None:
    """The error says to pass ``example_inputs``, and shows how; with them it works."""
    message = refused(door, TwoImages(), (InputError, TracingError))
    assert "example_inputs=" in message
    assert "torch." in message
    halves = (torch.randn(2, 1, 64, 64), torch.randn(2, 2, 64, 64))
    assert len(dcafy.inspect(TwoImages(), example_inputs=halves).blocks) == 4


# No attention, or no way to trace it -------------------------------------------------------------


def test_without_attention() -> None:
    model = torchvision.models.resnet18()
    assert dcafy.inspect(model).blocks == ()
    message = refused(dcafy.convert, model, NoAttentionError)
    assert "dcafy.attention" in message or "add" in message.lower()


class OneBlock(nn.Module):
    """One attention block: found, but with nobody to hear."""

    def __init__(self) -> None:
        super().__init__()
        self.network = with_attention(networks.SELinear, (16,))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def test_nothing_to_link() -> None:
    plan = dcafy.inspect(OneBlock(), example_inputs=IMAGES)
    assert [block.name for block in plan.blocks] == ["network.blocks.0.attention"]
    assert plan.links == ()
    message = refused(dcafy.convert, OneBlock(), NoAttentionError, example_inputs=IMAGES)
    assert re.search(r"\b1 attention block|one attention block|network\.blocks\.0\.attention", message)


class DataDependent(nn.Module):
    """Attention, and a branch that depends on the values of its input, in one and the same forward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.second = inner, nn.Linear(10, 10)
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None]
        if x.sum() > 0:
            x = x + 1
        x = x * torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None]
        return self.second(self.first(x))


def test_control_flow_on_values() -> None:
    """Half-way through the network: the place and its line are named, and nothing of the attempt stays behind."""
    model = DataDependent(torchvision.ops.MLP(64, [10])).train()
    model.first.eval()
    message = refused(dcafy.convert, model, (TracingError, NoAttentionError), example_inputs=IMAGES)
    assert "DataDependent" in message
    assert Path(__file__).name in message
    assert "if x.sum() > 0" in message


def test_control_flow_around_attention() -> None:
    """What cannot be traced is listed with its reason and its line; the network inside it is converted on its own."""
    model = DataDependent(networks.RootForward())
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    assert plan.islands == ("first",)
    assert [block.name for block in plan.blocks] == ["first", "first#2", "first#3"]
    assert any(Path(__file__).name in skipped.reason for skipped in plan.skipped)
    before = snapshot(model)
    converted = dcafy.convert(model, example_inputs=IMAGES)
    assert differences(before, snapshot(model)) == []
    assert torch.equal(converted.eval()(IMAGES), model.eval()(IMAGES))
    assert list(dcafy.connections(converted)) == ["first#2", "first#3"]


class FailsLate(nn.Module):
    """A network that breaks in its own last line."""

    def __init__(self) -> None:
        super().__init__()
        self.network = with_attention(networks.SEDropout)
        self.head = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.network(x))


def test_model_that_does_not_run() -> None:
    """Half-way through, in train mode, with running statistics that must not have moved."""
    for door in (dcafy.inspect, dcafy.convert):
        message = refused(door, FailsLate().train(), (InputError, TracingError), example_inputs=IMAGES)
        assert "head" in message or "mat1" in message or "shape" in message


# Wrong plans -------------------------------------------------------------------------------------


def test_plan_of_another_model() -> None:
    plan = dcafy.inspect(networks.RootForward(), example_inputs=IMAGES)
    message = refused(dcafy.convert, se_network(), PlanError, example_inputs=IMAGES, plan=plan)
    assert "root" in message


def test_plan_that_is_none() -> None:
    message = refused(dcafy.convert, se_network(), (InputError, PlanError), example_inputs=IMAGES, plan={"blocks": []})
    assert "plan" in message.lower()
    assert "inspect" in message


def edited(**changes: Any) -> dcafy.Plan:
    """The plan of ``se_network`` with its first link changed."""
    plan = dcafy.inspect(se_network(), example_inputs=IMAGES)
    chain = plan.chains[0]
    links = (dataclasses.replace(chain.links[0], **changes), *chain.links[1:])
    return dataclasses.replace(plan, chains=(dataclasses.replace(chain, links=links),))


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "blocks.9.attention"},
        {"target": "blocks.9.attention"},
        {"source": "blocks.3.attention"},
        {"channel_match": "fc9"},
        {"schema": "spectral"},
        {"reduction": 0},
        {"spatial_match": "cubic"},
    ],
    ids=["unknown-source", "unknown-target", "backwards", "match", "schema", "reduction", "spatial-match"],
)
def test_plan_with_an_impossible_link(changes: dict[str, Any]) -> None:
    message = refused(dcafy.convert, se_network(), dcafy.DcafyError, example_inputs=IMAGES, plan=edited(**changes))
    (value,) = changes.values()
    assert str(value) in message


@pytest.mark.parametrize(
    "options",
    [{"schema": "spectral"}, {"channel_match": "fc9"}, {"spatial_match": "cubic"}, {"reduction": 0}, {"min_hidden": 0}],
    ids=lambda options: next(iter(options)),
)
def test_unknown_options(options: dict[str, Any]) -> None:
    message = refused(dcafy.convert, se_network(), dcafy.DcafyError, example_inputs=IMAGES, **options)
    ((name, value),) = options.items()
    assert name in message
    assert str(value) in message


@pytest.mark.parametrize(
    "options",
    [{"where": "layer9.*"}, {"attention_init": "paper"}, {"attention_reduction": 4}, {"message": "plain"}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_nothing_would_go_by(options: dict[str, Any]) -> None:
    own = {"topology": "own"} if "message" in options else {}
    message = refused(dcafy.convert, se_network(), dcafy.DcafyError, example_inputs=IMAGES, **options, **own)
    assert next(iter(options)) in message


def test_plan_names() -> None:
    plan = dcafy.inspect(se_network(), example_inputs=IMAGES)
    with pytest.raises(PlanError, match=r"blocks\.0\.attention"):
        plan.without("blocks.7.attention")
    with pytest.raises(PlanError, match="schema_version"):
        dcafy.Plan.from_dict({})
    data = plan.to_dict()
    assert dcafy.Plan.from_dict(data) == plan
    for damage in ({"blocks": None}, {"chains": [{}]}, {"blocks": [{"name": 3}]}):
        with pytest.raises(PlanError):
            dcafy.Plan.from_dict({**data, **damage})


def test_edited_plan_is_followed() -> None:
    """The other side: a plan that fits does what it says, also after a round trip through JSON data."""
    model = se_network()
    plan = dcafy.inspect(model, example_inputs=IMAGES).without("blocks.1.attention")
    plan = plan.replace_link("blocks.2.attention", "blocks.3.attention", channel_match="fc1")
    converted = dcafy.convert(model, example_inputs=IMAGES, plan=dcafy.Plan.from_dict(plan.to_dict()))
    connections = dcafy.connections(converted)
    assert list(connections) == ["blocks.2.attention", "blocks.3.attention"]
    assert [len(connection.match) for connection in connections.values()] == [6, 3]


# Already connected -------------------------------------------------------------------------------


def test_connected_model_is_refused() -> None:
    model = se_network()
    plan = dcafy.inspect(model, example_inputs=IMAGES)
    converted = dcafy.convert(model, example_inputs=IMAGES)
    assert "revert" in refused(dcafy.convert, converted, dcafy.DcafyError, example_inputs=IMAGES)
    again = dcafy.inspect(converted, example_inputs=IMAGES)
    assert again.links == plan.links
    assert again.skipped == plan.skipped == ()
    own = [tuple(name for name in block.transformation if not name.startswith("hear")) for block in again.blocks]
    blocks = [dataclasses.replace(block, transformation=t) for block, t in zip(again.blocks, own, strict=True)]
    assert tuple(blocks) == plan.blocks


@pytest.mark.parametrize("door", [dcafy.connections, dcafy.revert, dcafy.freeze_base], ids=lambda door: door.__name__)
def test_unconnected_model(door: Callable[..., Any]) -> None:
    """What works on a connected model says so when it is given another."""
    message = refused(door, se_network(), dcafy.DcafyError)
    assert "dcafy.convert" in message


# Half-way ----------------------------------------------------------------------------------------


class Restless(nn.Module):
    """Attention in a network whose output changes from call to call, so that no conversion can be verified."""

    def __init__(self) -> None:
        super().__init__()
        self.network = with_attention(networks.SELinear)
        self.noise = Noise()

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(self.network(x))


class Noise(nn.BatchNorm1d):
    """A layer of its own with a clock in it: a leaf of every trace."""

    ticks = 0.0

    def __init__(self) -> None:
        super().__init__(10)

    def forward(self, x: Tensor) -> Tensor:
        Noise.ticks += 1.0
        return F.batch_norm(x, self.running_mean, self.running_var) + Noise.ticks


def test_verification_fails() -> None:
    """The last step fails, after everything has been built: the model is as it was all the same."""
    message = refused(dcafy.convert, Restless().train(), dcafy.errors.VerificationError, example_inputs=IMAGES)
    assert "verify=False" in message or "report" in message.lower()


class Rounded(networks.SELinear):
    """Its copies compute a little otherwise, as those of weights do that a file maps into memory."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        first = self.excite[0]
        twin = memo[id(self)] = type(self)(first.in_features).train(self.training)
        twin.load_state_dict(self.state_dict())
        with torch.no_grad():
            twin.excite[0].weight.mul_(1 + 1e-3)
        return twin


def test_a_model_whose_plain_copy_differs() -> None:
    """Weights elsewhere in memory may be summed in another order: the result is equal to a copy, and says so."""
    model = trained(functools.partial(with_attention, Rounded), IMAGES).eval()
    twin = copy.deepcopy(model)
    assert not torch.equal(twin(IMAGES), model(IMAGES))
    with pytest.warns(UserWarning, match="copy=False it is equal to the model"):
        converted = dcafy.convert(model, example_inputs=IMAGES)
    assert torch.equal(converted(IMAGES), twin(IMAGES))


def test_messages_do_not_leak_the_copy() -> None:
    """An error after a failure names the user's model; a second, correct call works."""
    model = se_network()
    with pytest.raises(dcafy.DcafyError):
        dcafy.convert(model, example_inputs=torch.zeros(0, 3, 64, 64))
    twin = copy.deepcopy(model)
    converted = dcafy.convert(model, example_inputs=IMAGES)
    assert torch.equal(converted.eval()(IMAGES), twin.eval()(IMAGES))


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = se_network()

    def forward(self, *, image: Tensor, mask: Any = None) -> Any:
        return self.body(image)


class ByAnyKeyword(ByKeyword):
    def forward(self, **batch: Tensor) -> Any:
        return self.body(batch["image"])


class ByBoth(ByKeyword):
    def forward(self, image: Tensor, *, scale: Any, flag: bool = False) -> Any:  # type: ignore[override]
        return self.body(image) * scale


@BOTH_DOORS
@pytest.mark.parametrize("kind", [ByKeyword, ByAnyKeyword])
@pytest.mark.parametrize("example", [{"image": IMAGES}, IMAGES, None], ids=["dict", "tensor", "guessed"])
def test_a_forward_that_takes_no_input_by_position(door: Any, kind: Any, example: Any) -> None:
    message = refused(door, kind(), InputError, example_inputs=example)
    assert "takes no input by position" in message
    assert "without a * before them" in message
    assert "Leave it out" not in message


def test_what_a_forward_takes_by_keyword_only() -> None:
    needed = refused(dcafy.inspect, ByBoth(), InputError, example_inputs={"image": IMAGES, "scale": 2.0})
    assert "'scale'" in needed
    assert "without a * before them" in needed
    optional = refused(dcafy.inspect, ByBoth(), InputError, example_inputs={"image": IMAGES, "flag": True})
    assert "'flag'" in optional
    assert "Leave it out" in optional


@BOTH_DOORS
def test_a_dictionary_with_a_wrong_name(door: Any) -> None:
    message = refused(door, se_network(), (TracingError, InputError), example_inputs={"img": IMAGES})
    assert re.search(r"a dictionary with 'img', and \w+\.forward has the parameters x", message)


@BOTH_DOORS
@pytest.mark.parametrize("shape", [(2, 3, 16, 16), [2, 3, 16, 16]], ids=["tuple", "list"])
def test_a_shape_is_no_tensor(door: Any, shape: Any) -> None:
    message = refused(door, se_network(), InputError, example_inputs=shape)
    assert "numbers and no tensors" in message
    assert "torch.rand(2, 3, 16, 16)" in message
