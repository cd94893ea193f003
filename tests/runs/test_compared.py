"""A comparison is read as it was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dcafy.analysis.listening import ConnectionUsage, Effect, Usage
from dcafy.errors import CheckpointError
from dcafy.runs.compare import Comparison, Contender, Pair
from dcafy.runs.compared import read_comparison
from dcafy.runs.evidence import Difference


def test_a_comparison_is_read_as_it_was_written(tmp_path: Path) -> None:
    effect = Effect(0.1, 0.01, -0.1, None, 100)
    row = ConnectionUsage("a", "channel", 1.0, 0.1, 0.1, 0.2, 0.3, None, effect, None, effect)
    usage = Usage(3, 0.5, 0.6, (row,), effect, None, effect, unheard=("a",), without=effect)
    arms = {
        arm: Contender(({"top1": 0.5}, {"top1": 0.75}), 10, 0.5, 0.1) for arm in ("plain", "attention", "connected")
    }
    pairs = (Pair("connected", "attention", {"top1": Difference(0.1, -0.1, 0.3, 2, 9), "loss": Difference(1, None, None, 2, lower_is_better=True)}),)  # fmt: skip  # noqa: E501
    comparison = Comparison((3, 4), arms, pairs, (usage, None))
    assert read_comparison(tmp_path) is None
    (tmp_path / "compare.json").write_text(json.dumps(comparison.to_dict()))
    assert read_comparison(tmp_path) == comparison
    elsewhere = {f"../{name}" if name == "plain" else name: value for name, value in comparison.to_dict().items()}
    (tmp_path / "compare.json").write_text(json.dumps(elsewhere))
    with pytest.raises(CheckpointError, match="should be one of plain, attention, original, connected"):
        read_comparison(tmp_path)
    data = comparison.to_dict()
    data["pairs"][0]["other"] = "nobody"
    (tmp_path / "compare.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="it compares a network that it does not name"):
        read_comparison(tmp_path)
