"""The rules on networks as torchvision and timm ship them: one or two of each family, and all with ``-m zoo``.

``benchmarks/zoo.py`` runs the same checks over whole zoos and writes a table. It starts every network in a
process of its own, and so does the whole zoo here; the few small networks of every run need none.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Container, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import dcafy
from dcafy.zoos.specs import parse

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def _script(name: str, module_name: str) -> ModuleType:
    """A script of ``benchmarks``, which is no package, under a name that no test module has."""
    spec = importlib.util.spec_from_file_location(module_name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module


zoo_checks = _script("zoo_checks", "zoo_checks")

SE = ("SEModule", "SqueezeExcite", "SqueezeExcitation", "QuantizableSqueezeExcitation")

CONVERTED = {
    "timm:test_byobnet": SE,
    "timm:test_maxvit": SE,
    "timm:test_nfnet": SE,
    "timm:lcnet_050": SE,
    "timm:repghostnet_050": SE,
    "timm:tinynet_e": SE,
    "timm:mobilenetv3_small_050": SE,
    "timm:mixnet_s": SE,
    "timm:regnety_002": SE,
    "timm:rexnet_100": SE,
    "timm:seresnet18": SE,
    "timm:gcresnext26ts": ("GlobalContext",),
    "timm:shvit_s1": SE,
    "timm:repvit_m0_9": SE,
    "torchvision:lraspp_mobilenet_v3_large": (*SE, "LRASPPHead"),
    "torchvision:quantized_mobilenet_v3_large": SE,
    "torchvision:ssdlite320_mobilenet_v3_large": SE,
}
"""Networks that are built, converted and checked -> the classes of the modules that hold their attention."""

INSPECTED = {
    "timm:cs3sedarknet_xdw": SE,
    "timm:eca_nfnet_l0": ("EcaModule",),
    "timm:ecaresnext26t_32x4d": ("EcaModule",),
    "timm:efficientnet_cc_b0_4e": SE,
    "timm:efficientvim_m1": SE,
    "timm:fbnetv3_b": SE,
    "timm:gcvit_xxtiny": SE,
    "timm:haloregnetz_b": SE,
    "timm:hgnet_small": ("EseModule",),
    "timm:legacy_senet154": SE,
    "timm:resnest50d": ("SplitAttn",),
    "timm:sebotnet33ts_256": SE,
    "timm:skresnext50_32x4d": ("SelectiveKernelAttn",),
    "timm:tresnet_m": SE,
    "torchvision:deeplabv3_mobilenet_v3_large": SE,
    "torchvision:regnet_y_128gf": SE,
}
"""Larger networks, and rarer kinds, that are looked at without weights."""

WITHOUT = (
    "timm:beit_base_patch16_224",
    "timm:convnext_nano",
    "timm:focalnet_tiny_srf",
    "timm:hrnet_w18_small",
    "timm:poolformer_s12",
    "timm:swin_tiny_patch4_window7_224",
    "torchvision:densenet121",
    "torchvision:googlenet",
    "torchvision:swin3d_t",
)
"""Networks in which there is nothing to find."""


def holders(spec: str, classes: tuple[str, ...]) -> list[str]:
    """The paths of the modules of these classes: where a reader of the network's source expects the blocks."""
    model = parse(spec, {}).build(on_meta=True)
    paths = [path for path, module in model.named_modules() if type(module).__name__ in classes]
    assert paths or not classes, f"{spec} has no {' or '.join(classes)}"
    return paths


def examined(spec: str, stage: str, classes: tuple[str, ...]) -> dict[str, Any]:
    """The row of a network in which all its attention was found, and nothing else."""
    torch.set_num_threads(1)
    row: dict[str, Any] = zoo_checks.examine(spec, stage, holders(spec, classes))
    assert row["step"] == "done"
    assert "error" not in row
    assert row["missed"] == []
    assert row["extra"] == []
    return row


QUICK = {"timm:test_byobnet", "timm:test_maxvit", "timm:test_nfnet", "timm:lcnet_050"}
"""Those of ``CONVERTED`` that plain ``pytest`` runs."""

SLOW = {
    "timm:cs3sedarknet_xdw",
    "timm:efficientnet_cc_b0_4e",
    "timm:fbnetv3_b",
    "timm:haloregnetz_b",
    "timm:resnest50d",
    "timm:tresnet_m",
}
"""Those of ``INSPECTED`` that it leaves out."""


def tiered(specs: Iterable[str], slow: Container[str]) -> list[Any]:
    return [pytest.param(spec, marks=pytest.mark.zoo if spec in slow else []) for spec in specs]


def test_the_tiers_name_networks_that_are_there() -> None:
    assert CONVERTED.keys() > QUICK
    assert INSPECTED.keys() > SLOW


@pytest.mark.zoo_quick
@pytest.mark.parametrize("spec", tiered(CONVERTED, CONVERTED.keys() - QUICK))
def test_a_network_of_the_zoos_converts(spec: str) -> None:
    row = examined(spec, "full", CONVERTED[spec])
    assert row["links"] > 0
    assert list(row["checks"]) == ["convert", *zoo_checks.CHECKS]
    wrong = {name: outcome for name, outcome in row["checks"].items() if outcome != "ok"}
    only_size = {"sizes": "n/a: the original takes images of one size"}
    assert wrong in ({}, only_size)


@pytest.mark.zoo_quick
@pytest.mark.parametrize("spec", tiered(INSPECTED, SLOW))
def test_attention_is_found_without_weights(spec: str) -> None:
    row = examined(spec, "inspect", INSPECTED[spec])
    assert row["links"] == len(row["blocks"]) - 1
    assert row["skipped"] == [] or all("self-attention" in reason for _, reason in row["skipped"])


@pytest.mark.zoo_quick
@pytest.mark.parametrize("spec", WITHOUT)
def test_nothing_is_found_where_there_is_nothing(spec: str) -> None:
    row = examined(spec, "inspect", ())
    assert row["blocks"] == []


# The checks can fail ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject() -> Any:
    """A converted network, to be broken on purpose."""
    spec = "timm:test_byobnet"
    model = parse(spec, {}).build(on_meta=True).eval()
    subject = zoo_checks.subject_of(spec, model)
    zoo_checks.convert_subject(subject, {"seconds": {}, "blocks": [], "example": []})
    return subject


@pytest.mark.zoo_quick
@pytest.mark.parametrize("check", zoo_checks.CHECKS)
@pytest.mark.xdist_group("zoo_checks")
def test_a_check_notices_what_it_is_for(subject: Any, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is wrong with the conversion, and something with one that was tampered with."""
    run = zoo_checks.CHECKS[check]
    assert run(subject) is None
    broken = copy.copy(subject)
    broken.converted = copy.deepcopy(subject.converted)
    if check == "liveness":
        monkeypatch.setattr(dcafy.Connection, "forward", lambda self, context, *_: self.alpha * context)
    else:
        with torch.no_grad():
            next(p for n, p in broken.converted.named_parameters() if n.endswith("attn_last.fc1.weight")).add_(0.5)
    assert run(broken) is not None


class OneSize(torch.nn.Module):
    """Takes images of one size, and does not notice without data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != 32 and x.device.type != "meta":
            raise RuntimeError("32 pixels, please")
        return x.sum((2, 3))


@pytest.mark.zoo_quick
def test_another_size_is_asked_of_the_original_first() -> None:
    """A size that the original refuses says nothing; one that only the converted network refuses is a failure."""
    subject = zoo_checks.Subject(OneSize(), (3, 32, 32), (3, 40, 40))
    subject.converted = OneSize()
    with pytest.raises(zoo_checks.NotApplicable, match="32 pixels, please"):
        zoo_checks.check_sizes(subject)
    subject.model = torch.nn.Identity()
    with pytest.raises(RuntimeError, match="32 pixels, please"):
        zoo_checks.check_sizes(subject)


@pytest.mark.zoo_quick
@pytest.mark.parametrize(("start", "least", "most"), [(0.0, 0.1, 0.3), (1.0, 0.7, 1.1)])
def test_gains_are_those_of_a_trained_network(start: float, least: float, most: float) -> None:
    """A gain that starts at zero is no longer zero, and so small that a hundred such branches do not add up."""
    gain = torch.full((1000,), start)
    zoo_checks._move(gain, bias=False)
    assert least <= gain.min() < gain.max() <= most
    assert gain.unique().numel() > 900


@pytest.mark.zoo_quick
def test_the_score_counts_what_is_missed_and_what_is_beside(subject: Any) -> None:
    """Inside and around an expected module count, the latter through nothing but ``Sequential``."""
    found = ["stages.0", "stages.1.0.attn_last", "stages.1.0.attn_last#2", "stages.2.0.attn_last.fc1", "stages.3.0"]
    expected = ["stages.0.0", "stages.1.0.attn_last", "stages.2.0.attn_last", "stages.3.0.attn_last"]
    scored = zoo_checks.score(subject.model, found, expected)
    assert scored["missed"] == ["stages.3.0.attn_last"]
    assert scored["extra"] == ["stages.3.0"]


# The whole zoo, with -m zoo -----------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "any_spec" in metafunc.fixturenames:
        # Listing them loads torchvision and timm: only who asks for the zoo waits for that.
        asked = metafunc.config.getoption("markexpr") == "zoo"
        metafunc.parametrize("any_spec", _script("zoo", "zoo_script").every_model() if asked else ["none asked for"])


@pytest.mark.zoo
def test_any_network_of_the_zoos(any_spec: str) -> None:
    zoo = _script("zoo", "zoo_script")
    zoo.prepare_processes()
    row = zoo.run_one(any_spec, "full", None, timeout=1800, memory=12)
    if row.get("traced") == "not built":
        pytest.skip(f"its own zoo cannot build it: {row['error']}")
    assert "error" not in row
    assert [f"{name} {text}" for name, text in row.get("checks", {}).items() if text.startswith("failed")] == []
