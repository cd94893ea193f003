"""``--config``: options in a file, which the command line beats, and what such a file may not say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from two_processes import FACTORY

from dcafy.errors import UsageError
from dcafy.images.options import DataOptions
from dcafy.plan.options import Conversion
from dcafy.runs.asking import Asked, request_of
from dcafy.runs.configured import completed, options_in
from dcafy.runs.options import RunOptions
from dcafy.runs.request import REQUEST, Request, read_request, write_request
from dcafy.sources.options import FileOptions
from dcafy.training import TrainingConfig

Run = Callable[..., tuple[int, str, str]]


def asked(file: Path, model: str = "", **given: Any) -> Asked:
    """What the command makes of a file and of options that stand on the command line."""

    def made(kind: type[Any]) -> Any:
        names = {item.name for item in dataclasses.fields(kind)}
        return kind(**{name: value for name, value in given.items() if name in names})

    run = dataclasses.replace(made(RunOptions), config=file, output=file.parent / "run")
    if model:
        given["model"] = model
    options = {}, run, made(TrainingConfig), made(DataOptions), made(Conversion), made(FileOptions)
    return completed(Asked(model, *options, given, given))


def written(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text)
    return file


EVERYTHING = """
# as in finetune.json, or as the options are called
model: timm:test_resnet
data: digits
set: {drop_rate: 0.25}
attention: SE
training:
  epochs: 5
  lr: 1e-3
  precision: no      # a word, and not false
  milestones: 3
  schedule: multistep
images:
  image-size: 32
bs: 16
compare: [plain, connected]
seeds: 3
"""


def test_a_file_says_what_the_options_say(tmp_path: Path) -> None:
    found = request_of(asked(written(tmp_path, EVERYTHING)))
    assert (found.model, found.data, found.settings) == ("timm:test_resnet", "digits", {"drop_rate": 0.25})
    assert (found.conversion.attention, found.arms, found.seeds) == ("se", ("plain", "connected"), 3)
    training = found.training
    assert (training.epochs, training.lr, training.precision, training.batch_size) == (5, 1e-3, "no", 16)
    assert (training.milestones, training.schedule, found.images.image_size) == ("3", "multistep", 32)


def test_the_command_line_beats_it_and_it_beats_a_recipe(tmp_path: Path) -> None:
    text = "model: timm:resnet18\ndata: digits\nrecipe: paper\nepochs: 7\nmomentum: 0.5\ncompare: plain"
    file = written(tmp_path, text)
    found = request_of(asked(file, epochs=3, plain=True))
    assert (found.training.epochs, found.training.momentum, found.training.weight_decay) == (3, 0.5, 1e-4)
    assert (found.arm, found.arms, found.seeds) == ("plain", (), 0)
    assert request_of(asked(file, model="torchvision:resnet18")).model == "torchvision:resnet18"


@pytest.mark.parametrize("task", ["classification", "detection"])
def test_the_request_of_a_run_is_one(tmp_path: Path, task: str) -> None:
    """Every field of it comes back, whatever the defaults of the task and the recipe are; older versions too."""
    training = TrainingConfig(epochs=2, optimizer="adamw", lr=0.25, warmup_steps=3, clip_norm=1.5)
    known = Request(
        "timm:test_resnet",
        "digits" if task == "classification" else f"coco:{tmp_path}:{tmp_path / 'boxes.json'}",
        settings={"drop_rate": 0.5},
        conversion=Conversion(attention="eca", schema="softmax"),
        images=DataOptions(val_fraction=0.5, download=True),
        training=training,
        seeds=2,
        task=task,
        arms=("attention", "connected"),
        recipe="paper" if task == "classification" else None,
        keep="best",
    )
    write_request(tmp_path, known)
    images = dataclasses.replace(known.images, download=False)  # no file chooses to fetch
    assert request_of(asked(tmp_path / REQUEST)) == dataclasses.replace(known, images=images)
    data = json.loads((tmp_path / REQUEST).read_text())
    del data["prefix"], data["ignore_head"]
    (tmp_path / REQUEST).write_text(json.dumps({**data, "version": 1}))
    assert request_of(asked(tmp_path / REQUEST, epochs=9)).training.epochs == 9


ENDLESS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epocs: 3", "unknown entry epocs. Did you mean 'epochs'"),
        ("training: {epocs: 3}", "unknown entry epocs. Did you mean 'epochs'"),
        ("epochs: three", "epochs should be a whole number, not 'three'|epochs should be a whole number, not three"),
        ("epochs: 0", "run.yaml': --epochs must be at least 1, not 0"),
        ("optimizer: adamv", "Did you mean 'adamw'"),
        ("attention: sse", "Did you mean 'se'"),
        ("training: 3", "training should be a group of options"),
        ("epochs: 3\ntraining: {epochs: 4}", "epochs stands in it twice"),
        ("epochs: 3\nepochs: 4", "stands in it twice"),
        ("- epochs", "it has no names with values"),
        ("", "it has no names with values"),
        ("epochs: [", "is no file of options"),
        ("{", "is no file of options"),
        ("a: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor"),
        ("model: !!python/name:os.system", "could not determine a constructor"),
        (ENDLESS, r"it has an alias \(\*\)"),
        ("epochs: " + "[" * 5000, "is no file of options"),
        ("epochs: 1\n" + "#" * 70000, "it is too large"),
        ('{"version": 99}', "version 99"),
        ("output: elsewhere", "--output is for the command line: a file does not choose what is written"),
        ("json_log: log", "a file does not choose what is written"),
        ("track: wandb", "a file does not choose what is sent"),
        ("images: {download: true}", "a file does not choose what is sent or fetched"),
        ("trust_pickle: true", "a file does not choose what is trusted"),
        ("resume: true", "it is about this call"),
        ("model: os:getcwd\ndata: digits", "built by code: os:getcwd. Name it as MODEL"),
        ("arch: os:getcwd\ndata: digits", "built by code: os:getcwd. Name it as --arch"),
        ("data: torchvision:CIFAR10:there", "may hold pickles"),
        ("follow_links: true", "Say so: --follow-links"),
        ("set: {checkpoint_path: /etc/passwd}", "which a file may not choose"),
        ("set: {act_layer: os.system}", "which a file may not choose"),
        ("set: [1]", "settings should be an object"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, text: str, says: str) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=says) as told:
        asked(written(tmp_path, text))
    assert "\n" not in str(told.value)
    assert sorted(tmp_path.iterdir()) == [*before, tmp_path / "run.yaml"]


def test_what_is_said_on_the_command_line_is_no_strangers_choice(tmp_path: Path) -> None:
    file = written(tmp_path, "model: os:getcwd\ndata: torchvision:CIFAR10:there\nfollow_links: true")
    found = asked(file, model=FACTORY, data="digits", follow_links=True)
    assert (found.model, found.run.data, found.images.follow_links) == (FACTORY, "digits", True)


@pytest.mark.parametrize("path", ["gone.yaml", ".", "/dev/zero", "a\0b"])
def test_a_file_that_is_none(path: str) -> None:
    with pytest.raises(UsageError, match="is no file of options"):
        options_in(Path(path))


def test_a_run_from_a_file_and_one_from_that_runs_request(command: Run, tmp_path: Path) -> None:
    text = "data: digits\nimage_size: 16\ntraining: {epochs: 1, bs: 256, cpu: true, usage_images: 0}\nval_fraction: 0.7"
    file = written(tmp_path, text)
    code, _, err = command(FACTORY, "--config", file, "--track", "tensorboard", "-o", "one")
    assert code == 0, err
    assert "tracked by tensorboard" in err
    assert list((tmp_path / "one/tracked").glob("events*"))
    code, _, err = command(FACTORY, "--config", "one/finetune.json", "--seed", 1, "-o", "other")
    assert code == 0, err
    known: Mapping[str, Any] = vars(read_request(tmp_path / "other"))
    ours = read_request(tmp_path / "one")
    assert known == vars(dataclasses.replace(ours, training=dataclasses.replace(ours.training, seed=1)))
    code, _, err = command("one", "--resume", "--config", file)
    assert (code, "Leave --config out" in err) == (2, True)
