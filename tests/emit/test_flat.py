"""``dcafy.flat``: the connected network as one plain graph that trains, scripts, and needs no dcafy where it runs."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from networks import Classifier, SELinear, with_attention
from subjects import cases, subject
from surroundings import BY_NAME as SPLITS
from surroundings import tensors
from torch import Tensor, fx, nn
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from trained import evaluate, images, moved, seeded, trained, with_betas
from users_classes import WITHOUT_GRAPH, trained_network
from zoo import BY_NAME, EVERY_HOST, HAND_WRITTEN_NETWORKS

import dcafy

# Torch says this of the ``__init__`` of its own GraphModule.
pytestmark = pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support instance-level annotations")


def under_way(name: str) -> Any:
    """A network of the zoo some way into training, in eval mode; a copy of one's own."""
    return moved(subject(name).pair()[1])


def classifier() -> tuple[nn.Module, Any]:
    model = trained(lambda: with_attention(SELinear), images(8, 32))
    return model, moved(dcafy.convert(model, example_inputs=images(2, 32)).eval())


def plain(module: nn.Module) -> bool:
    """Whether no class of dcafy has a part in this module."""
    return not any(kind.__module__.split(".")[0] == "dcafy" for kind in type(module).__mro__)


SCRIPTED = [network for network in HAND_WRITTEN_NETWORKS if network.name != "se_branches"]
"""TorchScript refuses the other one's own code: a ``scale_factor`` that is an integer."""
EVERY = pytest.mark.parametrize("name", cases(HAND_WRITTEN_NETWORKS, EVERY_HOST))


@EVERY
def test_it_computes_the_same(name: str) -> None:
    """Equal bits in eval at other sizes too, and in training under one seed, buffers included."""
    network, d = BY_NAME[name], under_way(name)
    flat = dcafy.flat(d).eval()
    sizes = [network.images(), network.images(1, seed=2), network.images(3, network.other, seed=4)]
    for x in sizes:
        assert torch.equal(evaluate(flat, x), evaluate(d, x)), tuple(x.shape)
    assert not torch.equal(evaluate(flat, sizes[0]), evaluate(dcafy.revert(d).eval(), sizes[0]))
    d, flat = copy.deepcopy(d).train(), copy.deepcopy(flat).train()
    for seed in (5, 6):
        outputs = []
        for one in (d, flat):
            with seeded(seed):
                outputs.append(evaluate(one, network.images(4, seed=seed)))
        assert torch.equal(*outputs)
    buffers = dict(d.named_buffers())
    assert all(torch.equal(buffers[key], buffer) for key, buffer in flat.named_buffers())
    assert torch.equal(evaluate(flat.eval(), sizes[0]), evaluate(d.eval(), sizes[0]))


@EVERY
def test_it_is_a_plain_graph_module(name: str) -> None:
    """Everything in it is torch's or the user's own; its keys are those of the network it was made of."""
    model, d = subject(name).pair()
    flat = dcafy.flat(moved(d))
    assert type(flat).__mro__[1] is fx.GraphModule
    users = {type(module) for module in model.modules()}
    for path, module in flat.named_modules():
        assert plain(module), f"{path} is a {type(module).__mro__}"
        assert type(module) in users or type(module).__module__.split(".")[0] == "torch", path
    flat.graph.lint()
    state, own = d.state_dict(), flat.state_dict()
    assert own.keys() <= state.keys()
    assert all(torch.equal(value, state[key]) for key, value in own.items())
    assert {key for key in state if "dca" in key.split(".")} <= own.keys(), "a connection is not in it"
    assert {key for key, _ in flat.named_parameters()} == {key for key, _ in d.named_parameters()}


@EVERY
def test_it_trains_as_the_network_does(name: str) -> None:
    network, d = BY_NAME[name], under_way(name)
    flat = dcafy.flat(d)
    gradients = []
    for one in (copy.deepcopy(d).train(), copy.deepcopy(flat).train()):
        with seeded(7):
            one(network.images(4)).square().mean().backward()
        gradients.append({key: parameter.grad for key, parameter in one.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-5, atol=1e-7, msg=key)
    betas = [gradient for key, gradient in gradients[1].items() if key.endswith(".beta")]
    assert betas
    assert all(beta.any() for beta in betas)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(SCRIPTED, EVERY_HOST))
def test_it_can_be_scripted(name: str) -> None:
    network = BY_NAME[name]
    flat = dcafy.flat(under_way(name)).eval()
    scripted = torch.jit.script(flat)
    for x in (network.images(), network.images(3, network.other, seed=4)):
        torch.testing.assert_close(evaluate(scripted, x), evaluate(flat, x), rtol=1e-5, atol=1e-6)


def test_scripting_the_network_itself_names_flat() -> None:
    _, d = classifier()
    with pytest.raises(Exception, match=r"dcafy\.flat"):
        torch.jit.script(d)
    assert torch.equal(evaluate(d, images(2, 32)), evaluate(dcafy.flat(d).eval(), images(2, 32)))


def test_it_keeps_modes() -> None:
    """Made of a network in training it trains, and goes to eval and back as the network does."""
    _, d = classifier()
    d.train()
    d.stem.eval()
    flat = dcafy.flat(d)
    modes = {path: module.training for path, module in d.named_modules()}
    assert {path: module.training for path, module in flat.named_modules() if module._parameters} == {
        path: modes[path] for path, module in flat.named_modules() if module._parameters
    }
    for training in (True, False, True):
        outputs = []
        for one in (copy.deepcopy(d).train(training), copy.deepcopy(flat).train(training)):
            with seeded(3):
                outputs.append(evaluate(one, images(4, 32)))
        assert torch.equal(*outputs)


def test_it_stands_on_its_own() -> None:
    """What happens to it, or to the network, afterwards does not show in the other."""
    _, d = classifier()
    flat = dcafy.flat(d).eval()
    x = images(2, 32)
    expected = evaluate(d, x)
    with torch.no_grad():
        for parameter in flat.parameters():
            parameter.mul_(0.5)
    assert torch.equal(evaluate(d, x), expected)
    halved = evaluate(flat, x)
    assert not torch.equal(halved, expected)
    with_betas(d, 2.0)
    assert torch.equal(evaluate(flat, x), halved)
    flat.load_state_dict(d.state_dict())
    assert torch.equal(evaluate(flat, x), evaluate(d, x))


def test_frozen_parameters_stay_frozen() -> None:
    _, d = classifier()
    flat = dcafy.flat(dcafy.freeze_base(d))
    trainable = {key for key, parameter in d.named_parameters() if parameter.requires_grad}
    assert {key for key, parameter in flat.named_parameters() if parameter.requires_grad} == trainable


def test_an_edited_graph_is_what_is_flattened() -> None:
    _, d = classifier()
    graph = fx.Graph()
    output = graph.graph_copy(d.graph, {})
    graph.output(graph.call_function(torch.neg, (output,)))
    expected = -evaluate(d, images(2, 32))
    d.graph = graph
    assert torch.equal(evaluate(dcafy.flat(d).eval(), images(2, 32)), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    _, d = classifier()
    flat = dcafy.flat(d).eval()
    twin = copied(flat)
    assert torch.equal(evaluate(twin, images(2, 32)), evaluate(d, images(2, 32)))
    assert all(plain(module) for module in twin.modules())


# Where dcafy is not ------------------------------------------------------------------------------


def small_mobilenet() -> nn.Module:
    rows = [
        (16, 3, 32, 16, True, "RE", 1, 1, 1.0),
        (16, 3, 48, 24, True, "HS", 2, 1, 1.0),
        (24, 3, 48, 24, True, "HS", 1, 1, 1.0),
    ]
    return MobileNetV3([InvertedResidualConfig(*row) for row in rows], 64, num_classes=10)


ELSEWHERE = """
import sys

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dcafy", "networks", "trained"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Nowhere())

import torch

saved = torch.load("flat.pt", weights_only=False)
with torch.no_grad():
    assert torch.equal(saved["model"](saved["images"]), saved["expected"])
saved["model"].train()(saved["images"]).square().mean().backward()
assert all(parameter.grad is not None for parameter in saved["model"].parameters())
scripted = torch.jit.load("flat.ts")
with torch.no_grad():
    torch.testing.assert_close(scripted(saved["images"]), saved["expected"], rtol=1e-5, atol=1e-6)
assert "dcafy" not in sys.modules
print("ran")
"""


@pytest.mark.slow
def test_it_runs_where_dcafy_is_not_installed(tmp_path: Path) -> None:
    """Pickled and scripted, in a process that cannot import dcafy."""
    model = trained(small_mobilenet, images(8, 32))
    d = with_betas(moved(dcafy.convert(model, example_inputs=images(2, 32)).eval()), 0.5)
    x = images(2, 32)
    expected = evaluate(d, x)
    assert not torch.equal(expected, evaluate(model, x))
    flat = dcafy.flat(d).eval()
    torch.save({"model": flat, "images": x, "expected": expected}, tmp_path / "flat.pt")
    torch.jit.script(flat).save(tmp_path / "flat.ts")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ELSEWHERE],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ran"]


# Where there is no graph -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["decides", "lists"])
def test_a_network_that_no_graph_can_be_of_is_refused(name: str) -> None:
    """With its class, and with what stands in the way."""
    model = trained_network(WITHOUT_GRAPH[name])
    d = moved(dcafy.convert(model, example_inputs=images(2, 32)).eval())
    with pytest.raises(dcafy.DcafyError, match=type(model).__name__) as caught:
        dcafy.flat(d)
    assert len(str(caught.value).split()) > 8
    assert torch.equal(evaluate(d, images())[0], evaluate(d, images())[0])


@pytest.mark.parametrize("name", ["yolo with SE", "a library's classes", "detector", "branches"])
def test_networks_of_many_parts(name: str) -> None:
    """A graph that does in both modes and at every size what the network does, or none: it is said why."""
    split = SPLITS[name]
    d = moved(dcafy.convert(split.apart(), example_inputs=split.example()).eval())
    try:
        flat = dcafy.flat(d)
    except dcafy.DcafyError as error:
        assert type(d).__name__ in str(error)  # noqa: PT017 (either way is right)
        return
    for training in (False, True, False):
        for given in (images(2, 32), images(3, 48)):
            outputs = []
            for one in (copy.deepcopy(d).train(training), copy.deepcopy(flat).train(training)):
                with seeded(3):
                    outputs.append(tensors(evaluate(one, *split.inputs(given, True))))
            assert len(outputs[0]) == len(outputs[1]) > 0
            assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("name", ["a part named graph", "an attribute named graph", "a container", "a list"])
def test_a_network_that_is_no_graph_module_may_be_flattened(name: str) -> None:
    """Where only a name or a class stood in the way of a ``GraphModule``, a plain one can be made, or it is said."""
    model = trained_network(WITHOUT_GRAPH[name])
    d = moved(dcafy.convert(model, example_inputs=images(2, 32)).eval())
    try:
        flat = dcafy.flat(d)
    except dcafy.DcafyError as error:
        assert type(model).__name__ in str(error)  # noqa: PT017 (either way is right)
        return
    assert torch.equal(evaluate(flat.eval(), images(2, 32)), evaluate(d, images(2, 32)))
    assert all(plain(module) for module in flat.modules())


def test_what_is_not_connected_is_refused() -> None:
    model, d = classifier()
    for given in (model, dcafy.revert(d)):
        with pytest.raises(dcafy.DcafyError, match="Classifier"):
            dcafy.flat(given)


# Whole networks of libraries ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regnet_y_400mf", "mobilenet_v3_large", "efficientnet_b0"])
def test_torchvisions_networks(name: str) -> None:
    build = functools.partial(torchvision.models.get_model, name, weights=None)
    d = with_betas(moved(dcafy.convert(trained(build, images(8, 64)), example_inputs=images()).eval()), 0.3)
    flat = dcafy.flat(d).eval()
    expected = evaluate(d, images(3, 96))
    assert torch.equal(evaluate(flat, images(3, 96)), expected)
    torch.testing.assert_close(evaluate(torch.jit.script(flat), images(3, 96)), expected, rtol=1e-4, atol=1e-5)
    assert all(plain(module) for module in flat.modules())
    outputs: list[Tensor] = []
    for one in (d.train(), flat.train()):
        with seeded(3):
            outputs.append(one(images(4)).detach())
    assert torch.equal(*outputs)


def test_it_is_a_graph_and_no_network_of_the_users_class() -> None:
    flat = dcafy.flat(classifier()[1])
    assert isinstance(flat, fx.GraphModule)
    assert not isinstance(flat, Classifier)
