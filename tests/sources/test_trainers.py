"""Checkpoints as trainers write them: data beside the weights, and networks inside larger state dicts."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import logging
import pathlib
import pickle
import types

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torchvision.transforms import InterpolationMode
from typer.testing import CliRunner

from dcafy.cli import app
from dcafy.errors import SourceError, UsageError
from dcafy.sources import open_model

ARCH = "timm:resnet10t"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=4).eval()


@pytest.fixture(scope="module")
def other():
    torch.manual_seed(1)
    return timm.create_model("resnet10t", num_classes=4).eval()


@pytest.fixture(scope="module")
def optimizer(network):
    made = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    return made.state_dict()


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def same(model, other):
    return all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())


def opened(content, path, **options):
    torch.save(content, path)
    return open_model(str(path), **{"arch": ARCH, **options}).model


# --- what trainers keep beside the weights ----------------------------------------------------------


class Mine:
    """A class of nobody's package."""


ARGUMENTS = argparse.Namespace(
    lr=0.1,
    output=pathlib.Path("runs/a"),
    amp_dtype=torch.float16,
    device=torch.device("cuda", 1),
    sizes=torch.Size([3, 4]),
)

DATA = {
    "argparse.Namespace": ARGUMENTS,
    "types.SimpleNamespace": types.SimpleNamespace(a=[1, 2]),
    "numpy numbers": [np.float64(0.5), np.float32(1.5), np.int64(3), np.bool_(True), np.str_("a"), np.complex64(1j)],
    "numpy types": [np.dtype("float32"), np.dtype("int64"), np.dtype(">f8"), np.dtype("U3")],
    "numpy arrays": [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.eye(3)),
        np.array(["ab", "c"]),
        np.zeros((0, 2)),
    ],
    "numpy's generator": np.random.RandomState(0).get_state(),
    "paths": [pathlib.PurePosixPath("a/b"), pathlib.PureWindowsPath("C:\\a")],
    "OrderedDict": collections.OrderedDict(a=1),
    "defaultdict": collections.defaultdict(list, {"loss": [0.5]}),
    "Counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2], maxlen=3),
    "sets": [{1, 2}, frozenset("a"), set()],
    "torch's constants": [torch.float16, torch.bfloat16, torch.strided, torch.Size([1, 2]), torch.device("cpu")],
    "enumerations": [InterpolationMode.BILINEAR],
    "datetime": [
        datetime.datetime(2024, 2, 29, 1, 2, 3, 4),
        datetime.date(2024, 2, 29),
        datetime.time(1, 2, 3, 4, fold=1),
    ],
    "time zones": datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=-3), "X")),
    "plain": [None, True, 2**70, -1.5, float("inf"), "é\n", b"\x00\xff", bytearray(b"x"), 1j, range(3), slice(1, None)],
    "tensors": [torch.get_rng_state(), torch.tensor(3), torch.zeros(2, dtype=torch.uint16), torch.ones(2, 3).t()],
}


def equal(one, two):
    if isinstance(one, torch.Tensor | np.ndarray):
        return type(one) is type(two) and one.dtype == two.dtype and one.shape == two.shape and bool((one == two).all())
    if isinstance(one, dict):
        return type(one) is type(two) and one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple | collections.deque):
        return type(one) is type(two) and len(one) == len(two) and all(map(equal, one, two))
    if isinstance(one, argparse.Namespace | types.SimpleNamespace):
        return type(one) is type(two) and equal(vars(one), vars(two))
    return one == two and (isinstance(one, pathlib.PurePath) or type(one) is type(two))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("kind", DATA)
def test_data_beside_the_weights_is_read_as_it_was(kind, protocol, legacy, tmp_path):
    """The network's attribute is where a reader of files shows what it read."""
    holder = nn.Identity()
    holder.data = DATA[kind]
    how = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": not legacy}
    torch.save(holder, tmp_path / "data.pt", **how)
    assert equal(holder.data, open_model(str(tmp_path / "data.pt")).model.data)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (Mine(), f"wants {__name__}.Mine. Opening"),
        (argparse.Namespace(inner=Mine()), f"wants {__name__}.Mine. Opening"),
        (collections.defaultdict(Mine), f"wants {__name__}.Mine. Opening"),
        (np.array([Mine()], dtype=object), f"wants numpy objects, {__name__}.Mine. Opening"),
        (np.array([1, "a"], dtype=object), "wants numpy objects. Opening"),
        (np.zeros(2, dtype=[("a", "i4")]), "wants numpy's types of several fields. Opening"),
        (np.datetime64("2024-01-01"), "wants numpy's type M8. Opening"),
        (print, "wants builtins.print. Opening"),
        (argparse.ArgumentParser, "wants argparse.ArgumentParser. Opening"),
        (pathlib.Path.unlink, "wants .*getattr"),
        (enum.Enum, "wants enum.Enum. Opening"),
        (nn.functional.relu, "wants torch.nn.functional.relu. Opening"),
        (torch.Generator, "wants torch._C.Generator. Opening"),
    ],
)
def test_anything_else_beside_the_weights_is_refused_by_name(value, says, network, tmp_path):
    with pytest.raises(SourceError, match=says) as caught:
        opened({"state_dict": network.state_dict(), "args": value}, tmp_path / "w.pt")
    assert "\n" not in str(caught.value)


# --- the files of trainers --------------------------------------------------------------------------


def lightning(state, optimizer):
    return {
        "epoch": 3,
        "global_step": 300,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {**prefixed(state, "model."), "criterion.weight": torch.ones(4), "train_acc.tp": torch.zeros(4)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best_model_score": torch.tensor(0.5), "dirpath": "runs"}},
        "optimizer_states": [optimizer],
        "lr_schedulers": [{"T_max": 10, "base_lrs": [0.1], "_get_lr_called_within_step": False}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "path": pathlib.PurePosixPath("data")},
    }


TRAINERS = {
    "timm": lambda state, optimizer: {
        "epoch": 3,
        "arch": "resnet10t",
        "state_dict": state,
        "state_dict_ema": state,
        "optimizer": optimizer,
        "version": 2,
        "args": ARGUMENTS,
        "amp_scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "metric": np.float64(71.2),
    },
    "torchvision's references": lambda state, optimizer: {
        "model": state,
        "optimizer": optimizer,
        "lr_scheduler": {"step_size": 30, "_last_lr": [0.1], "verbose": False},
        "epoch": 3,
        "args": ARGUMENTS,
        "model_ema": {"n_averaged": torch.tensor(3), **prefixed(state, "module.")},
        "scaler": None,
    },
    "Lightning": lightning,
    "Lightning, compiled": lambda state, optimizer: {"state_dict": prefixed(state, "model._orig_mod.")},
    "mmengine": lambda state, optimizer: {
        "meta": {
            "epoch": 3,
            "cfg": "model = dict()",
            "seed": np.int64(1),
            "time": "20240101_000000",
            "CLASSES": ("a", "b"),
        },
        "state_dict": {**prefixed(state, "backbone."), "data_preprocessor.mean": torch.zeros(3, 1, 1)},
        "optimizer": optimizer,
        "param_schedulers": [{"_last_value": [0.1], "param_name": "lr"}],
    },
    "mmpretrain's head": lambda state, optimizer: {"state_dict": prefixed(state, "module.backbone.")},
    "ultralytics-like": lambda state, optimizer: {
        "epoch": -1,
        "best_fitness": None,
        "model": state,
        "ema": None,
        "updates": 12,
        "date": datetime.datetime(2024, 2, 29),
        "train_args": {"lr0": 0.01, "data": pathlib.PurePosixPath("coco.yaml")},
        "train_metrics": {"fitness": np.float64(0.5)},
    },
    "Hugging Face's timm wrapper": lambda state, optimizer: prefixed(state, "timm_model."),
    "DataParallel": lambda state, optimizer: prefixed(state, "module."),
    "DataParallel of a compiled one": lambda state, optimizer: {
        "net": prefixed(state, "module._orig_mod."),
        "acc": 71.2,
    },
    "an average of models": lambda state, optimizer: {"n_averaged": torch.tensor(2), **prefixed(state, "module.")},
    "an average in a namespace": lambda state, optimizer: {
        "ema": {"module": state, "decay": 0.9},
        "best": np.float32(1),
    },
    "numbers among the weights": lambda state, optimizer: {"state_dict": {**state, "epoch": 3}},
    "Detectron2, in numpy's arrays": lambda state, optimizer: {
        "model": {key: value.numpy() for key, value in prefixed(state, "backbone.").items()},
        "__author__": "somebody",
        "matching_heuristics": True,
    },
    "a detector's backbone": lambda state, optimizer: {
        "model": {**prefixed(state, "backbone.body."), "rpn.head.conv.weight": torch.zeros(8, 8, 3, 3)}
    },
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_files_of_trainers(trainer, network, optimizer, tmp_path):
    content = TRAINERS[trainer](network.state_dict(), optimizer)
    assert same(opened(content, tmp_path / "w.pth"), network)


@pytest.mark.parametrize("trainer", ["timm", "Lightning"])
def test_commands_on_the_files_of_trainers(trainer, optimizer, tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("legacy_seresnet18", num_classes=4).state_dict()
    torch.save(TRAINERS[trainer](state, optimizer), tmp_path / "w.ckpt")
    arguments = [str(tmp_path / "w.ckpt"), "--arch", "timm:legacy_seresnet18", "--input-size", "3x32x32"]
    shown = CliRunner().invoke(app, ["inspect", *arguments])
    assert (shown.exit_code, "8 attention blocks" in shown.output) == (0, True)
    made = CliRunner().invoke(app, ["convert", *arguments, "-o", str(tmp_path / "out"), "--no-verify"])
    assert (made.exit_code, "7 connections" in made.output) == (0, True)


def test_the_place_is_said_on_the_command_line(tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("legacy_seresnet18").state_dict()
    body = {key: value for key, value in state.items() if not key.startswith("last_linear.")}
    torch.save(
        {"student": prefixed(body, "module.backbone."), "teacher": prefixed(body, "backbone.")}, tmp_path / "w.pth"
    )
    arguments = ["inspect", str(tmp_path / "w.pth"), "--arch", "timm:legacy_seresnet18", "--input-size", "3x32x32"]
    refused = CliRunner().invoke(app, arguments)
    assert (refused.exit_code, "--ignore-head" in refused.output) == (4, True)
    shown = CliRunner().invoke(app, [*arguments, "--prefix", "teacher.backbone", "--ignore-head"])
    assert (shown.exit_code, "8 attention blocks" in shown.output) == (0, True)


# --- networks inside larger state dicts -------------------------------------------------------------


def test_what_is_left_over_is_told(network, optimizer, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "dcafy"):
        opened(lightning(network.state_dict(), optimizer), tmp_path / "w.ckpt")
    count = len(network.state_dict())
    assert f"under model: all {count} tensors under 'model', 2 left over: criterion.weight, train_acc.tp" in caplog.text


DINO = {
    "in dicts": lambda one, two: {
        "student": prefixed(one, "module.backbone."),
        "teacher": {**prefixed(two, "backbone."), "head.mlp.0.weight": torch.zeros(8, 8)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        "args": ARGUMENTS,
    },
    "in keys": lambda one, two: {
        "state_dict": {**prefixed(one, "student.module.backbone."), **prefixed(two, "teacher.backbone.")}
    },
    "with a queue": lambda one, two: {
        "state_dict": {
            **prefixed(one, "module.student.module.backbone."),
            **prefixed(two, "module.teacher.backbone."),
            "module.queue": torch.zeros(8, 4),
        }
    },
}


@pytest.mark.parametrize("form", DINO)
def test_of_two_networks_the_user_is_asked_which(form, network, other, tmp_path):
    content = DINO[form](network.state_dict(), other.state_dict())
    with pytest.raises(SourceError, match=r"holds 2 networks that fit .* Say which one it is: --prefix ") as caught:
        opened(content, tmp_path / "w.pth")
    for place, expected in (("student.module.backbone", network), ("teacher.backbone", other)):
        assert place in str(caught.value)
        assert same(opened(content, tmp_path / "w.pth", prefix=place), expected)
    assert same(opened(content, tmp_path / "w.pth", prefix="teacher"), other)


def test_of_two_networks_that_are_one_none_is_asked_for(network, tmp_path):
    state = network.state_dict()
    assert same(opened({**prefixed(state, "a."), **prefixed(state, "b.")}, tmp_path / "w.pth"), network)


def test_a_prefix_leads_past_what_would_be_taken(network, other, tmp_path):
    content = {"state_dict": network.state_dict(), "ema": {"module": other.state_dict(), "decay": 0.9}}
    assert same(opened(content, tmp_path / "w.pth"), network)
    assert same(opened(content, tmp_path / "w.pth", prefix="ema.module"), other)


def test_a_prefix_that_is_not_there(network, tmp_path):
    with pytest.raises(SourceError, match=r"has nothing under --prefix teacher[.] It has: model, head[.]"):
        opened(
            {**prefixed(network.state_dict(), "model."), "head.x": torch.zeros(1)}, tmp_path / "w.pth", prefix="teacher"
        )


@pytest.mark.parametrize("option", [{"prefix": "model"}, {"ignore_head": True}])
def test_places_are_about_weights_only(option, network, tmp_path):
    torch.save(network, tmp_path / "whole.pt")
    for spec in (ARCH, str(tmp_path / "whole.pt")):
        with pytest.raises(UsageError, match="Leave --"):
            open_model(spec, **option)


def test_the_place_that_fits_best_is_named(network, tmp_path):
    state = prefixed(network.state_dict(), "encoder.")
    del state["encoder.conv1.0.weight"]
    state["criterion.weight"] = torch.ones(3)
    with pytest.raises(SourceError) as caught:
        opened(state, tmp_path / "w.pth")
    message = str(caught.value)
    assert "1 missing: conv1.0.weight" in message
    assert "Under 'encoder' they fit best" in message
    assert "left over: criterion.weight" in message


def test_weights_of_a_larger_network_are_not_taken_for_a_smaller(tmp_path):
    """An SE-ResNet has every key of the ResNet, and more inside its blocks."""
    larger = timm.create_model("resnet10t", block_args={"attn_layer": "se"}).state_dict()
    with pytest.raises(SourceError, match=r"not expected: layer1.0.se"):
        opened(larger, tmp_path / "w.pth")


# --- heads ------------------------------------------------------------------------------------------


def test_a_head_of_another_size_is_reported_and_can_be_dropped(network, tmp_path, caplog):
    state = {**network.state_dict(), "fc.weight": torch.zeros(9, 512), "fc.bias": torch.zeros(9)}
    with caplog.at_level(logging.INFO, "dcafy"):
        assert opened(state, tmp_path / "w.pth").fc.out_features == 9
    assert "has 9 classes: timm:resnet10t is built with that many" in caplog.text
    with pytest.raises(
        SourceError, match=r"fc.weight .9x512 instead of 5x512.* Only the head is another: --ignore-head"
    ):
        opened(state, tmp_path / "w.pth", settings={"num_classes": 5})
    model = opened(state, tmp_path / "w.pth", settings={"num_classes": 5}, ignore_head=True)
    assert model.fc.out_features == 5
    assert torch.equal(model.conv1[0].weight, network.conv1[0].weight)
    assert "the head of timm:resnet10t is new and untrained" in caplog.text


HEADS = {
    "missing": lambda state: {key: value for key, value in state.items() if not key.startswith("fc.")},
    "of two layers": lambda state: {
        **{key: value for key, value in state.items() if not key.startswith("fc.")},
        **{"fc.0.weight": torch.zeros(512, 512), "fc.2.weight": torch.zeros(128, 512)},
    },
    "of another width": lambda state: {**state, "fc.weight": torch.zeros(4, 1024)},
    "without a bias": lambda state: {key: value for key, value in state.items() if key != "fc.bias"},
}


@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
@pytest.mark.parametrize("head", HEADS)
def test_heads_of_another_kind(head, prefix, network, tmp_path):
    state = prefixed(HEADS[head](network.state_dict()), prefix)
    with pytest.raises(SourceError, match="Only the head is another: --ignore-head"):
        opened(state, tmp_path / "w.pth", settings={"num_classes": 4})
    model = opened(state, tmp_path / "w.pth", settings={"num_classes": 4}, ignore_head=True)
    assert torch.equal(model.layer4[0].conv1.weight, network.layer4[0].conv1.weight)


def test_only_a_head_is_ignored(network, tmp_path):
    state = network.state_dict()
    del state["layer1.0.conv1.weight"]
    with pytest.raises(SourceError, match=r"1 missing: layer1.0.conv1.weight"):
        opened(state, tmp_path / "w.pth", ignore_head=True)


# --- guesses ----------------------------------------------------------------------------------------


@pytest.fixture
def few_candidates(monkeypatch):
    from dcafy.zoos import fitting

    names = {"torchvision": ["resnet18", "mobilenet_v3_small"], "timm": ["resnet10t", "resnet18"]}
    monkeypatch.setattr(fitting, "_comparable", lambda prefix: names[prefix])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda state: state, "timm:resnet10t: all {n} tensors, with 4 classes."),
        (lambda state: prefixed(state, "m."), "timm:resnet10t: all {n} tensors under 'm', with 4 classes."),
        (lambda state: {**prefixed(state, "m."), "x": torch.zeros(1)}, "under 'm', with 4 classes, 1 left over: x."),
        (
            lambda state: {**prefixed(state, "a."), **prefixed(state, "b.")},
            "under 'a', with 4 classes, .* or under 'b'.",
        ),
        (lambda state: HEADS["missing"](state), "nearest is timm:resnet10t: .* another head. .*--ignore-head"),
        (
            lambda state: {key: value for key, value in state.items() if key != "conv1.0.weight"},
            "The nearest is timm:resnet10t: {m} of {n} tensors; 1 missing: conv1.0.weight",
        ),
    ],
)
def test_guesses_say_how_well_they_fit(content, says, network, few_candidates, tmp_path):
    torch.save(content(network.state_dict()), tmp_path / "w.pth")
    count = len(network.state_dict())
    with pytest.raises(SourceError, match=says.format(n=count, m=count - 3)):
        open_model(str(tmp_path / "w.pth"))
