"""Whole networks from files with something odd inside: refused in one line, with and without trust."""

from __future__ import annotations

import collections
import contextlib

import pytest
import torch
from torch import nn
from torchvision.ops import SqueezeExcitation

import dcafy
from dcafy.errors import DcafyError, SourceError
from dcafy.sources import open_model


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), SqueezeExcitation(8, 4), nn.ReLU(), nn.Conv2d(8, 8, 3), SqueezeExcitation(8, 4)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
    )


def deep(levels):
    inner = nn.Identity()
    for _ in range(levels):
        inner = nn.Sequential(inner)
    return inner


def lists(levels):
    inner = []
    for _ in range(levels):
        inner = [inner]
    return inner


def with_itself(model):
    model._modules["x"] = model


ODD = {
    "a method that is data": lambda m: vars(m[0]).update(forward=3),
    "a method that is a class": lambda m: vars(m[0]).update(named_parameters=nn.Linear),
    "a method that is a module": lambda m: vars(m[1]).update(forward=nn.ReLU()),
    "a property that is data": lambda m: vars(m).update(__class__=1),
    "a child named like a method": lambda m: m._modules.update(forward=nn.ReLU()),
    "a child named like a dunder": lambda m: m._modules.update(__class__=nn.ReLU()),
    "a child that a plain attribute of its class hides": lambda m: m._modules.update(call_super_init=nn.ReLU()),
    "a child without a name": lambda m: m._modules.update({"": nn.ReLU()}),
    "a child with a dot": lambda m: m._modules.update({"a.b": nn.ReLU()}),
    "a child that is a class": lambda m: m._modules.update(x=nn.ReLU),
    "a child that is a number": lambda m: m._modules.update(x=1),
    "a child that an attribute hides": lambda m: vars(m[1]).update(fc1=None),
    "a child of itself": with_itself,
    "children too deep": lambda m: m._modules.update(x=deep(150)),
    "a parameter that is a number": lambda m: m[0]._parameters.update(weight=1),
    "a parameter that is a module": lambda m: m[0]._parameters.update(weight=nn.ReLU()),
    "a buffer that is text": lambda m: m[0]._buffers.update(mean="x"),
    "no parameters": lambda m: vars(m[0]).pop("_parameters"),
    "parameters in a list": lambda m: vars(m[0]).update(_parameters=[]),
    "no children": lambda m: vars(m).pop("_modules"),
    "a mode that is a number": lambda m: vars(m[0]).update(training=3),
    "hooks in a list": lambda m: vars(m[0]).update(_forward_hooks=[1]),
    "a hook that is a class": lambda m: m[0]._forward_hooks.update({0: nn.Linear}),
    "a hook that is a number": lambda m: vars(m[0]).update(_state_dict_hooks=collections.OrderedDict({0: 1})),
    "names of buffers in a list": lambda m: vars(m[0]).update(_non_persistent_buffers_set=["x"]),
    "lists too deep": lambda m: vars(m[0]).update(note=lists(200)),
}


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("odd", ODD)
def test_odd_insides_are_refused(odd, trust, tmp_path):
    model = network()
    ODD[odd](model)
    torch.save(model, tmp_path / "odd.pt")
    with pytest.raises(SourceError) as caught:
        open_model(str(tmp_path / "odd.pt"), trust_pickle=trust)
    assert "odd insides" in str(caught.value) or "could not be unpickled" in str(caught.value)
    assert "\n" not in str(caught.value)


BROKEN = {
    "strides of 0": lambda m: vars(m[0]).update(stride=(0, 0)),
    "padding beyond all bounds": lambda m: vars(m[0]).update(padding=(2**62, 1)),
    "a padding of nobody's": lambda m: vars(m[0]).update(padding_mode="x"),
    "weights of another shape": lambda m: m[0]._parameters.update(weight=nn.Parameter(torch.zeros(3))),
    "no weights": lambda m: m[0]._parameters.update(weight=None),
    "no stride": lambda m: vars(m[0]).pop("stride"),
    "another class": lambda m: setattr(m[0], "__class__", nn.Bilinear),
    "another class for the root": lambda m: setattr(m, "__class__", nn.ModuleDict),
    "settings that are none": lambda m: vars(m).update(pretrained_cfg=3, default_cfg="x", image_size=None),
    "a size of text": lambda m: vars(m[5]).update(output_size="x"),
}


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.filterwarnings("ignore")
def test_broken_networks_are_told_or_connected(broken, trust, tmp_path):
    """Some work all the same; none raises what a user could not read."""
    model = network()
    BROKEN[broken](model)
    torch.save(model, tmp_path / "broken.pt")
    with contextlib.suppress(DcafyError):
        opened = open_model(str(tmp_path / "broken.pt"), trust_pickle=trust).model
        connected = dcafy.convert(opened, example_inputs=torch.zeros(2, 3, 12, 12))
        assert len(dcafy.connections(connected)) == 1


def test_a_number_of_layers_that_would_take_for_ever(tmp_path):
    model = nn.Sequential(nn.LSTM(2, 2))
    model[0].num_layers = 10**9
    torch.save(model, tmp_path / "rnn.pt")
    with pytest.raises(SourceError, match="another number of layers than weights"):
        open_model(str(tmp_path / "rnn.pt"))


def test_what_a_user_may_do_passes(tmp_path):
    """Hooks, methods of one's own and shared modules are fine where the file is trusted, shared ones anyway."""
    model = network()
    model.append(model[2])
    torch.save(model, tmp_path / "shared.pt")
    opened = open_model(str(tmp_path / "shared.pt")).model
    assert opened[2] is opened[8]
    model[0].register_forward_hook(print)
    model[0].train = nn.Module.train.__get__(model[0])
    torch.save(model, tmp_path / "hooked.pt")
    assert open_model(str(tmp_path / "hooked.pt"), trust_pickle=True).model[0]._forward_hooks
