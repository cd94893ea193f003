"""Each way to connect attention across depth: exact at the start, alive, and whole in a user's hands."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from family import WAYS, X, connected, new_parameters, original, under_way
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from trained import evaluate, images, seeded, trained, trained_like

import dcafy
from dcafy.errors import PlanError


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in WAYS])
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(way: str) -> Any:
    return under_way(copy.deepcopy(connected(way)))


def assert_exact(before: nn.Module, after: nn.Module, *inputs: Tensor) -> None:
    """The same outputs in eval, and under one seed in training with the same buffers; every key is there."""
    for x in inputs:
        assert torch.equal(evaluate(before, x), evaluate(after, x)), x.shape
    state = after.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in before.state_dict().items())
    before, after = (copy.deepcopy(one).train() for one in (before, after))
    with seeded(3):
        expected = evaluate(before, inputs[0])
    with seeded(3):
        assert torch.equal(evaluate(after, inputs[0]), expected)
    buffers = dict(after.named_buffers())
    assert all(torch.equal(value, buffers[key]) for key, value in before.named_buffers())


def assert_alive(model: nn.Module, names: set[str], x: Tensor) -> None:
    """Every one of these parameters gets a gradient that is somewhere other than 0."""
    model.train()(x).square().mean().backward()
    dead = [key for key, p in model.named_parameters() if key in names and (p.grad is None or not p.grad.any())]
    assert not dead


def test_exact_at_the_start(way: str) -> None:
    before, after = original(way), connected(way)
    assert_exact(before, after, X, images(3, 24, seed=5), images(1, 40, seed=6))
    own = set(WAYS[way].own)
    new = after.state_dict().keys() - before.state_dict().keys()
    assert new
    assert all(own & set(key.split(".")) for key in new)


def test_alive(way: str, model: Any) -> None:
    assert not torch.equal(evaluate(model, X), evaluate(original(way), X))
    assert_alive(model, set(new_parameters(model, way)), X)


def test_one_step_takes_everything_off_zero(way: str) -> None:
    """From the very start: what is zero there has a gradient, and what is behind it has one after a step."""
    model = copy.deepcopy(connected(way)).train()
    optimizer = torch.optim.SGD(dcafy.parameter_groups(model, lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    own = new_parameters(model, way)
    assert [key for key, p in own.items() if p.grad is None or not p.grad.any() or not p.any()] == []


def test_copies(way: str, model: Any, tmp_path: Path) -> None:
    expected = evaluate(model, X)
    dcafy.save(model, tmp_path / "model")
    loaded = dcafy.load(tmp_path / "model", _inserted(way))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded.eval()):
        assert torch.equal(evaluate(twin, X), expected)
        assert list(dcafy.connections(twin)) == list(dcafy.connections(model))
    assert loaded.dca.recipe.plan == model.dca.recipe.plan
    assert evaluate(dcafy.revert(model), X).shape == expected.shape


def _inserted(way: str) -> nn.Module:
    """What a folder of a network of our own asks for: the network as it was before its blocks were connected."""
    return dcafy.revert(connected(way))


def test_graphs(model: Any) -> None:
    with torch.no_grad():
        expected = model(X)
        assert torch.equal(dcafy.flat(model)(X), expected)
        program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        assert torch.equal(program.module()(X[:3]), model(X[:3]))


def test_compiled(model: Any) -> None:
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(X), model(X))


def test_checkpointed(model: Any) -> None:
    """Units that run again hear what they heard the first time: gradients are equal to the bit."""
    model.train()
    blocks = model.units if hasattr(model, "units") else model.blocks
    gradients = []
    for again in (False, True):
        model.zero_grad()
        calls = [(block, type(block).forward) for block in blocks]
        for block, forward in calls if again else ():
            block.forward = lambda x, b=block, f=forward: checkpoint(f, b, x, use_reentrant=False)
        torch.manual_seed(0)
        twin = copy.deepcopy(model.state_dict())
        model(X).square().mean().backward()
        model.load_state_dict(twin)
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])


def test_parts_in_one_run(model: Any) -> None:
    blocks = model.units if hasattr(model, "units") else model.blocks
    with torch.no_grad(), dcafy.run(model):
        x = model.stem(X)
        for block in blocks:
            x = block(x)
        assert torch.equal(model.head(x.mean((2, 3))), model(X))


def test_usage_and_drop(model: Any) -> None:
    """What usage finds without a connection is what the network computes once that is dropped."""
    labels = torch.arange(len(X)) % 5
    found = {row.name: row for row in dcafy.usage(model, [(X, labels)]).connections}
    assert list(found) == list(dcafy.connections(model))
    assert all(row.message_share > 0 for row in found.values())
    told = str(dcafy.summary(model))
    assert all(f"{link.mixing}: " in told for link in model.dca.recipe.plan.links)
    assert "arXiv" in told
    name = list(found)[-1]
    without = dcafy.drop(model, [name])
    losses = [nn.functional.cross_entropy(evaluate(one, X), labels).item() for one in (without, model)]
    assert found[name].cut.loss == pytest.approx(losses[0] - losses[1], abs=1e-5)
    assert name not in dcafy.connections(without)


def test_a_mixing_that_is_not_known_is_refused(way: str) -> None:
    plan = connected(way).dca.recipe.plan
    assert {link.mixing for link in plan.links} == {"depth" if "depth" in way else "along"}
    assert dcafy.Plan.from_dict(plan.to_dict()) == plan
    wrong = plan.replace_link(plan.links[0].source, plan.links[0].target, mixing="os")
    with pytest.raises(PlanError, match=r"mixing='os', which is not known\. Use one of: "):
        dcafy.convert(_inserted(way), example_inputs=X, plan=wrong)


# Networks of libraries ---------------------------------------------------------------------------------


def timm_network(name: str) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=5)


LIBRARIES = {
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), {"topology": "depth"}),
    "legacy_seresnet18": (lambda: timm_network("legacy_seresnet18"), {"topology": "depth"}),
    "efficientnet_b0": (lambda: timm_network("efficientnet_b0"), {"topology": "depth"}),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), {"attention": "mrla"}),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=5), {"attention": "mrla"}),
    "regnetx_002": (lambda: timm_network("regnetx_002"), {"attention": "mrla"}),
    "seresnet and mrla": (lambda: timm_network("legacy_seresnet18"), {"attention": "mrla", "topology": "depth"}),
}


@pytest.mark.zoo
@pytest.mark.parametrize("name", LIBRARIES)
def test_on_networks_of_libraries(name: str, tmp_path: Path) -> None:
    build, options = LIBRARIES[name]
    before = trained(build, images(4, 64))
    after = dcafy.convert(before, example_inputs=images(2, 64), **options).eval()
    assert_exact(before, after, images(2, 64), images(1, 96, seed=5))
    new = {key for key, _ in after.named_parameters()} - {key for key, _ in before.named_parameters()}
    under_way(after)
    expected = evaluate(after, images(2, 64))
    assert not torch.equal(evaluate(before, images(2, 64)), expected)
    dcafy.save(after, tmp_path / "model")
    assert torch.equal(evaluate(dcafy.load(tmp_path / "model").eval(), images(2, 64)), expected)
    assert_alive(after, new, images(4, 64))


@pytest.mark.zoo
def test_on_the_backbone_of_a_detector() -> None:
    """Inserted and connected in one go, in a detector whose own forward goes by what it finds."""
    with seeded(0):
        detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
            weights=None, weights_backbone=None, num_classes=3
        )
    trained_like(detector.backbone.body, images(4, 64))
    detector.eval()
    after = dcafy.convert(detector, attention="mrla", topology="depth", verify=False).eval()
    links = {link.mixing for link in after.dca.recipe.plan.links}
    assert links == {"along", "depth"}
    x = [torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(1))]
    first, second = evaluate(detector, x), evaluate(after, x)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a)
    features = after.backbone(torch.stack(x))
    under_way(after)
    moved = after.backbone(torch.stack(x))
    assert not all(torch.equal(features[key], moved[key]) for key in features)
