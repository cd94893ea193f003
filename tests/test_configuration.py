"""Configurations: their choices are those that there are, and a mistake names the nearest right word."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
import torchvision

import dcafy
from dcafy.attention import ATTENTIONS
from dcafy.choices import CHOICES
from dcafy.emit.matching import CHANNEL_MATCHES, SPATIAL_MATCHES
from dcafy.emit.schemas import SCHEMAS
from dcafy.errors import UsageError
from dcafy.link.topology import TOPOLOGIES
from dcafy.plan.options import Conversion, Linking, Overrides, check
from dcafy.records import Unknown, Wrong, read

REGISTRIES = {
    "attention": ATTENTIONS,
    "schema": SCHEMAS,
    "channel_match": CHANNEL_MATCHES,
    "spatial_match": SPATIAL_MATCHES,
    "topology": TOPOLOGIES,
}


@pytest.mark.parametrize("name", REGISTRIES)
def test_choices_are_the_registered_names(name):
    field = next(item for item in dataclasses.fields(Conversion) if item.name == name)
    assert set(field.metadata["choices"] or CHOICES[name]) == set(REGISTRIES[name])


def test_a_link_overrides_the_options_that_it_may():
    assert [item.name for item in dataclasses.fields(Overrides)] == [item.name for item in dataclasses.fields(Linking)]


def test_the_signature_of_convert_says_the_options():
    parameters = inspect.signature(dcafy.convert).parameters
    for item in dataclasses.fields(Conversion):
        assert parameters[item.name].default == item.default
    with pytest.raises(TypeError, match="shema"):
        dcafy.convert(torchvision.models.resnet18(), shema="direct")


@pytest.mark.parametrize("item", dataclasses.fields(Conversion), ids=lambda item: item.name)
def test_every_option_has_help(item):
    assert item.metadata["help"].endswith((".", "]"))


def test_a_wrong_choice_names_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'weighted'"):
        check(Conversion(schema="wheighted"), CHOICES)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"shema": "direct"}, "Did you mean 'schema'"),
        ({"reduction": "16"}, "reduction should be a whole number"),
        ({"reduction": True}, "reduction should be a whole number"),
        ({"attention": 3}, "attention should be text"),
    ],
)
def test_data_that_is_no_configuration(data, says):
    with pytest.raises((Wrong, Unknown), match=says):
        read(Conversion, data)


def test_data_gives_the_configuration_back():
    conversion = Conversion(attention="se", reduction=4)
    assert read(Conversion, dataclasses.asdict(conversion)) == conversion


def test_as_one_value_they_do_what_insert_and_convert_do():
    model = torchvision.models.resnet18().eval()
    conversion = Conversion(attention="ge-theta", where="layer[34].*", attention_init="paper", channel_match="fc1")
    torch.manual_seed(3)
    both = dcafy.convert(
        dcafy.insert(model, "ge-theta", where="layer[34].*", init="paper"), channel_match="fc1", verify=False
    )
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="'ge-theta' in its paper's own form is not the identity"):
        at_once = dcafy.convert(model, verify=False, **dataclasses.asdict(conversion))
    ours, theirs = at_once.state_dict(), both.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert len(dcafy.connections(at_once)) == 3


def test_a_whole_configuration_may_have_options_that_go_by_others():
    model = torchvision.models.mobilenet_v3_small().eval()
    d = dcafy.convert(model, verify=False, **dataclasses.asdict(Conversion(topology="own", attention_init="paper")))
    assert len(dcafy.connections(d)) == 9


def is_limited(item):
    return item.metadata["choices"] or item.name in CHOICES or item.metadata["bounds"]


@pytest.mark.parametrize(
    "name", [item.name for item in dataclasses.fields(Conversion) if item.default is not None and is_limited(item)]
)
def test_none_is_no_value_of_an_option_that_has_one(name):
    with pytest.raises(UsageError, match=name):
        dcafy.convert(torchvision.models.resnet18(), **{name: None})


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "16"])
def test_a_number_out_of_bounds(value):
    with pytest.raises(UsageError, match="reduction must be a whole number of at least 1, not"):
        dcafy.convert(torchvision.models.resnet18(), reduction=value)
