"""The study of benchmarks/accuracy.py: its rows, its intervals and its tables, on made-up garments."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dcafy

SOURCE = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[Any, Any]]:
    sys.path.insert(0, str(SOURCE))
    try:
        yield importlib.import_module("accuracy"), importlib.import_module("accuracy_report")
    finally:
        sys.path.remove(str(SOURCE))


@pytest.fixture
def study(modules: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    accuracy, _ = modules
    monkeypatch.setattr(accuracy, "VALIDATION", 1000)
    made = accuracy.Study(Path("nowhere"))
    chance = torch.Generator().manual_seed(0)
    images, labels = torch.rand(60, 1, 28, 28, generator=chance), torch.arange(60) % 10
    for part in ("train", "t10k"):
        for classes in (range(10), range(5), range(5, 10)):
            kept = (labels >= classes.start) & (labels < classes.stop)
            made._garments[part, classes] = images[kept], labels[kept] - classes.start
    return made


def short(setting: Any, steps: int = 2) -> Any:
    return dataclasses.replace(setting, steps=steps, batch=8)


ARMS = ["vanilla", "own message", "shuffled", "α alone", "no attention"]


@pytest.mark.filterwarnings("ignore:The schema 'normalised' is not the identity")
@pytest.mark.parametrize("name", ARMS)
def test_an_arm_is_what_it_says(name: str, study: Any, modules: tuple[Any, Any]) -> None:
    accuracy, _ = modules
    row = study.run(short(accuracy.SETTINGS["switch"]), name, 0)
    assert len(accuracy.unpacked(row["right"])) == 1000
    assert row["accuracy"] == pytest.approx(float(accuracy.unpacked(row["right"]).double().mean()))
    again = study.run(short(accuracy.SETTINGS["switch"]), name, 0)
    assert {**again, "seconds": row["seconds"]} == row, "a run is a function of setting, arm and seed"
    assert ("beta" in row) == (name not in ("vanilla", "no attention"))
    assert (row.get("beta") == 0.0) == (name == "α alone")
    assert json.loads(json.dumps(row)) == row


def test_arms_start_from_the_same_weights_and_outputs(study: Any, modules: tuple[Any, Any]) -> None:
    """All but *normalised*, whose f is another from the start."""
    accuracy, _ = modules
    setting = accuracy.SETTINGS["switch"]
    x, _ = study.batch(setting, "train", 4, torch.Generator().manual_seed(1))
    vanilla = study.network(setting, 3).eval()
    for arm in accuracy.MAIN.values():
        if arm.options is not None and "schema" not in arm.options:
            assert torch.equal(accuracy._converted(study.network(setting, 3), x, arm).eval()(x), vanilla(x))


def test_controls_differ_in_one_thing(study: Any, modules: tuple[Any, Any]) -> None:
    """*shuffled* hears another image, *own message* nothing of the block before, with as many parameters or nearly."""
    accuracy, _ = modules
    setting = accuracy.SETTINGS["switch"]
    x, _ = study.batch(setting, "train", 6, torch.Generator().manual_seed(1))
    made = {}
    for name in ("centred", "shuffled", "own message"):
        torch.manual_seed(7)
        made[name] = accuracy._converted(study.network(setting, 3), x, accuracy.MAIN[name]).eval()
    own, shuffled = made["own message"], made["shuffled"]
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in made.items()}
    assert counts["centred"] == counts["shuffled"]
    assert abs(counts["own message"] - counts["centred"]) < 0.02 * counts["centred"]
    T, G_prev = torch.rand(6, 32, 1, 1), torch.rand(6, 32, 1, 1)
    G = torch.rand(6, 32, 1, 1)
    first, rolled = (dcafy.connections(model)["units.1.6"] for model in (made["centred"], shuffled))
    for connection in (first, rolled, *dcafy.connections(own).values()):
        connection.beta.data.fill_(1.0)
    message = first.matched(G, T, G_prev)
    assert torch.equal(rolled.matched(G, T, G_prev), message.roll(1, 0))
    hearing = dcafy.connections(own)["units.1.6"]
    assert torch.equal(hearing(G, T, G_prev), hearing(G, T + 1, G_prev + 1))
    assert not torch.equal(hearing(G, T, G_prev), hearing(G + 0.1 * T, T, G_prev))


def test_a_killed_run_goes_on(tmp_path: Path, modules: tuple[Any, Any]) -> None:
    accuracy, _ = modules
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert accuracy.read(path) == [{"a": 1}, {"a": 2}]
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'


def test_runs_are_due_once_and_spreads_first(modules: tuple[Any, Any]) -> None:
    accuracy, _ = modules
    settings = list(accuracy.SETTINGS.values())
    due = list(dict.fromkeys(accuracy.due(settings, None)))
    main = [setting for setting in settings if setting.main]
    assert [key[1] for key in due[: 4 * len(main)]] == ["vanilla"] * 4 * len(main)
    assert len(main) == 3
    assert all(set(accuracy.MAIN) <= set(setting.arms) and setting.seeds == 20 for setting in main)
    wanted = {(accuracy.home(s.name, arm), arm, seed) for s in settings for arm in s.arms for seed in range(s.seeds)}
    assert set(due) == wanted
    assert ("cued", "vanilla", 0) in wanted
    assert ("cued, family", "vanilla", 0) not in wanted, "one run serves both"
    of = [(accuracy.SETTINGS[s.of], s) for s in settings if s.of]
    assert all((a.words, a.pairs, a.network, a.budget) == (b.words, b.pairs, b.network, b.budget) for a, b in of)
    row = {"setting": "switch", "arm": "vanilla", "seed": 0, **accuracy.SETTINGS["switch"].budget}
    assert accuracy.valid(row)
    assert not accuracy.valid({**row, "steps": 3}), "a row of another budget is not taken with the others"


@pytest.mark.parametrize("seeds", [3, 5, 10, 20])
@pytest.mark.parametrize("spread", [0.0, 0.02])
def test_intervals_hold_what_they_say(seeds: int, spread: float, modules: tuple[Any, Any]) -> None:
    """Seeds and images drawn anew: 95% of the intervals have the true difference in them."""
    _, report = modules
    chance = torch.Generator().manual_seed(seeds)
    rounds, images, found = 600, 200, 0

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=chance, dtype=torch.float64)

    for _ in range(rounds):
        differences = 0.01 + spread * draw(seeds, 1) + 0.1 * draw(1, images) + 0.5 * draw(seeds, images)
        mean, half = report.interval(differences)
        found += abs(mean - 0.01) <= half
    assert abs(found / rounds - 0.95) < 0.01 + 2 * math.sqrt(0.95 * 0.05 / rounds)


def test_one_seed_has_no_interval(modules: tuple[Any, Any]) -> None:
    assert modules[1].interval(torch.ones(1, 5, dtype=torch.float64)) == (1.0, None)


def test_what_is_missing_is_called_so(study: Any, modules: tuple[Any, Any]) -> None:
    accuracy, report = modules
    setting = accuracy.SETTINGS["switch"]
    right = torch.arange(800) % 4 > 0
    rows = []
    for arm, seeds, wrong in (("vanilla", 3, 0), ("centred", 2, 80)):
        for seed in range(seeds):
            hits = right.clone()
            hits[: 4 * wrong : 4] = True
            row = {"setting": "switch", "arm": arm, "seed": seed, **setting.budget, "loss": 1.0, "added": 0}
            rows.append({**row, "accuracy": float(hits.double().mean()), "right": accuracy.packed(hits)})
    text = report.report(rows)
    assert "**Incomplete**: 5 runs are here" in text
    assert f"Incomplete: {report.missing(rows, setting)} runs are still to come" in text
    assert report.missing(rows, setting) == 20 * len(setting.arms) - 5
    line = next(line for line in text.splitlines() if line.startswith("| centred: "))
    assert "| 2 | 85.00 | +10.00 [" in line


def test_the_rows_that_are_committed_make_the_tables(modules: tuple[Any, Any]) -> None:
    accuracy, report = modules
    rows = accuracy.read(accuracy.RESULTS)
    assert rows
    assert all(accuracy.valid(row) for row in rows)
    assert len({(row["setting"], row["arm"], row["seed"]) for row in rows}) == len(rows)
    written = accuracy.RESULTS.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    tables = [line for line in report.report(rows).splitlines() if line.startswith("|")]
    assert [line for line in written if line.startswith("|")] == tables
