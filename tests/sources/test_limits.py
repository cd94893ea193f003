"""Small files that would take long or much memory: refused soon, with the option that lifts the limit."""

from __future__ import annotations

import io
import json
import pickle
import resource
import struct
import sys
import time
import zipfile

import pytest
import torch
from torch import nn

from dcafy.errors import SourceError
from dcafy.sources import open_model
from dcafy.zoos import fitting


@pytest.fixture(autouse=True)
def no_search(monkeypatch):
    """Which of a thousand architectures the weights fit is of no interest here."""
    monkeypatch.setattr(fitting, "_comparable", lambda prefix: [])


MARK, GET, DUP, EMPTY_DICT, SET = b"(", b"h\x00", b"2", b"}", b"s"


def torch_zip(path, pickled, records=(), *, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        for name, content in records:
            archive.writestr(f"archive/{name}", content)


def named(name, arguments):
    module, _, name = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n" + arguments


def storage(elements, key=b"0"):
    size = b"J" + struct.pack("<i", elements)
    return (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00"
        + key
        + b"X\x03\x00\x00\x00cpu"
        + size
        + b"tQ"
    )


def tensor(elements, shape, strides):
    numbers = [b"(" + b"".join(pickle.dumps(n, 2)[2:-1] for n in part) + b"t" for part in (shape, strides)]
    rebuilt = b"(" + storage(elements) + b"K\x00" + numbers[0] + numbers[1] + b"\x89" + b"}" + b"tR"
    return b"}X\x01\x00\x00\x00w" + b"ctorch._utils\n_rebuild_tensor_v2\n" + rebuilt + b"s"


LONG_LIST = b"](" + 200_000 * b"K\x01" + b"eq\x00"

BOMBS = {
    "many values under one mark": MARK + 2_000_000 * b"N" + b"t",
    "many empty sets": b"]" + 900_000 * b"(\x8fe" + 700_000 * b"0",
    "a pickle that unpacks to hundreds of megabytes": 50_000_000 * b"N0" + b"N",
    "one list made into many sets": LONG_LIST + 3000 * (named("builtins.list", GET) + b"\x85R0"),
    "one text made into many bytes": b"X\x80\x96\x98\x00"
    + 10_000_000 * b"a"
    + b"q\x00"
    + 300 * (named("_codecs.encode", GET) + b"X\x06\x00\x00\x00latin1\x86R0"),
    "tuples as keys": EMPTY_DICT + b"".join(b"K\x01J" + struct.pack("<i", n) + b"\x86N" + SET for n in range(20_000)),
    "a tensor that repeats one number": tensor(1, (2**20, 2**20), (0, 0)),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_soon(bomb, tmp_path):
    torch_zip(tmp_path / "bomb.pt", b"\x80\x04" + BOMBS[bomb] + b".", [("data/0", bytes(4))])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(SourceError, match="--any-size") as caught:
        open_model(str(tmp_path / "bomb.pt"))
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6 * (1 if sys.platform != "darwin" else 1024)


def test_the_option_lifts_the_limit(tmp_path):
    torch_zip(tmp_path / "large.pt", b"\x80\x02" + tensor(1, (5000, 5000), (0, 0)) + b".", [("data/0", bytes(4))])
    with pytest.raises(SourceError, match="add --any-size"):
        open_model(str(tmp_path / "large.pt"))
    with pytest.raises(SourceError, match="holds weights only"):
        open_model(str(tmp_path / "large.pt"), any_size=True)


def test_a_record_larger_than_the_file_warrants(tmp_path):
    torch_zip(tmp_path / "w.pt", b"\x80\x02" + tensor(30_000_000, (1,), (1,)) + b".", [("data/0", bytes(120_000_000))])
    assert (tmp_path / "w.pt").stat().st_size < 200_000
    with pytest.raises(SourceError, match=r"far more memory than the file is large: .* --any-size"):
        open_model(str(tmp_path / "w.pt"))


def test_ordinary_compression_is_read(tmp_path):
    buffer = io.BytesIO()
    torch.save(nn.Sequential(nn.Linear(50, 50)), buffer)
    with zipfile.ZipFile(buffer) as stored, zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for info in stored.infolist():
            archive.writestr(info.filename, stored.read(info))
    assert open_model(str(tmp_path / "w.pt")).model[0].in_features == 50


DAMAGED = {
    "a shape of 2**62": tensor(1, (2**62, 1), (1, 1)),
    "a shape of 2**64": tensor(1, (2**64,), (1,)),
    "a shape that ends in nothing": tensor(1, (2**63, 0), (1, 1)),
    "a negative shape": tensor(1, (-1,), (1,)),
    "strides past the storage": tensor(1, (2, 2), (1, 1)),
    "strides of 2**62": tensor(1, (1, 1), (2**62, 2**62)),
    "a storage of another size": tensor(2, (2,), (1,)),
    "a key that is nested too deep": EMPTY_DICT + b"N" + 100_000 * b"\x85" + b"N" + SET,
    "an element that is nested too deep": b"\x8f(N" + 100_000 * b"\x85" + b"\x90",
    "keys that share one hash": EMPTY_DICT + b"".join(
        b"\x8a\x0a" + ((2**61 - 1) * n).to_bytes(10, "little", signed=True) + b"N" + SET for n in range(1, 1000)
    ),
    "bytes of 2**62": b"\x8e" + struct.pack("<Q", 2**62) + b"x",
    "text of 2**62": b"\x8d" + struct.pack("<Q", 2**62) + b"x",
    "a number of a gigabyte": b"\x8b\x00\x00\x00\x40\x01",
    "a number of 5000 digits": b"I" + 5000 * b"9" + b"\n",
    "nothing under a call": b"R",
    "what is not in the memo": b"h\x07",
    "a buffer from elsewhere": b"\x97",
    "an array of another length": (
        named("numpy.core.multiarray._reconstruct", named("numpy.ndarray", b"K\x00\x85C\x01b\x87R"))
        + b"(K\x01J\x00\x00\x00\x40\x85" + named("numpy.dtype", b"X\x02\x00\x00\x00f8\x89\x88\x87R") + b"\x89C\x01atb"
    ),
    "a date that there is not": named("datetime.datetime", b"C\x0a" + 10 * b"\xff" + b"\x85R"),
    "a range of text": named("builtins.range", b"X\x01\x00\x00\x00a\x85R"),
    "a device that there is not": named("torch.device", b"X\x03\x00\x00\x00abc\x85R"),
    "an enumeration's value that there is not": named(
        "torchvision.transforms.functional.InterpolationMode", b"X\x03\x00\x00\x00abc\x85R"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_cannot_be_is_damage(damage, tmp_path):
    torch_zip(tmp_path / "w.pt", b"\x80\x04" + DAMAGED[damage] + b".", [("data/0", bytes(4))])
    with pytest.raises(SourceError, match="is truncated or damaged") as caught:
        open_model(str(tmp_path / "w.pt"))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions(compression, tmp_path):
    torch_zip(tmp_path / "w.pt", b"\x80\x02N.", compression=compression)
    with pytest.raises(SourceError, match=r"compressed in a way that torch.save does not write"):
        open_model(str(tmp_path / "w.pt"))


def test_a_bit_that_flipped_is_noticed(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"w": torch.full((1000,), 0.5)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(1000 * struct.pack("<f", 0.5)) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(SourceError, match="is truncated or damaged"):
        open_model(str(path))


# --- safetensors ------------------------------------------------------------------------------------


def safe(header, content=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def entry(shape, end, dtype="F32", start=0):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


SAFE = {
    "a shape of 2**63": (safe({"w": entry([2**63, 0], 0)}), "of a shape or type"),
    "a shape of 2**64": (safe({"w": entry([2**64], 4)}, bytes(4)), "damaged"),
    "a type of nobody's": (safe({"w": entry([8], 4, "F5")}, bytes(4)), "damaged"),
    "a name with a line break": (safe({"a\nb\x1b": entry([2], 4)}, bytes(4)), "damaged"),
    "a long name": (safe({"a" * 100_000: entry([2], 4)}, bytes(4)), "damaged"),
    "lists without end": (safe(b"{" + 100_000 * b"["), "damaged|neither"),
    "many empty tensors": (safe({str(n): entry([0], 0, "U8") for n in range(100_000)}), "--any-size"),
}


@pytest.mark.parametrize("kind", SAFE)
def test_safetensors_that_cannot_be(kind, tmp_path):
    content, says = SAFE[kind]
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match=says) as caught:
        open_model(str(tmp_path / "w.safetensors"), arch="torchvision:squeezenet1_1")
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 700


def test_a_file_that_may_not_be_mapped(tmp_path, monkeypatch):
    import safetensors.torch

    def refuses(path):
        raise RuntimeError("unable to mmap 99 bytes from file <w>: Cannot allocate memory (12)")

    (tmp_path / "w.safetensors").write_bytes(safetensors.torch.save({"w": torch.zeros(1)}))
    monkeypatch.setattr(safetensors.torch, "load_file", refuses)
    with pytest.raises(SourceError, match=r"could not be read into memory .unable to mmap"):
        open_model(str(tmp_path / "w.safetensors"))


# --- tensors that no network is made of -------------------------------------------------------------

ODD = {
    "a sparse tensor": lambda: torch.eye(3).to_sparse(),
    "a nested tensor": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "a quantized tensor": lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
    "a tensor without data": lambda: torch.zeros(2, device="meta"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds_are_named(kind, tmp_path):
    torch.save({"weight": ODD[kind](), "bias": torch.zeros(2)}, tmp_path / "w.pt")
    for trust in (False, True):
        with pytest.raises(SourceError, match="weight is a"):
            open_model(str(tmp_path / "w.pt"), trust_pickle=trust)
    torch.save({"state_dict": {"bias": torch.zeros(2)}, "mask": ODD[kind]()}, tmp_path / "beside.pt")
    with pytest.raises(SourceError, match="holds weights only"):
        open_model(str(tmp_path / "beside.pt"))


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "\u202e", "x" * 100_000, "", ".", "..", "\ud800"])
def test_names_in_files_cannot_spoil_a_message(name, tmp_path):
    torch.save({name: torch.zeros(2), "b": torch.zeros(1)}, tmp_path / "w.pt")
    for options in ({"arch": "torchvision:squeezenet1_1"}, {"prefix": name}, {"prefix": name, "arch": "timm:resnet18"}):
        with pytest.raises(SourceError) as caught:
            open_model(str(tmp_path / "w.pt"), **options)
        message = str(caught.value)
        assert message.isprintable()
        assert len(message) < 1000
