"""The training loop: what it trains and measures, that it can be stopped at any step, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import random
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from training_data import CLASSES, SIZE, Stripes, connected, network

import dcafy
from dcafy.errors import CheckpointError, InputError, Interrupted, TrainingError, UsageError
from dcafy.images.order import Batches, Sample, Seeded, Spread, UnreadableImage
from dcafy.training import TrainingConfig, finetune
from dcafy.training.checkpoint import CHECKPOINT, Checkpoint, read_checkpoint, write_checkpoint
from dcafy.training.loop import accelerator_for
from dcafy.training.tasks import Batch, Classification
from dcafy.training.telling import JsonLines, Listener

CONFIG = TrainingConfig(epochs=2, batch_size=8, seed=3, usage_images=0, cpu=True)
TRAIN, VAL = Stripes(), Stripes(20)


def config(**options: object) -> TrainingConfig:
    return dataclasses.replace(CONFIG, **options)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class StopAfter(Listener):
    """Raises, or does something else, after so many steps."""

    def __init__(self, step: int, action=None) -> None:
        self.step, self.action = step, action

    def wants(self, step: int) -> bool:
        return step == self.step

    def stepped(self, step, loss, means, lr) -> None:
        if self.action is None:
            raise KeyboardInterrupt
        self.action()


def test_it_learns_and_every_connection_moves():
    model = connected()
    history = finetune(model, TRAIN, VAL, config(epochs=6, lr=5e-3, usage_images=64))
    assert history.metrics["top1"] > 0.6  # guessing gives 0.25
    assert history.epochs[-1].loss < history.epochs[0].loss
    for name, connection in dcafy.connections(model).items():
        assert connection.beta.item() != 0
        state = history.epochs[-1].connections[name]
        assert state.beta == pytest.approx(connection.beta.item())
    assert history.usage is not None
    assert history.usage.accuracy == pytest.approx(history.metrics["top1"])
    assert history.usage.images == len(VAL)


def test_one_seed_gives_one_result_and_another_seed_another():
    results = []
    for seed in (3, 3, 4):
        model = connected()
        finetune(model, TRAIN, VAL, config(seed=seed))
        results.append(weights(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_reading_in_other_processes_changes_nothing():
    models = [connected(), connected()]
    for model, workers in zip(models, (0, 2), strict=True):
        finetune(model, TRAIN, VAL, config(epochs=1, workers=workers))
    assert same(weights(models[0]), weights(models[1]))


WAYS = {
    "plain": {},
    "sgd": {"optimizer": "sgd", "lr": 0.05, "schedule": "step", "step_epochs": 1},
    "average": {"ema": 0.9},
    "mixed": {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1},
    "frozen at first": {"freeze_base_epochs": 1},
    "accumulated": {"accumulate": 2, "clip_norm": 0.5, "warmup_epochs": 0.5},
    "bf16": {"precision": "bf16"},
}


@functools.cache
def unbroken_end(way):
    """The weights and the epochs of a run that nothing stopped."""
    model = connected()
    history = finetune(model, TRAIN, VAL, config(**WAYS[way], checkpoint_steps=2))
    return weights(model), [dataclasses.replace(epoch, seconds=0) for epoch in history.epochs]


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.xdist_group(f"cut off {way}")) for way in WAYS])
@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_run_that_was_cut_off_ends_where_an_unbroken_one_does(way, step, tmp_path):
    options = config(**WAYS[way], checkpoint_steps=2)
    with pytest.raises(KeyboardInterrupt):
        finetune(connected(), TRAIN, VAL, options, directory=tmp_path, listener=StopAfter(step))
    assert (tmp_path / CHECKPOINT).exists()
    resumed = connected()
    history = finetune(resumed, TRAIN, VAL, options, directory=tmp_path, resume=True)
    end, epochs = unbroken_end(way)
    assert same(weights(resumed), end)
    assert [dataclasses.replace(epoch, seconds=0) for epoch in history.epochs] == epochs


def test_an_epoch_that_was_cut_off_at_its_end_has_the_rate_of_its_last_step(tmp_path):
    options = config(checkpoint_steps=1, schedule="cosine", warmup_epochs=0.5)
    unbroken = finetune(connected(), TRAIN, VAL, options)
    for step in (3, 6):  # the last of each epoch
        with pytest.raises(KeyboardInterrupt):
            finetune(connected(), TRAIN, VAL, options, directory=tmp_path, resume=True, listener=StopAfter(step))
    resumed = finetune(connected(), TRAIN, VAL, options, directory=tmp_path, resume=True)
    assert [epoch.lr for epoch in resumed.epochs] == [epoch.lr for epoch in unbroken.epochs]


@pytest.mark.parametrize("end", ["whole", "failed"])
def test_random_numbers_go_on_where_they_were(end):
    model = connected()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    listener = StopAfter(2) if end == "failed" else Listener()
    with pytest.raises(KeyboardInterrupt) if end == "failed" else contextlib.nullcontext():
        finetune(model, TRAIN, VAL, config(epochs=1), listener=listener)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_dropout_goes_on_where_it_was(tmp_path):
    def dropping() -> nn.Module:
        model = connected()
        model.add_module("noise", nn.Dropout(0.5))
        return nn.Sequential(model, nn.Dropout(0.5))

    options = config(checkpoint_steps=2)
    unbroken, cut, resumed = dropping(), dropping(), dropping()
    finetune(unbroken, TRAIN, VAL, options)
    with pytest.raises(KeyboardInterrupt):
        finetune(cut, TRAIN, VAL, options, directory=tmp_path, listener=StopAfter(5))
    finetune(resumed, TRAIN, VAL, options, directory=tmp_path, resume=True)
    assert same(weights(resumed), weights(unbroken))


def test_resume_without_a_checkpoint_starts_over(tmp_path):
    models = [connected(), connected()]
    finetune(models[0], TRAIN, VAL, CONFIG)
    finetune(models[1], TRAIN, VAL, CONFIG, directory=tmp_path, resume=True)
    assert same(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(number, tmp_path):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="--resume") as stopped:
        finetune(
            connected(),
            TRAIN,
            VAL,
            CONFIG,
            directory=tmp_path,
            listener=StopAfter(4, lambda: os.kill(os.getpid(), number)),
        )
    assert stopped.value.signal == number
    assert signal.getsignal(number) is before
    unbroken, resumed = connected(), connected()
    finetune(unbroken, TRAIN, VAL, CONFIG)
    finetune(resumed, TRAIN, VAL, CONFIG, directory=tmp_path, resume=True)
    assert same(weights(resumed), weights(unbroken))


def test_in_a_thread_signals_are_left_alone():
    done = []
    thread = threading.Thread(target=lambda: done.append(finetune(connected(), TRAIN, VAL, config(epochs=1))))
    thread.start()
    thread.join()
    assert len(done[0].epochs) == 1


def test_only_connections_move_when_the_base_is_frozen():
    model = connected()
    before = weights(model)
    finetune(model, TRAIN, VAL, config(freeze_base=True))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == ("dca" not in name.split(".")), name
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.train()
    assert all(module.training for module in model.modules())


def test_new_layers_are_trained_beside_a_frozen_base():
    model = connected()
    before = weights(model)
    head = next(name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == CLASSES)
    finetune(model, TRAIN, VAL, config(freeze_base=True), new_layers=(head,))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in moved if "dca" not in name.split(".")} == {f"{head}.weight", f"{head}.bias"}


PLAIN_SGD = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "epochs": 1}


def betas_after_a_step(**options: object) -> torch.Tensor:
    model = connected()
    finetune(model, Stripes(8), VAL, config(lr=1e-3, **PLAIN_SGD, **options))
    return torch.cat([connection.beta.detach() for connection in dcafy.connections(model).values()])


def test_the_connections_learn_ten_times_as_fast():
    alike = betas_after_a_step(connection_lr=1e-3)
    assert alike.abs().min() > 0
    torch.testing.assert_close(betas_after_a_step(), 10 * alike, rtol=1e-3, atol=0)


def test_gradients_are_clipped():
    model, steps, most = connected(), len(TRAIN) // 8, 0.01
    before = [p.detach().clone() for p in model.parameters()]
    finetune(model, TRAIN, VAL, config(lr=0.5, connection_lr=0.5, clip_norm=most, **PLAIN_SGD))
    moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(model.parameters(), before, strict=True)]).norm()
    assert 0 < moved <= steps * 0.5 * most * 1.001


@pytest.mark.parametrize(("step", "options", "kept"), [(12, {}, 6), (3, {"checkpoint_steps": 1}, 2)])
def test_weights_that_are_no_numbers_never_take_the_place_of_good_ones(step, options, kept, tmp_path):
    """An infinite gradient before a checkpoint is due: no loss in training has shown it yet."""
    model, seen = connected(), []

    def broken(gradient: torch.Tensor) -> torch.Tensor:
        seen.append(gradient)
        return gradient / 0 if len(seen) == step else gradient

    list(model.parameters())[-1].register_hook(broken)
    with pytest.raises(TrainingError, match="the weights are no numbers any more"):
        finetune(model, TRAIN, VAL, config(**options), directory=tmp_path)
    checkpoint = read_checkpoint(tmp_path / CHECKPOINT)
    assert checkpoint is not None
    assert checkpoint.facts["progress"]["step"] == kept
    assert all(value.isfinite().all() for name, value in checkpoint.tensors.items() if name.startswith("model/"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda image, label: (image, -1), "A label is -1"),
        (lambda image, label: (image, 1.7), "A label is 1.7, not a class number"),
        (lambda image, label: (image[:, :8] if label else image, label), "images of different sizes"),
    ],
)
def test_samples_that_cannot_be_trained_on(change, says):
    class Changed(Stripes):
        def __getitem__(self, index):
            return change(*super().__getitem__(index))

    with pytest.raises(InputError, match=says):
        finetune(connected(), Changed(), VAL, CONFIG)


def classification(**options: object) -> Classification:
    task = Classification(config(**options))
    task.check(network(), Sample(torch.zeros(3, SIZE, SIZE), 0, (0, 0)))
    return task


def test_labels_are_smoothed():
    outputs, labels = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(1)), torch.arange(6) % CLASSES
    loss, right = classification(label_smoothing=0.2).loss(nn.Identity(), Batch(outputs, labels, labels, ()))
    losses = -outputs.log_softmax(1)
    torch.testing.assert_close(loss, (0.8 * losses[range(6), labels] + 0.2 * losses.mean(1)).mean())
    assert right == (outputs.argmax(1) == labels).sum()


@pytest.mark.parametrize("options", [{"mixup": 1.0}, {"cutmix": 1.0}])
def test_images_are_mixed_as_their_labels_are(options):
    task = classification(**options)

    def mixed(epoch: int, *, training: bool = True) -> Batch:
        # An image is its label everywhere, so that its mean is that of the labels that it is made of.
        samples = [Sample(torch.full((3, SIZE, SIZE), float(i % 4)), i % 4, (epoch, i)) for i in range(8)]
        return task.collate(samples, training=training)

    batch = mixed(0)
    torch.testing.assert_close(batch.inputs.mean((1, 2, 3)), batch.labels @ torch.arange(4.0))
    assert ((batch.labels > 0).sum(1) == 2).any()
    assert torch.equal(batch.inputs, mixed(0).inputs)
    assert not torch.equal(batch.inputs, mixed(1).inputs)
    assert torch.equal(mixed(0, training=False).labels, torch.arange(8) % 4)


class Dtypes(Listener):
    """What the last layer computes in while it is trained, epoch by epoch."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[set[torch.dtype]] = [set()]
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        last.register_forward_hook(
            lambda module, _, output: self.seen[-1].add(output.dtype) if module.training else None
        )

    def epoch_ended(self, epoch) -> None:
        self.seen.append(set())


PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=PRECISIONS)
def precision(request, monkeypatch):
    """fp16 is taken on GPUs only; the CPU computes in it well enough to see the dtype."""
    if request.param == "fp16":

        def halved(options: TrainingConfig):
            accelerator = accelerator_for(dataclasses.replace(options, precision="bf16"))
            accelerator.state._mixed_precision = "fp16"
            return accelerator

        monkeypatch.setattr("dcafy.training.loop.accelerator_for", halved)
    return request.param


@pytest.fixture
def scaled(monkeypatch):
    """fp16 as on a GPU, with a scaled loss, which torch has for the CPU, and Accelerate does not use there."""

    def halved(options: TrainingConfig):
        accelerator = accelerator_for(dataclasses.replace(options, precision="bf16"))
        accelerator.state._mixed_precision = "fp16"
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=2)
        return accelerator

    monkeypatch.setattr("dcafy.training.loop.accelerator_for", halved)


@pytest.mark.slow
def test_a_scaled_loss_goes_on_as_it_was_and_a_strangers_scale_costs_nothing(scaled, tmp_path):
    options = config(precision="fp16", clip_norm=0.5, checkpoint_steps=2)
    unbroken, resumed = connected(), connected()
    finetune(unbroken, TRAIN, VAL, options)
    with pytest.raises(KeyboardInterrupt):
        finetune(connected(), TRAIN, VAL, options, directory=tmp_path, listener=StopAfter(3))
    good = read_checkpoint(tmp_path / CHECKPOINT)
    assert good.facts["scaler"]["scale"] != 2.0**17
    for scaler in (None, {}, {**good.facts["scaler"], "scale": 0.0}, {**good.facts["scaler"], "growth_interval": "x"}):
        write_checkpoint(tmp_path / CHECKPOINT, Checkpoint(good.tensors, {**good.facts, "scaler": scaler}))
        with pytest.raises(CheckpointError, match="does not fit this network"):
            finetune(resumed, TRAIN, VAL, options, directory=tmp_path, resume=True)
        assert same(weights(resumed), weights(connected()))
    write_checkpoint(tmp_path / CHECKPOINT, good)
    finetune(resumed, TRAIN, VAL, options, directory=tmp_path, resume=True)
    assert same(weights(resumed), weights(unbroken))


def test_fp16_is_never_float32_without_a_word():
    with pytest.raises(UsageError, match="bf16"):
        finetune(connected(), TRAIN, VAL, config(precision="fp16"))


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(more, marks=pytest.mark.slow) for more in ({"freeze_base_epochs": 1}, {"ema": 0.9}))],
    ids=str,
)
def test_layers_compute_in_the_precision_asked_for_in_every_epoch_and_run(precision, options):
    model = connected()
    for twin in (model, model, copy.deepcopy(model)):
        dtypes = Dtypes(twin)
        finetune(twin, TRAIN, VAL, config(epochs=2, precision=precision, **options), listener=dtypes)
        assert dtypes.seen == [{PRECISIONS[precision]}] * 2 + [set()]
        assert {parameter.dtype for parameter in twin.parameters()} == {torch.float32}


def test_a_run_that_failed_leaves_nothing_of_its_precision(precision):
    model, ways = connected(), {*connected().__dict__}
    with pytest.raises(KeyboardInterrupt):
        finetune(model, TRAIN, VAL, config(precision=precision), listener=StopAfter(2))
    assert {*model.__dict__} == ways
    model._is_accelerate_prepared = True  # as a model that somebody else has prepared
    dtypes = Dtypes(model)
    finetune(model, TRAIN, VAL, config(precision=precision), listener=dtypes)
    assert dtypes.seen == [{PRECISIONS[precision]}] * 2 + [set()]
    assert model._is_accelerate_prepared


def test_gradients_of_several_batches_are_one_step():
    models = connected(norm=False), connected(norm=False)
    for model, options in zip(models, ({"batch_size": 12}, {"batch_size": 4, "accumulate": 3}), strict=True):
        history = finetune(model, TRAIN, VAL, config(lr=0.01, **PLAIN_SGD, **options))
        assert history.epochs[-1].steps == len(TRAIN) // 12
    for whole, part in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-5)


def half_cosine(part: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * part))


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"schedule": "constant"}, [1, 1, 1]),
        ({"schedule": "step", "step_epochs": 1}, [1, 0.1, 0.01]),
        ({"schedule": "multistep"}, [1, 1, 0.01]),
        ({"schedule": "cosine"}, [half_cosine(5 / 18), half_cosine(11 / 18), half_cosine(17 / 18)]),  # of 18 steps
        ({"schedule": "cosine", "warmup_epochs": 2}, [6 / 13, 12 / 13, half_cosine(5 / 6)]),
    ],
)
def test_the_rate_follows_its_schedule(options, rates):
    """The rate of the last step of each epoch, over --lr."""
    history = finetune(connected(), TRAIN, VAL, config(**{**PLAIN_SGD, **options, "epochs": 3, "lr": 0.01}))
    assert [epoch.lr / 0.01 for epoch in history.epochs] == pytest.approx(rates, abs=1e-6)


def test_the_average_is_what_is_kept():
    plain, averaged = connected(), connected()
    finetune(plain, TRAIN, VAL, CONFIG)
    history = finetune(averaged, TRAIN, VAL, config(ema=0.9, usage_images=32))
    name = next(name for name, _ in plain.named_parameters())
    start = dict(connected().named_parameters())[name]
    moved = [(dict(model.named_parameters())[name] - start).norm() for model in (averaged, plain)]
    assert moved[0] < moved[1]
    assert history.usage is not None
    assert history.usage.accuracy == pytest.approx(history.metrics["top1"])


def test_a_model_that_is_not_converted_is_trained_as_well():
    model = network()
    history = finetune(model, TRAIN, VAL, config(epochs=6, lr=5e-3))
    assert history.metrics["top1"] > 0.6
    assert history.epochs[0].connections == {}
    assert history.usage is None


# --- checkpoints that are no good -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    finetune(connected(), TRAIN, VAL, config(epochs=1), directory=directory)
    return directory / CHECKPOINT


def test_nothing_in_a_checkpoint_is_pickled(finished):
    assert set(finished.parent.iterdir()) == {finished}
    assert any(key.startswith("optimizer/") for key in load_file(finished))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "damaged"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x55"), "damaged: its content"),
        (
            lambda file: file.write_bytes(file.read_bytes().replace(b'epoch\\": 1', b'epoch\\": 0')),
            "damaged: its content",
        ),
        (lambda file: file.write_bytes(b""), "damaged"),
        (lambda file: file.write_text("hello"), "damaged"),
        (lambda file: save_file({"a": torch.zeros(2)}, file), "no checkpoint of a dcafy run"),
    ],
    ids=["truncated", "one byte", "progress", "empty", "text", "foreign"],
)
def test_a_spoiled_checkpoint(finished, tmp_path, spoil, says):
    file = tmp_path / CHECKPOINT
    file.write_bytes(finished.read_bytes())
    spoil(file)
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=says):
        finetune(connected(), TRAIN, VAL, config(epochs=1), directory=tmp_path, resume=True)
    assert file.read_bytes() == before


def changed(*path, to):
    """A change of what is no tensor in a checkpoint."""

    def change(tensors, facts):
        *outer, last = path
        for key in outer:
            facts = facts[key]
        facts[last] = to(facts[last]) if callable(to) else to

    return change


def first(tensors, start, end=""):
    return next(name for name in tensors if name.startswith(start) and name.endswith(end))


def replaced_tensor(start, end, to):
    def change(tensors, facts):
        name = first(tensors, start, end)
        tensors[name] = to(tensors[name])

    return change


STRANGERS = {
    "a weight of another shape": replaced_tensor("model/", "", lambda value: value.reshape(-1)[:1].clone()),
    "a weight of another type": replaced_tensor("model/", "weight", lambda value: value.double()),
    "a weight less": lambda tensors, facts: tensors.pop(first(tensors, "model/")),
    "a weight more": lambda tensors, facts: tensors.update({"model/x": torch.zeros(1)}),
    "an average of another shape": replaced_tensor("average/", "weight", lambda value: value.flatten().clone()),
    "a moment of another shape": replaced_tensor("optimizer/", "/exp_avg", lambda value: torch.zeros(0)),
    "a moment of another type": replaced_tensor("optimizer/", "/exp_avg", lambda value: value.double()),
    "a moment less": lambda tensors, facts: tensors.pop(first(tensors, "optimizer/", "/exp_avg_sq")),
    "a moment of nobody": lambda tensors, facts: tensors.update({"optimizer/nobody/step": torch.zeros(())}),
    "a step without a number": replaced_tensor("optimizer/", "/step", lambda value: torch.zeros(0)),
    "a generator of another length": replaced_tensor("rng/0/torch", "", lambda value: value[:10].clone()),
    "a generator that is none": replaced_tensor("rng/0/torch", "", torch.zeros_like),
    "numpy's generator": changed("rng", 0, "numpy", 1, 29, to=10**400),
    "Python's generator": changed("rng", 0, "python", 1, 5, to=-1),
    "no generators": changed("rng", to=[]),
    "a rate of text": changed("schedule", "_last_lr", 0, to="fast"),
    "an endless rate": changed("schedule", "_last_lr", 0, to=float("inf")),
    "a rate less": changed("schedule", "_last_lr", to=lambda rates: rates[1:]),
    "an epoch of text": changed("progress", "epoch", to="1"),
    "a negative step": changed("progress", "step", to=-1),
    "a progress of its own": changed("progress", to=lambda known: {**known, "add": 1}),
    "epochs that are none": changed("epochs", to=[{"event": "epoch"}]),
    "ties of numbers": changed("tied", to={"a": 1}),
    "ties to nothing": changed("tied", to={"a": "b"}),
    "skipped numbers": changed("skipped", to=[1]),
}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("averaged")
    finetune(connected(), TRAIN, VAL, config(epochs=1, ema=0.5), directory=directory)
    return directory / CHECKPOINT


def test_the_checkpoint_that_strangers_change_is_fit_to_go_on_with(averaged, tmp_path):
    good = read_checkpoint(averaged)
    write_checkpoint(tmp_path / CHECKPOINT, Checkpoint(good.tensors, json.loads(json.dumps(good.facts))))
    assert (
        len(finetune(connected(), TRAIN, VAL, config(epochs=1, ema=0.5), directory=tmp_path, resume=True).epochs) == 1
    )


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_checkpoint_with_a_right_digest_and_a_wrong_content(stranger, averaged, tmp_path):
    """It is told in one line, and costs nothing: model and generators stay as they are."""
    good = read_checkpoint(averaged)
    tensors, facts = dict(good.tensors), json.loads(json.dumps(good.facts))
    STRANGERS[stranger](tensors, facts)
    write_checkpoint(tmp_path / CHECKPOINT, Checkpoint(tensors, facts))
    model = connected()
    before = weights(model), torch.get_rng_state(), random.getstate()
    with pytest.raises(CheckpointError, match="does not fit this network") as caught:
        finetune(model, TRAIN, VAL, config(epochs=1, ema=0.5), directory=tmp_path, resume=True)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert same(before[0], weights(model))
    assert torch.equal(before[1], torch.get_rng_state())
    assert before[2] == random.getstate()


@pytest.mark.parametrize(
    ("model", "options", "length", "says"),
    [
        (connected, {"lr": 0.5}, 48, "configuration differ"),
        (connected, {}, 40, "number of images differ"),
        (network, {}, 48, "does not fit this network"),
    ],
)
def test_a_checkpoint_of_another_run(finished, tmp_path, model, options, length, says):
    (tmp_path / CHECKPOINT).write_bytes(finished.read_bytes())
    with pytest.raises(CheckpointError, match=says):
        finetune(model(), Stripes(length), VAL, config(epochs=1, **options), directory=tmp_path, resume=True)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    finetune(connected(), TRAIN, VAL, config(epochs=1), directory=tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def full(*_: object, **__: object) -> None:
        (Path(str(_[1]))).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dcafy.training.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        finetune(connected(), TRAIN, VAL, config(epochs=1), directory=tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_what_a_killed_run_wrote_by_half_does_not_stay(tmp_path):
    (tmp_path / f".{CHECKPOINT}.0a1b2c3d").write_bytes(b"half")
    (tmp_path / ".mine").write_bytes(b"the user's")
    finetune(connected(), TRAIN, VAL, config(epochs=1), directory=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", CHECKPOINT]


@pytest.mark.parametrize("options", [{}, {"lr": 1e6}])
def test_a_loss_that_is_no_number_stops_the_run(options, tmp_path):
    class Broken(Stripes):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return (image * float("nan") if index == 30 and not options else image), label

    finetune(connected(), TRAIN, VAL, config(epochs=1), directory=tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(TrainingError, match="--lr"):
        finetune(connected(), Broken(), VAL, config(epochs=3, optimizer="sgd", **options), directory=tmp_path)
    if not options:
        assert (tmp_path / CHECKPOINT).read_bytes() == before
    kept = read_checkpoint(tmp_path / CHECKPOINT)
    assert kept is not None
    assert all(torch.isfinite(value).all() for value in kept.tensors.values() if value.is_floating_point())


# --- what is refused before the first step ----------------------------------------------------------------


class Unlabelled(Stripes):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], 9


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((TRAIN, []), InputError, "val has no images"),
        ((DataLoader(TRAIN, batch_size=None), VAL), InputError, "train gives one image at a time"),
        ((Unlabelled(), VAL), InputError, "A label is 9, but the network has 4 classes"),
        (([("words", 1)], VAL), InputError, "gives str"),
    ],
)
def test_data_that_cannot_be_trained_on(arguments, error, says):
    model = connected()
    before = weights(model)
    with pytest.raises(error, match=says):
        finetune(model, *arguments, CONFIG)
    assert same(weights(model), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optimizer": "adam"}, "Did you mean 'adamw'"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"lr": -1.0}, "--lr must be at least 0"),
        ({"ema": 1.0}, "--ema must be"),
        ({"mixup": -0.1}, "--mixup must be at least 0"),
    ],
)
def test_options_that_are_none(options, says):
    with pytest.raises(UsageError, match=says):
        config(**options)


def test_nothing_to_train():
    with pytest.raises(InputError, match="nothing to train"):
        finetune(connected().requires_grad_(False), TRAIN, VAL, CONFIG)


# --- the order of the images --------------------------------------------------------------------------------


def test_batches_go_on_from_the_middle():
    order = Batches(50, 8, seed=1, shuffle=True)
    order.epoch = 4
    whole = list(order)
    order.start = 3
    assert list(order) == whole[3:]
    assert len(order) == len(whole) - 3
    assert len({key for batch in whole for key in batch}) == 48
    order.epoch, order.start = 5, 0
    assert list(order) != whole


def test_connections_are_cut_on_images_of_all_classes():
    sorted_by_class = [Stripes()[index] for label in range(CLASSES) for index in range(label, 48, CLASSES)]
    history = finetune(connected(), TRAIN, sorted_by_class, config(epochs=1, usage_images=12))
    assert history.usage is not None
    assert history.usage.images == 12
    assert [Spread(sorted_by_class, 12)[i][1] for i in range(12)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len(Spread(sorted_by_class, 100)) == 48


class SomeUnreadable:
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index):
        if index in (1, 2):
            raise UnreadableImage(f"image {index}")
        return torch.full((1,), float(index)), index


def test_an_unreadable_image_is_stood_in_for_by_the_next():
    counted = Seeded(SomeUnreadable(), seed=0)[(0, 1)]
    assert (counted.image.item(), counted.label, counted.unreadable) == (3.0, 3, ("image 1", "image 2"))
    assert Seeded(SomeUnreadable(), seed=0, counts_stand_ins=False)[(0, 1)].label == -1
    assert Seeded(SomeUnreadable(), seed=0)[(0, 4)].unreadable == ()


def test_unreadable_images_are_named_once_and_do_not_count(tmp_path):
    class Holed(Stripes):
        def __getitem__(self, index):
            if index in (3, 11):
                raise UnreadableImage(f"stripes/{index}.png: cut short")
            return super().__getitem__(index)

    log = tmp_path / "log.jsonl"
    history = finetune(connected(), Holed(), Holed(20), config(epochs=2), listener=JsonLines(log))
    assert sorted(history.skipped) == ["stripes/11.png: cut short", "stripes/3.png: cut short"]
    assert history.metrics["images"] == 18
    named = [row["image"] for row in map(json.loads, log.read_text().splitlines()) if row["event"] == "skipped"]
    assert sorted(named) == sorted(history.skipped)


@pytest.mark.parametrize(
    ("kind", "plugin", "says"),
    [
        ("MULTI_CPU", None, "multiple"),
        ("DEEPSPEED", None, "asks for DEEPSPEED"),
        ("FSDP", SimpleNamespace(fsdp_version=1, activation_checkpointing=False), "fsdp_version: 2"),
        (
            "FSDP",
            SimpleNamespace(fsdp_version=2, activation_checkpointing=True),
            "fsdp_activation_checkpointing: false",
        ),
    ],
)
def test_two_processes_that_cannot_train(monkeypatch, kind, plugin, says):
    class Two:
        num_processes = 2
        distributed_type = SimpleNamespace(value=kind)
        state = SimpleNamespace(fsdp_plugin=plugin)

        def __init__(self, **_: object) -> None:
            pass

    monkeypatch.setattr("accelerate.Accelerator", Two)
    with pytest.raises(UsageError, match=says):
        finetune(connected(), TRAIN, VAL, config(batch_size=7))


def test_the_model_stays_a_plain_module():
    model = connected()
    finetune(model, TRAIN, VAL, config(epochs=1, precision="bf16"))
    assert "forward" not in model.__dict__
    twin = copy.deepcopy(model).eval()
    x = torch.rand(2, 3, SIZE, SIZE)
    assert torch.equal(twin(x), model.eval()(x))
