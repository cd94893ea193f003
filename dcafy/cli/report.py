"""``dcafy report``: what the attention of a network does on somebody's images, on one page."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dcafy.cli.app import app
from dcafy.cli.configured import with_options
from dcafy.cli.options import Model, Settings, settings_given
from dcafy.sources.options import FileOptions
from dcafy.wording import counted, require_extra

if TYPE_CHECKING:
    from dcafy.report import Findings


@app.command("report")
@with_options
def report_command(
    model: Model,
    file: FileOptions,
    images: Annotated[
        Path, typer.Option("--images", metavar="FOLDER", help="A folder of images to look at.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The page to write.  [default: report.html]", show_default=False
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="ORIGINAL", help="The network to compare with.  [default: MODEL without its connections]"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS",
            help="The class whose evidence is shown, by its name or its number.  [default: the predicted one]",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help="Labelled images on which each connection is cut, as for dcafy finetune --data."
        ),
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Print the report; a page is written only with -o.")] = False,
    most: Annotated[int, typer.Option(min=1, help="How many images are looked at; the first 8 are shown.")] = 64,
    follow_links: Annotated[
        bool,
        typer.Option(
            "--follow-links",
            help="Look also at what links in a folder of images lead to outside of it.  [default: name and skip it]",
        ),
    ] = False,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images in pixels.  [default: the network's own]")
    ] = None,
    settings: Settings = None,
) -> None:
    """Show what the attention of a network does on your images: one page, to look at and to send to somebody."""
    given = settings_given(settings)
    page = output or (None if text else Path("report.html"))
    if page is not None:
        require_extra("The page of dcafy report", "report")
    with contextlib.redirect_stdout(sys.stderr), _progress() as told:
        told("opening the network")
        from dcafy.images.options import DataOptions
        from dcafy.report import make_report, prepared_for, read_epochs, run_in
        from dcafy.runs.using import class_of, tell_random
        from dcafy.sources import open_model

        # --arch, --prefix and --ignore-head are about weights in a file, be they MODEL's or ORIGINAL's.
        files = [spec for spec in (model, against) if spec is not None and os.path.exists(spec)]
        unsaid = dataclasses.replace(file, arch=None, prefix=None, ignore_head=False)
        whose = file if model in files or not files else unsaid
        source = open_model(model, settings=given, **dataclasses.asdict(whose))
        tell_random(source.model, model)
        other = None
        if against is not None:
            whose = file if against in files else unsaid
            other = open_model(against, **dataclasses.asdict(whose)).model
            tell_random(other, against)
        run = run_in(model)
        findings = make_report(
            source.model,
            images,
            page,
            title=model,
            against=other,
            target=None if target is None else class_of(source.model, target),
            how=prepared_for(source.model, (source.architecture if model in files else "") or model, image_size),
            most=most,
            epochs=read_epochs(Path(model)),
            data=data,
            options=dataclasses.replace(
                run.images if run is not None else DataOptions(), follow_links=follow_links, download=False
            ),
            follow_links=follow_links,
            command=shlex.join(["dcafy", *sys.argv[1:]]),
            told=told,
        )
    if text:
        from rich.console import Console

        from dcafy.report import print_findings

        print_findings(findings, Console(highlight=False, width=None if sys.stdout.isatty() else 140))
    for row in findings.pictures.skipped:
        print(f"dcafy: left out {row.name}: {row.reason}", file=sys.stderr)
    if page is not None:
        print(f"{page}: {_described(findings)}, {page.stat().st_size / 1e6:.1f} MB.")


def _described(findings: Findings) -> str:
    blocks, images = len(findings.plan.blocks), counted(len(findings.pictures), "image")
    if not blocks:
        return f"no attention blocks, so only numbers, {images}"
    return f"{counted(blocks, 'attention block')}, {counted(len(findings.contributions), 'connection')}, {images}"


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done, and for how long."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description:<28}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda what: progress.update(task, description=what)
