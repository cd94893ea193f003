"""What holds on a GPU as well: exact outputs, precisions in every epoch, runs that go on, and the study's fast steps.

Without a GPU all of it is skipped. ``pytest -n 4 --dist load tests/test_gpu.py`` takes some minutes.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from garments import with_garments
from PIL import Image
from torch import nn
from training_data import Stripes, connected, network

import dcafy
from dcafy.errors import CheckpointError
from dcafy.training import TrainingConfig, finetune
from dcafy.training.checkpoint import CHECKPOINT, Checkpoint, read_checkpoint, write_checkpoint
from dcafy.training.telling import Listener

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.xdist_group("gpu"),
]

TRAIN, VAL = Stripes(), Stripes(20)
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def config(**options: Any) -> TrainingConfig:
    return TrainingConfig(**{"epochs": 2, "batch_size": 8, "seed": 3, "usage_images": 0, **options})


@pytest.fixture(autouse=True)
def _one_way_to_compute() -> Iterator[None]:
    """cuDNN takes the same kernels for the same shapes, and float32 is float32."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def with_statistics(model: nn.Module, size: int) -> nn.Module:
    """On the GPU, with running statistics of what goes through it and weights that show every path."""
    model = model.cuda().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, size, size, device="cuda"))
    return model.eval()


NETWORKS = {
    "torchvision:mobilenet_v3_small": 96,
    "torchvision:regnet_y_400mf": 96,
    "timm:seresnet18": 96,
    "timm:ecaresnet26t": 96,
    "timm:gcresnet33ts": 96,
    "timm:mobilenetv3_small_050": 96,
}


def build(name: str) -> nn.Module:
    library, _, model = name.partition(":")
    if library == "timm":
        return pytest.importorskip("timm").create_model(model)  # type: ignore[no-any-return]
    return getattr(importlib.import_module("torchvision.models"), model)(weights=None)  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [{}, {"message": "centred"}, {"topology": "depth"}, {"topology": "hub"}], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_converted_network_is_bit_identical_and_alive(name: str, options: dict[str, Any]) -> None:
    model = with_statistics(build(name), NETWORKS[name])
    x = torch.randn(4, 3, NETWORKS[name], NETWORKS[name], device="cuda")
    expected = model(x)
    with torch.autocast("cuda", torch.float16):
        halved = model(x)
    converted = dcafy.convert(copy.deepcopy(model), example_inputs=x[:2], **options)
    assert {p.device.type for p in converted.parameters()} == {"cuda"}
    assert torch.equal(converted(x), expected)
    with torch.autocast("cuda", torch.float16):
        assert torch.equal(converted(x), halved)
        loss = converted.train()(x).float().square().mean()
    loss.backward()
    connections = dcafy.connections(converted)
    assert connections
    assert all(connection.beta.grad is not None for connection in connections.values())
    for connection in connections.values():
        connection.beta.data.fill_(0.5)
    assert not torch.equal(converted.eval()(x), expected)


@pytest.mark.parametrize("name", list(NETWORKS)[:3])
def test_a_network_that_is_converted_on_the_cpu_moves(name: str) -> None:
    model = with_statistics(build(name), NETWORKS[name])
    x = torch.randn(4, 3, NETWORKS[name], NETWORKS[name], device="cuda")
    expected = model(x)
    converted = dcafy.convert(copy.deepcopy(model).cpu(), example_inputs=x[:2].cpu()).cuda()
    assert torch.equal(converted(x), expected)
    assert torch.equal(converted.half()(x.half()), model.half()(x.half()))


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "timm:seresnet18"])
def test_a_compiled_network_computes_the_same(name: str) -> None:
    model = with_statistics(build(name), NETWORKS[name])
    x = torch.randn(4, 3, NETWORKS[name], NETWORKS[name], device="cuda")
    converted = dcafy.convert(model, example_inputs=x)
    for connection in dcafy.connections(converted).values():
        connection.beta.data.fill_(0.5)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(converted)(x), converted(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["se", "cbam", "gc", "rla", "mrla", "dia"])
def test_attention_is_put_in_where_the_network_lies(kind: str) -> None:
    model = with_statistics(build("torchvision:resnet18"), 96)
    x = torch.randn(4, 3, 96, 96, device="cuda")
    expected = model(x)
    inserted = dcafy.insert(model, kind, example_inputs=x[:2])
    assert {p.device.type for p in inserted.parameters()} == {"cuda"}
    assert torch.equal(inserted.eval()(x), expected)


class Dtypes(Listener):
    """What the last layer computes in while it is trained, epoch by epoch; and stops after so many steps."""

    def __init__(self, model: nn.Module, stop: int = -1) -> None:
        self.seen: list[set[torch.dtype]] = [set()]
        self.stop = stop
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        last.register_forward_hook(
            lambda module, _, output: self.seen[-1].add(output.dtype) if module.training else None
        )

    def wants(self, step: int) -> bool:
        return step == self.stop

    def stepped(self, step: int, loss: Any, means: Any, lr: Any) -> None:
        raise KeyboardInterrupt

    def epoch_ended(self, epoch: Any) -> None:
        self.seen.append(set())


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_norm": 0.5, "accumulate": 2},
    "average, mixed": {"ema": 0.9, "mixup": 0.2, "cutmix": 1.0},
    "frozen at first": {"freeze_base_epochs": 1},
    "workers": {"workers": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_that_was_stopped_goes_on_to_the_same_end(precision: str, way: str, tmp_path: Path) -> None:
    options = config(precision=precision, checkpoint_steps=2, **WAYS[way])
    unbroken = connected()
    seen = Dtypes(unbroken)
    finetune(unbroken, TRAIN, VAL, options, listener=seen)
    assert seen.seen == [{PRECISIONS[precision]}] * 2 + [set()], "in every epoch"
    assert {parameter.dtype for parameter in unbroken.parameters()} == {torch.float32}
    stopped = connected()
    with pytest.raises(KeyboardInterrupt):
        finetune(stopped, TRAIN, VAL, options, directory=tmp_path, listener=Dtypes(stopped, stop=3))
    assert read_checkpoint(tmp_path / CHECKPOINT).facts["progress"]["step"] > 0
    resumed = connected()
    finetune(resumed, TRAIN, VAL, options, directory=tmp_path, resume=True)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_second_training_of_one_model_computes_in_half_as_well() -> None:
    model = connected()
    for precision in ("fp16", "no", "fp16"):
        seen = Dtypes(model)
        finetune(model, TRAIN, VAL, config(precision=precision), listener=seen)
        assert seen.seen == [{PRECISIONS[precision]}] * 2 + [set()]


def test_the_scale_of_the_loss_is_the_files_and_a_strangers_costs_nothing(tmp_path: Path) -> None:
    options = config(precision="fp16", checkpoint_steps=2)
    model = connected()
    with pytest.raises(KeyboardInterrupt):
        finetune(model, TRAIN, VAL, options, directory=tmp_path, listener=Dtypes(model, stop=3))
    good = read_checkpoint(tmp_path / CHECKPOINT)
    assert good.facts["scaler"]["scale"] > 0
    for scaler in (None, {}, {**good.facts["scaler"], "scale": 0.0}, {**good.facts["scaler"], "growth_interval": "x"}):
        write_checkpoint(tmp_path / CHECKPOINT, Checkpoint(good.tensors, {**good.facts, "scaler": scaler}))
        resumed = connected()
        before = copy.deepcopy(resumed.state_dict())
        with pytest.raises(CheckpointError, match="does not fit this network"):
            finetune(resumed, TRAIN, VAL, options, directory=tmp_path, resume=True)
        assert all(torch.equal(before[name], value.cpu()) for name, value in resumed.state_dict().items())


def test_half_precision_learns_what_full_precision_does() -> None:
    accuracy = {}
    for precision in PRECISIONS:
        history = finetune(connected(), TRAIN, VAL, config(epochs=6, lr=5e-3, precision=precision, usage_images=64))
        accuracy[precision] = history.metrics["top1"]
        assert history.usage is not None
    assert min(accuracy.values()) > 0.6, accuracy  # guessing gives 0.25


def test_random_numbers_of_the_gpu_are_where_they_were() -> None:
    model = network().cuda()
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).cuda()
    converted = dcafy.convert(model, example_inputs=x)
    finetune(converted, TRAIN, VAL, config(epochs=1))
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_the_command_trains_in_half_precision_goes_on_and_predicts(dcafy_command: Any, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for label in ("dark", "light"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for i in range(12):
                Image.new("RGB", (64, 64), (30 + 150 * (label == "light") + i,) * 3).save(folder / f"{i}.png")
    out = tmp_path / "out"
    arguments = ["finetune", "timm:test_efficientnet", "--data", tmp_path]
    arguments += ["--output", out, "--epochs", 2, "--bs", 4, "--precision", "fp16", "--image-size", 64]
    code, _, error = dcafy_command(*arguments)
    assert code == 0, error
    code, printed, error = dcafy_command("finetune", out, "--epochs", 3)
    assert code == 0, error
    code, printed, error = dcafy_command("predict", out, tmp_path / "val" / "dark" / "0.png", "--json")
    assert code == 0, error
    assert json.loads(printed)
    code, printed, error = dcafy_command("evaluate", out)
    assert code == 0, error


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    accuracy = importlib.import_module("accuracy")
    monkeypatch.setattr(accuracy, "VALIDATION", 1000)
    made = accuracy.Study(Path("nowhere"), "cuda")
    return accuracy, with_garments(made)


SETTINGS = ["switch", "switch, options", "cued, family", "cued cbam", "cued gc", "cued eca", "inserted", "tuned"]


@pytest.mark.filterwarnings("ignore:The schema 'normalised' is not the identity")
@pytest.mark.parametrize("name", SETTINGS)
def test_recorded_steps_of_the_study_are_its_steps(name: str, study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All arms at once, each as a graph, against one after the other; in double, for training makes rounding large."""
    accuracy, made = study
    setting = dataclasses.replace(accuracy.SETTINGS[name], steps=8, batch=32, lr=0.02)
    arms = {name: arm for name, arm in setting.arms.items() if not arm.order}
    drawn = made.batch

    def in_double(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = drawn(*arguments)
        return x.double(), y

    class InTurn(accuracy.InTurn):
        """With rates as a recorded step has them: in float32."""

        def __call__(self, x: torch.Tensor, y: torch.Tensor, part: float) -> None:
            for (one, optimizer), rates in zip(self.trained, self.rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = float(torch.tensor(part * rate))
                accuracy.stepped(one, optimizer, x, y)

    def networks() -> dict[str, nn.Module]:
        return {name: made.made(setting, arm, 1)[0].double() for name, arm in arms.items()}

    recorded, alone = networks(), networks()
    before = {name: copy.deepcopy(one.state_dict()) for name, one in alone.items()}
    with monkeypatch.context() as patched:
        patched.setattr(made, "batch", in_double)
        made.train([(recorded[name], arm) for name, arm in arms.items()], setting, 1)
        patched.setitem(sys.modules, "accuracy_cuda", SimpleNamespace(SideBySide=InTurn))
        for name, arm in arms.items():
            made.train([(alone[name], arm)], setting, 1)
    for name, one in alone.items():
        assert any(not torch.equal(value, before[name][key]) for key, value in one.state_dict().items())
        for key, value in one.state_dict().items():
            torch.testing.assert_close(recorded[name].state_dict()[key], value, rtol=1e-6, atol=1e-9)
    rows = list(made.run(setting, arms, 1))
    assert [row["arm"] for row in rows] == list(arms)
    assert {row["device"] for row in rows} == {"cuda"}
