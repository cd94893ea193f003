"""Options as people write them: other names, other cases, what is missing, and one default for one name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main
from PIL import Image

import dcafy
from dcafy.cli import app
from dcafy.errors import UsageError
from dcafy.images.about import About, put_about
from dcafy.runs.using import class_of
from dcafy.training import DataOptions, open_data

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes of 2, 6 and 12 pictures, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for number, (name, count) in enumerate({"daisy": 2, "rose": 6, "tulip": 12}.items()):
        (tmp_path / "flowers" / name).mkdir(parents=True)
        for index in range(count):
            picture = Image.new("RGB", (20, 20), (80 * number + index, 100, 50))
            picture.save(tmp_path / "flowers" / name / f"{index}.png")
    return tmp_path / "flowers"


def test_one_name_has_one_default_in_every_command() -> None:
    """But for what is an argument of another kind, and what evaluate takes from the training."""
    defaults: dict[str, dict[str, object]] = {}
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        for option in command.params:
            defaults.setdefault(option.name, {})[command.name] = option.default or None
    unlike = {name for name, by_command in defaults.items() if len(set(map(str, by_command.values()))) > 1}
    assert len(defaults) > 80
    assert unlike == {"val_fraction"}


def test_a_folder_of_images_needs_no_further_word(flowers: Path) -> None:
    for spec in ("flowers", str(flowers), flowers, "imagefolder:flowers"):
        assert open_data(spec, DataOptions()).classes == ("daisy", "rose", "tulip")
    with pytest.raises(UsageError, match=r"There is no folder 'gone/flowers', and it is not known"):
        open_data("gone/flowers", DataOptions())
    (flowers.parent / "digits").mkdir()
    assert len(open_data("digits", DataOptions()).classes) == 10  # a name of the table is one, and ./digits the folder


TRY = ("timm:test_resnet", "--data", "flowers", "--image-size", 32, "--cpu", "--epochs", 1, "--dry-run")


def test_names_and_cases_of_other_trainers_are_understood(dcafy_command: Run, flowers: Path) -> None:
    """In a trial that writes nothing, with a header that says what was understood."""
    pytest.importorskip("timm")
    options = ("--attention", "SE", "--wd", 0.125, "--bs", 8, "--learning-rate", 0.0625, "--schedule", "Constant")
    code, out, err = dcafy_command("finetune", *TRY, *options, "--balance", "-o", "run")
    assert code == 0, err
    told = {line.partition(" ")[0]: " ".join(line.split()) for line in err.splitlines()}
    assert (
        "with se put in, 3 connections with centred messages; weights: random (add @DEFAULT for trained ones)"
        in told["network"]
    )
    assert f"imagefolder:{flowers}: 17 images to train on, 3 to validate on, 3 classes: daisy, rose" in told["data"]
    assert "32 x 32 pixels (to validate on, the centre of 34), 3 channels" in told["images"]
    assert "new classifier: fc; classes weighed by how rare they are" in told["trained"]
    assert "adamw, base 0.0625, connections 0.0625" in told["rates"]
    assert told["rates"].endswith("constant; weight decay 0.125")
    assert "1 epoch of 2 steps, 8 images in a step" in told["budget"]
    assert told["device"] == "device cpu, float32"
    assert told["writes"] == "writes nothing (--dry-run)"
    assert "one batch went through training" in out
    assert "GB in this process" in out
    assert "an epoch takes about" in out
    assert sorted(path.name for path in flowers.parent.iterdir()) == ["flowers"]


def test_few_images_at_once_are_told_where_messages_are_centred(dcafy_command: Run, flowers: Path) -> None:
    pytest.importorskip("timm")
    for options, told in ((("--bs", 4), True), (("--bs", 4, "--message", "plain"), False), (("--bs", 8), False)):
        code, _, err = dcafy_command("finetune", *TRY, "--attention", "se", *options)
        assert code == 0, err
        assert ("of 4 images at once, which is few: --message plain" in err) == told


def test_a_connected_network_has_no_use_for_the_options_of_a_conversion(
    dcafy_command: Run, flowers: Path, tmp_path: Path
) -> None:
    """Nor for one that says what it would be by default."""
    pytest.importorskip("timm")
    assert dcafy_command("convert", "timm:test_efficientnet", "-o", tmp_path / "m")[0] == 0
    rest = TRY[1:]
    for option in (("--message", "centred"), ("--topology", "chain")):
        code, _, err = dcafy_command("finetune", tmp_path / "m", *rest, *option)
        assert (code, f"is connected already, so that {option[0]} is of no use" in err) == (2, True), err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--attention", "sse"), "Did you mean 'se'?"),
        (("--attention", "SE-"), "Did you mean 'se'?"),
        (("--bs", 0), "--batch-size must be at least 1, not 0"),
        (("--wd", -1), "--weight-decay must be at least 0"),
        (("--balance", "--task", "detection"), "--balance is for classifiers"),
        (("--data", "flower"), "--data 'flower' is not known"),
        (("--seeds", 2), "Add --compare"),
    ],
)
def test_what_is_not_understood_is_asked_about(
    dcafy_command: Run, flowers: Path, arguments: tuple[object, ...], says: str
) -> None:
    code, _, err = dcafy_command("finetune", *TRY, *arguments)
    assert code == 2
    assert says in " ".join(err.split())
    assert sorted(path.name for path in flowers.parent.iterdir()) == ["flowers"]


def test_what_is_not_installed_is_told_before_anything_is_built(
    dcafy_command: Run, flowers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcafy.sources.open_model", lambda *_, **__: pytest.fail("it is built"))
    monkeypatch.setattr("dcafy.runs.run.open_model", lambda *_, **__: pytest.fail("it is built"))
    for module, arguments, what in (
        ("accelerate", ("finetune", *TRY), "dcafy finetune needs accelerate, which is not installed"),
        ("pycocotools", ("finetune", *TRY, "--task", "detection"), "--task detection needs pycocotools, which is"),
        ("captum", ("report", "x", "--images", "flowers"), "The page of dcafy report needs captum, which is"),
    ):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module, None)
            code, _, err = dcafy_command(*arguments)
        assert code == 2
        assert what in err
        assert "pip install 'dcafy[" in err


def test_a_class_by_its_name_or_its_number() -> None:
    import torchvision

    model = dcafy.convert(torchvision.models.mobilenet_v3_small(num_classes=4), verify=False)
    with pytest.raises(UsageError, match="It has no names: give a number"):
        class_of(model, "rose")
    put_about(model, About(classes=("rose", "Tulip", "tulip", "3")))
    assert [class_of(model, name) for name in ("rose", "ROSE", "tulip", "3", "1")] == [0, 0, 2, 3, 1]
    with pytest.raises(UsageError, match="is the name of the classes 1, 2"):
        class_of(model, "TULIP")
    with pytest.raises(UsageError, match=r"Did you mean 'rose'\? It knows 'rose', 'Tulip'"):
        class_of(model, "rosee")
