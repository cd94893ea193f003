"""``--recipe``: the paper's own trainings, to the digit; what was given beats them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torchvision
from networks import SELinear, with_attention
from torch import nn
from trained import seeded

import dcafy
from dcafy.errors import UsageError
from dcafy.images.preparation import Prepared, preparation, with_resize
from dcafy.plan.options import Conversion
from dcafy.runs.options import Chosen, RunOptions, chosen
from dcafy.runs.paper import RECIPES
from dcafy.training import DataOptions, TrainingConfig
from dcafy.training.optimization import optimizer_for, scheduler_for


def asked(recipe: str, **given: Any) -> Chosen:
    """The options of a recipe, with these given on the command line."""
    parts: list[Any] = []
    for kind in (TrainingConfig, DataOptions, Conversion):
        own = kind.__dataclass_fields__.keys()
        parts.append(kind(**{name: value for name, value in given.items() if name in own}))
    return chosen(RunOptions(recipe=recipe), *parts, given)


def network() -> Any:
    with seeded(0):
        model = with_attention(SELinear, (8, 8, 12))
        model.blocks[0].add_module("depthwise", nn.Conv2d(8, 8, 3, groups=8))
    return dcafy.convert(model, example_inputs=torch.zeros(2, 3, 32, 32))


def decays(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == set(names.values())
    return found


def rates(config: TrainingConfig, steps: int) -> list[float]:
    """The rate of every step, of ``steps`` an epoch."""
    layer = nn.Linear(1, 1)
    optimizer = optimizer_for(layer, config)
    schedule = scheduler_for(optimizer, config, steps)
    found = []
    for _ in range(steps * config.epochs):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_the_recipe_of_resnets() -> None:
    found, model = asked("paper"), network()
    assert (found.task, found.training.batch_size, found.training.epochs) == ("classification", 256, 100)
    optimizer = optimizer_for(model, found.training)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(g["lr"], g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(0.1, 0.9, False)}
    assert set(decays(model, optimizer).values()) == {1e-4}  # on α, β, norms and biases as well
    by_epoch = rates(found.training, 2)[::2]
    assert by_epoch == pytest.approx([0.1] * 30 + [0.01] * 30 + [0.001] * 30 + [0.0001] * 10)
    assert (found.conversion.attention_init, found.conversion.min_hidden, found.conversion.reduction) == (
        "paper",
        1,
        16,
    )


def test_the_recipe_of_mobile_networks() -> None:
    found, model = asked("paper-mobile"), network()
    assert (found.training.batch_size, found.training.epochs) == (512, 150)
    optimizer = optimizer_for(model, found.training)
    assert {(g["lr"], g["nesterov"]) for g in optimizer.param_groups} == {(0.1, False)}
    owners = {f"{path}.{name}": m for path, m in model.named_modules() for name, _ in m.named_parameters(recurse=False)}
    found_decays = decays(model, optimizer)
    for name, decay in found_decays.items():  # the published list of exceptions: not α, β and what LayerNorms scale by
        batch_norm = isinstance(owners[name], nn.BatchNorm2d | nn.BatchNorm1d)
        assert decay == (0.0 if "depthwise" in name or name.endswith("bias") or batch_norm else 4e-5), name
    assert {found_decays[name] for name in found_decays if name.endswith(("alpha", "beta"))} == {4e-5}
    by_step = rates(found.training, 10)
    assert by_step[25] == pytest.approx(0.1 * 26 / 51)
    assert by_step[50] == pytest.approx(0.1)
    assert by_step[775] == pytest.approx(0.05 * (1 + math.cos(math.pi * 725 / 1450)))


def test_the_recipe_of_detectors() -> None:
    found = asked("paper-detection")
    assert (found.task, found.training.batch_size, found.training.epochs) == ("detection", 16, 24)
    assert (found.training.clip_norm, found.training.decayed, found.training.nesterov) == (35.0, "all", False)
    by_step = rates(found.training, 600)
    assert by_step[0] == pytest.approx(0.01 / 3)
    assert by_step[250] == pytest.approx(0.01 * 2 / 3)
    assert by_step[500] == by_step[18 * 600 - 1] == pytest.approx(0.01)
    assert by_step[18 * 600] == by_step[22 * 600 - 1] == pytest.approx(0.001)
    assert by_step[22 * 600] == by_step[-1] == pytest.approx(0.0001)


@pytest.mark.parametrize("recipe", ["paper", "paper-mobile"])
def test_the_augmentation_that_is_called_the_papers_is_so(recipe: str) -> None:
    images = asked(recipe).images
    model = torchvision.models.resnet50()
    how = with_resize(preparation(model, "torchvision:resnet50", images.image_size), images.val_resize)
    assert (how.size, how.resize) == ((224, 224), 256)
    assert images.augment == "standard"
    crop, flip = Prepared(how, images.augment, scale=images.crop_scale, ratio=images.crop_ratio).varied.transforms
    assert (crop.scale, crop.ratio, crop.size) == ((0.1, 1.0), (0.8, 1.25), (224, 224))
    assert flip.p == 0.5
    text = next(item for name, item in DataOptions.__dataclass_fields__.items() if name == "augment").metadata["help"]
    assert "paper 4.1" in text
    assert f"--crop-scale {images.crop_scale} --crop-ratio {images.crop_ratio}" in text


def test_what_is_given_beats_a_recipe() -> None:
    found = asked(
        "paper", epochs=5, weight_decay=0.5, nesterov=True, attention_init="identity", crop_scale=0.5, connection_lr=3.0
    )
    assert (found.training.epochs, found.training.weight_decay, found.training.nesterov) == (5, 0.5, True)
    assert (found.conversion.attention_init, found.images.crop_scale, found.training.connection_lr) == (
        "identity",
        0.5,
        3.0,
    )
    assert found.training.momentum == 0.9


def test_what_images_are_resized_to_is_in_proportion() -> None:
    assert asked("paper").images.val_resize == asked("paper", image_size=224).images.val_resize == 256
    assert asked("paper", image_size=32).images.val_resize == 37
    assert asked("paper-mobile", image_size=299).images.val_resize == 342
    assert asked("paper", image_size=32, val_resize=40).images.val_resize == 40


def test_rates_and_milestones_are_in_proportion() -> None:
    assert asked("paper", batch_size=32).training.lr == pytest.approx(0.1 / 8)
    assert asked("paper", batch_size=32, accumulate=8).training.lr == pytest.approx(0.1)
    assert asked("paper-detection", lr=0.02, batch_size=16).training.lr == 0.02
    assert asked("paper-detection", lr=0.02).training.connection_lr == 0.02
    assert asked("paper-detection", epochs=12).training.falls_at == (9, 11)
    assert asked("paper-detection", epochs=12, milestones="8,11").training.falls_at == (8, 11)
    assert asked("paper-mobile", warmup_steps=10).training.warmup_epochs == 0


def test_a_recipe_is_for_one_task() -> None:
    run = RunOptions(recipe="paper-detection", task="classification")
    with pytest.raises(UsageError, match="is for --task detection"):
        chosen(run, TrainingConfig(), DataOptions(), Conversion(), ["task"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"milestones": "18;22"}, "epochs that rise"),
        ({"milestones": "22,18"}, "epochs that rise"),
        ({"milestones": ""}, "epochs that rise"),
        ({"milestones": "0,4"}, "epochs that rise"),
        ({"milestones": "nan"}, "epochs that rise"),
        ({"warmup_steps": 5, "warmup_epochs": 1.0}, "Leave one out"),
        ({"decayed": "biases"}, "is not known"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        TrainingConfig(**options)


def test_milestones_behind_the_end() -> None:
    with pytest.raises(UsageError, match="beyond the 10 epochs"):
        scheduler_for(
            optimizer_for(nn.Linear(1, 1), TrainingConfig()), TrainingConfig(schedule="multistep", milestones="5,18"), 4
        )


def test_the_help_tells_what_the_paper_says_from_what_was_published() -> None:
    text = RunOptions.__dataclass_fields__["recipe"].metadata["help"]
    for name, recipe in RECIPES.items():
        part = text[text.index(f"{name}: ") :]
        stated, published = part.index(f"section {recipe.section}"), part.index("as published")
        assert stated < part.index("--momentum 0.9") < published
        assert published < part.index("--no-nesterov")
        assert published < part.index("--min-hidden 1")


def test_every_option_of_a_recipe_is_an_option() -> None:
    known = {name for kind in (TrainingConfig, DataOptions, Conversion) for name in kind.__dataclass_fields__}
    for recipe in RECIPES.values():
        assert recipe.options.keys() <= known
        assert not recipe.stated.keys() & recipe.published.keys()


def test_validation_images_that_would_be_smaller_than_what_is_cut_out() -> None:
    with pytest.raises(UsageError, match="--val-resize 200"):
        with_resize(preparation(torchvision.models.resnet18(), "torchvision:resnet18"), 200)


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({}, [], "centred"),
        ({"message": "plain"}, ["message"], "plain"),
        ({"schema": "normalised"}, ["schema"], "plain"),
        ({"schema": "direct"}, ["schema"], "centred"),
        ({"topology": "dense", "attention": "se"}, ["topology", "attention"], "centred"),
        ({"topology": "hub"}, ["topology"], "plain"),
    ],
)
def test_classifiers_hear_centred_messages_where_nothing_else_is_asked_for(
    options: dict[str, str], given: list[str], message: str
) -> None:
    """What the study supports for trained networks; the paper's own forms stay what they are."""

    def asked(run: RunOptions) -> str:
        found = chosen(run, TrainingConfig(), DataOptions(), Conversion(**options), [*given, "task", "recipe"])
        return found.conversion.message

    assert asked(RunOptions()) == message
    assert asked(RunOptions(task="detection")) == "plain"
    assert asked(RunOptions(task="detection", recipe="paper-detection")) == "plain"
    for recipe in ("paper", "paper-mobile"):
        assert asked(RunOptions(recipe=recipe)) == "plain"
