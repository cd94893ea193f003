"""Blocks in parts that no single recording joins hear one another as they would in a straight network.

Every network of ``surroundings.py`` is built twice of the same modules: straight, where one graph shows who hears
whom, and apart, as people write it. What holds for the one has to hold for the other.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from snapshot import differences, snapshot
from surroundings import (
    BY_NAME,
    SPLITS,
    Around,
    Constant,
    Rows,
    Split,
    WithoutGradients,
    WithoutLayers,
    attended,
    images,
    squares,
    tensors,
    unit,
)
from torch import Tensor, nn
from trained import moved, seeded, trained_like, with_betas

import dcafy


@functools.cache
def _made(name: str) -> tuple[nn.Module, Any]:
    split = BY_NAME[name]
    model = split.apart()
    return model, dcafy.convert(model, example_inputs=split.example())


def pair(split: Split) -> tuple[nn.Module, Any]:
    """The network as people write it, and connected; copies of one's own, in eval mode."""
    model, connected = _made(split.name)
    return copy.deepcopy(model).eval(), copy.deepcopy(connected).eval()


@pytest.fixture(params=[pytest.param(s, id=s.name, marks=pytest.mark.xdist_group(f"across {s.name}")) for s in SPLITS])
def split(request: pytest.FixtureRequest) -> Split:
    return request.param  # type: ignore[no-any-return]


def run(model: nn.Module, split: Split, batch: Tensor, *, apart: bool = True, **more: Any) -> list[Tensor]:
    with torch.no_grad():
        return [tensor.clone() for tensor in tensors(model(*split.inputs(batch, apart), **more))]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def seen(model: nn.Module, split: Split, batch: Tensor, *, apart: bool) -> list[Tensor]:
    """What both ways of writing a network have in common: what its head is given, or what it returns."""
    if not split.seen:
        return run(model, split, batch, apart=apart)
    given: list[Tensor] = []

    def note(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        given.extend(tensor.clone() for tensor in tensors(inputs))

    handle = model.get_submodule(split.seen).register_forward_pre_hook(note)
    run(model, split, batch, apart=apart)
    handle.remove()
    return given


def made(plan: dcafy.Plan) -> set[tuple[str, str]]:
    return {(link.source, link.target) for link in plan.links}


def names(plan: dcafy.Plan, dimension: str) -> tuple[str, ...]:
    return tuple(block.name for block in plan.blocks if block.dimension == dimension)


# Who hears whom ----------------------------------------------------------------------------------


def test_a_reader_finds_what_the_straight_network_shows(split: Split) -> None:
    """What the other tests stand on."""
    plan = dcafy.inspect(split.straight(), example_inputs=split.example(apart=False))
    assert (names(plan, "channel"), names(plan, "spatial")) == (split.channel, split.spatial)
    assert made(plan) == split.links()


def test_blocks_hear_across_parts(split: Split) -> None:
    plan = dcafy.inspect(split.apart(), example_inputs=split.example())
    assert (names(plan, "channel"), names(plan, "spatial")) == (split.channel, split.spatial)
    assert made(plan) == split.links()
    assert len(plan.links) == len(split.links())
    assert not {block.name for block in plan.blocks} & {skipped.name for skipped in plan.skipped}
    for dimension in ("channel", "spatial"):
        linked = [chain for chain in plan.chains if chain.dimension == dimension and chain.links]
        assert len(linked) == (1 if names(plan, dimension) else 0), "parts of one network have one chain"


def test_the_connections_are_those_of_the_plan(split: Split) -> None:
    _, connected = pair(split)
    assert set(dcafy.connections(connected)) == {target for _, target in split.links()}
    assert made(connected.dca.recipe.plan) == split.links()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolo with CBAM", "branches", "the nearest block in another part"])
def test_dense_hears_every_earlier_part(name: str) -> None:
    split = BY_NAME[name]
    straight, apart = (
        dcafy.convert(model, example_inputs=split.example(apart=apart), topology="dense", verify=False)
        for model, apart in ((split.straight(), False), (split.apart(), True))
    )
    assert made(apart.dca.recipe.plan) == made(straight.dca.recipe.plan) >= split.links()


def test_a_block_that_is_left_out_is_passed_over_across_parts() -> None:
    split = BY_NAME["yolo with SE"]
    model = split.apart()
    plan = dcafy.inspect(model, example_inputs=split.example()).without("model.3")
    connected = dcafy.convert(model, example_inputs=split.example(), plan=plan)
    assert made(connected.dca.recipe.plan) == {("model.1", "model.5"), ("model.5", "model.9")}
    before = run(connected, split, images())
    with torch.no_grad():
        dcafy.connections(connected)["model.5"].beta.fill_(0.5)
    assert not same(run(connected, split, images()), before)


# What is computed --------------------------------------------------------------------------------


def test_nothing_changes_at_the_start(split: Split) -> None:
    """Equal bits in eval at other batch and image sizes too, and in training under one seed, buffers included."""
    model, connected = pair(split)
    for batch in (images(), images(1, seed=2), images(5, seed=3), images(3, 48, seed=4)):
        assert same(run(connected, split, batch), run(model, split, batch)), tuple(batch.shape)
    batch = images(4, seed=5)
    outputs = []
    for one in (model.train(), connected.train()):
        with seeded(6):
            outputs.append(run(one, split, batch, **split.taught(batch)))
    assert same(*outputs)
    buffers = dict(connected.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert same(run(connected.eval(), split, batch), run(model.eval(), split, batch)), "after training"


def test_outputs_are_of_the_users_own_types(split: Split) -> None:
    def kinds(value: Any) -> Any:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return type(value), [kinds(item) for item in inner]

    batch = images()
    for training in (False, True):
        taught = split.taught(batch) if training else {}
        expected, output = (one.train(training)(*split.inputs(batch, True), **taught) for one in pair(split))
        assert kinds(output) == kinds(expected)


def test_every_connection_moves_the_output(split: Split) -> None:
    _, connected = pair(split)
    before = run(connected, split, images())
    assert dcafy.connections(connected)
    for name, connection in dcafy.connections(connected).items():
        with torch.no_grad():
            connection.beta.fill_(1.0)
        assert not same(run(connected, split, images()), before), f"the beta of {name} does nothing"
        with torch.no_grad():
            connection.beta.zero_()
    assert same(run(connected, split, images()), before)


@pytest.mark.slow
def test_the_wire_carries_what_a_graph_would(split: Split) -> None:
    """With the same connections the straight network and the other compute the same."""
    _, connected = pair(split)
    straight = dcafy.convert(split.straight(), example_inputs=split.example(apart=False)).eval()
    quiet = seen(straight, split, images(), apart=False)
    straight.load_state_dict(with_betas(moved(connected), 1.0).state_dict(), strict=True)
    for batch in (images(), images(3, 48, seed=4)):
        values = seen(connected, split, batch, apart=True)
        torch.testing.assert_close(values, seen(straight, split, batch, apart=False), rtol=1e-5, atol=2e-6)
    values = seen(connected, split, images(), apart=True)
    assert max((a - b).abs().max().item() for a, b in zip(values, quiet, strict=True)) > 1e-3, "nothing is shown"


def test_it_trains_as_the_original_does(split: Split) -> None:
    """At the start losses and gradients are those of the original; every connection learns at once."""
    batch = images(4, seed=7)
    losses = []
    model, connected = (one.train() for one in pair(split))
    for one in (model, connected):
        with seeded(8):
            losses.append(squares(one(*split.inputs(batch, True), **split.taught(batch))))
        losses[-1].backward()
    assert torch.equal(*losses)
    parameters = dict(connected.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameters[name].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    for name, connection in dcafy.connections(connected).items():
        assert all(p.grad is not None for p in connection.parameters()), name
        assert connection.beta.grad is not None, name
        assert connection.beta.grad.any(), name


# What it goes through ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_source_is_untouched(split: Split) -> None:
    """The run that shows the order leaves no trace: not in buffers, modes, lists or random numbers."""
    model = split.apart()
    model.train()
    next(iter(model.children())).eval()
    before = snapshot(model)
    dcafy.inspect(model, example_inputs=split.example())
    dcafy.convert(model, example_inputs=split.example())
    assert differences(before, snapshot(model)) == []


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("copied", COPIES)
def test_copies_are_connected(split: Split, copied: str) -> None:
    _, connected = pair(split)
    twin = COPIES[copied](moved(connected))
    assert list(dcafy.connections(twin)) == list(dcafy.connections(connected))
    assert same(run(twin, split, images()), run(connected, split, images()))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert not same(run(twin, split, images()), run(connected, split, images()))


@pytest.mark.slow
def test_save_load_and_revert(split: Split, tmp_path: Path) -> None:
    model, connected = pair(split)
    dcafy.save(moved(connected), tmp_path / "saved")
    loaded = dcafy.load(tmp_path / "saved", model=split.apart()).eval()
    assert same(run(loaded, split, images()), run(connected, split, images()))
    reverted = dcafy.revert(connected).eval()
    assert reverted.state_dict().keys() == model.state_dict().keys()
    assert same(run(reverted, split, images()), run(model, split, images()))


# One network at a time ---------------------------------------------------------------------------


def test_yolo_that_has_run_at_another_size() -> None:
    """Its head has kept grids of that size; the result makes its own, and the original keeps what it has."""
    split = BY_NAME["yolo with SE"]
    model = split.apart()
    run(model, split, images(1, 64))
    connected = dcafy.convert(model, example_inputs=split.example())
    assert set(dcafy.connections(connected)) == {"model.3", "model.5", "model.9"}
    for size in (64, 32, 48):
        assert same(run(connected, split, images(2, size)), run(model, split, images(2, size)))


def test_yolo_without_an_example() -> None:
    split = BY_NAME["yolo with CBAM"]
    model = split.apart()
    assert made(dcafy.inspect(model)) == split.links()
    connected = dcafy.convert(model)
    assert same(run(connected, split, images()), run(model, split, images()))


LIBRARY_CALLS: dict[str, dict[str, Any]] = {
    "tuples": {"return_dict": False},
    "all states": {"output_hidden_states": True},
    "all states as tuples": {"output_hidden_states": True, "return_dict": False},
    "labels": {"labels": torch.tensor([1, 3])},
    "labels, tuples": {"labels": torch.tensor([1, 3]), "return_dict": False},
    "several labels": {"labels": torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])},
}


@pytest.mark.parametrize("call", LIBRARY_CALLS)
def test_every_way_of_calling_a_librarys_model(call: str) -> None:
    """Converted with pictures alone, called with whatever its forward takes."""
    split = BY_NAME["a library's classes"]
    model, connected = pair(split)
    expected, output = (run(one, split, images(), **LIBRARY_CALLS[call]) for one in (model, connected))
    assert same(expected, output)
    assert connected.config == model.config
    assert connected.device == model.device
    connected = with_betas(connected, 0.5)
    assert not same(run(connected, split, images(), **LIBRARY_CALLS[call]), expected)


def test_a_configuration_that_is_changed_afterwards() -> None:
    model, connected = pair(BY_NAME["a library's classes"])
    for one in (model, connected):
        one.config.use_return_dict = False
        one.config.output_hidden_states = True
    expected, output = model(images()), connected(images())
    assert type(output) is type(expected) is tuple
    assert same(tensors(output), tensors(expected))


def test_images_of_many_sizes() -> None:
    model, connected = pair(BY_NAME["detector"])
    pictures = [images(1, size)[0] for size in (32, 40, 24, 48)]
    counts = []
    for given in (pictures, pictures[:1], pictures[2:]):
        with torch.no_grad():
            expected, output = model(given), connected(given)
        assert same(tensors(output), tensors(expected))
        counts.append([len(found["scores"]) for found in expected])
    assert counts[0] != counts[1], "as many boxes each time: nothing is shown"


def test_what_a_detector_refuses_it_refuses_afterwards() -> None:
    """And the call that failed leaves nothing for the next one to hear."""
    split = BY_NAME["detector"]
    _, connected = pair(split)
    connected = with_betas(connected, 0.5)
    expected = run(connected, split, images())
    with pytest.raises(ValueError, match="targets should not be None"):
        connected.train()(list(images()))
    assert same(run(connected.eval(), split, images()), expected)
    with pytest.raises(Exception, match=r".+"):  # it fails in its second part, after the first has told
        connected([torch.zeros(3, 4, 4), torch.zeros(3, 2, 2, 2)])
    assert same(run(connected, split, images()), expected)


# Where a run cannot tell, or parts do not reach one another --------------------------------------


class FrozenFront(Around):
    """A root that runs its first part without gradients, as one does with a backbone that is not to learn."""

    def __init__(self, apart: bool) -> None:
        super().__init__(apart)
        self.first = nn.Sequential(unit(3, 16, 2), attended(16, 16), attended(16, 24, 2))
        self.second = nn.Sequential(attended(24, 24), attended(24, 32))
        self.head = nn.Linear(32, 5)

    def maps(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
        return self.second(x)


CUT: dict[str, Callable[[], nn.Module]] = {
    "detach": lambda: Rows(True, Constant(unit(24, 24), apart=True)),
    "no_grad in a part": lambda: Rows(True, WithoutGradients(unit(24, 24), apart=True)),
    "no_grad in a part with attention": lambda: Rows(True, WithoutGradients(attended(24, 24), apart=True)),
    "no_grad in the root": lambda: FrozenFront(True),
}


@pytest.mark.parametrize("name", CUT)
def test_data_that_passes_without_gradients(name: str) -> None:
    """The second part hears the first, or it is said why not; each part is connected, and nothing else changes."""
    with seeded(0):
        model = trained_like(CUT[name](), images(8))
    connected = dcafy.convert(model, example_inputs=images()).eval()
    plan = connected.dca.recipe.plan
    assert {("first.1.1", "first.2.1"), ("second.0.1", "second.1.1")} <= made(plan)
    heard = {target for _, target in made(plan)}
    assert "second.0.1" in heard | {skipped.name for skipped in plan.skipped}
    with torch.no_grad():
        expected = model(images(3))
        assert torch.equal(connected(images(3)), expected)
        for connection in dcafy.connections(connected).values():
            connection.beta.fill_(0.5)
            assert not torch.equal(connected(images(3)), expected)
            connection.beta.zero_()
    for one in (model, connected):
        one.train()
        squares(one(images(4))).backward()
    parameters = dict(connected.named_parameters())
    heard = {name: connection.beta.grad for name, connection in dcafy.connections(connected).items()}
    assert all(gradient is not None and gradient.any() for name, gradient in heard.items() if "second" in name)
    for key, parameter in model.named_parameters():
        gradient = parameters[key].grad
        if parameter.grad is None:
            assert gradient is None or not gradient.any(), f"{key} learns, and did not before"
        else:
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5, msg=key)


class TwoInputs(nn.Module):
    """Two networks side by side on two inputs, whose scores are added up."""

    def __init__(self, *, reach: bool) -> None:
        super().__init__()
        self.left = nn.Sequential(unit(3, 16, 2), attended(16, 16), attended(16, 24))
        self.right = nn.Sequential(unit(3, 16, 2), attended(16, 16), attended(16, 24))
        self.head = nn.Linear(24, 5)
        self.reach = reach

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 1e6:
            return x
        left = self.left(x)
        right = self.right(x + left.mean() if self.reach else x)
        return self.head((left + right).mean((2, 3)))


@pytest.mark.parametrize("reach", [False, True], ids=["side by side", "one after the other"])
def test_only_data_that_reaches_a_block_is_heard(reach: bool) -> None:
    """Which part runs first says nothing by itself."""
    with seeded(0):
        model = trained_like(TwoInputs(reach=reach), images(8))
    plan = dcafy.inspect(model, example_inputs=images())
    inside = {("left.1.1", "left.2.1"), ("right.1.1", "right.2.1")}
    assert made(plan) == inside | ({("left.2.1", "right.1.1")} if reach else set())
    assert len([chain for chain in plan.chains if chain.links]) == (1 if reach else 2)


def test_blocks_without_layers() -> None:
    """Gather-excite has no parameter and no child; a root that calls it itself costs it nothing either."""
    expected = {("gates.0", "gates.1"), ("gates.1", "gates.2")}
    for apart in (False, True):
        with seeded(0):
            model = trained_like(WithoutLayers(apart), images(8))
        connected = dcafy.convert(model, example_inputs=images()).eval()
        assert made(connected.dca.recipe.plan) == expected
        with torch.no_grad():
            assert torch.equal(connected(images(3)), model(images(3)))


class Siamese(nn.Module):
    """One part, called once for each image of a pair by a root that looks at them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(unit(3, 16, 2), attended(16, 16), attended(16, 24), attended(24, 24))
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 1e6:
            return x
        one, other = self.body(x).mean((2, 3)), self.body(x.flip(3)).mean((2, 3))
        return self.head(torch.cat((one, (one - other).abs()), 1))


def test_a_part_that_is_called_twice() -> None:
    """Each of its blocks is connected within each call, or it is said why not; never to the other call's."""
    with seeded(0):
        model = trained_like(Siamese(), images(8))
    plan = dcafy.inspect(model, example_inputs=images())
    targets = {target.split("#")[0] for _, target in made(plan)}
    skipped = {item.name.split("#")[0] for item in plan.skipped}
    assert {"body.2.1", "body.3.1"} <= targets | skipped
    if not plan.links:
        return
    connected = dcafy.convert(model, example_inputs=images()).eval()
    with torch.no_grad():
        assert torch.equal(connected(images(3)), model(images(3)))
        body = copy.deepcopy(moved(connected).body)
        pooled = []
        connected.body.register_forward_hook(lambda _module, _inputs, output: pooled.append(output))
        connected(images(3))
        assert torch.equal(pooled[0], body(images(3)))
        assert torch.equal(pooled[1], body(images(3).flip(3)))
