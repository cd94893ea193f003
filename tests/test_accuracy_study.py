"""The study of benchmarks/accuracy.py: its rows, its intervals and its tables, on made-up garments."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from garments import with_garments

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
    return with_garments(made)


def short(setting: Any, steps: int = 2) -> Any:
    return dataclasses.replace(setting, steps=steps, batch=8)


ARMS = ["vanilla", "own message", "shuffled", "α alone", "no attention"]


@pytest.mark.filterwarnings("ignore:The schema 'normalised' is not the identity")
@pytest.mark.parametrize("name", ARMS)
def test_an_arm_is_what_it_says(name: str, study: Any, modules: tuple[Any, Any]) -> None:
    accuracy, _ = modules
    (row,) = study.run(short(accuracy.SETTINGS["switch"]), [name], 0)
    assert len(accuracy.unpacked(row["right"])) == 1000
    assert row["accuracy"] == pytest.approx(float(accuracy.unpacked(row["right"]).double().mean()))
    (again,) = study.run(short(accuracy.SETTINGS["switch"]), [name], 0)
    assert {**again, "seconds": row["seconds"]} == row, "a run is a function of setting, arm and seed"
    assert ("beta" in row) == (name not in ("vanilla", "no attention"))
    assert (row.get("beta") == 0.0) == (name == "α alone")
    assert json.loads(json.dumps(row)) == row


SLOW = (
    "cued eca",
    "cued gc",
    "cued, family",
    "switch, options",
    "inserted",
    "inserted, family",
    "plain",
    "tuned, adamw",
)


@pytest.mark.filterwarnings("ignore:The schema 'normalised' is not the identity")
@pytest.mark.parametrize("name", ["cued cbam", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_all_arms_of_a_setting_train_side_by_side(name: str, study: Any, modules: tuple[Any, Any]) -> None:
    """One after the other they end in the same rows."""
    accuracy, _ = modules
    setting = short(accuracy.SETTINGS[name])
    arms = [arm for arm in setting.arms if not setting.arms[arm].order]
    rows = list(study.run(setting, arms, 0))
    assert [row["arm"] for row in rows] == arms
    for row in rows:
        arm = setting.arms[row["arm"]]
        assert (row["added"] > 0) == (arm.options is not None or arm.inserted is not None)
    (alone,) = study.run(setting, arms[-1:], 0)
    assert {**alone, "seconds": 0} == {**rows[-1], "seconds": 0}


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
    """*shuffled* hears another image, *own message* nothing of the block before, with a quarter more parameters."""
    accuracy, _ = modules
    setting = accuracy.SETTINGS["switch"]
    x, _ = study.batch(setting, "train", 6, torch.Generator().manual_seed(1))
    made = {}
    for name in ("centred", "shuffled", "own message"):
        torch.manual_seed(7)
        made[name] = accuracy._converted(study.network(setting, 3), x, accuracy.MAIN[name]).eval()
    own, shuffled = made["own message"], made["shuffled"]
    base = sum(p.numel() for p in study.network(setting, 3).parameters())
    added = {name: sum(p.numel() for p in model.parameters()) - base for name, model in made.items()}
    assert added["centred"] == added["shuffled"]
    assert 1.0 < added["own message"] / added["centred"] < 1.3
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
    assert all(set(accuracy.MAIN) <= set(setting.arms) for setting in main)
    assert all(len(setting.seeds(arm)) == 20 for setting in main for arm in accuracy.MAIN)
    assert all(len(setting.seeds(arm)) >= 5 for setting in settings for arm in setting.arms)
    wanted = {(accuracy.home(s, arm), arm, seed) for s in settings for arm in s.arms for seed in s.seeds(arm)}
    assert set(due) == wanted
    assert ("cued", "vanilla", 0) in wanted
    assert ("cued, family", "vanilla", 0) not in wanted, "one run serves both"
    of = [(accuracy.SETTINGS[s.of], s) for s in settings if s.of]
    assert all((a.words, a.pairs, a.network, a.budget) == (b.words, b.pairs, b.network, b.budget) for a, b in of)
    row = {"setting": "switch", "arm": "vanilla", "seed": 0, **accuracy.SETTINGS["switch"].budget}
    assert accuracy.valid(row)
    assert not accuracy.valid({**row, "steps": 3}), "a row of another budget is not taken with the others"


def test_inserting_starts_from_the_trained_network(study: Any, modules: tuple[Any, Any]) -> None:
    """Attention and connections are exact no-ops in a network that has none, and both are trained."""
    accuracy, _ = modules
    setting = short(accuracy.SETTINGS["inserted"])
    start = study.start(setting, 0, attention=True)
    assert not [module for module in start.modules() if isinstance(module, accuracy.SE)]
    x, _ = study.batch(setting, "train", 4, torch.Generator().manual_seed(1))
    made = accuracy._converted(start, x, setting.arms["inserted"])
    assert torch.equal(made.eval()(x), start.eval()(x))
    assert len([module for module in made.modules() if isinstance(module, accuracy.SE)]) == 6
    with pytest.raises(dcafy.InputError, match="no connections"):
        dcafy.connections(made)
    (row,) = study.run(setting, ["inserted, connected"], 0)
    assert row["added"] > 0
    assert row.keys() >= {"near_half", "spread"}
    assert "beta" in row
    assert accuracy.valid({**row, "steps": accuracy.SETTINGS["inserted"].steps, "batch": 100})


def test_what_is_fine_tuned_starts_from_one_network(study: Any, modules: tuple[Any, Any]) -> None:
    """Whether a run is of the main comparison or of what else was tried."""
    accuracy, _ = modules
    kept = [study.start(short(accuracy.SETTINGS[name]), 0, attention=True) for name in ("tuned", "tuned, options")]
    assert all(torch.equal(a, b) for a, b in zip(*(network.parameters() for network in kept), strict=True))
    assert len(study._trained) == 1


def test_nuisances_are_of_the_whole_image(study: Any, modules: tuple[Any, Any]) -> None:
    """What differs between images of one garment is a number or two that any part of an image tells."""
    accuracy, _ = modules
    one = study.garments("train", range(10))[0][:1].expand(200, -1, -1, -1)
    made = {}
    for name, (task, _words) in accuracy.NUISANCES.items():
        made[name], asked = task(one, one, torch.Generator().manual_seed(0))
        again, _asked = task(one, one, torch.Generator().manual_seed(0))
        assert torch.equal(made[name], again)
        assert made[name].shape[2:] == (16, 16)
        assert not asked.any()
    offsets = made["cast"].mean((2, 3), keepdim=True)
    assert offsets.std(0).min() > 1.5
    assert (made["cast"] - offsets).std(0).max() < 0.3, "what is left is the garment"
    levels = made["blur"].diff(dim=3).abs().mean((1, 2, 3))
    assert levels.max() > 3 * levels.min()
    sharp = accuracy.F.interpolate(one[:1], size=16, mode="area")
    assert made["blur"].mean() == pytest.approx(float(2 * sharp.mean() - 1), abs=0.05)


def test_blurring_is_along_each_axis(modules: tuple[Any, Any]) -> None:
    """Of a point there is left a product of two bells, of widths that differ between images."""
    accuracy, _ = modules
    one = torch.zeros(50, 1, 16, 16)
    one[:, :, 8, 8] = 1.0
    x, _ = accuracy.blur(one, one, torch.Generator().manual_seed(0))
    y = (x[:, 0] + 1) / 2
    assert (y.sum((1, 2)) - 1).abs().max() < 2.5  # what was not cut off at the edges, and noise of 256 places
    rows, columns = y.sum(2), y.sum(1)
    assert (torch.einsum("nr,nc->nrc", rows, columns) / y.sum((1, 2), keepdim=True) - y).abs().mean() < 0.05
    wide = (rows[:, 8] - columns[:, 8]).abs()
    assert wide.max() > 0.3


def test_mobile_networks_have_shortcuts_but_at_strides(modules: tuple[Any, Any]) -> None:
    accuracy, _ = modules
    network = accuracy.Mobile(1, 10, accuracy.ATTENTION["se"])
    kinds = [(type(unit).__name__, unit[3].stride[0]) for unit in network.units]
    assert kinds == [("Shortcut", 1), ("Sequential", 2), ("Shortcut", 1), ("Sequential", 2), *[("Shortcut", 1)] * 2]
    x = torch.rand(2, 8, 8, 8)
    unit = network.units[0].eval()
    assert torch.equal(unit(x), x + torch.nn.Sequential.forward(unit, x))


def test_attention_values_are_compared_wherever_there_are_some(modules: tuple[Any, Any]) -> None:
    """Paper Fig. 1, connected and centred; runs that serve two settings stand once."""
    accuracy, report = modules
    rows = []
    for setting in accuracy.SETTINGS.values():
        for arm, near in (("vanilla", 0.7), ("connected", 0.6), ("inserted", 0.8), ("inserted, centred", 0.5)):
            if arm in setting.arms and accuracy.home(setting, arm) == setting.name:
                for seed in range(3):
                    values = {"near_half": near + 0.01 * seed * (arm == "connected"), "spread": 0.1}
                    rows.append({"setting": setting.name, "arm": arm, "seed": seed, **values})
    lines = [line.split(" | ") for line in report.maps(rows)[2:]]
    own = [name for name, setting in accuracy.SETTINGS.items() if "connected" in setting.arms and not setting.of]
    assert [line[0] for line in lines] == [f"| {name}" for name in [*own, "inserted"]]
    assert lines[0][1:4] == ["connected minus vanilla", "3", "-0.090 [-0.115, -0.065] **"]
    assert lines[-1][1:4] == ["inserted, centred minus inserted", "3", "-0.300"]


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
    assert report.missing(rows, setting) == 20 * (len(setting.arms) - 1) + len(setting.seeds("other order")) - 5
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


@pytest.mark.parametrize("kind", ["rla", "mrla", "dia"])
def test_what_is_handed_on_is_changed_in_the_controls(kind: str, study: Any, modules: tuple[Any, Any]) -> None:
    """The same network: another image's state moves its outputs, so does none, and two equal images hear each other."""
    accuracy, _ = modules
    setting = short(accuracy.SETTINGS["inserted, family"])
    x, _ = study.batch(setting, "train", 4, torch.Generator().manual_seed(1))
    made = {}
    for control in accuracy.CHANGED:
        network = study.made(setting, setting.arms[f"{kind} x10{control}"], 0)[0].eval()
        with torch.no_grad():
            for index, p in enumerate(network.parameters()):
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(index)))
            made[control] = network(x)
            alike = network(x[:1].expand(4, -1, -1, -1))
        assert torch.allclose(alike[0], alike[1], atol=1e-5)
        assert not torch.allclose(made[control], made[""]) or not control
