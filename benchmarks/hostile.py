"""Hostile inputs for ``benchmarks/faults.py``: for each part what may be drawn, and what dcafy then does with it.

A part is a strategy of hypothesis, which gives a *plan* (small, plain, the same for the same seed), and an act, which
writes what the plan says into a folder and opens it as the command would. Acts run in a process of their own.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import os
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn
from torchvision import models
from torchvision.ops import SqueezeExcitation

import dcafy
from dcafy.checkpoint.tensors import facts, fingerprint
from dcafy.choices import CHOICES
from dcafy.cli import main
from dcafy.detection import open_coco
from dcafy.errors import DcafyError
from dcafy.images.about import About, Trained, put_about
from dcafy.images.options import DataOptions
from dcafy.images.order import Seeded
from dcafy.images.preparation import Preparation, Prepared
from dcafy.images.sources import open_data
from dcafy.plan.options import Conversion
from dcafy.report.epochs import read_epochs
from dcafy.report.making import run_in
from dcafy.report.pictures import read_pictures
from dcafy.report.thumbnails import data_uri, sized
from dcafy.runs.asking import Asked, request_of
from dcafy.runs.configured import completed
from dcafy.runs.options import RunOptions
from dcafy.runs.request import Request, read_request, write_request
from dcafy.sources import open_model
from dcafy.sources.listing import specs_that_match
from dcafy.sources.options import FileOptions
from dcafy.training import TrainingConfig, finetune
from dcafy.training.checkpoint import _sha256
from dcafy.training.telling import Listener

MARKER = "CODE_RAN"
"""The file that code out of an input would write into the working folder."""

RUNS = f"__import__('os').system('touch {MARKER}')"

# --- what is drawn --------------------------------------------------------------------------------------

NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**64, 10**30, 10**400, -0.0, 1.5, 1e308),
    *(float("nan"), float("inf"), -float("inf")),
    *("", " ", "a", "é", "\x00", "\ud800", "\u202e", "\x1b[31m", "a\nb", "x" * 50_000, "1" * 5000, "(" * 100),
    *("../../etc/passwd", "/etc/passwd", "a/../b", "..", ".", "a.b", "a..b", "#2", "*", "[", "[!", "**"),
    *("__class__", "__dict__", "__class__.__init__", "forward", "_modules", "training", "dca", "root", "self"),
    *(RUNS, f'x") or {RUNS} or ("', f"c\\') if not [{RUNS}] else (\\'", "os:system", "planted:make", "import planted"),
    *("torchvision:resnet18", "torchvision:__import__", "torchvision:../x", "timm:hf-hub:evil/x", "timm:../../x"),
    *("torchvision:mobilenet_v3_small@DEFAULT", "TORCHVISION:resnet18", "torchvision:vit_h_14", "imagefolder:/"),
    *("se", "conv", "cbam", "float32", "int64", "bool", "complex64", "float8_e4m3fn", "model.safetensors"),
    *("1x1x1x1", "-1x3", "0x0", "99999999999999999999x1", "channel", "spatial", "sigmoid", "softmax", "fc1", "dense"),
    *([], {}, [[]], [{}], {"a": 1}, ["a"], [1, 2], [1, 2, 3, 4], [None] * 4, ["a"] * 4, [1e308] * 4, [-1, -1, 2, 2]),
]
"""Values that somebody's code did not think of."""

VALUES = st.one_of(
    st.sampled_from(NASTY),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.tuples(st.just("nested"), st.sampled_from([5, 50, 300, 900, 3000]), st.sampled_from(["list", "dict"])),
)
"""What takes the place of an entry. ``("nested", n, kind)`` stands for that many lists or objects in one another."""

TEXT = st.text(max_size=30)

PLACE = st.integers(0, 2**31)
"""Chooses among what there is, by its remainder."""

CHANGES = st.lists(
    st.tuples(PLACE, st.sampled_from(["set", "set", "set", "delete", "add", "rename", "copy", "cut"]), VALUES, PLACE),
    min_size=1,
    max_size=4,
)
"""What is changed in a document: (where, how, with what, from where)."""

EDITS = st.lists(
    st.tuples(PLACE, st.sampled_from(["set", "delete", "insert", "repeat", "truncate"]), st.binary(max_size=9), PLACE),
    min_size=1,
    max_size=8,
)
"""What is changed in bytes."""


def changed(document: Any, changes: list[Any]) -> Any:
    """The document with the changes."""
    document = copy.deepcopy(document)
    for where, how, value, other in changes:
        spots = [spot for spot in _spots(document, 0) if spot is not None]
        if not spots:
            break
        holder, key = spots[where % len(spots)]
        value = _nested(copy.deepcopy(value))  # a list that is set twice is not to hold itself
        if how == "delete":
            del holder[key]
        elif how == "add" and isinstance(holder, dict):
            holder[_text(value)] = 1
        elif how == "add":
            holder.insert(other % (len(holder) + 1), value)
        elif how == "rename" and isinstance(holder, dict):
            holder[_text(value)] = holder.pop(key)
        elif how == "copy":
            source, name = spots[other % len(spots)]
            with contextlib.suppress(RecursionError):
                holder[key] = copy.deepcopy(source[name])
        elif how == "cut" and isinstance(holder[key], str):
            text = holder[key]
            place = other % (len(text) + 1)
            holder[key] = text[:place] + _text(value)[:200] + text[place:]
        else:
            holder[key] = value
    return document


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:d}" if type(value) is int and abs(value) < 2**70 else "odd"


def _nested(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    made: Any = 1
    for _ in range(value[1]):
        made = [made] if value[2] == "list" else {"a": made}
    return made


def _spots(tree: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every entry, some way into long and deep ones."""
    if depth > 12 or not isinstance(tree, dict | list):
        return
    keys = list(tree) if isinstance(tree, dict) else list(range(min(len(tree), 40)))
    for key in keys:
        yield tree, key
        yield from _spots(tree[key], depth + 1)


def written(document: Any) -> bytes:
    """The document as JSON, however deep."""
    sys.setrecursionlimit(50_000)
    try:
        return json.dumps(document).encode("utf-8", "surrogatepass")
    finally:
        sys.setrecursionlimit(1000)


def put(path: Path, content: bytes) -> None:
    """Writes a file of the input's own: where a link lies, by another part of the input, it is not written through."""
    if path.is_symlink():
        path.unlink()
    path.write_bytes(content)


def edited(content: bytes, edits: list[Any]) -> bytes:
    """The bytes with the edits."""
    data = bytearray(content)
    for where, how, given, other in edits:
        place = where % (len(data) + 1)
        if how == "set":
            data[place : place + len(given)] = given
        elif how == "delete":
            del data[place : place + other % 60]
        elif how == "insert":
            data[place:place] = given
        elif how == "repeat":
            data[place:place] = data[other % (len(data) + 1) :][:200]
        elif other % 4 == 0:
            del data[place:]
    return bytes(data)


# --- the networks and files that are changed --------------------------------------------------------------


def network() -> nn.Module:
    """A small network of torch's and torchvision's own classes, with attention: a file may hold it whole."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), SqueezeExcitation(8, 4), nn.ReLU(), nn.Conv2d(8, 8, 3), SqueezeExcitation(8, 4)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
    )


EXAMPLE = torch.zeros(2, 3, 10, 10)
INPUTS = {"example_inputs": EXAMPLE, "verify": False}
CONFIG = TrainingConfig(epochs=2, batch_size=4, usage_images=0, cpu=True, ema=0.5)
SAMPLES = [(EXAMPLE[0] + index, index % 2) for index in range(8)]


class _Stop(Listener):
    def epoch_ended(self, epoch: Any) -> None:
        raise InterruptedError


@dataclass(frozen=True)
class Seeds:
    """What is changed: made once, before the first input.

    ``folders``  folders of ``dcafy.save``: with the base, connections only, of a zoo's network, with inserted attention
    """

    root: Path
    pickled: dict[str, bytes]
    folders: dict[str, Path]
    documents: dict[str, Any]
    checkpoint: Path
    header: dict[str, Any]
    images: dict[str, bytes]

    @classmethod
    def made(cls, root: Path) -> Seeds:
        state = network().state_dict()
        pickled = {
            "state": _saved(state),
            "checkpoint": _saved({"state_dict": state, "epoch": 3, "optimizer": {"lr": [1, 2.5, "x"]}}),
            "averaged": _saved({"ema": {"module": state}}),
            "network": _saved(network()),
            "old state": _saved(state, new=False),
            "old network": _saved(network(), new=False),
            "tensor": _saved(torch.zeros(2)),
            "list": _saved([1, "a"]),
            "safetensors": save({key: value.contiguous() for key, value in state.items()}, {"format": "pt"}),
        }
        connected = dcafy.convert(network(), **INPUTS)
        folders = {name: root / name for name in ("whole", "connections", "named", "inserted", "used")}
        dcafy.save(connected, folders["whole"])
        dcafy.save(connected, folders["connections"], base=False)
        small_network = models.mobilenet_v3_small(num_classes=2)
        shown = torch.zeros(2, 3, 32, 32)
        dcafy.save(dcafy.convert(small_network, example_inputs=shown, verify=False), folders["named"])
        resnet = timm.create_model("test_resnet", num_classes=2)
        inserted = dcafy.convert(resnet, attention="se", example_inputs=shown, verify=False)
        dcafy.save(inserted, folders["inserted"])
        used = dcafy.convert(timm.create_model("test_efficientnet", num_classes=2), example_inputs=shown, verify=False)
        how = Preparation((32, 32), 36, (0.5,) * 3, (0.5,) * 3)
        learned = Trained(f"imagefolder:{root / 'labelled'}", 3, {"loss": 0.5, "top1": 0.75})
        put_about(used, About("classification", ("a", "b"), how, learned))
        dcafy.save(used, folders["used"])
        for name in "ab":
            (root / "labelled" / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(root / "labelled" / name / f"{number}.png")
        documents = {name: json.loads((folder / "dcafy.json").read_bytes()) for name, folder in folders.items()}
        run = root / "run"
        write_request(run, Request("torchvision:mobilenet_v3_small", "digits"))
        documents["request"] = json.loads((run / "finetune.json").read_bytes())
        share = {"alpha": 1, "beta": 0, "contribution": 0.1, "message_share": 0.2}
        epoch = {"event": "epoch", "steps": 8, "connections": {"a.se": share, "b": share}}
        documents["log"] = [{"event": "begin"}, *({**epoch, "epoch": number} for number in (1, 2)), {"event": "end"}]
        documents["coco"] = _coco()
        with contextlib.suppress(InterruptedError):
            finetune(trained(), SAMPLES, SAMPLES, CONFIG, directory=run, listener=_Stop())
        checkpoint = run / "checkpoint.safetensors"
        with safe_open(checkpoint, framework="pt") as file:
            header = json.loads(file.metadata()["dcafy"])
        pictures = root / "pictures"
        pictures.mkdir()
        for number in range(4):
            Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(pictures / f"{number}.png")
        (root / "planted.py").write_text(f"open({str(root / MARKER)!r}, 'w').close()\n")
        (root / "given.py").write_text("from hostile import network\n")
        sys.path.insert(0, str(root))  # the user's own code, which he may name
        return cls(root, pickled, folders, documents, checkpoint, header, _images())


def _saved(value: Any, *, new: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=new)
    return stream.getvalue()


def trained() -> Any:
    """The connected network that the run trains."""
    return dcafy.convert(network(), **INPUTS)


def _coco() -> dict[str, Any]:
    runs = {"size": [30, 40], "counts": [100, 200, 900]}
    box = {"bbox": [1, 2, 10, 12], "area": 120, "iscrowd": 0}
    outlines = ([[1, 1, 5, 1, 5, 5]], runs, {"size": [30, 40], "counts": "`T1"})
    return {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 30} for n in range(4)],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"id": n, "image_id": n % 4, "category_id": 1 + n % 2, **box, "segmentation": outlines[n % 3]}
            for n in range(8)
        ],
    }


def _images() -> dict[str, bytes]:
    noise = Image.effect_noise((24, 20), 50)
    rgb = noise.convert("RGB")
    deep = Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24))
    made = {name: _encoded(rgb, name) for name in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "EPS", "PDF")}
    for name in ("JPEG2000", "ICO", "TGA", "PCX", "SGI", "DDS", "AVIF", "ICNS", "IM", "BLP"):
        with contextlib.suppress(Exception):  # what this Pillow was built without
            made[name] = _encoded(rgb, name)
    return {
        **made,
        "deep PNG": _encoded(deep, "PNG"),
        "deep TIFF": _encoded(deep, "TIFF"),
        "palette": _encoded(rgb.convert("P"), "PNG", transparency=0),
        "CMYK": _encoded(rgb.convert("CMYK"), "JPEG"),
        "bits": _encoded(rgb.convert("1"), "PNG"),
        "LA": _encoded(rgb.convert("LA"), "PNG"),
        "no numbers": _encoded(Image.fromarray(np.full((20, 24), np.nan, np.float32)), "TIFF"),
        "negative": _encoded(Image.fromarray(np.full((20, 24), -5, np.int32)), "TIFF"),
        "moving": _encoded(rgb, "GIF", save_all=True, append_images=[rgb.rotate(9), noise.convert("L")]),
    }


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# --- .pt ----------------------------------------------------------------------------------------------------

GLOBALS = [
    *("os system", "posix system", "builtins eval", "builtins exec", "builtins getattr", "__builtin__ eval"),
    *("builtins __import__", "subprocess Popen", "torch.hub load", "torch load", "runpy _run_code", "pickle loads"),
    *("importlib import_module", "operator attrgetter", "torch.nn os.system", "torch.nn.modules.module torch"),
    *("torch.nn.modules.module warnings.sys", "torch.fx.graph_module GraphModule", "torch.jit._script ScriptModule"),
    *("planted x", "planted make", "torch.nn.__main__ x", "torchvision.__main__ x", "timm.__main__ x", "this x"),
    *("timm.models._hub load_custom_from_hf", "torchvision.io image", "torch.nn.utils.rnn __main__", "timm.data x"),
    *("torch.nn.modules.linear Linear", "torch.nn.modules.container Sequential", "torchvision.models.resnet ResNet"),
    *("torchvision.ops.misc SqueezeExcitation", "timm.models.senet SENet", "torch.nn.parameter Parameter"),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"),
    *("torch FloatStorage", "torch.storage UntypedStorage", "torch.nn.modules.module Module", "_codecs encode"),
    *("builtins set", "torch._tensor _rebuild_from_type_v2", "torch.nn.quantized Linear", "torch.nn.cpp ModuleWrapper"),
]


def _opcode(index: int, given: bytes) -> bytes:
    module, name = GLOBALS[index % len(GLOBALS)].split(" ")
    text = RUNS.encode() if index % 3 else given
    one = bytes([index % 256])
    table = [
        *[f"c{module}\n{name}\n".encode()] * 6,
        *(_short(module.encode()) + _short(name.encode()) + b"\x93", f"i{module}\n{name}\n".encode()),
        *(
            b"(",
            b"(",
            b"t",
            b"R",
            b"R",
            b"\x81",
            b"b",
            b"}",
            b"]",
            b")",
            b"N",
            b"0",
            b"1",
            b"2",
            b"s",
            b"u",
            b"a",
            b"e",
        ),
        *(_short(text), b"X" + struct.pack("<I", len(text)) + text, b"q" + one, b"h" + one, b"\x94", b"Q", b"o"),
        *(
            b"K" + one,
            b"J" + struct.pack("<i", -index % 2**31),
            b"\x8a" + bytes([len(given)]) + given,
            b"\x85",
            b"\x86",
        ),
        *(
            b"\x8e" + struct.pack("<Q", 2**62),
            b"r" + struct.pack("<I", index),
            b"\x92",
            b"\x82" + one,
            b"\x90",
            b"\x8f",
        ),
        *(b"(" * 300, b"2" * 300, b"I" + b"1" * 4400 + b"\n", b"Vabc\n"),
    ]
    return table[(index // len(GLOBALS)) % len(table)]


def _short(text: bytes) -> bytes:
    return b"\x8c" + bytes([min(len(text), 255)]) + text[:255]


PICKLES = st.one_of(
    st.tuples(st.just("bytes"), PLACE, EDITS),
    st.tuples(st.just("pickle"), PLACE, EDITS),
    st.tuples(st.just("records"), PLACE, st.lists(st.tuples(PLACE, PLACE, st.binary(max_size=40)), max_size=4)),
    st.tuples(st.just("program"), PLACE, st.lists(st.tuples(PLACE, st.binary(max_size=9)), min_size=1, max_size=30)),
    st.tuples(st.just("network"), PLACE, st.lists(st.tuples(PLACE, PLACE, PLACE, VALUES), min_size=1, max_size=3)),
    st.tuples(st.just("network"), PLACE, st.lists(st.tuples(PLACE, PLACE, PLACE, VALUES), min_size=1, max_size=3)),
    st.tuples(st.just("weights"), PLACE, st.lists(st.tuples(PLACE, PLACE, PLACE, VALUES), min_size=1, max_size=3)),
)


def pt(seeds: Seeds, place: Path, plan: Any) -> None:
    """A file of ``torch.save``, opened; a network in it is looked at and connected."""
    kind, which, rest = plan
    names = [name for name in seeds.pickled if name != "safetensors"]
    if kind == "network":
        content = _odd_network(rest, new=which % 8 != 0)
    elif kind == "weights":
        content = _odd_weights(rest, new=which % 8 != 0)
    elif kind == "program":
        program = b"".join(_opcode(*one) for one in rest)
        pickled = bytes([0x80, (2, 2, 2, 3, 4, 5, 255)[which % 7]]) + program + b"."
        content = pickled if which % 5 == 0 else _archive(_records(seeds.pickled["state"]), {"data.pkl": pickled})
    elif kind == "bytes":
        content = edited(seeds.pickled[names[which % len(names)]], rest)
    else:
        whole = _records(seeds.pickled[("state", "checkpoint", "averaged", "network")[which % 4]])
        if kind == "pickle":
            content = _archive(whole, {"data.pkl": edited(whole["data.pkl"], rest)})
        else:
            content = _archive(whole, _odd_records(whole, rest), packed=which % 3 == 0)
    path = place / "x.pt"
    put(path, content)
    _open(path, None if kind in ("network", "program") else "given:network")


def _open(path: Path, arch: str | None) -> None:
    model = open_model(str(path), arch=arch).model
    dcafy.inspect(model, example_inputs=EXAMPLE)
    connected = dcafy.convert(model, **INPUTS)
    dcafy.save(connected, path.with_name("connected"))
    dcafy.flat(connected)


def _records(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def _archive(records: dict[str, bytes], others: dict[str, bytes], *, packed: bool = False) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, content in {**records, **others}.items():
            archive.writestr(f"archive/{name}", content)
    return stream.getvalue()


def _odd_records(records: dict[str, bytes], rest: list[Any]) -> dict[str, bytes]:
    made: dict[str, bytes] = {}
    for which, how, given in rest:
        name = list(records)[which % len(records)]
        made.update(
            [
                {name: b""},
                {name: given},
                {name: bytes(2**24)},
                {name: records[name] * 3},
                {name + given.hex(): records[name]},
                {"byteorder": given or b"big"},
                {".format_version": given},
                {"version": given},
                {"constants.pkl": given},
                {name: records[name][: how % (len(records[name]) + 1)]},
            ][how % 10]
        )
    return made


def _odd_network(rest: list[Any], *, new: bool) -> bytes:
    model = network()
    for one in rest:
        with contextlib.suppress(Exception):  # some changes cannot be made in memory either
            _alter(model, *one)
    return _pickled(model, new)


_METHODS = ("forward", "modules", "training", "_forward_hooks", "named_parameters", "state_dict", "eval", "_version")


def _alter(model: nn.Module, which: int, how: int, name: int, value: Any) -> None:
    """One thing in the network's insides is another."""
    modules = list(model.modules())
    inside = modules[which % len(modules)].__dict__
    names = list(inside)
    odd, value = str(NASTY[name % len(NASTY)])[:5000], _odd_value(value, name, model)
    children = inside["_modules"]
    ways: list[Callable[[], Any]] = [
        lambda: inside.update({names[name % len(names)]: value}),
        lambda: inside.update({odd: value}),
        lambda: inside.pop(names[name % len(names)]),
        lambda: children.update({odd: nn.Linear(1, 1) if name % 2 else value}),
        lambda: inside["_parameters"].update({odd: nn.Parameter(torch.zeros(1)) if name % 2 else value}),
        lambda: inside["_buffers"].update({odd: torch.zeros(1) if name % 2 else value}),
        lambda: children.update({"again": model}),
        lambda: children.update({odd: children.pop(next(iter(children)))}),
        lambda: inside.update({_METHODS[name % len(_METHODS)]: value}),
    ]
    ways[how % len(ways)]()


def _odd_weights(rest: list[Any], *, new: bool) -> bytes:
    state: Any = dict(network().state_dict())
    for which, how, name, value in rest:
        keys = [*state] or ["x"]
        key = keys[which % len(keys)]
        state[str(NASTY[name % len(NASTY)])[:5000] if how % 3 == 0 else key] = _odd_value(value, name, state.get(key))
        if how % 7 == 0:
            state = {("state_dict", "model", "ema", "weights")[how % 4]: state, "epoch": value}
    return _pickled(state, new)


def _odd_value(value: Any, which: int, other: Any) -> Any:
    kinds: list[Callable[[], Any]] = [
        lambda: value,
        lambda: value,
        lambda: _nested(value) if not isinstance(value, tuple) or value[1] < 500 else [value],
        lambda: torch.zeros(2, 3).to_sparse(),
        lambda: torch.zeros(3, dtype=torch.complex64),
        lambda: torch.empty(2**40, device="meta"),
        lambda: torch.zeros(1).expand(2**40),
        lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
        lambda: torch.full((8, 3, 3, 3), float("nan")),
        lambda: torch.zeros(8, 3, 3, 3, dtype=torch.int64),
        lambda: torch.zeros(0),
        lambda: nn.Parameter(torch.zeros(1)),
        lambda: {1: other},
        lambda: other,
        lambda: torch.float16,
        lambda: nn.ReLU(),
    ]
    return kinds[which % len(kinds)]()


def _pickled(value: Any, new: bool) -> bytes:
    sys.setrecursionlimit(20_000)
    try:
        return _saved(value, new=new)
    except Exception:  # what cannot be pickled cannot come in a file either
        return _saved([1], new=new)
    finally:
        sys.setrecursionlimit(1000)


# --- .safetensors -------------------------------------------------------------------------------------------

SAFETENSORS = st.one_of(
    st.tuples(st.just("bytes"), EDITS),
    st.tuples(st.just("header"), CHANGES),
    st.tuples(st.just("header"), CHANGES),
    st.tuples(st.just("facts"), st.lists(st.tuples(PLACE, PLACE, PLACE), min_size=1, max_size=3)),
    st.tuples(st.just("length"), st.sampled_from([0, 1, 7, 2**20, 10**8, 10**8 + 1, 2**40, 2**63, 2**64 - 1])),
)

_ODD_FACTS: list[Any] = [
    *("F64", "BOOL", "F8_E4M3", "xx", [], [0], [-1], [2**62], [2**63], [2**64], [2**32, 2**32], [1] * 100),
    *([0, 2**62], [10, 0], [2**62, 2**62 + 4], None, "1", {}, 1.5, [0, 0]),
]


def with_header(content: bytes, header: Any) -> bytes:
    """The file with another header, as long as it is."""
    length = struct.unpack("<Q", content[:8])[0]
    text = written(header)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def odd_tensors(content: bytes, plan: Any) -> bytes:
    """A safetensors file, changed."""
    kind, rest = plan
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    if kind == "bytes":
        return edited(content, rest)
    if kind == "length":
        return struct.pack("<Q", rest) + content[8:]
    if kind == "header":
        return with_header(content, changed(header, rest))
    for which, name, value in rest:
        keys = [key for key in header if key != "__metadata__"]
        of = header[keys[which % len(keys)]]
        of[("dtype", "shape", "data_offsets")[name % 3]] = _ODD_FACTS[value % len(_ODD_FACTS)]
    return with_header(content, header)


def safetensors(seeds: Seeds, place: Path, plan: Any) -> None:
    """A file of safetensors, opened."""
    path = place / "x.safetensors"
    put(path, odd_tensors(seeds.pickled["safetensors"], plan))
    _open(path, "given:network")


# --- folders ------------------------------------------------------------------------------------------------

FOLDERS = st.one_of(
    st.tuples(st.just("document"), PLACE, CHANGES),
    st.tuples(st.just("document"), PLACE, CHANGES),
    st.tuples(st.just("document"), PLACE, CHANGES),
    st.tuples(st.just("bytes"), PLACE, EDITS),
    st.tuples(st.just("tensors"), PLACE, SAFETENSORS),
    st.tuples(st.just("consistent"), PLACE, st.lists(st.tuples(PLACE, PLACE), min_size=1, max_size=3)),
    st.tuples(st.just("files"), PLACE, st.tuples(PLACE, PLACE)),
)


def folders(seeds: Seeds, place: Path, plan: Any) -> None:
    """A folder of ``dcafy.save``, loaded, and saved into."""
    kind, which, rest = plan
    name = ("whole", "whole", "whole", "connections", "connections", "inserted", "named")[which % 7]
    folder = place / "folder"
    shutil.copytree(seeds.folders[name], folder)
    marker = folder / "dcafy.json"
    tensors = next(path for path in folder.iterdir() if path.suffix == ".safetensors")
    if kind == "document":
        put(marker, written(changed(seeds.documents[name], rest)))
    elif kind == "bytes":
        put(marker, edited(marker.read_bytes(), rest))
    elif kind == "tensors":
        put(tensors, odd_tensors(tensors.read_bytes(), rest))
    elif kind == "consistent":
        _consistent(folder, tensors, seeds.documents[name], rest)
    else:
        _odd_file(folder / ("dcafy.json", tensors.name, ".dcafy-x")[rest[0] % 3], rest[1], seeds)
    model = {"named": None, "inserted": None}.get(name, network())
    try:
        dcafy.load(folder, model)
    finally:
        if which % 3 == 0:
            dcafy.save(trained(), folder)


def _consistent(folder: Path, file: Path, document: Any, rest: list[Any]) -> None:
    """Other tensors, with a description that fits them."""
    held = load_file(file)
    for which, how in rest:
        _swap(held, which, how)
    save_file({key: value.contiguous() for key, value in held.items()}, file)
    again = copy.deepcopy(document)
    again["weights"]["sha256"] = fingerprint({key: facts(value) for key, value in held.items()})
    put(folder / "dcafy.json", written(again))


def _swap(held: dict[str, torch.Tensor], which: int, how: int) -> None:
    """One tensor is another, or has another name."""
    key = list(held)[which % len(held)]
    value = held[key]
    casts = [torch.float64, torch.float16, torch.int32, torch.bool, torch.complex64, torch.uint8]
    names = ["../../x", "a.__class__", "\x00", "dca", "a.dca.b", "", ".", "x" * 1000, "a..b", RUNS]
    ways: list[Callable[[], Any]] = [
        lambda: held.update({key: value.to(casts[which % 6])}),
        lambda: held.update({key: value.reshape(-1)}),
        lambda: held.update({key: torch.full(value.shape, float("nan"))}),
        lambda: held.update({names[which % len(names)]: held.pop(key)}),
        lambda: held.update({"extra." + key: value.clone()}),
        lambda: held.pop(key) if len(held) > 1 else None,
        lambda: held.update({key: torch.zeros(())}),
        lambda: held.update({key: torch.zeros(0)}),
    ]
    ways[how % len(ways)]()


def _odd_file(path: Path, how: int, seeds: Seeds) -> None:
    """Something else in a file's place."""
    path.unlink(missing_ok=True)
    ways: list[Callable[[], Any]] = [
        lambda: os.mkfifo(path),
        lambda: path.mkdir(),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("/nowhere"),
        lambda: path.symlink_to(seeds.root),
        lambda: [path.touch(), os.truncate(path, 3 << 30)],
        lambda: put(path, b""),
        lambda: None,
    ]
    ways[how % len(ways)]()


# --- runs ---------------------------------------------------------------------------------------------------

RUN_FILES = st.one_of(
    st.tuples(st.just("request"), CHANGES),
    st.tuples(st.just("request bytes"), EDITS),
    st.tuples(st.just("log"), CHANGES),
    st.tuples(st.just("log bytes"), EDITS),
    st.tuples(st.just("files"), st.tuples(PLACE, PLACE)),
    st.tuples(st.just("checkpoint"), SAFETENSORS),
    st.tuples(st.just("facts"), CHANGES),
    st.tuples(st.just("state"), st.lists(st.tuples(PLACE, PLACE), min_size=1, max_size=2)),
)


def run_files(seeds: Seeds, place: Path, plan: Any) -> None:
    """The folder of a run: read as ``--resume`` and ``dcafy report`` read it; a checkpoint is gone on from."""
    kind, rest = plan
    folder = place / "run"
    shutil.copytree(seeds.root / "run", folder)
    request, log, checkpoint = (folder / name for name in ("finetune.json", "log.jsonl", "checkpoint.safetensors"))
    rows = [written(row) for row in seeds.documents["log"]]
    put(log, b"\n".join(rows) + b"\n")
    if kind == "request":
        put(request, written(changed(seeds.documents["request"], rest)))
    elif kind == "request bytes":
        put(request, edited(request.read_bytes(), rest))
    elif kind == "log":
        made = changed(seeds.documents["log"], rest)
        put(log, b"\n".join(map(written, made)) + b"\n")
    elif kind == "log bytes":
        put(log, edited(log.read_bytes(), rest))
    elif kind == "files":
        _odd_file((request, log, checkpoint)[rest[0] % 3], rest[1], seeds)
    elif kind == "checkpoint":
        put(checkpoint, odd_tensors(checkpoint.read_bytes(), rest))
    else:
        _odd_checkpoint(checkpoint, seeds, kind, rest)
    if kind in ("checkpoint", "facts", "state") or (kind == "files" and rest[0] % 3 == 2):
        finetune(trained(), SAMPLES, SAMPLES, CONFIG, directory=folder, resume=True)
        return
    _each(
        lambda: request_of(_resumed(folder)),
        lambda: run_in(str(folder)),
        lambda: _plotted(folder),
    )


def _resumed(folder: Path) -> Asked:
    """What ``dcafy finetune FOLDER --resume`` asks for."""
    options = TrainingConfig(), DataOptions(), Conversion(), FileOptions()
    return Asked("", {}, RunOptions(output=folder, resume=True), *options, {}, {})


def _plotted(folder: Path) -> None:
    from dcafy.report.figures import epoch_plot

    log = read_epochs(folder)
    for lines in () if log is None else (log.contribution,):
        epoch_plot(log.epochs, lines, label="x", named="y")  # type: ignore[union-attr]


def _each(*acts: Callable[[], Any]) -> None:
    """Does all of them; what the first refuses is raised in the end."""
    refused: list[DcafyError] = []
    for act in acts:
        try:
            act()
        except DcafyError as error:  # noqa: PERF203 - the next one is looked at as well
            refused.append(error)
    if refused:
        raise refused[0]


def _odd_checkpoint(path: Path, seeds: Seeds, kind: str, rest: Any) -> None:
    """Other facts or tensors, with a digest that fits them."""
    held, said = load_file(path), seeds.header["facts"]
    if kind == "facts":
        said = changed(said, rest)
    else:
        for which, how in rest:
            key = list(held)[which % len(held)]
            value = held[key]
            others = [value.double(), value.reshape(-1)[:1], torch.zeros(0), value.float() * float("nan"), value.bool()]
            if how % 7 < 5:
                held[key] = others[how % 7].clone()
            elif how % 7 == 5:
                del held[key]
            else:
                held["optimizer/nobody/step"] = torch.zeros(())
    with contextlib.suppress(RecursionError, ValueError):
        header = {**seeds.header, "facts": said, "sha256": _sha256(held, said)}
        save_file({k: v.contiguous() for k, v in held.items()}, path, metadata={"dcafy": json.dumps(header)})


# --- files of options -----------------------------------------------------------------------------------------

_OPTIONS: dict[str, Any] = {
    **{"model": "timm:test_resnet", "data": "digits", "set": {"drop_rate": 0.25}, "attention": "se", "bs": 4},
    "training": {"epochs": 3, "lr": 1e-3, "precision": "no", "milestones": "1,2", "schedule": "multistep"},
    "images": {"image-size": 16, "augment": "trivial", "val_fraction": 0.5},
    "conversion": {"schema": "weighted", "topology": "chain", "reduction": 4},
    **{"compare": ["plain", "connected"], "seeds": 3, "keep": "best", "task": "classification", "recipe": None},
}

_TRIED = {"attention": "se", "image_size": 16, "batch_size": 4, "usage_images": 2, "cpu": True, "val_fraction": 0.5}

_YAML = [
    *(f"!!python/object/apply:os.system ['touch {MARKER}']", "!!python/name:os.system", "!!python/module:planted"),
    *(f"!!python/object/new:os.system [touch {MARKER}]", "!!python/tuple [1, 2]", "!planted", "!!set {a, b}", "!<x> 1"),
    *("!!binary aGk=", "!!timestamp 2001-01-01", "!!omap [a: 1]", "!!str 3", "!!int 'x'", "!!float 'x'", "!!bool x"),
    *("&a [*a]", "*a", "&a 1", "{<<: {epochs: 1}}", "{? [a] : b}", "{? {a: 1} : b}", "? x", "| x", ">-", "---", "..."),
    *("0x10", "0o7", "1_000", "190:20:30", "2001-01-01", "yes", "~", ".nan", ".inf", "-.inf", "1e999", "9" * 5000),
    *(
        "[" * 20_000,
        "{a: " * 5000,
        "- " * 3000,
        "'" + "x" * 60_000,
        '"\\ud800"',
        '"\\0"',
        '"\\e[31m"',
        "\t",
        "%TAG ! x",
    ),
    *("%YAML 9.9", "\x85x", "\u2028x", "@", "`", "# x", "'a\n\n b'", "[1, 2", "a: b: c", "!!merge x", "=", "!!null x"),
    *(
        f"!!python/object:hostile.Seeds {{root: {MARKER}}}",
        f"!!python/apply:builtins.eval [{RUNS!r}]",
        "{__class__: 1}",
    ),
]
"""What YAML can say, in the place of a value or on a line of its own."""

_ENCODINGS = ("utf-16", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "cp1252", "utf-7")

CONFIGS = st.one_of(
    st.tuples(st.just("options"), PLACE, CHANGES),
    st.tuples(st.just("options"), PLACE, CHANGES),
    st.tuples(st.just("request"), PLACE, CHANGES),
    st.tuples(
        st.just("yaml"), PLACE, st.lists(st.tuples(PLACE, st.sampled_from(_YAML) | TEXT), min_size=1, max_size=4)
    ),
    st.tuples(st.just("bytes"), PLACE, EDITS),
    st.tuples(st.just("files"), PLACE, PLACE),
    st.tuples(st.just("tried"), PLACE, st.lists(st.tuples(PLACE, PLACE), min_size=1, max_size=3)),
    st.tuples(st.just("tried"), PLACE, st.lists(st.tuples(PLACE, PLACE), min_size=1, max_size=3)),
)

# Not between 200 and 100,000: images of 1,000 px are more work because they are asked for, and no fault.
_WHOLE = [0, 1, 2, 3, 7, 63, 200, 10**5, 10**7, 2**31, 2**32, 2**53, 2**63 - 1]
_REAL = [0, 1, 0.5, 1e-30, 1e-320, 1.0000001, 7.3, 1e6, 1e30, 1e308, 0.999999999999, 1e-9]
_OF_A_KIND: dict[str, list[Any]] = {
    "int": _WHOLE, "int | None": [None, *_WHOLE], "float": _REAL, "float | None": [None, *_REAL], "bool": [True, False]
}  # fmt: skip
_FIELDS = [item for kind in (TrainingConfig, DataOptions, Conversion) for item in dataclasses.fields(kind)]


def _as_it_should_be(which: int, value: int) -> tuple[str, Any]:
    """An option and a value of its kind, however unwise."""
    item = _FIELDS[which % len(_FIELDS)]
    choices = item.metadata["choices"] or CHOICES.get(item.name) or _OF_A_KIND.get(str(item.type)) or NASTY
    return item.name, [*choices][value % len(choices)]


def config(seeds: Seeds, place: Path, plan: Any) -> None:
    """A file of ``--config``: what it asks for is written as a run's request, and read again; or it is tried."""
    kind, which, rest = plan
    file = place / "run.yaml"
    lines = [f"{key}: {json.dumps(value)}" for key, value in _OPTIONS.items()]
    if kind == "options":
        document = changed(_OPTIONS, rest)
        put(file, written(document) if which % 2 else _as_yaml(document))
    elif kind == "request":
        put(file, written(changed(seeds.documents["request"], rest)))
    elif kind == "yaml":
        for where, value in rest:
            number = where % len(lines)
            name = lines[number].partition(":")[0]
            lines[number] = [f"{name}: {value}", value, f"{value}: 1", f"training: {{{name}: {value}}}"][where % 4]
        text = "\n".join(lines)
        encoding = _ENCODINGS[which % len(_ENCODINGS)] if which % 5 == 0 else "utf-8"
        errors = "surrogatepass" if encoding.startswith("utf") and encoding != "utf-7" else "replace"
        put(file, text.encode(encoding, errors))
    elif kind == "tried":
        put(file, written({**_TRIED, **dict(_as_it_should_be(*one) for one in rest)}))
    elif kind == "bytes":
        put(file, edited(written(_OPTIONS) if which % 2 else "\n".join(lines).encode(), rest))
    else:
        file.write_text("\n".join(lines))
        _odd_file(file, rest, seeds)
    if kind == "tried" or which % 8 == 3:  # what stands in the file beside these comes to be used
        images = f"imagefolder:{seeds.root / 'labelled'}"
        tried = ("timm:test_resnet", "--data", images, "--config", str(file), "--dry-run", "--cpu")
        arguments(seeds, place, ("finetune", *tried))
        return
    options = TrainingConfig(), DataOptions(), Conversion(), FileOptions()
    request = request_of(completed(Asked("", {}, RunOptions(config=file, output=place / "run"), *options, {}, {})))
    write_request(place / "run", request)
    if read_request(place / "run") != request:
        raise AssertionError("a run would go on with other options than it began with")


def _as_yaml(document: Any) -> bytes:
    """A line for each option, its value as JSON, which YAML reads as well."""
    if not isinstance(document, dict):
        return written(document)
    return b"\n".join(written(key) + b": " + written(value) for key, value in document.items())


# --- COCO ---------------------------------------------------------------------------------------------------

COCO = st.one_of(
    *[st.tuples(st.just("document"), CHANGES)] * 4,
    st.tuples(st.just("outlines"), st.lists(VALUES | st.lists(st.floats() | st.integers(), max_size=9), min_size=1)),
    st.tuples(st.just("counts"), st.lists(st.integers(-5, 2000) | st.integers(), max_size=9) | st.text(max_size=20)),
    st.tuples(st.just("bytes"), EDITS),
    st.tuples(st.just("files"), PLACE),
)


def coco(seeds: Seeds, place: Path, plan: Any) -> None:
    """Annotations, opened, and every picture read with its boxes and masks."""
    kind, rest = plan
    file, document = place / "a.json", copy.deepcopy(seeds.documents["coco"])
    if kind == "outlines":
        for row, value in zip(document["annotations"], itertools.cycle(rest), strict=False):
            row["segmentation"] = [_nested(value)] if row["id"] % 2 else _nested(value)
    elif kind == "counts":
        for row in document["annotations"]:
            row["segmentation"] = {"size": [30, 40], "counts": rest}
    elif kind == "document":
        document = changed(document, rest)
    content = written(document)
    put(file, edited(content, rest) if kind == "bytes" else content)
    if kind == "files":
        _odd_file(file, rest, seeds)
    from dcafy.detection.task import Boxes

    data = open_coco(f"coco:{seeds.root / 'pictures'}:{file}", DataOptions(val_fraction=0.5))
    _require_lines(data.amiss)
    for part in (data.train, data.val):
        for part.masks in (False, True):
            _each(*(functools.partial(_seen, Seeded(part, seed=0, transform=Boxes("standard")), n) for n in range(4)))


def _seen(shown: Any, index: int) -> None:
    if index < len(shown):
        _require_lines(shown[(0, index)].unreadable)


def _require_lines(said: Any) -> None:
    for text in said:
        if not text.isprintable() or len(text) > 1000:
            raise AssertionError(f"not a line of text: {text[:200]!a}")


# --- pictures -----------------------------------------------------------------------------------------------

NAMES = [
    *("a.png", "<script>alert(1)<script>.png", "a\nb.jpg", "\udcff\udcfe.png", "\u202egpj.png", "=cmd|x.png"),
    *("'\"&<>.png", "a\x1b[31m.gif", " .png", "..png", "é.webp", "x" * 200 + ".png", "-rf.png", "a.eps", "b.TIF"),
]

PICTURES = st.lists(
    st.tuples(
        st.sampled_from(["bytes", "bytes", "bytes", "truncated", "whole", "bomb", "text", "odd", "link"]),
        PLACE,
        PLACE,
        EDITS,
    ),
    min_size=1,
    max_size=3,
)

_TEXTS = [
    *(b"", b"x", b"GIF89a", b"\xff\xd8\xff", b"<svg onload=alert(1)>", b"BM" + b"\xff" * 60, b"II*\0" + b"\xff" * 100),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%touch " + MARKER.encode() + b") run\n",
    *(b"P6 99999999 99999999 255\n", b"P6 0 0 255\n", b"P5 1 99999999 65535\n", b"P5 1 60000 255\n" + bytes(60_000)),
]
_SIDES = [1, 2, 200, 9000, 13_000, 30_000, 65_535, 2**31 - 1]


def pictures(seeds: Seeds, place: Path, plan: Any) -> None:
    """A folder of pictures, as a training and a report read it."""
    folder = place / "if"
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for number in range(2):
            put(folder / name / f"good{number}.png", seeds.images["PNG"])
    for kind, which, other, edits in plan:
        path = folder / "ab"[other % 2] / NAMES[(other // 2) % len(NAMES)]
        with contextlib.suppress(OSError, ValueError):  # names that this disk cannot have
            _odd_picture(seeds, path, kind, which, other, edits)
    how = Preparation((16, 16), 18, (0.5,) * 3, (0.5,) * 3)

    def report() -> None:
        found = read_pictures(folder, how, most=20)
        _require_lines([f"{row.name}: {row.reason}" for row in found.skipped])
        for image in found.shown:
            data_uri(sized(image))

    def training() -> None:
        data = open_data(f"imagefolder:{folder}", DataOptions(val_fraction=0.3))
        _require_lines(data.amiss)
        for part in (data.train, data.val):
            shown = Seeded(part, seed=0, transform=Prepared(how, "trivial"))
            for index in range(len(shown)):
                _require_lines(shown[(0, index)].unreadable)

    _each(report, training)


def _odd_picture(seeds: Seeds, path: Path, kind: str, which: int, other: int, edits: Any) -> None:
    content = list(seeds.images.values())[which % len(seeds.images)]
    if kind == "link":
        bait = str(seeds.root / "given.py")
        targets = [bait, path.name, "/dev/zero", "/dev/urandom", "..", "../..", "/", "/nowhere", "../b"]
        path.symlink_to(targets[which % len(targets)])
        return
    if kind == "odd":
        _odd_file(path, which, seeds)
        return
    ways: dict[str, Callable[[], bytes]] = {
        "bytes": lambda: edited(content, edits),
        "truncated": lambda: content[: other % len(content)],
        "whole": lambda: content,
        "bomb": lambda: _bomb(_SIDES[which % 8], _SIDES[other % 8], [1, 8, 16][which % 3], [0, 2, 6][other % 3]),
        "text": lambda: _TEXTS[which % len(_TEXTS)],
    }
    put(path, ways[kind]())


def _bomb(width: int, height: int, depth: int, colour: int) -> bytes:
    """A PNG that says it is that large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# --- arguments ----------------------------------------------------------------------------------------------

_SPECS = [
    *("timm:../../x", "torchvision:__import__", "torchvision:", "timm:", ":", "::", "a:b", "torchvision:resnet18@"),
    *("torchvision:resnet18@X", "torchvision:resnet18@__class__", "timm:local-dir:/etc", "TORCHVISION:resnet18", ""),
    *(" ", "\x1b[31m", "\u202e", "x" * 5000, "../..", "/", "/etc/passwd", "/dev/null", "/dev/zero", ".", "..", "~"),
    *("http://x/y.pt", "file:///etc/passwd", "weights.pt", "a.b.c:d.e.f", "1:2", "__main__:x", "os.path:join", "a\nb"),
    *(
        "hf://",
        "hf://me",
        "hf://../x",
        "hf://me/x@../..",
        "hf://me/x\n",
        "hf-hub:me/x",
        "timm/../x",
        "hf://" + "x" * 5000,
    ),
    *("torch:nn.Linear", "torch.nn:Module", "given:make.x", "given:__class__", "given:", "a\x00b", "x/" * 2500),
]
_SETS = [
    *("a", "=", "=1", "a=", "a=1", "a=[", "a={}", "1=1", "a b=1", "num_classes=-1", "num_classes=1e999", "self=1"),
    *("num_classes=" + "9" * 5000, "num_classes=" + "[" * 5000, "num_classes=" + "[" * 100 + "]" * 100, "a=NaN"),
    *('pretrained_cfg_overlay={"file":"/etc/passwd"}', "checkpoint_path=/etc/passwd", "__class__=1", "a=\x1b[31m"),
]
_SIZES = [
    *("0x0x0", "3x", "x" * 999, "9" * 4400 + "x1x1", "1x1x1", "-1x2x3", "1e3x1x1", "３x８x８", "3x99999999x99999999"),
    *("3x10x10", "3x10x10x10", "", "3X8X8", "\x00", "2147483648x2147483648x4", "3x8x8" + "x8" * 60),
]
_NUMBERS = ["-1", "nan", "inf", "-inf", "1e400", "x", "", "9" * 5000, "0x10", "1_0", "１", "\x1b[31m", "--", "1.5.2"]
_FOLDERS = [".", "/etc", "nowhere", "/dev/null", "x" * 300, "a\x00b", "/proc/x", "", "o", "a\nb", "x/" * 2500, "\ud800"]
_DATA = [
    *("x", "imagefolder:", "imagefolder:/etc", "imagefolder:" + "x" * 5000, "torchvision:MNIST:/nowhere", "coco:a"),
    *("torchvision:CIFAR10:/etc", "torchvision:ImageNet:/etc", "torchvision:__class__:x", "fashion-mnist:/etc"),
    *("fashion-mnist:/dev/null", "digits:x", "coco:/etc:/etc/passwd", "coco:/etc:/dev/zero", "a\x00b", "\x1b[31m:x"),
    *("torchvision:SVHN:/etc", "torchvision:GTSRB:/etc", "torchvision:Places365:/etc", "imagefolder:a\x00b"),
]
_TRAINING = [
    *("--epochs", "--batch-size", "--lr", "--ema", "--mixup", "--cutmix", "--clip-norm", "--workers", "--image-size"),
    *("--val-fraction", "--warmup-epochs", "--label-smoothing", "--usage-images", "--checkpoint-steps", "--momentum"),
]

SPEC = st.sampled_from(_SPECS) | TEXT.filter(lambda text: ":" not in text and not text.startswith("-"))

ARGUMENTS = st.one_of(
    st.tuples(st.just("inspect"), SPEC),
    st.tuples(st.just("inspect"), st.just("given:network"), st.just("--set"), st.sampled_from(_SETS) | TEXT),
    st.tuples(st.just("inspect"), st.just("given:network"), st.just("--input-size"), st.sampled_from(_SIZES) | TEXT),
    st.tuples(st.just("inspect"), st.just("state.pt"), st.just("--arch"), SPEC),
    st.tuples(st.just("convert"), st.just("given:network"), st.just("-o"), st.sampled_from(_FOLDERS) | TEXT,
              st.just("--input-size"), st.just("3x10x10")),
    st.tuples(st.just("convert"), SPEC, st.just("-o"), st.just("out"),
              st.sampled_from(["--schema", "--where", "--init"]), st.sampled_from(_NUMBERS) | TEXT),
    st.tuples(st.just("report"), st.just("given:network"), st.just("--images"), st.sampled_from(_FOLDERS) | TEXT,
              st.just("-o"), st.sampled_from(_FOLDERS) | TEXT),
    st.tuples(st.just("predict"), SPEC, st.sampled_from(_FOLDERS) | TEXT),
    st.tuples(st.just("predict"), st.just("given:network"), st.sampled_from(_FOLDERS) | TEXT, st.just("/nowhere")),
    st.tuples(st.just("evaluate"), st.just("given:network"), st.just("--data"), st.sampled_from(_DATA) | TEXT),
    st.tuples(st.just("export"), st.just("given:network"), st.just("-o"), st.sampled_from(_FOLDERS) | TEXT,
              st.just("--images"), st.sampled_from(_FOLDERS) | TEXT),
    st.tuples(st.just("list"), TEXT.filter(lambda text: "*" not in text and not text.startswith("-"))),
    st.tuples(st.just("finetune"), st.just("given:network"), st.just("--data"), st.sampled_from(_DATA) | TEXT,
              st.just("-o"), st.just("run")),
    st.tuples(st.just("finetune"), st.sampled_from(_FOLDERS) | TEXT, st.just("--resume")),
    st.tuples(st.just("finetune"), st.just("given:network"), st.just("--data"), st.just("x"), st.just("-o"),
              st.sampled_from(_FOLDERS) | TEXT, st.sampled_from(_TRAINING), st.sampled_from(_NUMBERS) | TEXT),
)  # fmt: skip

EXITS = (0, 2, 3, 4, 5, 6)


def arguments(seeds: Seeds, place: Path, plan: Any) -> None:
    """The command with these arguments, in an empty folder."""
    put(place / "state.pt", seeds.pickled["state"])
    os.chdir(place)
    sys.argv = ["dcafy", *plan]
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    code: Any = 0
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            main()
    except SystemExit as ended:
        code = ended.code or 0
    printed.flush()
    text = printed.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]
    if "Traceback" in text or code not in EXITS:
        lines = [line for line in text.splitlines() if line.strip()]
        raise AssertionError(f"exit {code}: {' | '.join(lines[-4:])[-400:]}")
    if code:
        errors = [line for line in text.splitlines() if line.startswith("dcafy: error: ")]
        raise DcafyError(errors[-1] if errors else "the usage")


# --- a trained network in use -------------------------------------------------------------------------------

_ASKED: dict[str, list[str]] = {
    "--top": _NUMBERS, "--threshold": _NUMBERS, "--batch-size": _NUMBERS, "--image-size": [*_NUMBERS, "9999999"],
    "--part": ["val", "train", "all", "x", ""], "--val-fraction": _NUMBERS, "--data": _DATA, "--against": _SPECS,
    "--cut": [""], "--csv": [""], "--json": [""], "--fixed": [""], "--images": _FOLDERS, "--output": _FOLDERS,
    "--text": [""], "--target": _NUMBERS, "--most": _NUMBERS, "--arch": _SPECS, "--prefix": _NUMBERS,
    "--set": _SETS, "--attention": ["se", "x", "", "\x1b[31m", "(", "a" * 5000],
}  # fmt: skip
"""Option -> what may stand behind it; an option that a command does not have is a mistake, too."""

USES = st.tuples(
    st.sampled_from(["predict"] * 3 + ["evaluate"] * 3 + ["report"] * 2 + ["inspect", "export", "list"]),
    st.one_of(
        st.tuples(st.just("about"), CHANGES),
        st.tuples(st.just("document"), CHANGES),
        st.tuples(st.just("tensors"), st.lists(st.tuples(PLACE, PLACE), min_size=1, max_size=2)),
        st.tuples(st.just("pictures"), PICTURES),
        st.tuples(st.just("pictures"), PICTURES),
        st.tuples(st.just("options"), st.lists(st.tuples(st.sampled_from([*_ASKED]), PLACE), min_size=1, max_size=2)),
        st.tuples(st.just("options"), st.lists(st.tuples(st.sampled_from([*_ASKED]), PLACE), min_size=1, max_size=2)),
        st.tuples(st.just("names"), SPEC),
    ),
)


def use(seeds: Seeds, place: Path, plan: Any) -> None:
    """A command that uses a trained folder: on a stranger's folder, on odd pictures, with odd options and names."""
    command, (kind, rest) = plan
    folder, images = place / "used", place / "if"
    shutil.copytree(seeds.folders["used"], folder)
    for name in "ab":
        (images / name).mkdir(parents=True)
        for number in range(2):
            put(images / name / f"good{number}.png", seeds.images["PNG"])
    document, options, named = seeds.documents["used"], list[str](), str(folder)
    if kind == "about":
        document = {**document, "about": changed(document["about"], rest)}
    elif kind == "document":
        document = changed(document, rest)
    elif kind == "pictures":
        for how, which, other, edits in rest:
            path = images / "ab"[other % 2] / NAMES[(other // 2) % len(NAMES)]
            with contextlib.suppress(OSError, ValueError):  # names that this disk cannot have
                _odd_picture(seeds, path, how, which, other, edits)
    elif kind == "options":
        for option, which in rest:
            given = _ASKED[option][which % len(_ASKED[option])]
            options += [option] if _ASKED[option] == [""] else [f"{option}={given}"]
    elif kind == "names":
        named = rest
    put(folder / "dcafy.json", written(document))
    if kind == "tensors":
        _consistent(folder, folder / "model.safetensors", document, rest)
    if command == "list":
        named = kind if kind != "names" else rest
        with contextlib.suppress(DcafyError):
            named = specs_that_match(named)[0]  # of a glob that matches many, one
    commands = {
        "predict": ("predict", named, str(images), "--cpu"),
        "evaluate": (
            "evaluate",
            named,
            "--cpu",
            "--val-fraction=0.5",
            *(() if kind == "about" else ("--data", f"imagefolder:{images}")),
        ),
        "report": ("report", named, "--images", str(images), "--text"),
        "inspect": ("inspect", named),
        "export": ("export", named, "-o", str(place / "x.pt2"), "--images", str(images), "--fixed"),
        "list": ("list", named),
    }
    arguments(seeds, place, (*commands[command], *options))


# --- all of them --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A kind of input: what may be drawn, what is done with it, and how many of a hundred inputs are of it.

    ``whole``: plans that change nothing, so that what they give is taken; if it is not, the others prove nothing.
    """

    plans: st.SearchStrategy[Any]
    act: Callable[[Seeds, Path, Any], None]
    share: int
    whole: tuple[Any, ...]


PARTS = {
    "pt": Part(PICKLES, pt, 18, (("bytes", 0, []), ("records", 1, []), ("network", 1, []), ("weights", 1, []))),
    "safetensors": Part(SAFETENSORS, safetensors, 10, (("bytes", []), ("facts", []))),
    "folders": Part(FOLDERS, folders, 14, tuple(("document", which, []) for which in range(7))),
    "runs": Part(RUN_FILES, run_files, 14, (("request", []), ("log", []), ("facts", []), ("state", []))),
    "config": Part(CONFIGS, config, 8, (("options", 0, []), ("options", 3, []), ("yaml", 1, []), ("tried", 0, []))),
    "coco": Part(COCO, coco, 20, (("document", []), ("bytes", []))),
    "pictures": Part(PICTURES, pictures, 14, ([],)),
    "uses": Part(
        USES,
        use,
        12,
        tuple((command, ("pictures", [])) for command in ("predict", "evaluate", "report", "inspect", "export")),
    ),
    "arguments": Part(ARGUMENTS, arguments, 10, (("inspect", "given:network", "--input-size", "3x10x10"),)),
}
