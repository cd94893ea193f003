"""``dcafy.drop``: connections out for good; the network computes what it did where their messages were none."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from networks import CBAM, SELinear, with_attention
from torch import nn
from trained import connected, evaluate, images, moved, seeded, trained, trained_like

import dcafy
from dcafy.emit.dca import own_contexts, recipes
from dcafy.errors import InputError, PlanError, UsageError


def network(attention: Callable[[int], nn.Module] = SELinear, **options: Any) -> Any:
    """A connected network of four blocks of two widths, some way into training, in eval mode."""
    with seeded(0):
        model = trained_like(with_attention(attention, (8, 8, 12, 12)), images(8, 32))
        return connected(model, images(2, 32), **options).eval()


def silenced(model: Any, names: Iterable[str]) -> Any:
    """A copy in which these connections say nothing."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            dcafy.connections(twin)[name].beta.zero_()
    return twin


def own_keys(model: nn.Module) -> set[str]:
    return {key for key in model.state_dict() if "dca" in key.split(".")}


CASES = [
    (SELinear, {}),
    (SELinear, {"topology": "dense"}),
    (SELinear, {"schema": "weighted"}),
    (SELinear, {"schema": "softmax"}),
    (SELinear, {"schema": "normalised"}),
    (CBAM, {"schema": "normalised", "topology": "dense"}),
    (SELinear, {"message": "centred", "topology": "tree"}),
    (SELinear, {"topology": "own"}),
    (CBAM, {}),
    (CBAM, {"topology": "dense"}),
]


@pytest.mark.filterwarnings("ignore:The schema")
@pytest.mark.parametrize(("attention", "options"), CASES)
def test_it_computes_what_it_did_with_those_messages_at_none(attention: Any, options: dict[str, Any]) -> None:
    model, x = network(attention, **options), images(3, 32)
    names = list(dcafy.connections(model))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for gone in (names[:1], names[-1:], names[::2], names):
        dropped = dcafy.drop(model, gone)
        assert torch.equal(evaluate(dropped, x), evaluate(silenced(model, gone), x))
        left = dcafy.connections(dropped) if own_keys(dropped) else {}
        assert len(left) == len(names) - len(gone)
        for key, value in dropped.state_dict().items():
            if "dca" not in key.split("."):
                assert torch.equal(value, before[key])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_is_dropped_is_gone_and_the_block_keeps_its_alpha() -> None:
    model = network()
    first, second, third = dcafy.connections(model)
    dropped = dcafy.drop(model, [second])
    assert list(dcafy.connections(dropped)) == [first, third]
    ((name, own),) = own_contexts(dropped).items()
    assert name == second
    assert own.alpha.item() == dcafy.connections(model)[second].alpha.item() != 1
    assert own_keys(dropped) < own_keys(model)
    assert own_keys(model) - own_keys(dropped) == {
        key for key in own_keys(model) if key.startswith(f"{second}.dca") and "alpha" not in key
    }
    groups = dcafy.parameter_groups(dropped, lr=0.1, connection_lr=1.0)
    listed = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in dropped.parameters()}
    plan = dict(recipes(dropped))[""].plan
    assert [link.target for link in plan.links] == [first, third]
    assert [one.name for one in plan.alone] == [second]
    assert [item.name for item in plan.skipped if "dcafy.drop" in item.reason] == [second]


def test_the_next_block_hears_it_as_before() -> None:
    model = network()
    _, second, third = dcafy.connections(model)
    dropped, x = dcafy.drop(model, [second]), images(2, 32)
    with torch.no_grad():
        dcafy.connections(dropped)[third].beta.add_(0.5)
    assert not torch.equal(evaluate(dropped, x), evaluate(silenced(model, [second]), x))


def test_an_alpha_of_one_leaves_nothing() -> None:
    model = network()
    names = list(dcafy.connections(model))
    with torch.no_grad():
        for connection in dcafy.connections(model).values():
            connection.alpha.fill_(1.0)
    dropped = dcafy.drop(model, names[:2])
    assert own_contexts(dropped) == {}
    assert all(key.startswith(f"{names[2]}.dca") for key in own_keys(dropped))
    nothing = dcafy.drop(model, names)
    assert type(nothing) is type(dcafy.revert(model))
    assert own_keys(nothing) == set()
    assert torch.equal(evaluate(nothing, images(2, 32)), evaluate(silenced(model, names), images(2, 32)))


def test_dropped_one_after_the_other_or_at_once() -> None:
    model, x = network(topology="dense"), images(2, 32)
    names = list(dcafy.connections(model))
    gone = names[1:4]
    one_by_one = model
    for name in gone:
        single = name if name in dcafy.connections(one_by_one) else name.partition("<-")[0]
        one_by_one = dcafy.drop(one_by_one, single)
    at_once = dcafy.drop(model, gone)
    assert own_keys(one_by_one) == own_keys(at_once)
    assert torch.equal(evaluate(one_by_one, x), evaluate(at_once, x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The schema")
@pytest.mark.parametrize(("attention", "options"), CASES)
def test_it_is_saved_loaded_copied_and_written_flat(attention: Any, options: dict[str, Any], tmp_path: Any) -> None:
    model, x = network(attention, **options), images(2, 32)
    gone = list(dcafy.connections(model))[::2]
    dropped = dcafy.drop(model, gone)
    expected = evaluate(dropped, x)
    dcafy.save(dropped, tmp_path / "folder")
    loaded = dcafy.load(tmp_path / "folder", with_attention(attention, (8, 8, 12, 12)))
    assert list(loaded.state_dict()) == list(dropped.state_dict())
    for other in (loaded, copy.deepcopy(dropped), pickle.loads(pickle.dumps(dropped)), dcafy.flat(dropped)):
        assert torch.equal(evaluate(other.eval(), x), expected)
    reverted = dcafy.revert(dropped)
    assert own_keys(reverted) == set()
    assert torch.equal(evaluate(reverted, x), evaluate(dcafy.revert(model), x))
    again = dcafy.drop(loaded, list(dcafy.connections(loaded))[:1])
    assert len(dcafy.connections(again)) == len(dcafy.connections(loaded)) - 1


def test_it_trains_on_and_every_parameter_has_a_gradient() -> None:
    model = network()
    dropped = dcafy.drop(model, list(dcafy.connections(model))[:1]).train()
    dropped(images(4, 32)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in dropped.parameters())
    assert own_contexts(dropped).popitem()[1].alpha.grad.abs() > 0


def test_frozen_parts_modes_and_hooks_stay() -> None:
    model = network().train()
    _, second, third = dcafy.connections(model).values()
    third.requires_grad_(False)
    second.eval()
    seen = []
    model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    dropped = dcafy.drop(model, list(dcafy.connections(model))[:1])
    second, third = dcafy.connections(dropped).values()
    assert not any(parameter.requires_grad for parameter in third.parameters())
    assert all(parameter.requires_grad for parameter in second.parameters())
    assert not second.training
    assert dropped.training
    dropped(images(2, 32))
    assert seen == [1]


def test_without_a_copy_the_parameters_are_the_same_and_an_optimizer_goes_on() -> None:
    model = network()
    first, *others = dcafy.connections(model)
    optimizer = torch.optim.SGD(dcafy.parameter_groups(model, lr=0.1), momentum=0.9)
    dropped = dcafy.drop(model, first, copy=False)
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert {id(parameter) for parameter in dropped.parameters()} < mine
    before = dcafy.connections(dropped)[others[0]].beta.item()
    dropped.train()(images(4, 32)).square().mean().backward()
    optimizer.step()
    assert dcafy.connections(dropped)[others[0]].beta.item() != before


def test_drawing_no_random_numbers() -> None:
    model = network()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dcafy.drop(model, list(dcafy.connections(model))[:1])
    assert torch.equal(torch.rand(3), expected)


def test_the_branches_of_one_link_go_together() -> None:
    with seeded(0):
        plain = trained_like(dcafy.insert(nn_resnet(), "sk", init="paper"), images(8, 32))
    model = moved(dcafy.convert(plain, example_inputs=images(2, 32), verify=False)).eval()
    names = list(dcafy.connections(model))
    assert names[0].endswith("[0]")
    with pytest.raises(UsageError, match="drop both, or neither"):
        dcafy.drop(model, names[:1])
    dropped, x = dcafy.drop(model, names[:2]), images(2, 32)
    assert torch.equal(evaluate(dropped, x), evaluate(silenced(model, names[:2]), x))
    assert list(own_contexts(dropped)) == names[:2]
    assert torch.equal(evaluate(dcafy.drop(dropped, names[2:4]), x), evaluate(silenced(model, names[:4]), x))


def nn_resnet() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18(num_classes=5)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([["a"]], "names should be those of connections"),
        (3, "not 3: see dcafy.connections"),
        (["blocks.9.attention"], "has no connection 'blocks.9.attention'"),
        ("blocks.1.attentio", "Did you mean"),
    ],
)
def test_a_name_that_there_is_not(names: Any, says: str) -> None:
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=says):
        dcafy.drop(model, names)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_is_no_converted_model() -> None:
    with pytest.raises(InputError, match="convert it first"):
        dcafy.drop(trained(lambda: with_attention(SELinear, (8, 8))), "x")
    with pytest.raises(InputError, match="has one inside"):
        dcafy.drop(nn.Sequential(network()), "x")


def test_no_names_drop_nothing() -> None:
    model, x = network(), images(2, 32)
    dropped = dcafy.drop(model, [])
    assert torch.equal(evaluate(dropped, x), evaluate(model, x))
    assert not {id(p) for p in dropped.parameters()} & {id(p) for p in model.parameters()}


def test_the_connections_that_usage_names_can_be_dropped_as_it_says() -> None:
    model = network()
    first = next(iter(dcafy.connections(model)))
    with torch.no_grad():
        dcafy.connections(model)[first].beta.fill_(1e-8)
    data = [(images(16, 32), torch.arange(16) % 5)]
    found = dcafy.usage(model, data)
    assert first in found.unheard
    dropped = dcafy.drop(model, found.unheard)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(dropped(data[0][0]), data[0][1]).item()
    assert loss == pytest.approx(found.loss + found.without.loss, abs=1e-5)


def test_a_plan_says_who_hears_nobody_and_may_not_say_both() -> None:
    model = network()
    first = next(iter(dcafy.connections(model)))
    whole, plan = (dict(recipes(one))[""].plan for one in (model, dcafy.drop(model, first)))
    assert "alone" not in whole.to_dict()
    assert plan.to_dict()["alone"] == [{"name": first, "schema": "direct", "branched": False}]
    assert dcafy.Plan.from_dict(plan.to_dict()) == plan
    assert plan.without(first).alone == ()
    plain = dcafy.revert(model)
    again = dcafy.convert(plain, plan=plan, example_inputs=images(2, 32))
    assert list(own_contexts(again)) == [first]
    both = dataclasses.replace(whole, alone=plan.alone)
    stranger = dataclasses.replace(plan, alone=(dataclasses.replace(plan.alone[0], name="elsewhere"),))
    twice = dataclasses.replace(plan, alone=plan.alone * 2)
    said = {"nobody and somebody": both, "no attention block": stranger, "nobody more than once": twice}
    for says, wrong in said.items():
        with pytest.raises(PlanError, match=says):
            dcafy.convert(plain, plan=wrong, example_inputs=images(2, 32))
    schema = dataclasses.replace(plan, alone=(dataclasses.replace(plan.alone[0], schema="__class__"),))
    with pytest.raises(UsageError, match="is not known"):
        dcafy.convert(plain, plan=schema, example_inputs=images(2, 32))
