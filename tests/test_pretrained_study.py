"""The study of benchmarks/pretrained.py: the network that its weights make, its words, and its tables."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dcafy
from dcafy.training.optimization import groups_of
from dcafy.training.options import TrainingConfig

SOURCE = Path(__file__).parents[1] / "benchmarks"

WIDTHS = {  # of each unit: what is expanded to, what comes out, and the kernel
    2: (8, 8, 3),
    3: (24, 8, 3),
    4: (32, 8, 3),
    5: (32, 16, 5),
    **dict.fromkeys((6, 7), (88, 16, 5)),
    8: (40, 16, 5),
    9: (48, 16, 5),
    10: (104, 32, 5),
    **dict.fromkeys((11, 12), (200, 32, 5)),
}


def made_up() -> dict[str, Any]:
    """Weights with the names and shapes of PP-OCR's."""
    chance, found = np.random.default_rng(0), {}

    def put(name: str, *shape: int) -> None:
        found[name] = (0.3 * chance.standard_normal(shape)).astype(np.float32)

    def convolution(name: str, outputs: int, inputs: int, size: int) -> None:
        put(f"{name}_weights", outputs, inputs, size, size)
        for part in ("scale", "offset", "mean", "variance"):
            put(f"{name}_bn_{part}", outputs)
        found[f"{name}_bn_variance"] = found[f"{name}_bn_variance"] ** 2 + 0.5

    convolution("conv1", 8, 3, 3)
    inputs = 8
    for number, (wide, outputs, size) in WIDTHS.items():
        convolution(f"conv{number}_expand", wide, inputs, 1)
        convolution(f"conv{number}_depthwise", wide, 1, size)
        convolution(f"conv{number}_linear", outputs, wide, 1)
        if number not in (3, 4):
            for part, (out, into) in enumerate(((wide // 4, wide), (wide, wide // 4)), start=1):
                put(f"conv{number}_se_{part}_weights", out, into, 1, 1)
                put(f"conv{number}_se_{part}_offset", out)
        inputs = outputs
    convolution("conv_last", 200, 32, 1)
    put("fc_0.w_0", 200, 2)
    put("fc_0.b_0", 2)
    return found


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    sys.path.insert(0, str(SOURCE))
    try:
        yield importlib.import_module("pretrained")
    finally:
        sys.path.remove(str(SOURCE))


@pytest.fixture
def study(module: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(module, "weights_of", lambda wheel: made_up())
    made = module.Lines(Path("nowhere"), Path("nowhere"))
    chance = torch.Generator().manual_seed(0)
    for part in ("train", "t10k"):
        made._garments[part] = torch.rand(40, 1, *module.SIZE, generator=chance), torch.arange(40) % 2
    monkeypatch.setattr(type(made), "validation", lambda self, setting: [made.batch(setting, "t10k", 16, chance)])
    return made


def test_weights_are_read_by_name_and_nothing_of_the_wheel_is_run(module: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = onnx.numpy_helper.from_array(value, "w")
    nodes = [onnx.helper.make_node("Constant", [], ["conv1_weights"], value=tensor)]
    nodes.append(onnx.helper.make_node("Identity", ["conv1_weights"], ["y"]))
    graph = onnx.helper.make_graph(nodes, "g", [], [])
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx", onnx.helper.make_model(graph).SerializeToString()
        )
        archive.writestr("rapidocr/models/other.onnx", b"")
        archive.writestr("rapidocr/__init__.py", "raise SystemExit")
    found = module.weights_of(wheel)
    assert list(found) == ["conv1_weights"]
    assert np.array_equal(found["conv1_weights"], value)


def test_the_network_has_all_of_the_weights(module: Any) -> None:
    """Each of them once, and nine blocks in one chain; without attention, all but the blocks'."""
    weights = made_up()
    network = module.Angle(weights)
    state = [value for key, value in network.state_dict().items() if "num_batches" not in key]
    assert sum(value.numel() for value in state) == sum(value.size for value in weights.values())
    ours = sorted(float(value.double().sum()) for value in state)
    assert np.allclose(ours, sorted(float(value.astype(float).sum()) for value in weights.values()), atol=1e-4)
    plan = dcafy.inspect(network, example_inputs=torch.zeros(2, 3, *module.SIZE))
    assert [block.channels for block in plan.blocks] == [8, 32, 88, 88, 40, 48, 104, 200, 200]
    assert len(plan.chains) == 1
    assert [unit.shortcut for unit in network.units] == [False, False, True, False, *[True] * 4, False, True, True]
    plain = module.Angle(weights, attention=False).state_dict()
    squeezed = {key for key in network.state_dict() if ".reduce." in key or ".expand." in key}
    assert len(network.state_dict()) - len(plain) == len(squeezed) == 4 * 9
    z = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])
    assert torch.allclose(module.HardSigmoid()(z), torch.tensor([0.0, 0.3, 0.5, 0.7, 1.0]))


def test_a_mark_says_which_of_two_words_is_asked_for(module: Any) -> None:
    """And nothing else does; each word is in a channel of its own."""
    one, other = torch.zeros(300, 1, *module.SIZE), torch.zeros(300, 1, *module.SIZE)
    one[:, :, 4:8], other[:, :, 20:24] = 1.0, 1.0
    x, asked = module.two_words(one, other, torch.Generator().manual_seed(0))
    height, width = module.SIZE
    assert x.shape == (300, 3, height, module.MARGIN + width)
    assert 100 < int(asked.sum()) < 200
    assert torch.equal(x[:, 1, :, : module.MARK].mean((1, 2)) > 0, asked == 1)
    red, blue = (x[:, channel, :, module.MARGIN :].mean(2) for channel in (0, 2))
    assert (red[:, 10:] - red[:, 4:8].mean(1, keepdim=True)).mean() > 0.7
    assert (blue[:, :18] - blue[:, 20:24].mean(1, keepdim=True)).mean() > 0.7
    said = (x[:, 1, :, module.MARK :], x[:, 0], x[:, 2])
    means = torch.stack([part.flatten(1).mean(1) for part in said] + [asked.float()])
    assert torch.corrcoef(means)[-1, :-1].abs().max() < 0.2


def test_only_attention_brings_the_mark_to_the_words(module: Any) -> None:
    """The trained network's convolutions do not see so far."""
    for attention in (False, True):
        network = module.Angle(made_up(), attention=attention).eval()
        x = torch.rand(1, 3, module.SIZE[0], module.MARGIN + module.SIZE[1], requires_grad=True)
        features = network.last(network.units(network.stem(x)))
        features[..., module.MARGIN // 4 :].sum().backward()
        assert x.grad is not None
        assert bool(x.grad[..., : module.MARK].any()) == attention
        assert x.grad[..., module.MARGIN :].any()


def test_words_are_drawn_alike_each_time_and_half_of_them_upside_down(module: Any, monkeypatch: Any) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setattr(module, "FACES", ("DejaVuSans", "DejaVuSerif-Bold"))
    monkeypatch.setattr(module, "DRAWN", {"train": (1, 160), "t10k": (2, 160)})
    fonts = Path(matplotlib.get_data_path()) / "fonts"
    (ink, turned), (again, _), (others, _) = (module.drawn(fonts, part) for part in ("train", "train", "t10k"))
    assert torch.equal(ink, again)
    assert not torch.equal(ink, others)
    assert ink.shape == (160, 1, *module.SIZE)
    assert int(turned.sum()) == 80
    assert ink.amax((1, 2, 3)).min() > 0.8, "no word is out of the picture"
    left, right = (ink[:, 0, :, part].mean((1, 2)) for part in (slice(4, 12), slice(-8, None)))
    words = (left > right).float()
    assert words[turned == 0].mean() > 0.55 > 0.45 > words[turned == 1].mean(), "words begin at the left"


@pytest.mark.parametrize("name", ["centred", "no attention"])
def test_an_arm_is_what_it_says(name: str, study: Any, module: Any) -> None:
    setting = dataclasses.replace(module.SETTING, steps=1, batch=4)
    (row,) = study.run(setting, [name], 0)
    assert ("beta" in row) == (name == "centred")
    assert ("spread" in row) == (name != "no attention")
    start, other = (study.start(setting, 3, attention=attention) for attention in (True, False))
    assert torch.equal(start.fc.weight, other.fc.weight)
    assert start.fc.out_features == 2


def test_by_adamw_as_finetune_trains(study: Any, module: Any) -> None:
    """The optimizer's groups have the rates and the decay that the command's have."""
    accuracy = importlib.import_module("accuracy")
    setting = dataclasses.replace(module.SETTINGS["pretrained, adamw"], steps=1, batch=4)
    (row,) = study.run(setting, ["centred"], 0)
    assert (row["optimizer"], row["setting"]) == ("adamw", "pretrained, adamw")
    arm = setting.arms["centred"]
    network, _ = study.made(setting, arm, 0)
    groups, wanted = accuracy._groups(network, setting, arm), groups_of(network, TrainingConfig())
    found, expected = (
        sorted((group["lr"], group["weight_decay"], sum(p.numel() for p in group["params"])) for group in one)
        for one in (groups, wanted)
    )
    assert found == expected
    assert isinstance(accuracy.OPTIMIZERS[setting.optimizer](groups, setting.lr, False), torch.optim.AdamW)


def test_arms_start_from_the_same_outputs(study: Any, module: Any) -> None:
    x, _ = study.batch(module.SETTING, "train", 3, torch.Generator().manual_seed(1))
    accuracy = importlib.import_module("accuracy")
    vanilla = study.start(module.SETTING, 3, attention=True).eval()
    for name in ("connected", "own message"):
        arm = module.SETTING.arms[name]
        made = accuracy._converted(study.start(module.SETTING, 3, attention=True), x, arm).eval()
        assert torch.equal(made(x), vanilla(x))
        assert len(dcafy.connections(made)) == 8


def test_the_rows_that_are_committed_make_the_tables(module: Any) -> None:
    rows = module.read(module.RESULTS)
    assert rows
    assert all(module.valid(row) for row in rows)
    assert len({(row["setting"], row["arm"], row["seed"]) for row in rows}) == len(rows)
    written = module.RESULTS.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    tables = [line for line in module.report(rows).splitlines() if line.startswith("|")]
    assert [line for line in written if line.startswith("|")] == tables
