"""Folders of pictures from strangers: what is no picture, too large, a link or a loop is named, and costs nothing."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from dcafy.errors import InputError, UsageError
from dcafy.images import pictures
from dcafy.images.data import IndexedImages, read_idx
from dcafy.images.options import DataOptions
from dcafy.images.order import Seeded, UnreadableImage
from dcafy.images.pictures import MOST_PIXELS, opened, pictures_in, size_of, with_channels
from dcafy.images.preparation import Preparation, Prepared
from dcafy.images.sources import open_data
from dcafy.report.pictures import read_pictures

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and links")

HOW = Preparation((16, 16), 18, (0.5,) * 3, (0.5,) * 3)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
DDS = b"DDS " + b"".join(n.to_bytes(4, "little") for n in (124, 0, 4, 4)) + bytes(56) + (32).to_bytes(4, "little")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of two pictures each, and a folder outside with one more."""
    for number, path in enumerate(("in/a/0", "in/a/1", "in/b/0", "in/b/1", "out/x", "out/deep/y")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (40 * number,) * 3).save(tmp_path / f"{path}.png")
    return tmp_path / "in"


def read(folder: Path, **options: Any) -> tuple[int, list[str]]:
    """How many pictures a training on the folder reads, and what it names."""
    data = open_data(f"imagefolder:{folder}", DataOptions(val_fraction=0.5, **options))
    count, named = 0, list(data.amiss)
    for part in (data.train, data.val):
        shown = Seeded(part, seed=0, transform=Prepared(HOW))
        for index in range(len(shown)):
            unreadable = shown[(0, index)].unreadable
            named += unreadable
            count += not unreadable
    return count, sorted(set(named))


def shown(folder: Path, **options: Any) -> tuple[int, list[str]]:
    """How many pictures a report on the folder shows, and what it names."""
    found = read_pictures(folder, HOW, most=64, **options)
    return len(found), [f"{row.name}: {row.reason}" for row in found.skipped]


def written(content: bytes) -> Callable[[Path], Any]:
    return lambda place: (place / "odd.png").write_bytes(content)


ODD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "PostScript": (written(POSTSCRIPT), "cannot identify"),
    "DDS": (written(DDS + bytes(300)), "cannot identify"),
    "text": (written(b"<svg onload=alert(1)>"), "cannot identify"),
    "nothing": (written(b""), "cannot identify"),
    "no head": (written(b"P6 99999999 99999999 255\n"), "pixels"),
    "a pipe": (lambda place: os.mkfifo(place / "odd.png"), "no regular file"),
    "a link to itself": (lambda place: (place / "odd.png").symlink_to("odd.png"), "symbolic links"),
    "a link to nothing": (lambda place: (place / "odd.png").symlink_to("nowhere"), "No such file"),
    "a device": (lambda place: (place / "odd.png").symlink_to("/dev/zero"), "leads out of"),
    "a file outside": (lambda place: (place / "odd.png").symlink_to("../../out/x.png"), "leads out of"),
    "a folder outside": (lambda place: (place / "odd").symlink_to("../../out"), "leads out of"),
    "the folder above": (lambda place: (place / "odd").symlink_to(".."), "a link to a folder around it"),
    "everything": (lambda place: (place / "odd").symlink_to("/"), "a link to a folder around it"),
    "a thin line": (lambda place: Image.new("1", (1, 3_000_000)).save(place / "odd.png"), "1 x 3000000 pixels"),
    "a thin short line": (lambda place: Image.new("1", (40_000, 3)).save(place / "odd.png"), "40000 x 3 pixels"),
    "many pixels": (
        lambda place: Image.new("1", (13000, 13000)).save(place / "odd.png"),
        "more pixels than the 89,478,485",
    ),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("look", [read, shown])
def test_what_is_no_picture_is_named_and_left_out(kind: str, look: Callable[..., Any], folder: Path) -> None:
    make, reason = ODD[kind]
    make(folder / "a")
    start = time.process_time()
    count, named = look(folder)
    assert time.process_time() - start < 3
    assert count == 4
    assert len(named) == 1
    assert "a/odd" in named[0]
    assert reason in named[0]
    assert named[0].isprintable()


@pytest.mark.parametrize("look", [read, shown])
def test_links_are_followed_where_they_may_be(look: Callable[..., Any], folder: Path) -> None:
    for name, target in (("x", "../../out"), ("odd.png", "../../out/x.png")):
        (folder / "a" / name).symlink_to(target)
    (folder / "b" / "inside.png").symlink_to("../a/0.png")
    assert look(folder)[0] == 5  # what stays inside is followed
    assert look(folder, follow_links=True) == (8, [])


@pytest.mark.parametrize("link", ["c", "train"])
def test_a_class_outside_is_no_class(link: str, folder: Path) -> None:
    """Without it the labels would be others."""
    shutil.copytree(folder, folder.parent / "other")
    if link == "train":
        shutil.copytree(folder.parent / "other", folder / "val")
    (folder / link).symlink_to(folder.parent / ("other" if link == "train" else "out"))
    with pytest.raises(InputError, match=f"in/{link}' is a link: .* --follow-links"):
        open_data(f"imagefolder:{folder}", DataOptions())
    assert open_data(f"imagefolder:{folder}", DataOptions(follow_links=True, val_fraction=0.5)).classes[:2] == (
        "a",
        "b",
    )


def test_links_among_many_folders_are_followed_once(folder: Path) -> None:
    """Ten folders, each with links to all others: without a memory that is millions of ways."""
    names = [f"f{number}" for number in range(10)]
    for name in names:
        (folder / "a" / name).mkdir()
        Image.new("L", (20, 20)).save(folder / "a" / name / "p.png")
    for name in names:
        for other in names:
            (folder / "a" / name / f"to_{other}").symlink_to(f"../{other}")
    start = time.process_time()
    count, named = read(folder)
    assert time.process_time() - start < 3
    assert count == 14
    assert named == []


def test_a_deep_folder_is_read_as_far_as_names_go(tmp_path: Path) -> None:
    places = [f"{tmp_path}{depth * '/a'}" for depth in range(1, 1500)]
    for place in places:
        os.mkdir(place)
    Image.new("L", (20, 20)).save(f"{places[-1]}/p.png")
    assert len(pictures_in(tmp_path, {".png"}, tmp_path).files) == 1
    os.unlink(f"{places[-1]}/p.png")
    for place in reversed(places):  # shutil.rmtree ends with Python's stack
        os.rmdir(place)


def test_the_order_is_by_folder_and_name(folder: Path) -> None:
    """A resumed run finds the same image under the same index."""
    for name in ("a/sub/0.png", "a/sub/b.png", "a/Z.JPG", "a/notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("L", (20, 20)).save(folder / name, "PNG")
    found = pictures_in(folder / "a", (".png", ".jpg"), None).files
    assert [os.path.relpath(path, folder) for path in found] == [
        *("a/0.png", "a/1.png", "a/Z.JPG"),
        *("a/sub/0.png", "a/sub/b.png"),
    ]


def test_strict_stops_at_a_folder_that_is_passed_over(folder: Path) -> None:
    (folder / "a" / "x").symlink_to("../../out")
    with pytest.raises(InputError, match=r"leads out of .* --strict was given"):
        open_data(f"imagefolder:{folder}", DataOptions(strict=True))


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800", "a\nb\x1b[31m"])
def test_folders_with_names_that_are_none(name: str, tmp_path: Path) -> None:
    for look in (lambda: open_data(f"imagefolder:{name}", DataOptions()), lambda: shown(tmp_path / name)):
        with pytest.raises(UsageError) as caught:
            look()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


# --- one file -------------------------------------------------------------------------------------------


def test_no_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow starts ``gs`` on PostScript. A torchvision data set opens its files itself."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\n: > {tmp_path}/started\necho 10.0\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = tmp_path / "photo.png"
    path.write_bytes(POSTSCRIPT)

    class Theirs:
        def __getitem__(self, index: int) -> Any:
            with Image.open(path) as image:
                return image.convert("RGB"), 0

    for attempt in (lambda: opened(path), lambda: IndexedImages(Theirs(), [0], [0])[0]):
        with pytest.raises(UnreadableImage):
            attempt()
        assert EpsImagePlugin.gs_binary is None, "Pillow is as it was"
    assert not (tmp_path / "started").exists()
    with pytest.raises(OSError, match=r"."):  # what is tested could have happened
        Theirs()[0]
    assert (tmp_path / "started").exists()


@pytest.mark.parametrize("error", [RuntimeError("a"), KeyError("b"), MemoryError(), ZeroDivisionError("\x1b[31m")])
def test_whatever_a_decoder_raises_is_told(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (20, 20)).save(tmp_path / "a\nb.png")

    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "load", broken)
    with pytest.raises(UnreadableImage, match=r"a\\nb\.png: .") as caught:
        opened(tmp_path / "a\nb.png")
    assert str(caught.value).isprintable()


def test_sizes_are_read_from_the_head_alone(folder: Path) -> None:
    assert size_of(folder / "a/0.png", folder) == (20, 20)
    content = (folder / "a/0.png").read_bytes()
    (folder / "a/0.png").write_bytes(content[:-20])
    assert size_of(folder / "a/0.png") == (20, 20)
    with pytest.raises(UnreadableImage, match="leads out of"):
        size_of(folder.parent / "out/x.png", folder)


@pytest.mark.parametrize(
    ("limit", "size"), [("MOST_PIXELS", (40, 11)), ("MOST_SIDE", (101, 2)), ("MOST_UNEQUAL", (2, 11))]
)
def test_every_limit_holds(limit: str, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, limit, {"MOST_PIXELS": 400, "MOST_SIDE": 100, "MOST_UNEQUAL": 5}[limit])
    Image.new("RGB", size).save(tmp_path / "large.png")
    Image.new("RGB", (20, 4)).save(tmp_path / "small.png")
    with pytest.raises(UnreadableImage, match=f"{size[0]} x {size[1]} pixels"):
        opened(tmp_path / "large.png")
    opened(tmp_path / "small.png")


@pytest.mark.parametrize(("dtype", "largest"), [(np.uint16, 65535), (np.int32, 255), (np.float32, 255)])
def test_deep_values_are_scaled_the_same_in_strips(dtype: Any, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, largest, (50, 3000)).astype(dtype)
    image = Image.fromarray(values)
    assert len(list(pictures._strips(Image.new("I", (3000, 1000))))) == 3
    whole = (values.astype(np.float64) * (255.0 / largest)).round().astype(np.uint8)
    assert np.array_equal(np.asarray(with_channels(image, 1)), whole)
    monkeypatch.setattr(pictures, "_strips", lambda image: (np.float64(row)[None] for row in np.asarray(image)))
    assert np.array_equal(np.asarray(with_channels(image, 1)), whole)


def test_values_that_are_no_numbers_are_black() -> None:
    image = Image.fromarray(np.full((4, 4), np.nan, np.float32))
    assert np.asarray(with_channels(image, 3)).max() == 0


def test_an_array_is_not_larger_than_it_says_and_than_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip
    import struct

    from dcafy.images import data

    path = tmp_path / "images"
    for rank, shape in ((1, (2**31,)), (3, (2**31, 2**31, 2**31)), (1, (9,))):
        head = struct.pack(f">HBB{rank}I", 0, 8, rank, *shape)
        path.write_bytes(gzip.compress(head + bytes(10)))
        with pytest.raises(InputError, match="no whole idx file"):
            read_idx(path)
    os.unlink(path)
    os.mkfifo(path)
    with pytest.raises(InputError, match="no regular file"):
        read_idx(path)
    assert data._LARGEST_ARRAY > 60_000 * 28 * 28


def test_a_picture_too_large_once_it_is_resized_is_named_and_counted_as_unreadable_ones_are() -> None:
    how = Preparation((8, 8), 6000, (0.5,) * 3, (0.5,) * 3)
    both = [(Image.new("RGB", size), 0) for size in ((30, 30), (3000, 30))]
    shown = Seeded(both, seed=0, transform=Prepared(how), counts_stand_ins=False)
    assert shown[(0, 0)].unreadable == ()
    stand_in = shown[(0, 1)]
    assert stand_in.label == -1
    assert stand_in.unreadable == (
        f"image 1: it has 3000 x 30 pixels, and as large as the network wants it more than {MOST_PIXELS:,}",
    )
    with pytest.raises(InputError, match="None of the 1 images can be read; the first: image 0: it has 3000 x 30"):
        Seeded(both[1:], seed=0, transform=Prepared(how))[(0, 0)]
