"""``dcafy finetune``: from a checkpoint to a better checkpoint, whatever happens on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from two_processes import DIGITS as QUICK
from two_processes import FACTORY, FACTORY_CODE

import dcafy
from dcafy.amounts import fixed
from dcafy.plan.options import Conversion
from dcafy.runs.asking import Asked, request_of
from dcafy.runs.compare import compare
from dcafy.runs.options import RunOptions
from dcafy.runs.request import Request, write_request
from dcafy.sources.options import FileOptions
from dcafy.training import DataOptions, TrainingConfig
from dcafy.training.telling import Listener

TESTS = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of grey squares, dark and bright, with two broken files among them."""
    root = tmp_path / "pictures"
    for label, name in enumerate(("dark", "bright")):
        (root / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (24, 24), (40 + 150 * label + number,) * 3).save(root / name / f"{number}.png")
    for name in ("dark/3.png", "bright/5.png"):
        (root / name).write_bytes((root / name).read_bytes()[:40])
    return root


def test_a_run_leaves_a_model_a_log_and_a_request(command: Run, tmp_path: Path) -> None:
    log = tmp_path / "steps.jsonl"
    code, out, err = command(FACTORY, *QUICK, "--epochs", 2, "-o", "run", "--json-log", log)
    assert code == 0
    assert "epoch 2/2: loss" in err
    assert "validation after 2 epochs" in out
    assert "if shuffled" in out
    assert re.search(r"all of them +[+-]\d\.\d{4} ± \d\.\d{4}", out)
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["begin", "epoch", "epoch", "end"]
    assert set(next(iter(rows[1]["connections"].values()))) == {"alpha", "beta", "contribution"}
    assert rows[-1]["usage"]["connections"][0]["shuffled"]["loss_error"] > 0
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events.count("step") == 2 * (1438 // 64)
    from training_data import network

    assert "dcafy.load('run', model=YOUR_NETWORK) gives the model" in " ".join(out.split())
    loaded = dcafy.load(tmp_path / "run", network(classes=10))
    assert all(connection.beta.item() != 0 for connection in dcafy.connections(loaded).values())


@pytest.mark.slow
def test_a_zoo_network_with_inserted_attention_and_a_new_head_is_loaded_by_itself(command: Run) -> None:
    pytest.importorskip("timm")
    code, _, _ = command("timm:test_resnet", "--attention", "se", *QUICK, "--epochs", 1, "-o", "run")
    assert code == 0
    model = dcafy.load("run")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    code, _, _ = command("run", *QUICK, "--epochs", 1, "-o", "again")  # a folder is a MODEL
    assert code == 0
    assert len(dcafy.connections(dcafy.load("again"))) == len(dcafy.connections(model))


def test_a_second_run_needs_a_folder_of_its_own(command: Run, tmp_path: Path) -> None:
    assert command(FACTORY, *QUICK, "--epochs", 1, "-o", "run")[0] == 0
    before = (tmp_path / "run/checkpoint.safetensors").read_bytes()
    code, _, err = command(FACTORY, *QUICK, "--epochs", 1, "-o", "run")
    assert code == 2
    assert "--resume" in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("dear")
    code, _, err = command(FACTORY, *QUICK, "-o", "full")
    assert code == 4
    assert "letter.txt" in err
    code, _, err = command(FACTORY, "-o", "run", "--resume", "--lr", 3)
    assert code == 2
    assert "was started without --lr" in err
    for other, says in (
        ([FACTORY, "--arch", "torchvision:resnet18"], "without --arch"),
        ([FACTORY, "--data", "fashion-mnist"], "with --data digits"),
        ([FACTORY, "--set", "classes=3"], "without --set"),
        ([FACTORY, "--compare"], "without --compare"),
    ):
        code, _, err = command(*other, "-o", "run", "--resume")
        assert code == 2
        assert f"was started {says}" in " ".join(err.split())
    assert (tmp_path / "run/checkpoint.safetensors").read_bytes() == before
    assert command(FACTORY, *QUICK, "--epochs", 1, "-o", "run", "--resume", "--workers", 1)[0] == 0  # as asked, but for


def test_a_folder_does_not_choose_the_code_that_is_run(command: Run, tmp_path: Path) -> None:
    assert command(FACTORY, *QUICK, "--epochs", 1, "-o", "run")[0] == 0
    request = json.loads((tmp_path / "run/finetune.json").read_text())
    request["model"] = "os:getcwd"
    (tmp_path / "run/finetune.json").write_text(json.dumps(request))
    code, _, err = command("run", "--resume")
    assert code == 2
    assert "is built by code: os:getcwd" in err
    (tmp_path / "run/finetune.json").write_text(json.dumps({**request, "model": "hf://somebody/network"}))
    code, _, err = command("run", "--resume")
    assert (code, "comes from the Hub: hf://somebody/network" in err) == (2, True)
    (tmp_path / "run/finetune.json").write_text(json.dumps(request))
    code, _, err = command(FACTORY, "-o", "run", "--resume")
    assert code == 2


def test_a_folder_does_not_choose_what_is_read_elsewhere_or_fetched(command: Run, tmp_path: Path) -> None:
    """A stranger's request asks for both; links are followed where the user says so again, nothing is fetched."""
    images = DataOptions(follow_links=True, download=True)
    request = Request("torchvision:squeezenet1_1", "torchvision:CIFAR10:nowhere", images=images)
    write_request(tmp_path / "run", request.anchored())
    code, _, err = command("run", "--resume")
    assert code == 2
    assert "Say that it may: --follow-links" in err
    run = RunOptions(resume=True, output=tmp_path / "run")
    options = {}, run, TrainingConfig(), DataOptions(), Conversion(), FileOptions()
    known = request_of(Asked("", *options, {"follow_links": True}, {}))
    assert (known.images.follow_links, known.images.download) == (True, False)
    assert request_of(Asked("", *options, {"follow_links": True, "download": True}, {})).images.download


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([FACTORY, "--data", "digitz", "-o", "run"], 2, "Did you mean 'digits'"),
        ([FACTORY, "--data", "digits"], 2, "-o names no folder"),
        ([FACTORY, "-o", "run"], 2, "--data names no images"),
        ([FACTORY, "--data", "digits", "-o", "run", "--seeds", "3"], 2, "Add --compare"),
        ([FACTORY, "--data", "digits", "-o", "run", "--compare", "plain,conected"], 2, "Did you mean 'connected'"),
        ([FACTORY, "--data", "digits", "-o", "run", "--compare", "conected"], 2, "Did you mean 'connected'"),
        ([FACTORY, *QUICK, "-o", "run", "--compare", "attention", "connected"], 2, "--attention names none"),
        ([FACTORY, "--data", "digits", "-o", "run", "--plain", "--compare"], 2, "Leave one of them out"),
        (
            [FACTORY, "--data", "digits", "-o", "run", "--plain", "--attention", "se"],
            2,
            "--compare attention trains it",
        ),
        ([FACTORY, "--data", "digits", "-o", "run", "--plain", "--schema", "softmax"], 2, "--schema is of no use"),
        ([FACTORY, "--data", "digits", "-o", "run", "--compare", "attention", "--reduction", "4"], 2, "of no use"),
        ([FACTORY, "--data", "digits", "-o", "run", "--lr", "inf"], 2, "--lr must be at least 0 and finite"),
        ([FACTORY, *QUICK, "-o", "run", "--json-log", "no/log.jsonl"], 4, "'no/log.jsonl' cannot be written"),
        (["torchvison:resnet18", "--data", "digits", "-o", "run"], 2, "Did you mean 'torchvision'"),
        (["torchvision:resnet19", "--data", "digits", "-o", "run"], 2, "resnet18"),
        ([FACTORY, "--data", "digits", "-o", "run", "--schedule", "cosin"], 2, "Did you mean 'cosine'"),
        ([FACTORY, "--data", "digits", "-o", "run", "--epoch", "3"], 2, "--epochs"),
        ([FACTORY, "--data", "digits", "-o", "run", "--mixup", "-1"], 2, "--mixup must be at least 0"),
        (["nowhere", "--resume"], 2, "There is no run in 'nowhere'"),
        (["torchvision:resnet18", "--data", "digits", "--image-size", "32", "-o", "run"], 3, "--attention se"),
        ([FACTORY, "--data", "digits", "-o", "finetune_factory.py/run", "--image-size", "16"], 4, "run"),
    ],
)
def test_mistakes_cost_nothing(command: Run, tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    ended, _, err = command(*arguments)
    assert ended == code
    assert says in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_broken_pictures_are_named_counted_and_skipped(command: Run, pictures: Path) -> None:
    arguments = [FACTORY, "--data", f"imagefolder:{pictures}", "--image-size", 16, "--batch-size", 4, "--epochs", 1]
    code, out, err = command(*arguments, "-o", "run", "--cpu")
    assert code == 0
    assert "2 images could not be read and were skipped" in out
    for name in ("dark/3.png", "bright/5.png"):
        assert err.count(f"skipped, cannot be read: {pictures / name}") == 1
    code, _, err = command(*arguments, "-o", "strict", "--strict", "--cpu")
    assert code == 2
    assert "--strict was given" in err


def test_every_option_has_help(command: Run) -> None:
    code, out, _ = command("--help")
    assert code == 0
    for kind in (TrainingConfig, DataOptions):
        for item in dataclasses.fields(kind):
            assert f"--{item.name.replace('_', '-')}" in out


# --- killed -----------------------------------------------------------------------------------------------


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "dcafy", "finetune", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(run: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and what was written to stderr, once the run has ended."""
    _, err = run.communicate(timeout=300)
    return run.returncode, err


def written(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def tensors(file: Path) -> dict[str, torch.Tensor]:
    return {key: value for key, value in load_file(file).items() if key.startswith(("model/", "optimizer/"))}


LONG = [*QUICK, "--epochs", "2", "--checkpoint-steps", "2", "--augment", "shift"]


@pytest.mark.slow
def test_killed_at_any_moment_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "finetune_factory.py").write_text(FACTORY_CODE)
    code, err = ended(start(tmp_path, FACTORY, *LONG, "-o", "whole"))
    assert code == 0, err
    moments, file, kills = random.Random(5), tmp_path / "cut/checkpoint.safetensors", 0
    run = start(tmp_path, FACTORY, *LONG, "-o", "cut")
    while kills < 3:
        before, first = written(file), time.monotonic()
        while written(file) == before and run.poll() is None:
            assert time.monotonic() - first < 120
            time.sleep(0.005)
        time.sleep(moments.random() * 0.4)
        if run.poll() is not None:
            break
        run.send_signal(signal.SIGKILL)
        assert ended(run)[0] == -signal.SIGKILL
        kills += 1
        run = start(tmp_path, FACTORY, "-o", "cut", "--resume")
    assert kills >= 2
    code, err = ended(run)
    assert code == 0, err
    ours, theirs = tensors(file), tensors(tmp_path / "whole/checkpoint.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
def test_sigterm_saves_and_exits_143(tmp_path: Path) -> None:
    (tmp_path / "finetune_factory.py").write_text(FACTORY_CODE)
    run = start(tmp_path, FACTORY, *LONG, "--epochs", "50", "-o", "run")
    file = tmp_path / "run/checkpoint.safetensors"
    while not file.exists():
        assert run.poll() is None, ended(run)[1]
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    code, err = ended(run)
    assert code == 143
    assert "dcafy finetune run --resume" in err
    assert "Traceback" not in err


# --- did it help? -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_comparison(command: Run, tmp_path: Path) -> None:
    code, out, _ = command(FACTORY, *QUICK, "--epochs", 1, "-o", "run", "--compare", "--seeds", 2)
    assert code == 0
    found = json.loads((tmp_path / "run/compare.json").read_text())
    assert found["seeds"] == [0, 1]
    for side in ("original", "connected"):
        assert len(found[side]["metrics"]) == 2
        assert found[side]["step_seconds"] > 0
    assert found["connected"]["parameters"] > found["original"]["parameters"]
    pairs = zip(found["connected"]["metrics"], found["original"]["metrics"], strict=True)
    mean = sum(connected["top1"] - original["top1"] for connected, original in pairs) / 2
    assert found["differences"]["top1"]["mean"] == pytest.approx(mean)
    low, high = (found["differences"]["top1"][end] for end in ("low", "high"))
    assert low < mean < high
    assert f"{100 * low:+.2f} to {100 * high:+.2f}: 2 seeds say next to nothing" in out
    assert found["differences"]["top1"]["images"] == 359
    loss = found["differences"]["loss"]
    assert loss["lower_is_better"]
    mean, low = (fixed(loss[name], sign=True) for name in ("mean", "low"))
    assert f"loss, connected minus original: {mean}, 95% interval {low}" in out
    assert len(found["usage"]) == 2
    shutil.rmtree(tmp_path / "run/seeds/1-connected")
    (tmp_path / "run/compare.json").unlink()
    assert command(FACTORY, "-o", "run", "--resume")[0] == 0  # goes on where it was, and comes to the same
    again = json.loads((tmp_path / "run/compare.json").read_text())
    assert again["differences"] == found["differences"]


@pytest.mark.slow
def test_three_arms_in_one_comparison(command: Run, tmp_path: Path) -> None:
    options = ("--attention", "eca", *QUICK, "--epochs", 1, "--usage-images", 0)
    code, out, err = command(
        "torchvision:resnet18", *options, "--compare", "plain", "attention", "connected", "-o", "run"
    )
    assert code == 0, err
    found = json.loads((tmp_path / "run/compare.json").read_text())
    sizes = [found[arm]["parameters"] for arm in ("plain", "attention", "connected")]
    assert sizes == sorted(set(sizes))
    pairs = [(pair["one"], pair["other"]) for pair in found["pairs"]]
    assert pairs == [("connected", "attention"), ("connected", "plain"), ("attention", "plain")]
    for pair in found["pairs"]:
        ours, theirs = (found[pair[side]]["metrics"][0]["loss"] for side in ("one", "other"))
        assert pair["differences"]["loss"]["mean"] == pytest.approx(ours - theirs)
        assert "one seed says nothing" in pair["differences"]["top1"]["verdict"]
    assert "top1, attention minus plain" in out
    assert "--compare" in command("run", "--resume", "--compare", "plain,connected")[2]
    assert command("run", "--resume", "--compare", "connected", "plain", "attention")[0] == 0  # in any order


def test_a_recipe_in_one_line(command: Run, tmp_path: Path) -> None:
    options = ("--recipe", "paper", *QUICK, "--epochs", 1, "--val-resize", 18, "--usage-images", 0)
    code, _, err = command(FACTORY, *options, "-o", "run")
    assert code == 0, err
    kept = json.loads((tmp_path / "run/finetune.json").read_text())
    assert (kept["recipe"], kept["training"]["decayed"], kept["images"]["crop_scale"]) == ("paper", "all", 0.1)
    assert kept["training"]["connection_lr"] == kept["training"]["lr"] == pytest.approx(0.1 / 4)
    code, _, err = command(FACTORY, "-o", "run", "--resume", "--recipe", "paper-mobile")
    assert code == 2
    assert "was started with --recipe paper" in " ".join(err.split())


def test_a_plain_network_is_trained_as_it_is(command: Run, tmp_path: Path) -> None:
    code, _, err = command(FACTORY, *QUICK, "--epochs", 1, "--plain", "-o", "run")
    assert code == 0, err
    assert not any("dca" in key.split(".") for key in load_file(tmp_path / "run/model.safetensors"))
    assert command(FACTORY, "--plain", "-o", "run", "--resume")[0] == 0
    assert command(FACTORY, *QUICK, "--epochs", 1, "--compare", "plain", "-o", "other")[0] == 0
    alone = load_file(tmp_path / "other/seeds/0-plain/model.safetensors")
    assert all(torch.equal(value, alone[key]) for key, value in load_file(tmp_path / "run/model.safetensors").items())


UNMOVED = ("--epochs", 1, "--lr", 0, "--connection-lr", 0, "--weight-decay", 0)


@pytest.mark.slow
def test_both_sides_begin_with_the_same_weights_of_a_network_without_any(command: Run, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    options = ("--attention", "se", "--attention-reduction", 4, *QUICK, *UNMOVED, "--compare", "--seeds", 2)
    code, _, err = command("timm:test_resnet", *options, "-o", "run")
    assert code == 0, err
    kept = {
        (seed, side): load_file(tmp_path / f"run/seeds/{seed}-{side}/model.safetensors")
        for seed in (0, 1)
        for side in ("original", "connected")
    }
    for seed in (0, 1):
        ours, theirs = kept[seed, "connected"], kept[seed, "original"]
        assert ours.keys() - theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert any(not torch.equal(value, kept[1, "original"][key]) for key, value in kept[0, "original"].items())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), [("test_byobnet", None), ("test_resnet", "se")])
def test_a_folder_that_is_connected_is_compared_with_what_it_was_before(
    name: str, attention: str | None, command: Run, tmp_path: Path
) -> None:
    pytest.importorskip("timm")
    dcafy.save(dcafy.convert(timm_network(name), attention=attention), tmp_path / "connected")
    assert command("connected", *QUICK, *UNMOVED, "--compare", "-o", "run")[0] == 0
    found = json.loads((tmp_path / "run/compare.json").read_text())
    assert found["connected"]["parameters"] > found["original"]["parameters"]
    assert found["connected"]["metrics"] == found["original"]["metrics"]
    code, _, err = command("connected", *QUICK, "--epochs", 1, "-o", "trained")
    assert code == 0
    code, _, err = command("trained", *QUICK, "--epochs", 1, "--compare", "-o", "again")
    assert code == 2
    assert "have been trained already" in err


def timm_network(name: str) -> torch.nn.Module:
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: torch.nn.Module = timm.create_model(name)
    return model.eval()


def test_a_comparison_that_was_stopped_names_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stops(Listener):
        def wants(self, step: int) -> bool:
            return True

        def stepped(self, *_: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "finetune_factory.py").write_text(FACTORY_CODE)
    quick = TrainingConfig(epochs=1, batch_size=64, cpu=True, usage_images=0)
    request = Request(FACTORY, "digits", images=DataOptions(image_size=16), training=quick, seeds=1)
    with pytest.raises(dcafy.errors.Interrupted, match=r"dcafy finetune \S*/run --resume"):
        compare(request, tmp_path / "run", listener_for=lambda title: (Stops(),))
    sys.modules.pop("finetune_factory", None)
