"""Configurations: their choices are those that there are, and a mistake names the nearest right word."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torchvision

import dcafy
from dcafy.attention import ATTENTIONS
from dcafy.conversion import converted_as
from dcafy.emit.connection import CHANNEL_MATCHES, SCHEMAS, SPATIAL_MATCHES
from dcafy.errors import UsageError
from dcafy.plan.options import Conversion, check_choices, from_mapping

REGISTRIES = {
    "attention": ATTENTIONS,
    "schema": SCHEMAS,
    "channel_match": CHANNEL_MATCHES,
    "spatial_match": SPATIAL_MATCHES,
}


@pytest.mark.parametrize("name", REGISTRIES)
def test_choices_are_the_registered_names(name):
    field = next(item for item in dataclasses.fields(Conversion) if item.name == name)
    assert set(field.metadata["choices"]) == set(REGISTRIES[name])


@pytest.mark.parametrize("item", dataclasses.fields(Conversion), ids=lambda item: item.name)
def test_every_option_has_help(item):
    assert item.metadata["help"].endswith(".")


def test_a_wrong_choice_names_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'weighted'"):
        check_choices(Conversion(schema="wheighted"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"shema": "direct"}, "Did you mean 'schema'"),
        ({"reduction": "16"}, "reduction should be int"),
        ({"reduction": True}, "reduction should be int"),
        ({"attention": 3}, "attention should be str or None"),
    ],
)
def test_data_that_is_no_configuration(data, says):
    with pytest.raises(UsageError, match=says):
        from_mapping(Conversion, data)


def test_data_gives_the_configuration_back():
    conversion = Conversion(attention="se", reduction=4)
    assert from_mapping(Conversion, dataclasses.asdict(conversion)) == conversion


def test_as_one_value_they_do_what_insert_and_convert_do():
    model = torchvision.models.resnet18().eval()
    conversion = Conversion(attention="ge-theta", where="layer[34].*", init="paper", channel_match="fc1")
    torch.manual_seed(3)
    both = dcafy.convert(
        dcafy.insert(model, "ge-theta", where="layer[34].*", init="paper"), channel_match="fc1", verify=False
    )
    torch.manual_seed(3)
    at_once = converted_as(model, conversion, verify=False)
    ours, theirs = at_once.state_dict(), both.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert len(dcafy.connections(at_once)) == 3
