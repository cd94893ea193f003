"""COCO documents from strangers: one clear error, or what is amiss is named and left out; C meets no wild outline."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dcafy.detection import CocoImages, open_coco
from dcafy.detection.outlines import _lengths, drawn, wrong
from dcafy.errors import DcafyError, InputError
from dcafy.images.data import Data
from dcafy.images.options import DataOptions
from dcafy.images.order import UnreadableImage

mask = pytest.importorskip("pycocotools.mask")

HEIGHT, WIDTH = 30, 40
GOOD: dict[str, Any] = {
    "images": [{"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in range(4)],
    "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    "annotations": [
        {"id": n, "image_id": n % 4, "category_id": 1 + n % 2, "bbox": [1, 2, 10, 12], "area": 120, "iscrowd": 0,
         "segmentation": [[1, 1, 5, 1, 5, 5]]}
        for n in range(8)
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        Image.new("RGB", (WIDTH, HEIGHT), (50 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


def opened(pictures: Path, document: Any, **options: Any) -> Data:
    file = pictures / "annotations.json"
    text = document if isinstance(document, str) else json.dumps(document)
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    return open_coco(f"coco:{pictures}:{file}", DataOptions(val_fraction=0.5, **options))


def is_a_line(said: object) -> bool:
    return str(said).isprintable() and len(str(said)) < 600


def read(data: Data) -> None:
    """Every picture with its boxes and its masks; one that cannot be read says so."""
    for part in (data.train, data.val):
        part.masks = True
        assert all(_is_whole(part, index) for index in range(len(part)))
    assert all(map(is_a_line, data.amiss))


def _is_whole(part: CocoImages, index: int) -> bool:
    try:
        _, target = part[index]
    except UnreadableImage as error:
        return is_a_line(error)
    fits = tuple(target["masks"].shape) == (len(target["boxes"]), HEIGHT, WIDTH)
    return fits and bool(torch.isfinite(target["boxes"]).all())


def is_refused(pictures: Path, document: Any) -> bool:
    """Whether the document is refused, in a line; where it is not, all that it holds can be read."""
    try:
        data = opened(pictures, document)
    except DcafyError as error:
        return isinstance(error, InputError) and is_a_line(error)
    read(data)
    return False


def changed(*path: Any, to: Any) -> dict[str, Any]:
    document = copy.deepcopy(GOOD)
    place = document
    for step in path[:-1]:
        place = place[step]
    if to is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return document


def deep(levels: int, value: Any = 1) -> Any:
    for _ in range(levels):
        value = [value]
    return value


# --- documents ------------------------------------------------------------------------------------------

HOSTILE = [
    *(None, True, 0, -1, 1.5, 2**31, 2**64, 10**30, 10**400, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "\x00", "\ud800", "\x1b[31m", "/etc/passwd", "x" * 5000, "1", [], {}, [[]], {"a": 1}, [1, 2, 3, 4]),
    *([None] * 4, ["a"] * 4, [1e308] * 4, [float("nan")] * 4, [10**400] * 4, deep(50), deep(900)),
]


@pytest.mark.parametrize("part", ["images", "categories", "annotations"])
@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:20])
def test_every_entry_may_be_anything(pictures: Path, part: str, value: Any) -> None:
    for path in [(part,), (part, 0), *((part, 1, name) for name in GOOD[part][0])]:
        is_refused(pictures, changed(*path, to=value))  # and nothing else happens


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (changed("categories", 0, "id", to="1"), r"categories\[0\].id should be a whole number of at least 0, not '1'"),
        (changed("categories", 0, "id", to=True), r"categories\[0\].id should be a whole number"),
        (changed("categories", 1, "id", to=1), r"categories\[1\] has the id 1, as another has"),
        (changed("categories", 0, "name", to=3), r"categories\[0\].name should be text, not 3"),
        (changed("images", 1, "id", to=0), r"images\[1\] has the id 0, as another has"),
        (changed("images", 1, "id", to=[0]), r"images\[1\].id should be a whole number or text, not \[0\]"),
        (changed("images", 1, "width", to="wide"), r"images\[1\].width should be a whole number of at least 1, not"),
        (changed("images", 1, "height", to=0), r"images\[1\].height should be a whole number of at least 1, not 0"),
        (changed("images", 1, "file_name", to=None), r"images\[1\].file_name should be text, not None"),
        (changed("annotations", 3, "image_id", to={}), r"annotations\[3\].image_id should be a whole number or text"),
        (changed("annotations", 3, "iscrowd", to="no"), r"annotations\[3\].iscrowd should be 0 or 1, not 'no'"),
        (changed("annotations", 3, "bbox", to=...), r"annotations\[3\] has no 'bbox'"),
        (changed("annotations", 3, to=deep(30)), r"annotations\[3\] should be an object, not \[\[\["),
        (changed("images", to={}), "images should be a list"),
        ("[" * 100_000, "it is no JSON object"),
        ('{"images":' + "[" * 100_000, "lists in lists without end"),
        ('{"a": ' + "1" * 5000 + "}", "no file of annotations"),
        ("\x00" * 100, "it is no JSON object"),
        ('{"images": "\ud800"', "no file of annotations"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(pictures: Path, document: Any, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        opened(pictures, document)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkfifo, "no file"),
        (os.mkdir, "no file"),
        (lambda path: os.symlink("/dev/zero", path), "no file"),
        (lambda path: [path.touch(), os.truncate(path, 2**35)], "no JSON object"),
    ],
)
def test_what_is_no_file_is_not_read(pictures: Path, make: Callable[[Path], Any], says: str, tmp_path: Path) -> None:
    make(tmp_path / "a.json")
    with pytest.raises(InputError, match=says):
        open_coco(f"coco:{pictures}:{tmp_path / 'a.json'}", DataOptions())


def test_documents_changed_at_random(pictures: Path) -> None:
    """A few hundred, as ``benchmarks/faults.py`` makes thousands."""
    draw = random.Random(0)
    refused = 0
    for _ in range(200):
        document = copy.deepcopy(GOOD)
        for _ in range(draw.choice([1, 1, 2, 3])):
            part = draw.choice(list(GOOD))
            row = draw.choice(document[part])
            row[draw.choice([*GOOD[part][0], "x"])] = draw.choice(HOSTILE)
        refused += is_refused(pictures, document)
    assert 40 < refused < 190


def test_names_of_files_stay_in_their_folder(pictures: Path, tmp_path: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "outside.png")
    for name in (str(tmp_path / "outside.png"), os.path.relpath(tmp_path / "outside.png", pictures)):
        document = changed("images", 0, "file_name", to=name)
        for sized in (
            document,
            {**document, "images": [{k: row[k] for k in ("id", "file_name")} for row in document["images"]]},
        ):
            data = opened(pictures, sized)
            found = [part[index] for part in (data.train, data.val) for index, one in enumerate(part.ids) if one]
            assert len(found) == 3
            (part, index) = next((p, p.ids.index(0)) for p in (data.train, data.val) if 0 in p.ids)
            with pytest.raises(UnreadableImage, match=r"leads out of .* --follow-links"):
                part[index]
        assert sum(len(part) for part in (data.train, data.val)) == 4
        data = opened(pictures, document, follow_links=True)
        read(data)
        part = next(p for p in (data.train, data.val) if 0 in p.ids)
        assert part[part.ids.index(0)][0].size == (WIDTH, HEIGHT)


def test_ids_may_be_text(pictures: Path) -> None:
    document = copy.deepcopy(GOOD)
    for row in document["images"]:
        row["id"] = f"i{row['id']}" if row["id"] else 0
    for row in document["annotations"]:
        row["image_id"] = f"i{row['image_id']}" if row["image_id"] else 0
    data = opened(pictures, document)
    read(data)
    assert data.amiss == ()
    assert sorted(map(str, [*data.train.ids, *data.val.ids])) == ["0", "i1", "i2", "i3"]


# --- outlines -------------------------------------------------------------------------------------------

OUTLINES: dict[str, tuple[Any, str]] = {
    "huge numbers": ([[0, 0, 1e308, 1e308, 5, 5]], "reaches far over the border"),
    "huge whole numbers": ([[0, 0, 10**400, 5, 5, 5]], "reaches far over the border"),
    "far away": ([[0, 0, 1e9, 0, 1e9, 1e9]], "reaches far over the border"),
    "no numbers": ([[float("nan")] * 6], "reaches far over the border"),
    "one that is no number": ([[1, 1, 5, 1, 5, float("nan")]], "reaches far over the border"),
    "text": ([["1", "1", "5", "1", "5", "5"]], "not a list of numbers"),
    "truth": ([[True, 1, 5, 1, 5, 5]], "not a list of numbers"),
    "two numbers": ([[1, 2]], "a polygon of 2 numbers"),
    "four numbers": ([[1, 2, 3, 4]], "a polygon of 4 numbers"),  # a box, to pycocotools
    "an odd number": ([[1, 1, 5, 1, 5, 5, 5]], "a polygon of 7 numbers"),
    "one that is empty": ([[1, 1, 5, 1, 5, 5], []], "a polygon of 0 numbers"),
    "flat": ([1, 1, 5, 1, 5, 5], "not a list of numbers"),
    "nested": ([[[1]]], "not a list of numbers"),
    "deeply nested": ([deep(900)], "not a list of numbers"),
    "without end": ([[0, 0, 40, 30] * 20_000], "pixels long"),
    "many without end": ([[0, 0, 40, 30] * 1000] * 20, "pixels long"),
    "a word": ("abc", "not polygons or runs"),
    "a number": (5, "not polygons or runs"),
    "runs of another size": ({"counts": [0, WIDTH * HEIGHT], "size": [WIDTH, HEIGHT]}, "for a size of"),
    "no size": ({"counts": [0, 1200]}, "for a size of None"),
    "a huge size": ({"counts": [0, 10**10], "size": [10**5, 10**5]}, "for a size of"),
    "too many runs": ({"counts": [0, 10**9], "size": [HEIGHT, WIDTH]}, "runs of 1000000000 pixels"),
    "too few runs": ({"counts": [5], "size": [HEIGHT, WIDTH]}, "runs of 5 pixels"),
    "negative runs": ({"counts": [-5, 1205], "size": [HEIGHT, WIDTH]}, "not a list of whole numbers"),
    "runs with a point": ({"counts": [0.0, 1200.0], "size": [HEIGHT, WIDTH]}, "not a list of whole numbers"),
    "no counts": ({"size": [HEIGHT, WIDTH]}, "not a list of whole numbers"),
    "text that says nothing": ({"counts": "0" * 50, "size": [HEIGHT, WIDTH]}, "runs of 0 pixels"),
    "text cut off": ({"counts": "PPYo", "size": [HEIGHT, WIDTH]}, "runs that are damaged"),
    "text of another alphabet": ({"counts": "\x00\ud800", "size": [HEIGHT, WIDTH]}, "runs that are damaged"),
    "text without end": ({"counts": "P" * 10_000, "size": [HEIGHT, WIDTH]}, "runs that are damaged"),
    "empty text": ({"counts": "", "size": [HEIGHT, WIDTH]}, "runs of 0 pixels"),
}


@pytest.mark.parametrize("name", OUTLINES)
def test_outlines_that_are_none_are_named_and_left_out(pictures: Path, name: str) -> None:
    outline, says = OUTLINES[name]
    data = opened(pictures, changed("annotations", 0, "segmentation", to=outline))
    (said,) = data.amiss
    assert "annotation 0 in 0.png: the outline" in said
    assert says in said
    assert said.endswith(": left out")
    assert said.isprintable()
    assert len(said) < 400
    assert (
        sum(len(data.train[n][1]["boxes"]) for n in range(len(data.train)))
        + sum(len(data.val[n][1]["boxes"]) for n in range(len(data.val)))
        == 8
    ), "the box stays"
    read(data)
    with pytest.raises(InputError, match="--strict was given"):
        opened(pictures, changed("annotations", 0, "segmentation", to=outline), strict=True)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
def test_runs_are_taken_as_pycocotools_writes_and_reads_them(height: int, width: int, seed: int, part: float) -> None:
    picture = (np.random.default_rng(seed).random((height, width)) < part).astype(np.uint8)
    text = mask.encode(np.asfortranarray(picture))["counts"].decode()
    flat = picture.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    counts = np.diff([0, *edges, flat.size]).tolist()
    assert _lengths(text) == counts
    for given_ in (text, counts):
        runs = {"size": [height, width], "counts": given_}
        assert wrong(runs, height, width) == ""
        assert np.array_equal(drawn([runs], height, width)[0].numpy(), picture)


@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12))
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
def test_runs_that_are_taken_fill_the_picture(text: str) -> None:
    runs = {"size": [4, 5], "counts": text}
    if not wrong(runs, 4, 5):
        assert drawn([runs], 4, 5).shape == (1, 4, 5)
        assert sum(_lengths(text)) == 20


def test_polygons_that_reach_a_little_over_the_border_are_taken() -> None:
    for polygon in ([-5, -5, 45, -5, 45, 35, -5, 35], [0, 0, 0, 0, 0, 0], [1, 1, 39.5, 1, 39.5, 29.5] * 50):
        assert wrong([polygon], HEIGHT, WIDTH) == ""
        assert drawn([[polygon]], HEIGHT, WIDTH).shape == (1, HEIGHT, WIDTH)
