"""Makes the screenshots in this folder: what dcafy looks like today.

    pip install 'dcafy[dev,docs]' && python docs/screenshots.py [NAME ...] [--run FOLDER]

Each picture is made anew by the program itself: a small network is fine-tuned on digits with and without connections
(some minutes on a CPU; ``--run`` takes the folder of such a comparison that is there already), and its report is
opened in Chromium. Commands run in a terminal of the size that is shown, cells in a kernel; Chromium shows what they
gave. Nothing is downloaded. A row of ``PICTURES`` is what there is to make.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).resolve().parent

LARGEST = 140_000
"""Bytes that a picture may have: they are kept in the repository, and all together are to stay under 1 MB."""

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


def environment() -> dict[str, str]:
    """That of programs that are to find this checkout."""
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}


def dcafy(*arguments: str, within: Path) -> None:
    """Runs the command; its errors end the script."""
    subprocess.run([sys.executable, "-m", "dcafy", *arguments], cwd=within, check=True, env=environment())


@contextlib.contextmanager
def opened(page: str, **options: Any) -> Iterator[Any]:
    """The page at this address in Chromium."""
    from playwright.sync_api import sync_playwright

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as started:
        # In a container Chromium's own sandbox may not be had.
        chromium = started.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        shown = chromium.new_page(**options)
        shown.goto(page)
        yield shown
        chromium.close()


def report(made: Made, target: Path, *, width: int, height: int, scheme: str) -> None:
    """The first ``height`` pixels of the report on a screen of that width."""
    with opened(made.report.as_uri(), viewport={"width": width, "height": height}, color_scheme=scheme) as page:
        page.screenshot(path=target)


# -- a terminal ------------------------------------------------------------------------------------------


def terminal(made: Made, target: Path, command: str, *, columns: int, lines: int) -> None:
    """What a terminal of this size shows when the command has ended."""
    from rich.console import Console
    from rich.text import Text

    printed = in_terminal(shlex.split(command), made.run.parent, columns, lines)
    screen = ["$ " + command, *printed.replace("\r\n", "\n").rstrip().split("\n"), "", "$ \u2588"][-lines:]
    console = Console(record=True, file=io.StringIO(), width=columns, color_system="truecolor", force_terminal=True)
    console.print(Text.from_ansi("\n".join(screen + [""] * (lines - len(screen)))))
    body = console.export_html(inline_styles=True, code_format="{code}")
    photographed(f'<pre style="width: {columns}ch">{body}</pre>', target, TERMINAL, 1600)


def in_terminal(command: list[str], within: Path, columns: int, lines: int) -> str:
    """What a command writes into a terminal of this size; an error of it ends the script."""
    import fcntl
    import pty
    import struct
    import termios

    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    around = {name: value for name, value in environment().items() if name != "COLUMNS"} | {"TERM": "xterm-256color"}
    started = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=within, env=around, stdin=its, stdout=its, stderr=its
    )  # fmt: skip
    os.close(its)
    written = b""
    with contextlib.suppress(OSError):  # how the end of a terminal is told
        while part := os.read(ours, 65536):
            written += part
    os.close(ours)
    if started.wait():
        raise SystemExit(f"{shlex.join(command)}:\n{written.decode()}")
    return written.decode()


# -- a notebook ------------------------------------------------------------------------------------------

BEFORE = """
import dcafy, dcafy.analysis, timm, torch
from PIL import Image
from sklearn.datasets import load_digits

model = dcafy.load("RUN").eval()
digits, prepared = load_digits(), dcafy.transforms(model)
pictures = [Image.fromarray((15 * image).astype("uint8")).convert("RGB") for image in digits.images[-359:]]
images, labels = torch.stack([prepared(one) for one in pictures]), torch.tensor(digits.target[-359:])
"""
"""What the cells that are shown build on."""


def notebook(made: Made, target: Path, *cells: str) -> None:
    """Cells and what a notebook shows of their results, after they were executed in a kernel."""
    import nbformat
    from nbclient import NotebookClient

    os.environ.update(environment())
    sources = [BEFORE.replace("RUN", made.run.name), *cells]
    executed = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    where = {"metadata": {"path": str(made.run.parent)}}
    NotebookClient(executed, timeout=600, kernel_name="python3", resources=where).execute()
    body = ""
    for number, cell in enumerate(executed.cells[1:], 1):
        body += f'<div class="in"><b>[{number}]</b><pre>{escape(cell.source)}</pre></div>'
        for output in cell.outputs:
            data = output.get("data", {})
            body += f'<div class="out">{data.get("text/html") or escape(data.get("text/plain", ""))}</div>'
    photographed(body, target, NOTEBOOK, 940)


def photographed(body: str, target: Path, style: str, width: int) -> None:
    """These elements, on a page of that width, as a picture as large as they are."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(f'<meta charset="utf-8"><style>{style}</style><main>{body}</main>', encoding="utf-8")
        with opened(page.as_uri(), viewport={"width": width, "height": 600}, color_scheme="light") as shown:
            shown.locator("main").screenshot(path=target)


TERMINAL = """
main { display: inline-block; padding: 10px 14px; background: #1d1f21; color: #dcdcdc }
pre { margin: 0; font: 14px/1.25 "DejaVu Sans Mono", monospace }
"""
NOTEBOOK = """
main { padding: 10px 16px; background: #fff; font: 14px/1.45 system-ui, sans-serif }
.in { display: flex; gap: 10px; margin-top: 8px } .in b { color: #307fc1; font: 13px monospace; padding-top: 7px }
.in pre { flex: 1; margin: 0; padding: 6px 10px; background: #f5f5f5; border: 1px solid #e0e0e0; font-size: 13px }
.out { margin: 6px 0 14px 34px } table { border-collapse: collapse; font-size: 12.5px } th, td { padding: 3px 8px }
tbody tr:nth-child(odd) { background: #f5f5f5 } thead { border-bottom: 1px solid #bdbdbd }
"""
"""Styles as a terminal and Jupyter have them."""


PICTURES: dict[str, Callable[[Made, Path], None]] = {
    "report": functools.partial(report, width=960, height=1240, scheme="light"),
    **{
        f"report-{width}-{scheme}": functools.partial(report, width=width, height=height, scheme=scheme)
        for width, height in ((375, 2900), (1280, 2300))
        for scheme in ("light", "dark")
    },
    "terminal-80": functools.partial(terminal, command="dcafy inspect timm:ese_vovnet19b_dw", columns=80, lines=24),
    "terminal-140": functools.partial(terminal, command="dcafy inspect digits", columns=140, lines=40),
    "notebook-plan": lambda made, target: notebook(
        made, target, 'dcafy.inspect(timm.create_model("mobilenetv3_small_050"))', "dcafy.connections(model)"
    ),
    "notebook-usage": lambda made, target: notebook(
        made, target, "dcafy.usage(model, [(images, labels)])", "dcafy.summary(model)"
    ),
    "notebook-looks": lambda made, target: notebook(
        made, target, "dcafy.analysis.attention_values(model, images)", "dcafy.analysis.grad_cam(model, images[:2])"
    ),
}
"""Name of a picture -> what makes it."""


def small(picture: Path) -> None:
    """Makes a PNG as small as it can be without a visible loss: text and plots have few colours."""
    with Image.open(picture) as image:
        shown = image.convert("RGB")
    for colours in (64, 32, 16):
        few = shown.quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
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
