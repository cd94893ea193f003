"""Opening models: names, factories, weights in files, and the architectures that these fit."""

from __future__ import annotations

import collections
import logging
import random
import sys
import urllib.error

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

import dcafy
from dcafy.errors import SourceError, UsageError
from dcafy.sources import Source, build_architecture, open_model
from dcafy.zoos import fitting

SMALL = "torchvision:mobilenet_v3_small"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return torchvision.models.mobilenet_v3_small(weights=None, num_classes=7).eval()


def same(one, other):
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


# --- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "settings", "kind", "architecture"),
    [
        (SMALL, {}, torchvision.models.MobileNetV3, SMALL),
        (SMALL, {"num_classes": 3}, torchvision.models.MobileNetV3, SMALL),
        ("torchvision:lraspp_mobilenet_v3_large", {}, torchvision.models.segmentation.LRASPP, None),
        ("timm:legacy_seresnet18", {}, timm.models.senet.SENet, "timm:legacy_seresnet18"),
        ("timm:mobilenetv3_small_050.lamb_in1k", {}, timm.models.MobileNetV3, "timm:mobilenetv3_small_050.lamb_in1k"),
        ("timm:tv_resnet34", {}, timm.models.ResNet, "timm:tv_resnet34"),
    ],
)
def test_names(spec, settings, kind, architecture, monkeypatch):
    forbid_downloads(monkeypatch)
    source = open_model(spec, settings=settings)
    assert isinstance(source.model, kind)
    assert (source.spec, source.architecture, source.settings) == (spec, architecture or spec, settings)
    again = build_architecture(source.architecture, source.settings)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in source.model.state_dict().items()
    }


NO_ROUTE = urllib.error.URLError("no route to host")


def forbid_downloads(monkeypatch, error=NO_ROUTE):
    def fetch(*arguments, **options):
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    monkeypatch.setattr("timm.models._builder.load_pretrained", fetch)


def test_a_source_is_frozen(small):
    with pytest.raises(AttributeError):
        Source(small, "x").spec = "y"


def test_on_meta_there_are_only_shapes():
    real, meta = (open_model("torchvision:regnet_y_400mf", on_meta=on_meta).model for on_meta in (False, True))
    assert all(value.is_meta for value in meta.state_dict().values())
    assert {k: v.shape for k, v in real.state_dict().items()} == {k: v.shape for k, v in meta.state_dict().items()}
    assert not any(value.is_meta for value in real.state_dict().values())


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("torchvision:mobilenet_v3_smal", "Did you mean torchvision:mobilenet_v3_small"),
        ("torchvision:seresnet50", "Did you mean timm:seresnet50"),
        ("timm:seresnet_50", "timm:seresnet50"),
        ("mobilenet_v3_small", "Did you mean torchvision:mobilenet_v3_small"),
        ("seresnet50", "Did you mean timm:seresnet50"),
        ("Timm:seresnet50", "Did you mean timm:seresnet50"),
        ("", "package.module:factory"),
        ("no model of mine", "package.module:factory"),
        ("timm:", "no model ''"),
        ("timm:hf-hub:somebody/something", "no model 'hf-hub:somebody/something'"),
        ("timm:local-dir:/tmp", "no model"),
        ("timm:seresnet50.nope", "a1_in1k, a2_in1k"),
        ("timm:seresnet50@IMAGENET1K_V1", "timm:seresnet50.TAG@DEFAULT"),
        ("timm:seresnet18@DEFAULT", "no pretrained weights"),
        (f"{SMALL}@NOPE", "It has IMAGENET1K_V1"),
        (f"{SMALL}@", "It has IMAGENET1K_V1"),
        ("torchvision:mnasnet0_75@IMAGENET1K_V9", "IMAGENET1K_V1"),
    ],
)
def test_unknown_names(spec, says):
    with pytest.raises(UsageError) as caught:
        open_model(spec)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["weights", "weights_backbone", "pretrained", "checkpoint_path"])
def test_weights_are_not_for_settings(name):
    with pytest.raises(UsageError, match="@DEFAULT"):
        open_model(SMALL, settings={name: "DEFAULT"})


@pytest.mark.parametrize("settings", [{"num_classes": "many"}, {"bogus": 1}])
@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:legacy_seresnet18"])
def test_settings_that_do_not_work(spec, settings):
    with pytest.raises(UsageError, match=f"cannot be built with {next(iter(settings))}="):
        open_model(spec, settings=settings)


def test_arch_is_for_files():
    with pytest.raises(UsageError, match="Leave --arch out"):
        open_model(SMALL, arch=SMALL)


@pytest.mark.parametrize(("package", "install"), [("timm", r"dcafy\[timm\]"), ("torchvision", "torchvision")])
def test_a_missing_package(package, install, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"{package} is not installed.*pip install.*{install}"):
        open_model(f"{package}:resnet18")


def test_suggestions_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"Did you mean torchvision:resnet18[?]"):
        open_model("resnet18")


@pytest.mark.parametrize("spec", [f"{SMALL}@DEFAULT", f"{SMALL}@IMAGENET1K_V1", "timm:seresnet50@DEFAULT"])
@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), OSError("no space"), RuntimeError("invalid hash value")]
)
def test_weights_that_cannot_be_fetched(spec, error, monkeypatch):
    forbid_downloads(monkeypatch, error)
    with pytest.raises(SourceError, match=r"could not be fetched.*leave @"):
        open_model(spec)


def test_weights_that_can_be_fetched(monkeypatch):
    published = torchvision.models.mobilenet_v3_small(weights=None)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: published.state_dict())
    source = open_model(f"{SMALL}@DEFAULT")
    assert same(source.model, published)
    assert (source.spec, source.architecture) == (f"{SMALL}@DEFAULT", SMALL)


def test_no_architecture_where_weights_bring_settings_along(monkeypatch):
    """GoogLeNet's published weights switch on another treatment of the input, which no key shows."""
    published = torchvision.models.googlenet(weights=None, init_weights=False)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: published.state_dict())
    source = open_model("torchvision:googlenet@DEFAULT", settings={"aux_logits": True, "init_weights": False})
    assert source.model.transform_input
    assert source.architecture is None


def test_build_architecture_runs_no_code(here):
    (here / "mine.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UsageError, match="not a torchvision: or timm: name"):
        build_architecture("mine:build")


# --- factories --------------------------------------------------------------------------------------

FACTORIES = """
import sys
import torch
from torch import nn

class Holder:
    @staticmethod
    def build(): return nn.Linear(1, 1)

def build(width=3, *, name="x"):
    model = nn.Conv2d(3, width, 1)
    model.label = name
    return model

def anything(**kwargs): return nn.Linear(len(kwargs), 1)
def fails(): raise ValueError("a\\nbad day")
def leaves(): sys.exit(3)
def number(): return 3
def lazy():
    import {name}_beside
    return {name}_beside.model
finished = nn.ReLU()
constant = 3
"""


@pytest.fixture
def factories(here, request):
    """A module of factories in the current directory, under a name that is used once."""
    name = f"factories_{abs(hash(request.node.name))}"
    (here / f"{name}.py").write_text(FACTORIES.replace("{name}", name))
    (here / f"{name}_beside.py").write_text("from torch import nn\nmodel = nn.Identity()\n")
    (here / f"{name}_broken.py").write_text("import no_such_module_anywhere\n")
    (here / f"{name}_leaving.py").write_text("import sys\nsys.exit(1)\n")
    yield name
    for loaded in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[loaded]


def test_a_factory_is_called_with_settings(factories, caplog):
    path = list(sys.path)
    with caplog.at_level(logging.WARNING, "dcafy"):
        source = open_model(f"{factories}:build", settings={"width": 5, "name": "mine"})
    assert (source.model.out_channels, source.model.label) == (5, "mine")
    assert source.architecture is None
    assert f"importing {factories} and calling build(width=5, name='mine'): this runs its code" in caplog.text
    assert sys.path == path


@pytest.mark.parametrize(
    ("factory", "kind"),
    [("Holder.build", nn.Linear), ("finished", nn.ReLU), ("lazy", nn.Identity), ("nn.GELU", nn.GELU)],
)
def test_what_may_be_a_factory(factories, factory, kind):
    assert isinstance(open_model(f"{factories}:{factory}").model, kind)


@pytest.mark.parametrize(
    ("spec", "settings", "says"),
    [
        ("{name}:biuld", {}, "has nothing named 'biuld'. Did you mean build"),
        ("{name}:Holder.nope", {}, "has nothing named 'Holder.nope'"),
        ("{name}:build", {"depth": 3}, "unexpected keyword argument 'depth'"),
        ("{name}:fails", {}, "ValueError: a bad day ("),
        ("{name}:leaves", {}, "SystemExit: 3"),
        ("{name}:number", {}, "returned int, not a torch.nn.Module"),
        ("{name}:constant", {}, "is of type int"),
        ("{name}:finished", {"inplace": True}, "is a finished ReLU"),
        ("{name}_broken:build", {}, "No module named 'no_such_module_anywhere' ("),
        ("{name}_leaving:build", {}, "SystemExit: 1"),
        ("{name}_absent:build", {}, "There is no module"),
        ("{name}.sub:build", {}, "There is no module"),
        ("{name}.py:build", {}, "imports it, and not as a file: {name}:build"),
    ],
)
def test_factories_that_do_not_work(factories, spec, settings, says):
    with pytest.raises(UsageError) as caught:
        open_model(spec.format(name=factories), settings=settings)
    assert says.format(name=factories) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_name_the_line_of_the_users_own_code(factories, here):
    with pytest.raises(UsageError, match=rf"{factories}\.py:\d+"):
        open_model(f"{factories}:fails")


# --- weights in files -------------------------------------------------------------------------------

CHECKPOINTS = {
    "bare": lambda state: state,
    "ordered": lambda state: collections.OrderedDict(state),
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {}}},
    "model": lambda state: {"model": state, "args": "lr=0.1"},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "ema": lambda state: {"ema": {"module": state, "decay": 0.9}, "model": None},
    "state_dict_ema": lambda state: {"state_dict_ema": state},
    "model_ema": lambda state: {"model_ema": {"n_averaged": torch.tensor(3), **prefixed(state, "module.")}},
    "net": lambda state: {"net": state},
    "network": lambda state: {"network": state},
    "DataParallel": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "compiled DataParallel": lambda state: {"state_dict": prefixed(state, "module._orig_mod.")},
    "compiled inside": lambda state: {k.replace("features.1.", "features.1._orig_mod."): v for k, v in state.items()},
    "lightning": lambda state: {"pytorch-lightning_version": "2.4.0", "state_dict": prefixed(state, "model.")},
}


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("form", CHECKPOINTS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_weights_in_checkpoints(form, legacy, small, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(CHECKPOINTS[form](small.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    source = open_model(str(path), arch=SMALL)
    assert same(source.model, small)
    assert (source.spec, source.architecture, source.settings) == (str(path), SMALL, {"num_classes": 7})


def test_plain_weights_come_before_averaged_ones(small, tmp_path, caplog):
    state = small.state_dict()
    other = {key: value + 1 for key, value in state.items()}
    torch.save({"ema": other, "state_dict": state}, tmp_path / "both.pt")
    with caplog.at_level(logging.INFO, "dcafy"):
        assert same(open_model(str(tmp_path / "both.pt"), arch=SMALL).model, small)
    assert "'state_dict' ('ema' passed over)" in caplog.text


def test_safetensors(small, tmp_path):
    # The name does not matter.
    path = tmp_path / "weights.bin"
    safetensors.torch.save_file(small.state_dict(), path)
    assert same(open_model(str(path), arch=SMALL, settings={"num_classes": 7}).model, small)


def test_a_torch_file_that_is_called_safetensors(small, tmp_path):
    path = tmp_path / "weights.safetensors"
    torch.save(small.state_dict(), path)
    assert same(open_model(str(path), arch=SMALL).model, small)


def test_weights_without_batch_counts(small, tmp_path):
    state = {k: v for k, v in small.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pt")
    assert same(open_model(str(tmp_path / "old.pt"), arch=SMALL).model, small)


def test_weights_for_the_users_own_network(factories, tmp_path):
    model = nn.Conv2d(3, 5, 1)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    source = open_model(str(tmp_path / "w.pt"), arch=f"{factories}:build", settings={"width": 5})
    assert same(source.model, model)
    assert source.architecture is None
    with pytest.raises(SourceError, match=r"of another shape: weight .5x3x1x1 instead of 3x3x1x1."):
        open_model(str(tmp_path / "w.pt"), arch=f"{factories}:build")


def test_weights_that_do_not_fit_say_what_differs(small, tmp_path):
    state = small.state_dict()
    state["features.0.0.weight"] = torch.zeros(8, 3, 3, 3)
    state["extra\x1b[31m.weight"] = state.pop("features.1.block.0.0.weight")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(SourceError) as caught:
        open_model(str(tmp_path / "w.pt"), arch=SMALL)
    message = str(caught.value)
    assert "1 missing: features.1.block.0.0.weight" in message
    assert "1 not expected: extra\\x1b[31m.weight" in message
    assert "features.0.0.weight (8x3x3x3 instead of 16x3x3x3)" in message


def test_a_given_number_of_classes_is_not_overruled(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / "w.pt")
    with pytest.raises(SourceError, match=r"classifier.3.bias .7 instead of 9."):
        open_model(str(tmp_path / "w.pt"), arch=SMALL, settings={"num_classes": 9})


# --- architectures that fit -------------------------------------------------------------------------


@pytest.fixture
def few_candidates(monkeypatch):
    names = {
        "torchvision": ["mobilenet_v3_small", "mobilenet_v3_large", "resnet18", "regnet_y_400mf", "googlenet"],
        "timm": ["resnet18", "tv_resnet34", "mobilenetv3_small_100", "legacy_seresnet18", "vit_base_r26_s32_224"],
    }
    monkeypatch.setattr(fitting, "_comparable", lambda prefix: names[prefix])


@pytest.mark.parametrize(
    ("model", "fits"),
    [
        (lambda: torchvision.models.mobilenet_v3_small(num_classes=7), [SMALL]),
        (lambda: torchvision.models.resnet18(num_classes=2), ["torchvision:resnet18", "timm:resnet18"]),
        (lambda: torchvision.models.regnet_y_400mf(), ["torchvision:regnet_y_400mf"]),
        (lambda: timm.create_model("legacy_seresnet18", num_classes=5), ["timm:legacy_seresnet18"]),
    ],
)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_weights_alone_name_the_architectures_that_fit(model, fits, prefix, few_candidates, tmp_path):
    torch.save(prefixed(model().state_dict(), prefix), tmp_path / "w.pt")
    with pytest.raises(SourceError) as caught:
        open_model(str(tmp_path / "w.pt"))
    assert f"Their keys and shapes fit: {', '.join(fits)}. Say which one it is, such as --arch {fits[0]}." in str(
        caught.value
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("features.1.block.0.0.weight"),
        lambda state: state.update({"features.0.0.weight": torch.zeros(16, 1, 3, 3)}),
        lambda state: state.update({"classifier.3.bias": torch.zeros(8)}),
        lambda state: state.update(more=torch.zeros(1)),
    ],
)
def test_weights_that_fit_nothing(change, small, few_candidates, tmp_path):
    state = small.state_dict()
    change(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(SourceError, match=r"No architecture of torchvision or timm .* --arch package.module:factory"):
        open_model(str(tmp_path / "w.pt"))


@pytest.mark.slow
def test_every_architecture_is_compared(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / "w.pt")
    with pytest.raises(SourceError, match=f"fit: {SMALL}. Say which"):
        open_model(str(tmp_path / "w.pt"))


def test_a_search_without_timm(small, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(
        torchvision.models, "list_models", lambda: ["mobilenet_v3_small", "quantized_mobilenet_v3_large"]
    )
    torch.save(small.state_dict(), tmp_path / "w.pt")
    with caplog.at_level(logging.INFO, "dcafy"), pytest.raises(SourceError, match=f"fit: {SMALL}. Say"):
        open_model(str(tmp_path / "w.pt"))
    assert "timm is not installed" in caplog.text
    assert "1 architectures" in caplog.text


def test_weights_of_a_converted_model_are_recognised(small, tmp_path):
    torch.save({**small.state_dict(), "dca.features.4.alpha": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(SourceError, match=r"name the folder that dcafy.save wrote"):
        open_model(str(tmp_path / "w.pt"))


# --- folders, and what opening leaves alone ---------------------------------------------------------


def test_a_folder_of_dcafy_save(small, tmp_path):
    connected = dcafy.convert(small, verify=False)
    dcafy.save(connected, tmp_path / "saved")
    with pytest.raises(SourceError, match=r"holds weights only"):
        open_model(str(tmp_path / "saved" / "model.safetensors"))
    source = open_model(str(tmp_path / "saved"), arch=SMALL, settings={"num_classes": 7})
    assert source.model.state_dict().keys() == connected.state_dict().keys()
    assert [len(dcafy.inspect(model).links) for model in (source.model, connected)] == [8, 8]


def test_a_folder_says_itself_how_it_is_built(tmp_path):
    dcafy.save(dcafy.convert(build_architecture(SMALL), verify=False), tmp_path / "saved")
    assert len(dcafy.connections(open_model(str(tmp_path / "saved")).model)) == 8
    with pytest.raises(UsageError, match="--set has nothing to set"):
        open_model(str(tmp_path / "saved"), settings={"num_classes": 7})


def test_another_folder(tmp_path):
    (tmp_path / "b.safetensors").touch()
    (tmp_path / "a.pth").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SourceError, match=r"folder without a dcafy.json.*: 'a.pth', 'b.safetensors'[.]"):
        open_model(str(tmp_path))


@pytest.mark.parametrize("spec", [SMALL, "timm:legacy_seresnet18", "w.pt", "whole.pt", "{name}:build"])
def test_random_numbers_are_left_alone(spec, factories, small, here):
    torch.save(small.state_dict(), "w.pt")
    torch.save(small, "whole.pt")
    before = torch.get_rng_state(), random.getstate()
    open_model(spec.format(name=factories), arch=SMALL if spec == "w.pt" else None)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
