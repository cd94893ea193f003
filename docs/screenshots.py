"""Makes the screenshots in this folder: what dcafy looks like today.

    pip install 'dcafy[dev]' && python docs/screenshots.py [NAME ...] [--run FOLDER]

Each picture is made anew by the program itself: a small network is fine-tuned on digits with and without connections
(some minutes on a CPU; ``--run`` takes the folder of such a comparison that is there already), and its report is
opened in Chromium. Nothing is downloaded. A row of ``PICTURES`` is what there is to make.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent

LARGEST = 250_000
"""Bytes that a picture may have: they are kept in the repository."""

COMPARISON = (
    "finetune", "timm:mobilenetv3_small_050", "--data", "digits", "--image-size", "32", "--compare", "--seeds", "3",
    "--epochs", "8", "--lr", "0.002",
)  # fmt: skip


@dataclass
class Made:
    """What pictures are made of, each made once and only where it is asked for."""

    folder: Path
    given: Path | None = None

    @functools.cached_property
    def run(self) -> Path:
        """A comparison: networks fine-tuned on digits, and what was measured."""
        if self.given is not None:
            return self.given.resolve()
        run = self.folder / "digits"
        dcafy(*COMPARISON, "-o", run.name, within=self.folder)
        return run

    @functools.cached_property
    def report(self) -> Path:
        """The report of the comparison."""
        page = self.folder / "report.html"
        dcafy("report", self.run.name, "-o", str(page), within=self.run.parent)
        return page


def dcafy(*arguments: str, within: Path) -> None:
    """Runs the command; its errors end the script."""
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "dcafy", *arguments]
    subprocess.run(command, cwd=within, check=True, env={**os.environ, "PYTHONPATH": path})


def report(made: Made, target: Path, *, width: int, height: int, scheme: str) -> None:
    """The first ``height`` pixels of the report on a screen of that width."""
    from playwright.sync_api import sync_playwright

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as started:
        # In a container Chromium's own sandbox may not be had.
        opened = started.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = opened.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.goto(made.report.as_uri())
        page.screenshot(path=target)
        opened.close()


PICTURES: dict[str, Callable[[Made, Path], None]] = {
    "report": functools.partial(report, width=960, height=1240, scheme="light"),
    **{
        f"report-{width}-{scheme}": functools.partial(report, width=width, height=height, scheme=scheme)
        for width, height in ((375, 2900), (1280, 2300))
        for scheme in ("light", "dark")
    },
}
"""Name of a picture -> what makes it."""


def small(picture: Path) -> None:
    """Makes a PNG as small as it can be without a visible loss: text and plots have few colours."""
    with Image.open(picture) as image:
        shown = image.convert("RGB")
    for colours in (None, 256, 128, 64):
        few = (
            shown if colours is None else shown.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        )
        few.save(picture, optimize=True)
        if picture.stat().st_size <= LARGEST:
            return
    raise SystemExit(f"{picture}: {picture.stat().st_size:,} bytes are more than {LARGEST:,}. Show less of it.")


@contextlib.contextmanager
def somewhere() -> Iterator[Path]:
    """A folder for what comes in between."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main() -> None:
    """Makes the pictures that are named, all of them by default."""
    parser = argparse.ArgumentParser(description="Makes the screenshots of the documentation.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones (default: all): {', '.join(PICTURES)}")
    parser.add_argument("--run", type=Path, help="the folder of a comparison, in the place of a new one")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in PICTURES]
    if unknown:
        parser.error(f"there is no picture {unknown[0]!r}. There are: {', '.join(PICTURES)}")
    with somewhere() as folder:
        made = Made(folder, options.run)
        for name in options.names or PICTURES:
            picture = HERE / f"{name}.png"
            PICTURES[name](made, picture)
            small(picture)
            print(f"{picture.name}: {picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
