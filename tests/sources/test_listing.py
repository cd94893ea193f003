"""``dcafy list``: what attention networks have is found in them, and told by name."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

Run = Callable[..., tuple[int, str, str]]


def test_what_they_have(dcafy_command: Run) -> None:
    code, out, err = dcafy_command("list", "timm:test_*resnet", "--json")
    assert code == 0, err
    rows = {row["spec"]: row for row in json.loads(out)}
    assert rows["timm:test_resnet"]["attention"] == {}
    code, out, err = dcafy_command("list", "mobilenet_v3_*")
    assert code == 0, err
    assert out.splitlines() == ["torchvision:mobilenet_v3_large: 8 se", "torchvision:mobilenet_v3_small: 9 se"]


@pytest.mark.parametrize(
    ("attention", "expected"), [("eca", ["timm:ecaresnet26t"]), ("ECA", ["timm:ecaresnet26t"]), ("cbam", [])]
)
def test_only_those_that_have_it(attention: str, expected: list[str], dcafy_command: Run) -> None:
    code, out, err = dcafy_command("list", "*resnet26t", "--attention", attention, "--json")
    assert (code, [row["spec"] for row in json.loads(out)]) == (0 if expected else 3, expected), err


def test_nothing_of_that_name(dcafy_command: Run) -> None:
    code, out, err = dcafy_command("list", "mobilenet_v3_smal")
    assert (code, out) == (2, "")
    assert "Did you mean 'mobilenet_v3_small'?" in err
