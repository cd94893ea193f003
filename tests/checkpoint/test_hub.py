"""Folders on the Hub, in a cache as its library lays it out, and the card that lies in each: what was measured."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import hub_here
from torch import nn

import dcafy
from dcafy.checkpoint.card import CARD
from dcafy.checkpoint.hub import parsed
from dcafy.errors import CheckpointError, SourceError, UsageError
from dcafy.images.about import About, Trained, put_about
from dcafy.images.preparation import Preparation
from dcafy.sources import open_model
from dcafy.zoos.specs import has_random_weights

hub = pytest.importorskip("huggingface_hub")

Run = Callable[..., tuple[int, str, str]]

HOW = Preparation((32, 48), (36, 50), (0.5,) * 3, (0.25,) * 3)
TRAINED = Trained("imagefolder:/disk/somebody/secret/flowers", 3, {"loss": 0.5, "top1": 0.75, "images": 8.0})
ODD = "<script>alert(1)</script> [x](http://y) `z` | *a*\x1b[2J"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    found = dcafy.convert(timm.create_model("test_efficientnet", num_classes=3), verify=False).eval()
    put_about(found, About("classification", ("a", "b", ODD), HOW, TRAINED))
    return found


class Hub:
    """The Hub's cache on this disk, and what of its interface dcafy calls: commits come straight into the cache."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.private = cache, {}

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.private.setdefault(name, private)

    def upload_folder(
        self, *, repo_id: str, folder_path: str, commit_message: str, revision: str | None, allow_patterns: list[str],
        delete_patterns: list[str],
    ) -> None:  # fmt: skip
        names = [n for n in os.listdir(folder_path) if any(fnmatch.fnmatch(n, one) for one in allow_patterns)]
        self.commit(repo_id, {n: (Path(folder_path) / n).read_bytes() for n in names}, revision or "main")

    def commit(self, name: str, files: dict[str, bytes], revision: str = "main") -> Path:
        home = self.cache / f"models--{name.replace('/', '--')}"
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        place = home / "snapshots" / commit
        for folder in (home / "blobs", home / "refs", place):
            folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            blob = home / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            if not (place / file).exists():
                (place / file).symlink_to(os.path.relpath(blob, place))
        (home / "refs" / revision).write_text(commit)
        return place


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    from huggingface_hub import constants

    found = Hub(tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(found.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HfApi", lambda: found, raising=False)
    return found


def test_there_and_back(cached: Hub, model: nn.Module, tmp_path: Path, dcafy_command: Run) -> None:
    """The same network, bit for bit, from a model and from a folder; commands take the address."""
    assert dcafy.push_to_hub(model, "me/flowers", private=True) == "hf://me/flowers"
    assert cached.private == {"me/flowers": True}
    x = torch.rand(2, 3, 32, 48)
    loaded = dcafy.load("hf://me/flowers").eval()
    assert torch.equal(loaded(x), model(x))
    assert dcafy.about(loaded).classes == dcafy.about(model).classes
    dcafy.save(model, tmp_path / "run")
    (tmp_path / "run" / "finetune.json").write_text('{"mine": "/disk/somebody"}')
    with torch.no_grad():
        for connection in dcafy.connections(model).values():
            connection.beta.add_(0.25)
    assert dcafy.push_to_hub(tmp_path / "run", "hf://me/flowers", revision="v2") == "hf://me/flowers@v2"
    assert torch.equal(dcafy.load("hf://me/flowers@v2").eval()(x), loaded(x))
    code, out, err = dcafy_command("inspect", "hf://me/flowers@v2", "--json")
    assert (code, json.loads(out)["about"]["task"]) == (0, "classification"), err
    sent = b"".join(path.read_bytes() for path in cached.cache.rglob("blobs/*"))
    assert b"somebody" not in sent, "a path is nobody's business"
    assert b"imagefolder:flowers" in sent


def test_nothing_but_data_is_taken(cached: Hub, model: nn.Module, tmp_path: Path) -> None:
    dcafy.save(model, tmp_path / "it")
    files = {path.name: path.read_bytes() for path in (tmp_path / "it").iterdir()}
    place = cached.commit(
        "me/pickled", {**files, "pytorch_model.bin": b"cos\nsystem\n", "code.py": b"raise SystemExit"}
    )
    asked: list[str] = []
    real = hub.hf_hub_download

    def download(repository: str, name: str, **options: Any) -> str:
        asked.append(name)
        return str(real(repository, name, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "hf_hub_download", download)
        dcafy.load("hf://me/pickled")
    assert asked == ["dcafy.json", "model.safetensors"]
    # Links that lead out of the cache were not made by the Hub's library.
    for name in ("model.safetensors", "dcafy.json"):
        (place / name).unlink()
        (place / name).symlink_to(tmp_path / "it" / name)
        with pytest.raises(CheckpointError, match="leads out of the Hub's cache"):
            dcafy.load("hf://me/pickled")


@pytest.mark.parametrize(
    "spec",
    ["hf://", "hf://me", "hf://me/", "hf:///x", "hf://../x", "hf://me/..", "hf://me/x/y", "hf://me/x@../../y",
     "hf://me/x@", "hf://me/x@/etc", "hf://me/x y", "hf://me/x\n", "hf://me/\x1b[2J", "hf://me/é", "hf://a--b/c",
     "hf://me/x@a b", "hf://me/-x", "hf://" + "x" * 5000 + "/y", "hf://me/x.", "hf://me\\x/y", "hf://me/x\0"],
)  # fmt: skip
def test_what_is_no_address(spec: str, cached: Hub) -> None:
    for act in (lambda: dcafy.load(spec), lambda: open_model(spec)):
        with pytest.raises(UsageError, match=r"names nothing on the Hub\. Write hf://user/name") as caught:
            act()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400
    if "@" not in spec:
        with pytest.raises(UsageError):
            dcafy.push_to_hub(nn.Linear(1, 1), spec.removeprefix("hf://"))


def test_what_is_not_there(cached: Hub, model: nn.Module, tmp_path: Path, dcafy_command: Run) -> None:
    with pytest.raises(SourceError, match="cannot be reached, and hf://me/nowhere is not in its cache"):
        dcafy.load("hf://me/nowhere")
    assert dcafy_command("predict", "hf://me/nowhere", tmp_path)[0] in (2, 4)
    dcafy.save(model, tmp_path / "it")
    marker = (tmp_path / "it" / "dcafy.json").read_bytes()
    cached.commit("me/half", {"dcafy.json": marker})
    with pytest.raises(SourceError):
        dcafy.load("hf://me/half")
    cached.commit("me/damaged", {"dcafy.json": marker[:-20], "model.safetensors": b""})
    with pytest.raises(CheckpointError, match="hf://me/damaged"):
        dcafy.load("hf://me/damaged")
    cached.commit("me/other", {"dcafy.json": marker, "model.safetensors": b"\x02\0\0\0\0\0\0\0{}"})
    with pytest.raises(CheckpointError, match="hf://me/other"):
        dcafy.load("hf://me/other")
    with pytest.raises(UsageError, match=r"A folder of dcafy's on the Hub is hf://me/x\."):
        open_model("hf-hub:me/x")
    with pytest.raises(CheckpointError, match="does not exist"):
        dcafy.push_to_hub(tmp_path / "nothing", "me/x")
    assert parsed("hf://me/a.b_c-d@refs/pr/1").revision == "refs/pr/1"


def test_what_the_hub_answers_is_told(cached: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    class Answer:
        status_code, headers, text, url, request = 404, {}, "", "", None

    cases: list[tuple[type[Exception], str]] = [
        (errors.RepositoryNotFoundError, "There is no hf://timm/x@v1 on the Hub, or it is private"),
        (errors.GatedRepoError, "open to some only"),
        (errors.RevisionNotFoundError, "has no revision 'v1'"),
        (errors.EntryNotFoundError, r"It is timm's own: name it timm:x@DEFAULT"),
        (ConnectionError, "could not be reached"),
    ]
    for kind, said in cases:

        def answers(*args: object, kind: type[Exception] = kind, **options: object) -> str:
            raise kind.__new__(kind, "no")  # their own constructors differ from version to version

        monkeypatch.setattr(hub, "hf_hub_download", answers)
        with pytest.raises(SourceError, match=said):
            dcafy.load("hf://timm/x@v1")


def test_without_the_library(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for act in (lambda: dcafy.load("hf://me/x"), lambda: dcafy.push_to_hub(model, "me/x")):
        with pytest.raises(UsageError, match=r"needs huggingface_hub: pip install .*\[hub\]'"):
            act()


# --- the card -------------------------------------------------------------------------------------------


def test_the_card_tells_what_was_measured_and_nothing_else(model: nn.Module, tmp_path: Path) -> None:
    dcafy.save(model, tmp_path / "it")
    text = (tmp_path / "it" / CARD).read_text()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for said in ("Trained for 3 epochs on imagefolder:flowers", "Validation top1: 75.00% (8 images)",
                 "Validation loss: 0.5000", f"Parameters: {parameters:,}", "1 connection", "32 x 48 pixels",
                 "multiply-adds for one image"):  # fmt: skip
        assert said in text
    assert "random" not in text
    for markup in ("<script", "[x](", "`z`", "\x1b", "secret"):
        assert markup not in text
    untrained = dcafy.convert(timm.create_model("test_efficientnet", num_classes=3), verify=False).eval()
    dcafy.save(untrained, tmp_path / "bare", base=False)
    bare = (tmp_path / "bare" / CARD).read_text()
    assert "Validation" not in bare
    assert "Trained" not in bare
    assert "holds only what dcafy added" in bare


def test_random_weights_are_told_whatever_they_went_through(tmp_path: Path, dcafy_command: Run) -> None:
    """In a folder, of a folder, and on its card; not once they were trained."""
    network = dcafy.convert(open_model("timm:test_efficientnet").model, verify=False)
    dcafy.save(network, tmp_path / "it")
    loaded = dcafy.load(tmp_path / "it")
    assert has_random_weights(loaded)
    assert has_random_weights(dcafy.load(tmp_path / "it").half())
    assert "**weights: random**" in (tmp_path / "it" / CARD).read_text()
    code, _, err = dcafy_command("convert", tmp_path / "it", "-o", tmp_path / "other")
    assert (code, "weights: random (add @DEFAULT" in err) == (2, True)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(0.01)
    dcafy.save(loaded, tmp_path / "it")
    assert not has_random_weights(dcafy.load(tmp_path / "it"))
    assert "random" not in (tmp_path / "it" / CARD).read_text()
    marker = tmp_path / "it" / "dcafy.json"
    data = json.loads(marker.read_text())
    del data["about"]["random"]
    marker.write_text(json.dumps(data))
    assert not has_random_weights(dcafy.load(tmp_path / "it")), "folders from before say nothing of it"


def test_a_card_of_the_users_own_stays(model: nn.Module, tmp_path: Path) -> None:
    folder, card = tmp_path / "it", tmp_path / "it" / CARD
    dcafy.save(model, folder)
    written = card.read_text()
    card.unlink()
    dcafy.save(model, folder)
    assert card.read_text() == written
    for own in (written + "more\n", written.replace("Trained", "It was trained"), "mine", ""):
        card.write_text(own)
        dcafy.save(model, folder)
        assert card.read_text() == own
    card.unlink()
    (tmp_path / "mine").write_text("mine")
    card.symlink_to(tmp_path / "mine")
    dcafy.save(model, folder)
    assert (tmp_path / "mine").read_text() == "mine"
    assert card.is_symlink()


def test_a_full_disk_leaves_model_and_card(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "it"
    dcafy.save(model, folder)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    real = Path.write_text

    def full(self: Path, text: str, **options: Any) -> int:
        if self.name != CARD:
            return real(self, text, **options)
        real(self, text[:100], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    other = dcafy.load(folder)
    with torch.no_grad():
        next(iter(dcafy.connections(other).values())).beta.fill_(0.75)
    with pytest.raises(CheckpointError, match="could not be written: No space left"):
        dcafy.save(other, folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_no_card_tells_of_another_model(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a save is broken off, there is the old model with its card or without one, or the new one likewise."""
    folder = tmp_path / "it"
    dcafy.save(model, folder)
    old = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    other = dcafy.load(folder)
    with torch.no_grad():
        for connection in dcafy.connections(other).values():
            connection.beta.fill_(0.75)
    dcafy.save(other, tmp_path / "new")
    new = {name: (tmp_path / "new" / name).read_bytes() for name in os.listdir(tmp_path / "new")}
    real, seen = os.replace, set()
    for last in range(5):
        shutil.rmtree(folder)
        folder.mkdir()
        for name, content in old.items():
            (folder / name).write_bytes(content)
        left = [last]

        def replace(*args: Any, left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            real(*args)

        monkeypatch.setattr(os, "replace", replace)
        try:
            dcafy.save(other, folder)
            seen.add("done")
        except KeyboardInterrupt:
            seen.add("broken off")
        monkeypatch.setattr(os, "replace", real)
        of = old if (folder / "dcafy.json").read_bytes() == old["dcafy.json"] else new
        assert not (folder / CARD).exists() or (folder / CARD).read_bytes() == of[CARD]
        dcafy.load(folder)
    assert seen == {"done", "broken off"}


# --- over HTTP ------------------------------------------------------------------------------------------


@pytest.mark.slow  # the library tries a refused upload again and again
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the library, where it uploads
def test_what_is_pushed_over_http_is_what_is_loaded(model: nn.Module, tmp_path: Path) -> None:
    """The library's own requests, against a hub on this machine; a second model takes the place of the first."""
    x = torch.rand(2, 3, 32, 48)
    with hub_here(str(tmp_path / "cache")) as served:
        assert dcafy.push_to_hub(model, "me/flowers", private=True) == "hf://me/flowers"
        assert served.repositories == {"me/flowers": True}
        (_, files) = served.commits["me/flowers", "main"][-1]
        assert sorted(files) == ["README.md", "dcafy.json", "model.safetensors"]
        assert b"somebody" not in b"".join(files.values())
        assert torch.equal(dcafy.load("hf://me/flowers").eval()(x), model(x))
        dcafy.save(model, tmp_path / "it", base=False)
        assert dcafy.push_to_hub(tmp_path / "it", "me/flowers") == "hf://me/flowers"
        assert sorted(served.commits["me/flowers", "main"][-1][1]) == [
            "README.md",
            "connections.safetensors",
            "dcafy.json",
        ]
        served.asked.clear()
        first = served.commits["me/flowers", "main"][1][0]
        assert torch.equal(dcafy.load(f"hf://me/flowers@{first}").eval()(x), model(x))
        assert all(first in line or "xet" in line for line in served.asked), served.asked
        with pytest.raises(SourceError, match="has no revision 'v9'"):
            dcafy.load("hf://me/flowers@v9")
        with pytest.raises(SourceError, match="There is no hf://me/weeds on the Hub, or it is private"):
            dcafy.load("hf://me/weeds")
        served.refuses = True
        with pytest.raises(SourceError, match=r"could not be reached .*uploading 'model.safetensors'"):
            dcafy.push_to_hub(model, "me/trees")
    with hub_here(str(tmp_path / "new")) as served:
        served.shutdown()
        served.server_close()
        with pytest.raises(
            SourceError, match="The Hub cannot be reached, and hf://me/flowers is not in its cache here"
        ):
            dcafy.load("hf://me/flowers")
