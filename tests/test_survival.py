"""What a converted network goes through in a user's hands, once each, on one small network.

The network has channel and spatial attention, batch norm and functional dropout; before each test its connections
are moved away from their start, so that losing them shows.
"""

from __future__ import annotations

import copy
import io
import pickle
import types
from collections.abc import Callable
from pathlib import Path

import networks
import pytest
import torch
from subjects import cases, subject
from torch import Tensor, nn
from trained import evaluate, moved, seeded
from zoo import BY_NAME, HAND_WRITTEN_NETWORKS, SMALL_CBAM, Network

import dcafy

NETWORK = SMALL_CBAM


def base() -> nn.Module:
    """The network before it was connected, trained-like and in eval mode."""
    return subject(NETWORK.name).pair()[0]


def at_the_start() -> torch.fx.GraphModule:
    """The network just after it was connected, in eval mode."""
    return subject(NETWORK.name).pair()[1]


def under_way(network: Network = NETWORK) -> torch.fx.GraphModule:
    """The network some way into training."""
    return moved(subject(network.name).pair()[1])


def assert_same_model(one: nn.Module, other: nn.Module) -> None:
    """Equal outputs in both modes, equal state, and connections that can still be listed."""
    state = one.state_dict()
    assert list(state) == list(other.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    assert isinstance(one, torch.fx.GraphModule)
    assert isinstance(other, torch.fx.GraphModule)
    assert list(dcafy.connections(one)) == list(dcafy.connections(other)) != []
    for training in (False, True):
        outputs = []
        for model in (one, other):
            with seeded(32):
                outputs.append(evaluate(copy.deepcopy(model).train(training), NETWORK.images(4)))
        assert torch.equal(*outputs)


class Frozen(networks.Classifier):
    """A network that keeps its batch norms and first blocks in eval, as detectors' backbones do."""

    frozen_stages = 1

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    def _frozen_parts(self) -> list[nn.Module]:
        return [*self.blocks[: self.frozen_stages], *(m for m in self.modules() if isinstance(m, nn.BatchNorm2d))]


class Wrapped(nn.Module):
    """``Frozen`` in a network that is no graph, so that it becomes an island."""

    def __init__(self, frozen: nn.Module) -> None:
        super().__init__()
        self.frozen = frozen

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) if x.sum() > -1e9 else x


def frozen_network() -> nn.Module:
    return Frozen(list(networks.with_attention(networks.SELinear).blocks))


def modes(model: nn.Module) -> dict[str, bool]:
    return {path: module.training for path, module in model.named_modules() if "dca" not in path.split(".")}


@pytest.fixture
def model() -> torch.fx.GraphModule:
    return under_way()


def test_the_connections_count(model: torch.fx.GraphModule) -> None:
    """What the other tests stand on: this network differs from the one it was made of."""
    output = evaluate(model, NETWORK.images())
    assert (output - evaluate(base(), NETWORK.images())).abs().max() > 1e-3


def test_deepcopy(model: torch.fx.GraphModule) -> None:
    """As an exponential moving average does: a copy that shares nothing and can be changed on its own."""
    twin = copy.deepcopy(model)
    assert_same_model(model, twin)
    before = evaluate(model, NETWORK.images())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.9)
    assert torch.equal(before, evaluate(model, NETWORK.images()))
    assert not torch.equal(before, evaluate(twin, NETWORK.images()))


def test_averaged_model(model: torch.fx.GraphModule) -> None:
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert torch.equal(evaluate(average.eval(), NETWORK.images()), evaluate(model, NETWORK.images()))


def test_pickle(model: torch.fx.GraphModule) -> None:
    assert_same_model(model, pickle.loads(pickle.dumps(model)))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert_same_model(model, torch.load(buffer, weights_only=False))


def test_pickled_copy_of_a_copy(model: torch.fx.GraphModule) -> None:
    again = pickle.loads(pickle.dumps(copy.deepcopy(pickle.loads(pickle.dumps(model)))))
    assert_same_model(model, again)
    assert evaluate(dcafy.revert(again), NETWORK.images()).isfinite().all()


@pytest.mark.parametrize("name", cases(HAND_WRITTEN_NETWORKS))
def test_every_kind_of_attention_can_be_copied(name: str, tmp_path: Path) -> None:
    network = BY_NAME[name]
    model = under_way(network)
    assert_same_model(model, copy.deepcopy(model))
    assert_same_model(model, pickle.loads(pickle.dumps(model)))
    dcafy.save(model, tmp_path / "saved")
    assert_same_model(model, dcafy.load(tmp_path / "saved", model=network.build().eval()))


@pytest.mark.parametrize("build", [frozen_network, lambda: Wrapped(frozen_network())], ids=["root", "island"])
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), dcafy.revert])
def test_the_networks_own_way_of_training(
    build: Callable[[], nn.Module], copied: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    """``train`` of the network's class says which parts train; its result and its copies follow it."""
    original = build()
    converted = dcafy.convert(original, example_inputs=NETWORK.images())
    dcafy.save(converted, tmp_path / "saved")
    loaded = dcafy.load(tmp_path / "saved", model=build())
    for twin in (copied(converted), loaded):
        for mode in (True, False, True):
            assert twin.train(mode) is twin
            assert modes(twin) == modes(original.train(mode))
        assert modes(twin.eval()) == modes(original.eval())
    assert all(connection.training for connection in dcafy.connections(loaded.train()).values())
    assert set(modes(original.train()).values()) == {True, False}


def test_a_train_method_of_the_instance() -> None:
    """Bound to the network, it is bound to the copy of the network afterwards."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        nn.Module.train(self, mode)
        self.stem.eval()
        return self

    original = base()
    original.train = types.MethodType(train, original)
    converted = dcafy.convert(original.train(), example_inputs=NETWORK.images())
    assert converted.eval() is converted
    assert not any(modes(converted).values())
    assert modes(original)[""]
    assert modes(copy.deepcopy(converted).train()) == modes(original)


def test_state_dict(model: torch.fx.GraphModule) -> None:
    fresh = at_the_start()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert_same_model(model, fresh)


def test_save_and_load(model: torch.fx.GraphModule, tmp_path: Path) -> None:
    dcafy.save(model, tmp_path / "all")
    assert_same_model(model, dcafy.load(tmp_path / "all", model=NETWORK.build().eval()))
    dcafy.save(model, tmp_path / "connections", base=False)
    loaded = dcafy.load(tmp_path / "connections", model=base())
    assert_same_model(model, loaded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    """``.half()`` and its like: everything is of that dtype, and the identity at the start holds there too."""
    original = base().to(dtype)
    converted = at_the_start().to(dtype)
    images = NETWORK.images().to(dtype)
    assert torch.equal(evaluate(original, images), evaluate(converted, images))
    output = evaluate(moved(converted), images)
    assert output.dtype == dtype
    assert output.isfinite().all()
    assert not torch.equal(output, evaluate(original, images))
    assert {parameter.dtype for parameter in converted.parameters()} == {dtype}


def test_converted_in_another_dtype() -> None:
    """A model that is bf16 already: the connections are made in it."""
    original = base().to(torch.bfloat16)
    converted = dcafy.convert(original, example_inputs=NETWORK.images().to(torch.bfloat16)).eval()
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.bfloat16}
    images = NETWORK.images(3).to(torch.bfloat16)
    assert torch.equal(evaluate(original, images), evaluate(converted, images))


def test_channels_last(model: torch.fx.GraphModule) -> None:
    images = NETWORK.images()
    expected = evaluate(model, images)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    output = evaluate(last, images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    original = base().to(memory_format=torch.channels_last)
    start = dcafy.convert(original, example_inputs=images).eval()
    images = images.to(memory_format=torch.channels_last)
    assert torch.equal(evaluate(original, images), evaluate(start, images))


def test_autocast(model: torch.fx.GraphModule) -> None:
    """bf16 autocast: a connection's result has G's dtype, training steps stay finite and reach the connections."""
    dtypes = []

    def note(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        dtypes.append((inputs[0].dtype, output.dtype))

    for connection in dcafy.connections(model).values():
        connection.register_forward_hook(note)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(NETWORK.images(4)).float().square().mean()
    loss.backward()
    assert dtypes
    assert torch.bfloat16 in {dtype for dtype, _ in dtypes}
    assert all(given == returned for given, returned in dtypes)
    gradients = [p.grad for name, p in model.named_parameters() if "dca" in name.split(".")]
    assert gradients
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_autocast_is_the_identity_at_the_start() -> None:
    original, converted = base(), at_the_start()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(evaluate(original, NETWORK.images()), evaluate(converted, NETWORK.images()))


@pytest.mark.slow
def test_compile(model: torch.fx.GraphModule) -> None:
    """One graph without a break, in eval and in a training step."""
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(evaluate(compiled, NETWORK.images()), evaluate(model, NETWORK.images()))
    compiled(NETWORK.images(4)).square().mean().backward()
    gradients = {name: p.grad for name, p in compiled.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    assert any(".dca." in f".{name}" for name in gradients)


@pytest.mark.slow
@pytest.mark.parametrize("network", [NETWORK, BY_NAME["se_shared"]], ids=["cbam", "names-with-a-mark"])
def test_export(network: Network) -> None:
    """``torch.export`` with a batch size that stays open; also of connections whose block has ``#2`` in its name."""
    model = under_way(network)
    program = torch.export.export(model, (network.images(3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (2, 7):
        images = network.images(batch)
        torch.testing.assert_close(evaluate(program.module(), images), evaluate(model, images))


def test_an_exported_program_is_the_network_only(tmp_path: Path) -> None:
    """An export runs the graph of a ``GraphModule``, which is written then: no step of that is in the program."""
    images = NETWORK.images()
    model = under_way(NETWORK)
    program = torch.export.export(model, (images,))
    torch.export.save(program, tmp_path / "program.pt2")
    assert torch.equal(torch.export.load(tmp_path / "program.pt2").module()(images), evaluate(model, images))
    assert len(torch.export.export(model, (images,)).graph.nodes) == len(program.graph.nodes)


@pytest.mark.slow
def test_onnx(model: torch.fx.GraphModule, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "model.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (NETWORK.images(3),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (3, 5):
        images = NETWORK.images(batch)
        (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), evaluate(model, images), rtol=1e-3, atol=1e-4)


def test_meta_device() -> None:
    """A model without storage can be inspected and converted; it takes its weights later."""
    with torch.device("meta"):
        empty = NETWORK.build()
    plan = dcafy.inspect(empty.eval())
    assert [block.name for block in plan.blocks] == [
        f"blocks.{index}.attention.{half}" for index in range(3) for half in ("channel", "spatial")
    ]
    converted = dcafy.convert(empty, verify=False)
    assert all(parameter.is_meta for parameter in converted.parameters())
    filled = converted.to_empty(device="cpu")
    filled.load_state_dict(under_way().state_dict(), strict=True)
    assert torch.equal(evaluate(filled.eval(), NETWORK.images()), evaluate(under_way(), NETWORK.images()))


def test_new_head(model: torch.fx.GraphModule) -> None:
    """What users do first with a fine-tuning model: another head, a hook, a part of it."""
    model.head = nn.Linear(24, 3)
    seen: list[torch.Size] = []
    model.blocks[1].conv1.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    assert evaluate(model, NETWORK.images()).shape == (2, 3)
    assert seen == [torch.Size((2, 16, 32, 32))]


def test_revert(model: torch.fx.GraphModule) -> None:
    """The base as it is now, without connections."""
    with torch.no_grad():
        model.head.weight.mul_(2.0)
    expected = base()
    with torch.no_grad():
        expected.head.weight.mul_(2.0)
    reverted = dcafy.revert(model)
    assert list(reverted.state_dict()) == list(expected.state_dict())
    assert torch.equal(evaluate(reverted.eval(), NETWORK.images()), evaluate(expected, NETWORK.images()))
    assert dcafy.connections(model)


def test_frozen_base(model: torch.fx.GraphModule) -> None:
    """Only the connections train; statistics of the base stand still through ``.train()``."""
    frozen = dcafy.freeze_base(model) or model
    frozen.train()
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    trainable = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name in dict(frozen.named_parameters()) if "dca" in name.split(".")}
    optimizer = torch.optim.SGD([p for p in frozen.parameters() if p.requires_grad], lr=0.1)
    frozen(NETWORK.images(4)).square().mean().backward()
    optimizer.step()
    changed = {key for key, value in frozen.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all("dca" in key.split(".") for key in changed)


def test_parameter_groups(model: torch.fx.GraphModule) -> None:
    """Every parameter once; no decay on α, β, norms and biases; the connections at their own rate."""
    groups = dcafy.parameter_groups(model, lr=0.1, connection_lr=0.5, weight_decay=0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [(names[id(p)], group) for group in groups for p in group["params"]]
    assert sorted(name for name, _ in grouped) == sorted(names.values())
    for name, group in grouped:
        parameter = model.get_parameter(name)
        assert group["lr"] == (0.5 if "dca" in name.split(".") else 0.1), name
        plain = parameter.ndim > 1 and not name.endswith(("alpha", "beta", "bias"))
        assert group["weight_decay"] == (0.01 if plain else 0.0), name
    torch.optim.AdamW(groups)
