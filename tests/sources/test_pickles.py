"""Files from strangers: nothing in them is run, and whatever is wrong with one is said in one line."""

from __future__ import annotations

import io
import os
import pickle
import shlex
import struct
import sys
import tarfile
import warnings
import zipfile

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from dcafy.errors import DcafyError, SourceError, UsageError
from dcafy.sources import open_model


class Mine(nn.Module):
    """A network class of nobody's package."""


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A path that hostile files try to create, and a current directory with modules that do so when imported."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "canary"
    for name in ("timm_evil", "torchvision_evil", "evil"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(path)!r}, 'w')\nfrom torch import nn\nclass Net(nn.Module): pass\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    return path


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=4).eval()


def torch_zip(path, pickled):
    """A file as torch.save writes them, around this pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


def legacy(path, pickled):
    """A file as torch.save wrote them before PyTorch 1.6, around this pickle."""
    head = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}]
    parts = [pickle.dumps(part, protocol=2) for part in head]
    path.write_bytes(b"".join([*parts, pickled, pickle.dumps([], protocol=2)]))


# --- whole networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: torchvision.models.resnet18(num_classes=4),
        lambda: torchvision.models.mobilenet_v3_small(num_classes=4),
        lambda: timm.create_model("legacy_seresnet18", num_classes=4),
        lambda: timm.create_model("mobilenetv3_small_050", num_classes=4),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Hardsigmoid()),
    ],
)
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: {"epoch": 1, "model": model}])
def test_a_whole_network_of_known_classes_opens(build, wrap, tmp_path):
    model = build().eval()
    allowed = set(torch.serialization.get_safe_globals())
    torch.save(wrap(model), tmp_path / "whole.pt")
    source = open_model(str(tmp_path / "whole.pt"))
    x = torch.rand(2, 3, 64, 64)
    assert type(source.model) is type(model)
    assert not source.model.training
    assert torch.equal(source.model(x), model(x))
    assert (source.spec, source.architecture) == (str(tmp_path / "whole.pt"), None)
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_what_was_allowed_before_stays_allowed(resnet, tmp_path):
    torch.save(resnet, tmp_path / "whole.pt")
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([Mine, type(resnet)])
    try:
        open_model(str(tmp_path / "whole.pt"))
        assert set(torch.serialization.get_safe_globals()) == {*before, Mine, type(resnet)}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


@pytest.mark.parametrize("option", [{"arch": "timm:resnet18"}, {"settings": {"num_classes": 3}}])
def test_a_whole_network_leaves_nothing_to_say(option, resnet, tmp_path):
    torch.save(resnet, tmp_path / "whole.pt")
    with pytest.raises(UsageError, match="holds a whole network"):
        open_model(str(tmp_path / "whole.pt"), **option)


def test_other_classes_are_refused_with_the_command_that_accepts_them(tmp_path):
    path = tmp_path / "it's mine.pt"
    model = nn.Sequential(Mine())
    model.note = io.StringIO
    torch.save(model, path)
    with pytest.raises(SourceError) as caught:
        open_model(str(path))
    assert f"wants _io.StringIO, {__name__}.Mine." in str(caught.value)
    assert str(caught.value).endswith(f"accept the risk: dcafy inspect {shlex.quote(str(path))} --trust-pickle")
    assert isinstance(open_model(str(path), trust_pickle=True).model[0], Mine)


def test_the_command_keeps_the_architecture(tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(1)}, "args": Mine()}, tmp_path / "w.pt")
    with pytest.raises(SourceError, match=r"dcafy inspect \S+ --arch timm:resnet18 --trust-pickle$"):
        open_model(str(tmp_path / "w.pt"), arch="timm:resnet18")


def test_trusting_says_that_code_runs(tmp_path, caplog):
    torch.save(nn.Sequential(Mine()), tmp_path / "whole.pt")
    open_model(str(tmp_path / "whole.pt"), trust_pickle=True)
    assert "this runs code that the file chooses" in caplog.text


def test_trusted_classes_come_from_the_current_directory(canary, tmp_path, monkeypatch):
    torch_zip(tmp_path / "whole.pt", b"\x80\x02cevil\nNet\n)\x81}X\x08\x00\x00\x00trainingI00\ns}.")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    with pytest.raises(SourceError):
        open_model("whole.pt")
    assert not canary.exists()
    with pytest.raises(SourceError, match=r"holds {}: neither a network nor a state dict"):
        open_model("whole.pt", trust_pickle=True)
    assert canary.exists()
    del sys.modules["evil"]


def test_a_network_that_a_script_saved_whole(tmp_path):
    torch_zip(tmp_path / "whole.pt", b"\x80\x02c__main__\nNetOfScript\n.")
    with pytest.raises(SourceError, match=r"saved by a script .*__main__.*save model.state_dict.*--arch script.py:"):
        open_model(str(tmp_path / "whole.pt"), trust_pickle=True)


def test_trusted_classes_that_are_not_there(tmp_path):
    torch_zip(tmp_path / "whole.pt", b"\x80\x02cno_such_module\nNet\n.")
    with pytest.raises(SourceError, match=r"could not be unpickled .ModuleNotFoundError.*must be importable"):
        open_model(str(tmp_path / "whole.pt"), trust_pickle=True)


@pytest.mark.parametrize("trust", [False, True])
def test_whole_networks_from_before_pytorch_1_6(trust, resnet, tmp_path):
    """The source code that such a file brings along is passed over."""
    torch.save(resnet, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = open_model(str(tmp_path / "old.pt"), trust_pickle=trust).model
    assert type(opened) is type(resnet)
    assert torch.equal(opened(torch.ones(1, 3, 32, 32)), resnet(torch.ones(1, 3, 32, 32)))


# --- hostile pickles --------------------------------------------------------------------------------

EMPTY = b")"
NEWOBJ = b"\x81"
CREATE = b"X\x06\x00\x00\x00canary"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


HOSTILE = {
    # A function of Python's own.
    "os.system": b"cos\nsystem\n" + text("touch canary") + b"\x85R",
    "posix.system": b"cposix\nsystem\n" + text("touch canary") + b"\x85R",
    "eval": b"cbuiltins\neval\n" + text("open('canary','w')") + b"\x85R",
    "eval, as Python 2 called it": b"c__builtin__\neval\n" + text("open('canary','w')") + b"\x85R",
    "open, by INST": b"(" + CREATE + text("w") + b"ibuiltins\nopen\n",
    "open, by OBJ": b"(cbuiltins\nopen\n" + CREATE + text("w") + b"o",
    "open, by STACK_GLOBAL": text("builtins") + text("open") + b"\x93" + CREATE + text("w") + b"\x86R",
    "open, by NEWOBJ": b"cbuiltins\nopen\n" + CREATE + text("w") + b"\x86\x81",
    "open, by NEWOBJ_EX": b"cbuiltins\nopen\n" + CREATE + text("w") + b"\x86}\x92",
    "open, out of the memo": b"cbuiltins\nopen\nq\x050h\x05" + CREATE + text("w") + b"\x86R",
    "open, by DUP": b"cbuiltins\nopen\n2" + CREATE + text("w") + b"\x86R",
    "an extension": b"\x82\x01" + EMPTY + b"R",
    "getattr": b"cbuiltins\ngetattr\n" + text("os") + text("system") + b"\x86R",
    "partial": b"cfunctools\npartial\ncos\nsystem\n" + text("touch canary") + b"\x86R",
    # A module that would be imported only because the file names it.
    "another module": b"cevil\nNet\n" + EMPTY + NEWOBJ + b"}b",
    "a module that is called almost like timm": b"ctimm_evil\nNet\n" + EMPTY + NEWOBJ + b"}b",
    "a module that is called almost like torchvision": b"ctorchvision_evil\nNet\n" + EMPTY + NEWOBJ + b"}b",
    "a module below none": b"ctimm.\nNet\n" + EMPTY + NEWOBJ + b"}b",
    "a main module": b"ctimm.__main__\nNet\n" + EMPTY + NEWOBJ + b"}b",
    "another module through a class": b"ctorch.nn\nmodules.module.torch.os.system\n" + text("touch canary") + b"\x85R",
    "a module's own import": b"ctorch.nn.modules.module\ntorch\n",
    # Things of the three packages that are no network classes.
    "a function of timm": b"ctimm\ncreate_model\n" + text("resnet18") + b"\x85R",
    "a function of torchvision": b"ctorchvision.models.resnet\nresnet18\n" + EMPTY + b"R",
    "a function of torch.nn": b"ctorch.nn.init\nzeros_\n" + EMPTY + b"R",
    "a class that is no network": b"ctorchvision.datasets.folder\nImageFolder\n" + text(".") + b"\x85R",
    "a class that timm only imports": b"ctimm.models.resnet\nOrderedDict\n" + EMPTY + b"R",
    "a traced program": b"ctorchvision.models.feature_extraction\nDualGraphModule\n" + EMPTY + NEWOBJ + b"}b",
    "a scripted program": b"ctorch.jit._script\nRecursiveScriptModule\n" + EMPTY + NEWOBJ + b"}b",
    "a torch module outside torch.nn": b"ctorch.fx.graph_module\nGraphModule\n" + EMPTY + NEWOBJ + b"}b",
    # Network classes that are called.
    "a constructor": b"ctorch.nn.modules.linear\nLinear\nK\x03K\x04\x86R",
    "a constructor without arguments": b"ctorch.nn.modules.linear\nIdentity\n" + EMPTY + b"R",
    "a constructor by NEWOBJ": b"ctorch.nn.modules.linear\nLinear\nK\x03K\x04\x86" + NEWOBJ,
    "a constructor by INST": b"(K\x03K\x04itorch.nn.modules.linear\nLinear\n",
    "a constructor out of the memo": b"ctorch.nn.modules.linear\nLinear\nq\x070h\x07K\x03K\x04\x86R",
    "something computed": b"ccollections\nOrderedDict\n" + EMPTY + b"R" + EMPTY + b"R",
    "an instance of something computed": b"ccollections\nOrderedDict\n" + EMPTY + b"R" + EMPTY + NEWOBJ,
    "attributes of a class": b"ctorch.nn.modules.linear\nLinear\n}" + text("forward") + b"cbuiltins\nprint\nsb",
}


@pytest.mark.parametrize("form", [torch_zip, legacy])
@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_pickles_are_refused_and_not_run(attack, form, canary, tmp_path):
    form(tmp_path / "hostile.pt", b"\x80\x02" + HOSTILE[attack] + b".")
    loaded = set(sys.modules)
    with pytest.raises(SourceError) as caught:
        open_model("hostile.pt")
    assert not canary.exists()
    assert "is a pickle that wants" in str(caught.value)
    assert "--trust-pickle" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not {"timm_evil", "torchvision_evil", "evil"} & (set(sys.modules) - loaded)


def test_the_attacks_are_real(canary, tmp_path):
    """Where it is trusted, such a file does run."""
    torch_zip(tmp_path / "hostile.pt", b"\x80\x02" + HOSTILE["os.system"] + b".")
    with pytest.raises(DcafyError):
        open_model("hostile.pt", trust_pickle=True)
    assert canary.exists()


def test_attributes_of_a_class_are_not_set(tmp_path):
    """A class that may be lent must not be changed for everybody."""
    before = dict(vars(nn.Linear))
    pickled = b"\x80\x02ctorch.nn.modules.linear\nLinear\n}" + text("forward") + b"Nsb."
    torch_zip(tmp_path / "hostile.pt", pickled)
    with pytest.raises(SourceError):
        open_model(str(tmp_path / "hostile.pt"))
    assert dict(vars(nn.Linear)) == before


def test_names_in_messages_cannot_steer_the_terminal(tmp_path):
    torch_zip(tmp_path / "hostile.pt", b"\x80\x02c\x1b]0;title\x07\n\x1b[31m\n.")
    with pytest.raises(SourceError) as caught:
        open_model(str(tmp_path / "hostile.pt"))
    assert "\x1b" not in str(caught.value)


def test_two_pickles_under_one_name(canary, tmp_path):
    """What is judged is what is read, whichever of the two that is."""
    harmless = pickle.dumps({"w": 1}, protocol=2)
    for order in ([HOSTILE["eval"], harmless], [harmless, HOSTILE["eval"]]):
        with zipfile.ZipFile(tmp_path / "two.pt", "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for pickled in order:
                archive.writestr(
                    "archive/data.pkl", b"\x80\x02" + pickled.removeprefix(b"\x80\x02").rstrip(b".") + b"."
                )
            archive.writestr("archive/version", "3\n")
        with pytest.raises(SourceError):
            open_model("two.pt")
        assert not canary.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_read_and_judged(protocol, legacy, resnet, tmp_path):
    how = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": not legacy}
    torch.save(nn.Sequential(Mine(), nn.ReLU()), tmp_path / "mine.pt", **how)
    with pytest.raises(SourceError, match=f"wants {__name__}.Mine. Opening"):
        open_model(str(tmp_path / "mine.pt"))
    torch.save(resnet, tmp_path / "known.pt", **how)
    opened = open_model(str(tmp_path / "known.pt")).model
    assert type(opened) is type(resnet)
    assert all(torch.equal(value, opened.state_dict()[key]) for key, value in resnet.state_dict().items())


# --- other kinds of files ---------------------------------------------------------------------------


def package(path):
    with torch.package.PackageExporter(str(path)) as exporter:
        exporter.extern("**")
        exporter.save_pickle("model", "model.pkl", nn.Linear(2, 2))


def scripted(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))


def exported(path):
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), path)


def archived(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("docs/readme.txt", "hello")


def tarred(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))


def saved(content):
    return lambda path: torch.save(content, path)


def containing(content):
    return lambda path: path.write_bytes(content)


OTHERS = {
    "scripted.pt": (scripted, "is a TorchScript archive"),
    "exported.pt2": (exported, "is a .pt2 archive of torch.export"),
    "package.pt": (package, "is a torch.package archive"),
    "archive.zip": (archived, "is a zip archive that torch.save did not write"),
    "old.tar": (tarred, "is a tar archive"),
    "pickled.pkl": (containing(pickle.dumps([1, 2])), "is a Python pickle that torch.save did not write"),
    "empty.pt": (containing(b""), "is an empty file"),
    "empty.safetensors": (containing(b""), "is an empty file"),
    "text.pt": (containing(b"hello world"), "is not a model file that dcafy knows"),
    "model.onnx": (containing(b"\x08\x07\x12\x07pytorch"), "is an ONNX model"),
    "page.pth": (containing(b"<!DOCTYPE html><html>Not found</html>"), "is a web page"),
    "pointer.pt": (containing(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "is a Git LFS pointer"),
    "keras.h5": (containing(b"\x89HDF\r\n\x1a\n" + bytes(100)), "is an HDF5 file"),
    "packed.pt.gz": (containing(b"\x1f\x8b\x08" + bytes(50)), "is compressed with gzip"),
    "array.npy": (containing(b"\x93NUMPY\x01\x00" + bytes(50)), "is a NumPy array"),
    "cut.zip": (containing(b"PK\x03\x04" + bytes(50)), "is truncated or damaged"),
    "cut.pt": (containing(b"\x80"), "is truncated or damaged"),
    "cut.safetensors": (containing(struct.pack("<Q", 80) + b'{"w":'), "is a truncated or damaged safetensors file"),
    "list.pt": (saved([1, 2]), "holds a list: neither a network nor a state dict"),
    "tensor.pt": (saved(torch.zeros(2, 3)), "holds one tensor of shape (2, 3)"),
    "nothing.pt": (saved({}), "holds {}"),
    "numbers.pt": (saved({"epoch": 3, "\x1b[31m": 1}), "holds a dict with 2 entries (epoch, \\x1b[31m)"),
    "optimizer.pt": (saved({"optimizer": {"state": {}}}), "holds a dict with 1 entries (optimizer)"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named_in_one_line(name, tmp_path):
    write, says = OTHERS[name]
    write(tmp_path / name)
    with pytest.raises(SourceError) as caught:
        open_model(str(tmp_path / name))
    assert str(caught.value).startswith(f"{str(tmp_path / name)!r} {says}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["scripted.pt", "exported.pt2", "text.pt", "empty.pt", "cut.zip", "list.pt"])
def test_trust_does_not_make_a_network_of_them(name, tmp_path):
    OTHERS[name][0](tmp_path / name)
    with pytest.raises(SourceError):
        open_model(str(tmp_path / name), trust_pickle=True)


def test_a_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spec in ("missing.pt", "some/where", "missing.safetensors"):
        with pytest.raises(SourceError, match="no file or folder"):
            open_model(spec)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(SourceError, match="not a regular file"):
        open_model(str(tmp_path / "pipe.pt"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "secret.pt").write_bytes(b"PK")
    (tmp_path / "secret.pt").chmod(0)
    with pytest.raises(SourceError, match="could not be read"):
        open_model(str(tmp_path / "secret.pt"))


# --- damaged files ----------------------------------------------------------------------------------


def saved_bytes(**options):
    buffer = io.BytesIO()
    torch.save({"state_dict": nn.BatchNorm2d(3).state_dict(), "epoch": 2}, buffer, **options)
    return buffer.getvalue()


WHOLE = {
    "zip": saved_bytes(),
    "legacy": saved_bytes(_use_new_zipfile_serialization=False),
    "safetensors": safetensors.torch.save(nn.BatchNorm2d(3).state_dict()),
}


def reads_or_refuses(path):
    """Opening either gets to the weights or raises SourceError; any other error fails the test."""
    with pytest.raises(SourceError) as caught:
        open_model(str(path), arch="torchvision:squeezenet1_1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_truncated_files(form, part, tmp_path):
    path = tmp_path / "cut"
    path.write_bytes(WHOLE[form][: int(len(WHOLE[form]) * part)])
    reads_or_refuses(path)


@pytest.mark.parametrize("form", WHOLE)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files(form, data, tmp_path):
    content = bytearray(WHOLE[form])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(content)
    reads_or_refuses(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(b"\x80\x02.")
@example(b"\x80\x02h\x07.")
@example(b"\x80\x02R.")
@given(st.binary(max_size=40))
def test_any_bytes_are_refused_as_a_pickle(tmp_path, content):
    torch_zip(tmp_path / "any.pt", content)
    with pytest.raises(SourceError):
        open_model(str(tmp_path / "any.pt"))
