"""The rules of a conversion, on networks of the field and on hand-written ones.

Every network has trained-like values (``trained.py``) and, before it is converted, modes that differ per module,
a frozen stem and a gradient that was left over (``subjects.py``): what users bring.
"""

from __future__ import annotations

import copy

import pytest
import torch
from networks import SEDropout, with_attention
from subjects import Subject, cases
from subjects import subject as subject_of
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from trained import evaluate, seeded
from zoo import BY_NAME, HAND_WRITTEN_NETWORKS, LIBRARY_NETWORKS, NETWORKS, QUICK, Network

import dcafy


@pytest.fixture(scope="module", params=cases(NETWORKS))
def subject(request: pytest.FixtureRequest) -> Subject:
    return subject_of(request.param)


def own_parameters(converted: nn.Module) -> dict[str, nn.Parameter]:
    """The connections' parameters."""
    return {name: p for name, p in converted.named_parameters() if "dca" in name.split(".")}


def parts_of(path: str) -> tuple[str, str]:
    """The module that has a connection, and the place of that below its ``dca``."""
    levels = path.split(".")
    at = levels.index("dca")
    return ".".join(levels[:at]), ".".join(levels[at + 1 :])


def test_the_quick_networks_are_there() -> None:
    """Every rule is shown on hand-written networks and on four of libraries by plain ``pytest``, too."""
    assert BY_NAME.keys() >= QUICK
    assert {network.name for network in HAND_WRITTEN_NETWORKS} < QUICK
    assert len({network.name for network in LIBRARY_NETWORKS} & QUICK) == 4


# What is found -----------------------------------------------------------------------------------


def test_blocks_are_those_a_reader_finds(subject: Subject) -> None:
    expected = subject.network.expected(subject.model)
    for dimension, names in (("channel", expected.channel), ("spatial", expected.spatial)):
        assert tuple(block.name for block in subject.plan.blocks if block.dimension == dimension) == names
    assert {(link.source, link.target) for link in subject.plan.links} == set(expected.links)
    assert len(subject.plan.links) == len(expected.links)


def test_nothing_is_silent(subject: Subject) -> None:
    """Rule 7: every block stands in one chain; one that hears nobody is the first of its kind or has a reason."""
    plan, expected = subject.plan, subject.network.expected(subject.model)
    blocks = {block.name for block in plan.blocks}
    assert sorted(name for chain in plan.chains for name in chain.blocks) == sorted(blocks)
    assert blocks & {skipped.name for skipped in plan.skipped} == set(expected.skipped)
    assert all(len(skipped.reason.split()) >= 3 for skipped in plan.skipped)
    for chain in plan.chains:
        heard = {link.target for link in chain.links}
        assert set(chain.blocks) - heard == {chain.blocks[0]}


def test_connections_are_those_of_the_plan(subject: Subject) -> None:
    """Each is the ``dca`` of a module of the source, or below it: of the very block, or of a part of it."""
    connections = dcafy.connections(subject.converted)
    assert set(connections) == {link.target for link in subject.plan.links}
    source = dict(subject.model.named_modules())
    homes: dict[str, list[str]] = {}
    for name, connection in connections.items():
        found = [p for p, module in subject.converted.named_modules() if module is connection]
        assert len(found) == 1
        home, inside = parts_of(found[0])
        assert home in source
        path = name.split("#")[0]
        assert path == "root" or f"{home}.".startswith(f"{path}.")
        homes.setdefault(home, []).append(inside)
    for inside in homes.values():  # several in one module are numbered in the order of the plan
        assert inside == ([""] if len(inside) == 1 else [f"{i}" for i in range(len(inside))])


# Rule 1 ------------------------------------------------------------------------------------------


def test_identity(subject: Subject) -> None:
    """At the start the outputs are the same bits, at other batch and image sizes too."""
    original, converted = subject.in_eval()
    network = subject.network
    batches = [subject.example, network.images(1, seed=2), network.images(5, seed=3)]
    if network.other:
        batches += [network.images(3, network.other, seed=4)]
    for images in batches:
        output = evaluate(original, images)
        assert torch.equal(output, evaluate(converted, images)), f"differs on {tuple(images.shape)}"
    assert torch.equal(original(subject.example), converted(subject.example)), "differs with gradients"


# Rule 2 ------------------------------------------------------------------------------------------


def test_every_beta_moves_the_output(subject: Subject) -> None:
    original, converted = subject.in_eval()
    output = evaluate(original, subject.example)
    connections = dcafy.connections(converted)
    assert connections
    for name, connection in connections.items():
        with torch.no_grad():
            connection.beta.fill_(0.5)
        moved = evaluate(converted, subject.example)
        assert moved.isfinite().all()
        assert not torch.equal(output, moved), f"the beta of {name} does nothing"
        with torch.no_grad():
            connection.beta.zero_()
    assert torch.equal(output, evaluate(converted, subject.example))


def test_every_new_parameter_learns(subject: Subject) -> None:
    """Each gets a gradient at once, and once the betas have left zero each gets one that is not zero."""
    converted = copy.deepcopy(subject.converted).train()
    parameters = own_parameters(converted)
    assert parameters
    optimizer = torch.optim.Adam(parameters.values(), lr=0.05)
    images = subject.network.images(4)
    with seeded(7):
        target = torch.randn_like(evaluate(copy.deepcopy(converted), images))
    for step in range(2):
        optimizer.zero_grad()
        with seeded(8):
            (converted(images) - target).square().mean().backward()
        without = [name for name, parameter in parameters.items() if parameter.grad is None]
        assert without == [], f"no gradient in step {step}"
        learning = [name for name in parameters if step > 0 or name.endswith((".alpha", ".beta"))]
        dead = [name for name in learning if not parameters[name].grad.any()]  # type: ignore[union-attr]
        assert dead == [], f"a gradient of zero in step {step}"
        optimizer.step()
    zero = [name for name, parameter in parameters.items() if not parameter.any()]
    assert zero == []


# Rule 3 ------------------------------------------------------------------------------------------


def test_keys_are_those_of_the_source(subject: Subject) -> None:
    source, result = subject.model.state_dict(), subject.converted.state_dict()
    assert list(source) == [key for key in result if "dca" not in key.split(".")]
    assert all(torch.equal(value, result[key]) for key, value in source.items())
    frozen = {name for name, parameter in subject.model.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert frozen == {name for name, parameter in subject.converted.named_parameters() if not parameter.requires_grad}


def test_the_module_tree_is_that_of_the_source(subject: Subject) -> None:
    """Every module is where it was, and of its class; those that hear or tell are of one made of it, by its name."""
    source, result = dict(subject.model.named_modules()), dict(subject.converted.named_modules())
    assert list(source) == [path for path in result if "dca" not in path.split(".")]
    rewritten = {path for path, module in source.items() if type(result[path]) is not type(module)}
    for path in rewritten:
        kind = type(source[path])
        assert isinstance(result[path], kind), path
        assert type(result[path]).__name__ == kind.__name__
        assert not isinstance(source[path], nn.Sequential | nn.ModuleList | nn.ModuleDict)
    assert rewritten == {path for path in source if hasattr(result[path], "dca")}
    assert {parts_of(path)[0] for path in result if "dca" in path.split(".")} <= rewritten
    back = dict(dcafy.revert(subject.converted).named_modules())
    assert {path: type(module) for path, module in back.items()} == {p: type(m) for p, m in source.items()}


def test_without_copy_the_tensors_are_the_same(subject: Subject) -> None:
    shared = dcafy.convert(subject.model, example_inputs=subject.example, copy=False, verify=False)
    result = dict(shared.named_parameters())
    for name, parameter in subject.model.named_parameters():
        assert result[name] is parameter, name
    state = shared.state_dict()
    for key, value in subject.model.state_dict().items():
        assert state[key].data_ptr() == value.data_ptr(), key
    original, shared = copy.deepcopy(subject.model).eval(), shared.eval()
    assert torch.equal(evaluate(original, subject.example), evaluate(shared, subject.example))


# Rule 4 ------------------------------------------------------------------------------------------


def test_the_source_is_untouched(subject: Subject) -> None:
    assert subject.plan.links
    assert dcafy.connections(subject.converted)
    assert subject.touched == []


def test_the_result_shares_nothing(subject: Subject) -> None:
    source = {id(module) for module in subject.model.modules()}
    assert not source & {id(module) for module in subject.converted.modules()}
    storages = {value.data_ptr() for value in subject.model.state_dict().values() if value.numel()}
    shared = [key for key, value in subject.converted.state_dict().items() if value.data_ptr() in storages]
    assert shared == []


# Rule 5 ------------------------------------------------------------------------------------------


def assert_trains_alike(original: nn.Module, converted: nn.Module, network: Network) -> None:
    """Two forward passes under one seed: equal outputs, and equal buffers afterwards."""
    buffers = {name: buffer.clone() for name, buffer in original.named_buffers()}
    for seed in (11, 12):
        images = network.images(4, seed=seed)
        with seeded(seed):
            output = original(images).detach()
        with seeded(seed):
            assert torch.equal(output, converted(images).detach())
    result = dict(converted.named_buffers())
    for name, buffer in original.named_buffers():
        assert torch.equal(buffer, result[name]), name
    counted = [name for name in buffers if name.endswith("num_batches_tracked")]
    moved = [name for name in counted if not torch.equal(buffers[name], result[name])]
    norms = [m for m in original.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    assert len(moved) == len(norms), "no batch norm saw a batch"


def test_train_mode_is_that_of_the_source(subject: Subject) -> None:
    original, converted = copy.deepcopy(subject.model).train(), copy.deepcopy(subject.converted).train()
    quiet = evaluate(copy.deepcopy(original).eval(), subject.example)
    with seeded(1):
        loud = evaluate(copy.deepcopy(original), subject.example)
    assert not torch.equal(quiet, loud), "the network does the same in both modes: nothing is shown"
    assert_trains_alike(original, converted, subject.network)
    assert torch.equal(evaluate(original.eval(), subject.example), evaluate(converted.eval(), subject.example))


def test_modes_per_module_are_those_of_the_source(subject: Subject) -> None:
    converted = copy.deepcopy(subject.converted)
    modes = {path: module.training for path, module in converted.named_modules()}
    assert {path: modes[path] for path in subject.modes} == subject.modes
    assert len(set(subject.modes.values())) == 2 or not any(isinstance(m, _BatchNorm) for m in converted.modules())
    assert_trains_alike(copy.deepcopy(subject.model), converted, subject.network)


def test_dropout_follows_the_module_that_holds_it() -> None:
    """A functional dropout obeys the mode of the very module whose forward reads it, before and after conversion."""
    network = Network("se_dropout", lambda: with_attention(SEDropout), HAND_WRITTEN_NETWORKS[0].expected)
    model = network.trained()
    converted = dcafy.convert(model, example_inputs=network.images())
    for path in ("blocks.0.attention", "blocks.2.attention", ""):
        for one in (model, converted):
            one.eval()
            one.get_submodule(path).training = True
        with seeded(3):
            output = evaluate(model, network.images())
        with seeded(4):
            other = evaluate(model, network.images())
        assert not torch.equal(output, other), "no dropout: nothing is shown"
        with seeded(3):
            assert torch.equal(output, evaluate(converted, network.images())), path


@pytest.mark.parametrize("name", cases(HAND_WRITTEN_NETWORKS))
def test_the_base_learns_as_the_source_does(name: str) -> None:
    """Gradients of the original parameters are those of the source, as far as rounding allows."""
    images = subject_of(name).network.images(4)
    model, converted = (one.train() for one in subject_of(name).pair())
    for one in (model, converted):
        with seeded(5):
            one(images).square().mean().backward()
    result = dict(converted.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(result[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
