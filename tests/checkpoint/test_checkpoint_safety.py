"""What strangers, damage and power failures do to a saved folder: one clear error, or the old model whole."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import SELinear, with_attention
from safetensors.torch import load_file, save_file
from snapshot import differences, snapshot
from torch import Tensor, nn
from trained import images, seeded, with_betas

import dcafy
from dcafy.checkpoint.description import Description
from dcafy.checkpoint.folder import Folder
from dcafy.errors import CheckpointError

IMAGES = images()


def network() -> nn.Module:
    with seeded(0):
        return with_attention(SELinear).eval()


@functools.cache
def with_beta(beta: float) -> torch.fx.GraphModule:
    """A converted network; β tells one from another."""
    return with_betas(dcafy.convert(network(), example_inputs=IMAGES, verify=False), beta)


def beta_of(folder: Path) -> float:
    """The β of the model in the folder, once it has been loaded."""
    loaded = dcafy.load(folder, network())
    (beta,) = {connection.beta.item() for connection in dcafy.connections(loaded).values()}
    return beta


def beta_in(folder: Path) -> float:
    """The β in the folder's files, of which every byte is checked; a hundred times faster than loading."""
    description, tensors = Folder(folder).read()
    assert tensors.keys() == with_beta(0.5).state_dict().keys() or not description.weights.with_base
    (beta,) = {value.item() for key, value in tensors.items() if key.endswith(".beta")}
    return beta


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folders = {base: tmp_path_factory.mktemp("saved") for base in (True, False)}
    for base, folder in folders.items():
        dcafy.save(with_beta(0.5), folder, base=base)
    return folders


@pytest.fixture
def folder(saved: dict[bool, Path], tmp_path: Path) -> Path:
    """A folder with a whole model, to be damaged."""
    return Path(shutil.copytree(saved[True], tmp_path / "model"))


@pytest.fixture
def part(saved: dict[bool, Path], tmp_path: Path) -> Path:
    """A folder with connections alone, to be damaged."""
    return Path(shutil.copytree(saved[False], tmp_path / "part"))


def refused(folder: Path, model: nn.Module | None) -> str:
    """What is said about a folder; whatever it is, the given network is left alone."""
    before = None if model is None else snapshot(model)
    with pytest.raises(CheckpointError) as raised:
        dcafy.load(folder, model)
    if model is not None:
        assert before is not None
        assert differences(before, snapshot(model)) == []
    said = str(raised.value)
    assert folder.name in said
    assert said.isprintable(), "a message that could steer a terminal"
    assert len(said) < 1500
    return said


def edited(folder: Path, edit: Callable[[Any], Any]) -> Path:
    """The folder with another ``dcafy.json``."""
    marker = folder / "dcafy.json"
    data = json.loads(marker.read_text())
    edit(data)
    marker.write_text(json.dumps(data))
    return folder


# dcafy.json ----------------------------------------------------------------------------------------


def _set(*path: Any) -> Callable[[Any], None]:
    """Sets the entry at all but the last of ``path`` to the last."""
    *keys, last, value = path

    def edit(data: Any) -> None:
        for key in keys:
            data = data[key]
        data[last] = value

    return edit


def _link(name: str, value: Any) -> Callable[[Any], None]:
    def edit(data: Any) -> None:
        chain = next(chain for chain in data["plan"]["chains"] if chain["links"])
        chain["links"][0][name] = value

    return edit


DAMAGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "newer": (_set("format_version", 4), r"format version 4, written by dcafy 0\..*Install a newer dcafy"),
    "no version": (lambda data: data.pop("format_version"), "not written by dcafy.save"),
    "odd version": (_set("format_version", "1"), "format_version is '1'"),
    "version zero": (_set("format_version", 0), "format_version is 0"),
    "version true": (_set("format_version", True), "format_version is True"),
    "unknown entry": (_set("hook", "os.system"), "does not know: hook"),
    "unknown entry inside": (_set("weights", "url", "http://x"), r"does not know: weights\.url"),
    "unknown option": (_set("options", "temperature", 2), r"does not know: options\.temperature"),
    "unknown in plan": (_set("plan", "code", "x"), r"does not know: plan\.code"),
    "unknown in link": (_link("forward", "x"), r"does not know: plan\.chains\[0\]\.links\[0\]\.forward"),
    "entry missing": (lambda data: data.pop("weights"), "should be an object with 'weights'"),
    "entry missing inside": (lambda data: data["state"].pop("frozen"), "state should be an object with 'frozen'"),
    "wrong kind": (_set("state", "training", 1), r"state\.training should be true or false, not 1"),
    "wrong kind in a list": (_set("state", "frozen", [1]), r"state\.frozen\[0\] should be text"),
    "versions": (_set("versions", "dcafy", 1), r"versions\.dcafy should be text"),
    "versions of nothing": (_set("versions", []), "versions should be an object"),
    "plan": (_set("plan", []), "plan should be an object"),
    "plan of another version": (_set("plan", "schema_version", 9), "schema_version 9"),
    "block": (_set("plan", "blocks", 0, "channels", "x"), "plan should be a plan"),
    "rows": (_set("plan", "blocks", 0, 3), "plan should be a plan"),
    "file": (_set("weights", "file", "../model.safetensors"), r"weights\.file should be one of"),
    "absolute file": (_set("weights", "file", "/etc/passwd"), r"weights\.file should be one of"),
    "digest": (_set("weights", "sha256", "../../x"), r"weights\.sha256 should be a SHA-256"),
    "other digest": (_set("weights", "sha256", "0" * 64), "other tensors than dcafy.json describes"),
    "schema": (_link("schema", "quantum"), "'quantum'"),
    "reduction": (_link("reduction", 0), "reduction should be a whole number from 1"),
    "a layer beyond all bounds": (_link("min_hidden", 10**12), "min_hidden should be a whole number from 1"),
    "option beyond all bounds": (_set("options", "min_hidden", 10**12), "min_hidden should be a whole number"),
    "option of another kind": (_set("options", "schema", None), "options.schema should be text"),
    "link to nowhere": (_link("source", "../x"), r"plan\.chains should be of blocks of the plan, not '\.\./x'"),
    "block of another name": (
        lambda data: data["plan"]["blocks"][0].update(name="other"),
        r"plan\.chains should be of blocks of the plan, not 'blocks\.0",
    ),
    "inputs": (_set("inputs", {"call": "os.system"}), "inputs should be a description of inputs"),
    "inputs of another kind": (_set("inputs", [1]), "inputs should be a description of inputs"),
    "inputs without a tensor": (_set("inputs", {"tuple": [{"value": 1}]}), "no tuple with a tensor"),
    "empty input": (_set("inputs", {"tuple": [{"tensor": {"shape": [0], "dtype": "float32"}}]}), "describes no input"),
    "large input": (_set("inputs", {"tuple": [{"tensor": {"shape": [2**30, 8], "dtype": "int8"}}]}), "too large"),
    "huge input": (_set("inputs", {"tuple": [{"tensor": {"shape": [2**30] * 9, "dtype": "int8"}}]}), "inputs should"),
    "input of no dtype": (_set("inputs", {"tuple": [{"tensor": {"shape": [2], "dtype": "load"}}]}), "no input"),
    "input that does not fit": (
        _set("inputs", {"tuple": [{"tensor": {"shape": [2, 4, 64, 64], "dtype": "float32"}}]}),
        "plan does not fit the network",
    ),
    "tied to nothing": (_set("weights", "tied", {"head.weight": "stem"}), "tied to stem, which is not stored"),
    "tied to itself": (_set("weights", "tied", {"head.bias": "head.bias"}), "tied to"),
    "tied to another": (_set("weights", "tied", {"x": "head.bias"}), "1 not expected: x"),
    "no strides": (_set("weights", "layouts", {"head.weight": "9x9"}), "cannot be laid out"),
    "strides beyond all bounds": (_set("weights", "layouts", {"head.weight": f"1x{10**14}"}), "cannot be laid out"),
    "frozen nothing": (_set("state", "frozen", ["x"]), "x is a frozen parameter in the folder"),
    "base listed": (_set("weights", "base", {"a": f"float32 [1] {'0' * 64}"}), "list of base weights"),
    "terminal": (_set("\x1b[2J", 1), "does not know"),
    "terminal in a name": (_set("state", "frozen", ["\x1b]0;x\x07\u202e"]), "frozen parameter"),
    "half a character": (_set("state", "frozen", ["\ud800"]), "frozen parameter"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_description(name: str, folder: Path) -> None:
    edit, said = DAMAGES[name]
    assert re.search(said, refused(edited(folder, edit), network()))


TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not JSON"),
    "cut off": (b'{"format_version": 1, "versions"', "not JSON"),
    "no text": (b"\x80\x02}q\x00.", "not JSON"),
    "a list": (b"[1]", "no format_version"),
    "a number": (b"1", "no format_version"),
    "deep": (b'{"format_version": 1, "x": ' + b"[" * 100_000, "not JSON"),
    "twice": (b'{"format_version": 1, "format_version": 1}', "same entry twice"),
    "not a number": (b'{"format_version": NaN}', "NaN is no JSON number"),
    "many digits": (b'{"format_version": ' + b"1" * 9999 + b"}", "is damaged"),
    "utf-16": ("{}".encode("utf-16"), "no format_version"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_damaged_json(name: str, folder: Path) -> None:
    text, said = TEXTS[name]
    (folder / "dcafy.json").write_bytes(text)
    assert said in refused(folder, network())


def test_a_description_too_large(folder: Path) -> None:
    with (folder / "dcafy.json").open("r+b") as file:
        file.truncate(2**40)  # takes no room on the disk
    assert "too large" in refused(folder, network())


# The tensors ---------------------------------------------------------------------------------------


def _cut(data: bytes) -> bytes:
    return data[:-5]


def _flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def _header(header: bytes, length: int | None = None) -> Callable[[bytes], bytes]:
    return lambda _data: struct.pack("<Q", len(header) if length is None else length) + header


OVERLAPPING = (
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
)

FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _data: b"", "damaged or truncated"),
    "cut off": (_cut, "damaged or truncated"),
    "cut off in the header": (lambda data: data[:100], "damaged or truncated"),
    "huge header": (_header(b"{}", 2**63), "damaged or truncated"),
    "large header": (_header(b"{}", 99_000_000), "damaged or truncated"),
    "no JSON": (_header(b"{{{{{{{{"), "damaged or truncated"),
    "overlapping": (_header(OVERLAPPING), "damaged or truncated"),
    "huge tensor": (_header(b'{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,4]}}'), "damaged"),
    "no tensors": (_header(b"{}"), "other tensors than dcafy.json describes"),
    "one bit": (_flipped, "other tensors than dcafy.json describes"),
    "a pickle": (lambda _data: b"\x80\x02cos\nsystem\nq\x00X\x02\x00\x00\x00idq\x01\x85q\x02Rq\x03.", "damaged"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("base", [True, False])
def test_damaged_tensors(name: str, base: bool, folder: Path, part: Path) -> None:
    damage, said = FILES[name]
    place = folder if base else part
    path = place / ("model.safetensors" if base else "connections.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    assert said in refused(place, network())


def test_the_file_of_another_model(folder: Path, tmp_path: Path) -> None:
    dcafy.save(with_beta(0.25), tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", folder / "model.safetensors")
    assert "other tensors than dcafy.json describes" in refused(folder, network())


def test_base_weights_in_the_wrong_file(part: Path, folder: Path) -> None:
    everything = load_file(folder / "model.safetensors")
    save_file(everything, part / "connections.safetensors")
    digest = json.loads((folder / "dcafy.json").read_text())["weights"]["sha256"]
    assert "holds base weights too" in refused(edited(part, _set("weights", "sha256", digest)), network())


def test_list_of_base_weights(part: Path) -> None:
    def edit(data: Any) -> None:
        del data["weights"]["base"]["head.bias"]

    assert "list of base weights is damaged" in refused(edited(part, edit), network())
    assert "should be a dtype" in refused(edited(part, _set("weights", "base", {"a": "os.system"})), network())


def test_missing_pieces(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused(folder, network())
    (folder / "model.safetensors").mkdir()
    assert "has no model.safetensors" in refused(folder, network())
    (folder / "dcafy.json").unlink()
    assert "has no dcafy.json" in refused(folder, network())
    assert "does not exist" in refused(tmp_path / "nowhere", None)
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in refused(tmp_path / "file", None)
    os.mkfifo(folder / "dcafy.json")
    assert "dcafy.json' could not be read: it is no regular file" in refused(folder, network())


# A folder from a stranger --------------------------------------------------------------------------

FORBIDDEN = [
    "os:system",
    "stranger:build",
    "stranger.build",
    "torchvision:../stranger",
    "torchvision:stranger",
    "torchvision:mobilenet_v3_small@DEFAULT",
    "torchvision:get_model",
    "timm:hf-hub:timm/seresnet50.a1_in1k",
    "timm:local-dir:.",
    "timm:hf_hub:stranger/model",
    "timm:seresnet50.stranger",
    "timm:seresnet50@DEFAULT",
    "timm:",
    "torchvision:",
    ":",
    "",
    "TIMM:seresnet50",
    "timm:../../stranger",
    "timm:https://example.org/model.pth",
    "\x1b[2J:x",
]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_names_that_are_not_built(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger.py").write_text("raise SystemExit('the stranger ran')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    said = refused(edited(folder, _set("model", {"name": name, "arguments": {}})), None)
    assert "cannot be built here" in said
    assert "stranger" not in sys.modules


ARGUMENTS: list[dict[str, Any]] = [
    {"checkpoint_path": "evil.pth"},
    {"pretrained": True},
    {"weights": "DEFAULT"},
    {"weights_backbone": "DEFAULT"},
    {"pretrained_cfg": "hf-hub:stranger/model"},
    {"pretrained_cfg_overlay": ["file", "evil.pth"]},
    {"cache_dir": "/"},
    {"norm_layer": "os.system"},
    {"num_classes": "10"},
    {"num_classes": True},
    {"num_classes": 1.5},
    {"img_size": ["x"]},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_arguments_that_are_not_given(arguments: dict[str, Any], folder: Path) -> None:
    how = {"name": "timm:mobilenetv3_small_050", "arguments": arguments}
    said = refused(edited(folder, _set("model", how)), None)
    assert f"{next(iter(arguments))} with the value" in said


def test_a_network_that_the_tensors_do_not_fit_is_not_made(folder: Path) -> None:
    """A name and a number cost nothing to write: memory is only taken for what the folder holds."""
    how = {"name": "torchvision:mobilenet_v3_small", "arguments": {"num_classes": 10**12}}
    assert "do not fit the torchvision:mobilenet_v3_small" in refused(edited(folder, _set("model", how)), None)
    how = {"name": "torchvision:mobilenet_v3_small", "arguments": {"num_classes": -3}}
    assert "cannot be" in refused(edited(folder, _set("model", how)), None)


def test_nothing_is_unpickled_or_fetched(
    folder: Path, part: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import pickle
    import socket

    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a folder was unpickled, or something fetched")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (torch, "save")):
        monkeypatch.setattr(owner, name, never)
    monkeypatch.setattr(socket.socket, "connect", never)
    assert beta_of(folder) == beta_of(part) == 0.5
    dcafy.save(with_beta(0.125), tmp_path / "new")
    assert beta_of(tmp_path / "new") == 0.125


# What else was written with ------------------------------------------------------------------------


def test_other_versions_load(folder: Path) -> None:
    edited(folder, _set("versions", {"dcafy": "0.0.9", "torch": "2.4.0", "timm": "0.1"}))
    assert beta_of(folder) == 0.5


def test_other_versions_are_named_where_it_does_not_fit(folder: Path) -> None:
    edited(folder, _set("versions", {"dcafy": "0.0.9", "torch": torch.__version__}))
    other = network()
    other.head = nn.Linear(32, 3)
    assert "(It was written with dcafy 0.0.9.)" in refused(folder, other)


def test_options_that_came_later(folder: Path) -> None:
    """An option that an older dcafy did not have keeps its default."""
    edited(folder, lambda data: data["options"].pop("spatial_match"))
    assert beta_of(folder) == 0.5


# Where a model cannot be saved ----------------------------------------------------------------------


def test_folders_that_are_not_replaced(tmp_path: Path) -> None:
    dca = with_beta(0.5)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/model.safetensors").write_text("kept")
    for place, said in {
        "file": "is a file",
        "file/below": "could not be written",
        "full": r"holds other things \(model.safetensors\) and no dcafy.json",
    }.items():
        with pytest.raises(CheckpointError, match=said):
            dcafy.save(dca, tmp_path / place)
    assert (tmp_path / "full/model.safetensors").read_text() == "kept"
    assert os.listdir(tmp_path / "full") == ["model.safetensors"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder where nobody may write")
def test_unwritable() -> None:
    with pytest.raises(CheckpointError, match="/proc/dcafy' could not be written"):
        dcafy.save(with_beta(0.5), "/proc/dcafy")


def test_hidden_files_and_parents(tmp_path: Path) -> None:
    place = tmp_path / "a/b"
    place.mkdir(parents=True)
    (place / ".gitignore").write_text("kept")
    dcafy.save(with_beta(0.5), place)
    dcafy.save(with_beta(0.25), str(place / "below/it"))
    assert beta_of(place) == 0.5
    assert beta_of(place / "below/it") == 0.25
    dcafy.save(with_beta(0.125), place)
    assert beta_of(place) == 0.125
    assert (place / ".gitignore").read_text() == "kept"
    assert beta_of(place / "below/it") == 0.25


def test_a_damaged_folder_is_replaced(folder: Path) -> None:
    (folder / "dcafy.json").write_text("{")
    dcafy.save(with_beta(0.25), folder)
    assert beta_of(folder) == 0.25


# Killed half-way -----------------------------------------------------------------------------------


class Killed(BaseException):
    """As good as a killed process: nothing in the package catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int, after: bool) -> list[str]:
    """Raises ``Killed`` at the change of that number; the list has the changes that were begun."""
    import dcafy.checkpoint.folder as module

    begun: list[str] = []

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            if len(begun) > number:  # a dead process does nothing more, not even tidy up
                raise Killed
            begun.append(name)
            if len(begun) > number and not after:
                raise Killed
            result = original(*args, **kwargs)
            if len(begun) > number:
                raise Killed
            return result

        monkeypatch.setattr(owner, name, step)

    for owner, name in (
        (module.os, "replace"),
        (module.os, "fsync"),
        (module, "save_file"),
        (module.shutil, "rmtree"),
        (module.Path, "mkdir"),
        (module.Path, "write_text"),
        (module.Path, "chmod"),
        (module.Path, "unlink"),
    ):
        wrap(owner, name)
    return begun


@pytest.mark.parametrize("after", [False, True], ids=["before the change", "after it"])
@pytest.mark.parametrize("base", [True, False], ids=["same file", "other file"])
def test_killed_at_every_change(base: bool, after: bool, saved: dict[bool, Path], tmp_path: Path) -> None:
    """The old model or the new one, whole; the next save leaves no trace of the killed one."""
    new, newer = with_beta(0.25), with_beta(0.125)
    outcomes = []
    for number in range(100):
        place = Path(shutil.copytree(saved[True], tmp_path / str(number)))
        with pytest.MonkeyPatch.context() as patch:
            begun = kill_at(patch, number, after)
            try:
                dcafy.save(new, place, base=base)
            except Killed:
                finished = False
            else:
                finished = True
        outcomes.append(beta_in(place))
        card = place / "README.md"
        assert not card.exists() or f"{outcomes[-1]:+.4f}" in card.read_text(), "the card of another model"
        dcafy.save(newer, place)
        assert sorted(os.listdir(place)) == ["README.md", "dcafy.json", "model.safetensors"]
        assert beta_in(place) == 0.125
        if finished:
            break
    else:
        raise AssertionError("it never finished")
    assert {"replace", "fsync", "save_file", "rmtree", "mkdir", "write_text", "chmod"} <= set(begun)
    assert outcomes[0] == 0.5
    assert outcomes[-1] == 0.25
    assert outcomes == sorted(outcomes, reverse=True), "back to the old model"
    assert outcomes.count(0.5) >= 8
    assert beta_of(place) == 0.125


@pytest.mark.parametrize("after", [False, True])
def test_the_first_save_killed(after: bool, tmp_path: Path) -> None:
    """A new folder holds a whole model or none, and can be saved into."""
    for number in range(0, 30, 3):
        place = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, number, after)
            with contextlib.suppress(Killed):
                dcafy.save(with_beta(0.25), place)
        if (place / "dcafy.json").exists():
            assert beta_in(place) == 0.25
        else:
            refused(place, None)
        dcafy.save(with_beta(0.125), place)
        assert sorted(os.listdir(place)) == ["README.md", "dcafy.json", "model.safetensors"]
        assert beta_in(place) == 0.125


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "interrupt"]
)
def test_a_save_that_fails_leaves_no_trace(error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dcafy.checkpoint.folder as module

    def fail(_tensors: object, path: Path, **_kwargs: object) -> None:
        path.write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(module, "save_file", fail)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as raised:
        dcafy.save(with_beta(0.25), folder)
    assert expected is KeyboardInterrupt or "could not be written: No space left" in str(raised.value)
    assert sorted(os.listdir(folder)) == ["README.md", "dcafy.json", "model.safetensors"]
    assert beta_in(folder) == 0.5


def test_the_same_model_over_itself_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors that are half written have the fingerprint of those that count, and must not count."""
    import dcafy.checkpoint.folder as module

    def die(*_args: object, **_kwargs: object) -> None:
        raise Killed

    def half(_tensors: object, path: Path, **_kwargs: object) -> None:
        path.write_bytes(b"half a file")
        for owner, name in ((module.os, "replace"), (module.shutil, "rmtree"), (module.Path, "unlink")):
            monkeypatch.setattr(owner, name, die)
        raise Killed

    monkeypatch.setattr(module, "save_file", half)
    with pytest.raises(Killed):
        dcafy.save(with_beta(0.5), folder)
    assert any(name.startswith(".dcafy-") for name in os.listdir(folder)), "nothing was half written"
    assert beta_in(folder) == 0.5
    monkeypatch.undo()
    dcafy.save(with_beta(0.5), folder)
    assert sorted(os.listdir(folder)) == ["README.md", "dcafy.json", "model.safetensors"]
    assert beta_in(folder) == 0.5


KILLED = """
import os, shutil, signal, sys
sys.path[:0] = {path!r}
import test_checkpoint_safety as tests, dcafy, dcafy.checkpoint.folder as module

def kill_at(number):
    begun = []
    def wrap(owner, name):
        original = getattr(owner, name)
        def step(*args, **kwargs):
            begun.append(name)
            if len(begun) > number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        setattr(owner, name, step)
    for owner, name in ((module.os, "replace"), (module.os, "fsync"), (module, "save_file"), (module.shutil, "rmtree")):
        wrap(owner, name)

dca = tests.with_beta(0.25)
for number in map(int, sys.argv[2:]):
    place = sys.argv[1] + "/" + str(number)
    shutil.copytree(sys.argv[1] + "/saved", place)
    child = os.fork()
    if not child:
        kill_at(number)
        dcafy.save(dca, place)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL")
def test_killed_process(saved: dict[bool, Path], tmp_path: Path) -> None:
    """SIGKILL at every step: the old model up to one of them, the new one from there on."""
    shutil.copytree(saved[True], tmp_path / "saved")
    numbers = range(24)
    command = [sys.executable, "-c", KILLED.format(path=sys.path), str(tmp_path), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    codes = [int(line) for line in done.stdout.split()]
    assert len(codes) == len(numbers), done.stderr
    killed = codes.count(-signal.SIGKILL)
    assert 8 <= killed < len(numbers)
    assert codes == [-signal.SIGKILL] * killed + [0] * (len(numbers) - killed)
    outcomes = [beta_in(tmp_path / str(number)) for number in numbers]
    assert outcomes == sorted(outcomes, reverse=True)
    assert {outcomes.index(0.25) < killed, outcomes[0] == 0.5} == {True}
    for number in numbers:
        place = tmp_path / str(number)
        dcafy.save(with_beta(0.125), place)
        assert sorted(os.listdir(place)) == ["README.md", "dcafy.json", "model.safetensors"]
        assert beta_in(place) == 0.125


def test_others_that_save_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model, and then the first one again: what was read in between fits neither text."""
    dcafy.save(with_beta(0.5), tmp_path)
    tensors, calls = Folder._tensors, []

    def disturbed(folder: Folder, description: Description) -> dict[str, Tensor]:
        calls.append(description)
        if len(calls) > 1:
            return tensors(folder, description)
        dcafy.save(with_beta(0.25), tmp_path)
        try:
            return tensors(folder, description)
        finally:
            dcafy.save(with_beta(0.5), tmp_path)

    monkeypatch.setattr(Folder, "_tensors", disturbed)
    assert beta_in(tmp_path) == 0.5
    assert len(calls) == 2


def test_many_at_once(tmp_path: Path) -> None:
    """Several savers and a reader: whoever comes last, the folder holds one whole model at every moment."""
    models = {beta: with_beta(beta) for beta in (0.5, 0.25)}
    place = tmp_path / "model"
    dcafy.save(models[0.5], place)
    failures: list[BaseException] = []
    seen: set[float] = set()

    def saver(beta: float) -> None:
        try:
            for _ in range(8):
                dcafy.save(models[beta], place)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=saver, args=(beta,)) for beta in models]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.add(beta_in(place))
    for thread in threads:
        thread.join()
    assert failures == []
    assert seen <= set(models)
    assert beta_in(place) in models
    assert sorted(os.listdir(place)) == ["README.md", "dcafy.json", "model.safetensors"]
