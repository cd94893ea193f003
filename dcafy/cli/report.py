"""``dcafy report``: what the attention of a network does on somebody's images, on one page."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcafy.cli.app import command
from dcafy.cli.configured import with_options
from dcafy.cli.help import is_quiet
from dcafy.cli.options import Model, Settings, settings_given
from dcafy.errors import UsageError
from dcafy.plan.options import check, setting
from dcafy.sources.options import FileOptions
from dcafy.wording import counted, printable, require_extra

if TYPE_CHECKING:
    from torch import nn

    from dcafy.images.options import DataOptions
    from dcafy.report import Findings
    from dcafy.sources import Source


@dataclass(frozen=True)
class ReportOptions:
    """What is looked at, and what becomes of it."""

    images: Path | None = setting(
        None,
        "A folder of images to look at; in a folder of a class's name they are of that class. [default: labelled "
        "images of --data]",
        metavar="FOLDER",
    )
    output: Path | None = setting(None, "The page to write. [default: report.html]", metavar="FILE", short="-o")
    against: str | None = setting(
        None,
        "The network to compare with. [default: the original of a comparison, else MODEL without its connections]",
        metavar="ORIGINAL",
    )
    target: str | None = setting(
        None,
        "The class whose evidence is shown, by its name or its number. [default: the predicted one]",
        metavar="CLASS",
    )
    data: str | None = setting(
        None,
        "Labelled images on which networks are measured and each connection is cut, as for dcafy finetune --data. "
        "[default: without --images, what MODEL was trained on]",
        metavar="SPEC",
    )
    text: bool = setting(False, "Print the report; a page is written only with -o.")
    most: int = setting(64, "How many images are looked at; 8 are shown, changed and wrong predictions first.", least=1)
    follow_links: bool = setting(
        False, "Look also at what links in a folder of images lead to outside of it. [default: name and skip it]"
    )
    image_size: int | None = setting(None, "Side of the images in pixels. [default: the network's own]", least=1)

    def __post_init__(self) -> None:
        check(self)

    @property
    def page(self) -> Path | None:
        """The page to write, if any."""
        return self.output or (None if self.text else Path("report.html"))


@command("report", "dcafy report runs/flowers --images photographs")
@with_options
def report_command(model: Model, options: ReportOptions, file: FileOptions, settings: Settings = None) -> None:
    """Show what the attention of a network does on your images: one page, to look at and to send to somebody."""
    given = settings_given(settings)
    if options.page is not None:
        require_extra("The page of dcafy report", "report")
    with contextlib.redirect_stdout(sys.stderr), _progress() as told:
        findings = _made(model, options, file, given, told)
    if options.text:
        from rich.console import Console

        from dcafy.report import print_findings

        print_findings(findings, Console(highlight=False, width=None if sys.stdout.isatty() else 140))
    for row in findings.pictures.skipped:
        print(f"dcafy: left out {row.name}: {row.reason}", file=sys.stderr)
    if options.page is not None:
        print(f"{options.page}: {_described(findings)}, {options.page.stat().st_size / 1e6:.1f} MB.")


def _made(
    model: str, options: ReportOptions, file: FileOptions, settings: dict[str, Any], told: Callable[[str], None]
) -> Findings:
    """Opens what the command names, and makes the report of it."""
    told("opening the network")
    from dcafy.report import make_report, prepared_for, read_run
    from dcafy.runs.using import class_of, tell_random
    from dcafy.sources import open_model

    # --arch, --prefix and --ignore-head are about weights in a file, be they MODEL's or ORIGINAL's.
    files = [spec for spec in (model, options.against) if spec is not None and os.path.exists(spec)]
    unsaid = dataclasses.replace(file, arch=None, prefix=None, ignore_head=False)

    def opened(spec: str, **settings: Any) -> Source:
        whose = file if spec in files or (spec == model and not files) else unsaid
        found = open_model(spec, **settings, **dataclasses.asdict(whose))
        tell_random(found.model, spec)
        return found

    source = opened(model, settings=settings)
    run = read_run(Path(model))
    original = None if options.against is None else opened(options.against)
    versus = "original"
    if original is None and run.before and os.path.exists(os.path.join(model, run.place(run.before))):
        original = open_model(os.path.join(model, run.place(run.before)), **dataclasses.asdict(file))
        versus = "attention alone" if run.before == "attention" else versus
    data = _data(source.model, options)
    return make_report(
        source.model,
        options.images,
        options.page,
        title=model,
        against=None if original is None else original.model,
        versus=versus,
        target=None if options.target is None else class_of(source.model, options.target),
        how=prepared_for(source.model, (source.architecture if model in files else "") or model, options.image_size),
        most=options.most,
        epochs=run,
        data=data,
        options=_held_out(model, source.model, data, options),
        follow_links=options.follow_links,
        command=shlex.join(["dcafy", *sys.argv[1:]]),
        told=told,
    )


def _data(network: nn.Module, options: ReportOptions) -> str | None:
    """Labelled images: those that are named, else what the network was trained on where there are no other images."""
    from dcafy.images.about import known

    if options.data is not None or options.images is not None:
        return options.data
    about = known(network)
    trained = None if about is None else about.trained
    if trained is None:
        raise UsageError(
            "There are no images to look at. Name a folder of them, --images FOLDER, or labelled ones, --data DATA."
        )
    if not trained.opened_unasked or about is None or about.task != "classification":
        raise UsageError(
            f"It was trained on {printable(trained.data)}, which is not opened unasked. Name images: --images FOLDER, "
            f"or --data {printable(trained.data)} where a classifier can be measured on it."
        )
    return trained.data


def _held_out(model: str, network: nn.Module, data: str | None, options: ReportOptions) -> DataOptions:
    """How the images of ``data`` are read, and which of them are held out: as in the training on the same ones."""
    from dcafy.images.about import known
    from dcafy.images.options import DataOptions
    from dcafy.report import run_in

    run, about = run_in(model), known(network)
    found = run.images if run is not None else DataOptions()
    if run is None and about is not None and about.trained is not None and about.trained.data == data:
        found = dataclasses.replace(found, val_fraction=about.trained.val_fraction)
    return dataclasses.replace(found, follow_links=options.follow_links, download=False)


def _described(findings: Findings) -> str:
    blocks, images = len(findings.plan.blocks), counted(len(findings.pictures), "image")
    if not blocks and findings.handed:
        return f"{findings.handed[0]}, {images}"
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
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal or is_quiet()) as progress:
        task = progress.add_task("", total=None)
        yield lambda what: progress.update(task, description=what)
