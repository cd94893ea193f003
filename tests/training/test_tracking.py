"""Trackers: what TensorBoard's files say afterwards, and what happens where a tracker fails."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from training_data import Stripes, connected

from dcafy.errors import CheckpointError, UsageError
from dcafy.runs.options import RunOptions
from dcafy.training import Listener, TrainingConfig, finetune
from dcafy.training.telling import Several
from dcafy.training.tracking import Tracked, require_trackers

pytest.importorskip("tensorboard")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CONFIG = TrainingConfig(epochs=2, batch_size=8, usage_images=0, cpu=True, accumulate=2)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of all that the files of this folder say, those below it left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboards_files_say_what_was_measured(tmp_path):
    tracked = Tracked(["tensorboard"], tmp_path / "tracked", "", {"model": "a", "attention": None})
    history = finetune(connected(), Stripes(), Stripes(8), CONFIG, directory=tmp_path, listener=tracked)
    found = scalars(tmp_path / "tracked")
    assert (
        [step for step, _ in found["train/step_loss"]] == [step for step, _ in found["train/lr"]] == list(range(1, 7))
    )
    last = history.epochs[-1]
    for name, value in {"train/loss": last.loss, **{f"validation/{k}": v for k, v in last.metrics.items()}}.items():
        assert [step for step, _ in found[name]] == [3, 6]
        assert found[name][-1][1] == pytest.approx(value)
    for name, state in last.connections.items():
        assert found[f"beta/{name}"][-1] == (6, pytest.approx(state.beta))
        assert found[f"contribution/{name}"][-1] == (6, pytest.approx(state.contribution))
    assert any("batch_size: 8" in path.read_text() for path in (tmp_path / "tracked").rglob("hparams.yml"))


def test_a_run_that_goes_on_has_each_step_once(tmp_path):
    class Stop(Listener):
        def wants(self, step: int) -> bool:
            return step == 5

        def stepped(self, *_: object) -> None:
            raise ZeroDivisionError

    def tracked() -> Tracked:
        return Tracked(["tensorboard"], tmp_path / "tracked", "0-plain", {})

    listener = Several([tracked(), Stop()])
    with pytest.raises(ZeroDivisionError):
        finetune(connected(), Stripes(), Stripes(8), CONFIG, directory=tmp_path, listener=listener)
    finetune(connected(), Stripes(), Stripes(8), CONFIG, directory=tmp_path, resume=True, listener=tracked())
    assert [step for step, _ in scalars(tmp_path / "tracked/0-plain")["train/lr"]] == list(range(1, 7))


class Failing:
    requires_logging_directory = False

    def __init__(self, project: str, at: str = "log", **_: object) -> None:
        self.at = at

    def store_init_configuration(self, values: object) -> None:
        if self.at == "begin":
            raise RuntimeError("no key")

    def log(self, values: object, step: int) -> None:
        raise ConnectionError("the server is gone")


def test_a_server_that_is_gone_does_not_end_a_training(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("accelerate").tracking.LOGGER_TYPE_TO_CLASS, "clearml", Failing)
    with pytest.warns(UserWarning, match="clearml has failed: the server is gone") as warned:
        history = finetune(connected(), Stripes(), Stripes(8), CONFIG, listener=Tracked(["clearml"], tmp_path, "", {}))
    assert (len(history.epochs), len(warned)) == (2, 1)
    monkeypatch.setattr(Failing, "store_init_configuration", lambda self, values: 1 / 0)
    with pytest.raises(UsageError, match="--track clearml cannot begin"):
        finetune(connected(), Stripes(), Stripes(8), CONFIG, listener=Tracked(["clearml"], tmp_path, "", {}))


class Drawing(Failing):
    """One that seeds every generator that there is, as some do."""

    def store_init_configuration(self, values: object) -> None:
        torch.manual_seed(1337), np.random.seed(1337), random.seed(1337)

    def log(self, values: object, step: int) -> None:
        torch.rand(1)

    def finish(self) -> None:
        torch.manual_seed(1)


def test_what_a_tracker_or_a_listener_draws_is_not_the_trainings(tmp_path, monkeypatch):
    class Draws(Listener):
        def wants(self, step: int) -> bool:
            return bool(torch.rand(1) < 2)

        def stepped(self, *_: object) -> None:
            torch.rand(3), np.random.rand(), random.random()

        measured = advanced = stepped

    monkeypatch.setitem(__import__("accelerate").tracking.LOGGER_TYPE_TO_CLASS, "clearml", Drawing)
    ways = [Listener(), Tracked(["clearml"], tmp_path, "", {}), Draws()]
    runs = [finetune(connected(), Stripes(), Stripes(8), CONFIG, listener=way) for way in ways]
    assert len({tuple(epoch.loss for epoch in run.epochs) for run in runs}) == 1


def test_what_cannot_be_tracked_is_told_at_once(tmp_path, monkeypatch):
    assert RunOptions(track="TensorBoard, wandb").trackers == ("tensorboard", "wandb")
    with pytest.raises(UsageError, match="Did you mean 'tensorboard'"):
        RunOptions(track="tensorbord")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs wandb, which is not installed: pip install wandb"):
        require_trackers(["wandb"])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tracked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link"):
        finetune(
            connected(), Stripes(), Stripes(8), CONFIG, listener=Tracked(["tensorboard"], tmp_path / "tracked", "", {})
        )
    assert list((tmp_path / "elsewhere").iterdir()) == []
