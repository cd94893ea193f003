"""``dcafy finetune``: a network connected and trained on; it can be stopped at any moment and gone on with."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcafy.cli.app import command
from dcafy.cli.configured import given_options, with_options
from dcafy.cli.help import Command, is_quiet
from dcafy.cli.options import MODEL, Settings, settings_given
from dcafy.errors import UsageError
from dcafy.images.options import DataOptions
from dcafy.plan.options import Conversion, require_heeded
from dcafy.runs.options import ARMS, RunOptions
from dcafy.sources.options import FileOptions
from dcafy.training.options import TrainingConfig
from dcafy.wording import nearest, printable, quoted, require_extra

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dcafy.runs.asking import Asked
    from dcafy.runs.compare import Turn
    from dcafy.runs.request import Request
    from dcafy.runs.run import Subject
    from dcafy.training.telling import Listener
    from dcafy.training.trial import Trial


class _Comparing(Command):
    """A command whose ``--compare`` may have a value, several, or none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_with_arms(args)))


def _is_meant_as_arms(word: str) -> bool:
    """Whether a word behind ``--compare`` is no model: arms, or what is misspelt of one."""
    if word.startswith("-"):
        return False
    return word in ARMS or "," in word or (bool(nearest(word, ARMS)) and not os.path.exists(word))


def _with_arms(args: list[str]) -> Iterator[str]:
    """The arguments with one value behind each ``--compare``: the arms that stand there, or the usual two."""
    left = list(args)
    while left:
        argument = left.pop(0)
        if argument != "--compare":
            yield argument
            continue
        arms = []
        while left and _is_meant_as_arms(left[0]):
            arms.append(left.pop(0))
        yield f"--compare={','.join(arms) or 'original,connected'}"


@command(
    "finetune",
    "dcafy finetune torchvision:efficientnet_b0@DEFAULT \\\n    --data imagefolder:flowers --epochs 5 -o runs/flowers",
    cls=_Comparing,
)
@with_options
def finetune_command(
    context: typer.Context,
    run: RunOptions,
    training: TrainingConfig,
    images: DataOptions,
    conversion: Conversion,
    file: FileOptions,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL, show_default=False)] = "",
    settings: Settings = None,
) -> None:
    """Connect a network and train it on. Under torchrun it trains in several processes or on several machines."""
    given = given_options(context)
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as alone:
        from dcafy.runs.asking import Asked, request_of
        from dcafy.runs.configured import completed
        from dcafy.runs.request import REQUEST
        from dcafy.training.folder import alone_in
        from dcafy.training.parallel import is_main_process
        from dcafy.training.tracking import require_trackers

        options = model, settings_given(settings), run, training, images, conversion, file
        _put_back(Path(model) if run.output is None and model else run.output, run)
        asked = completed(Asked(*options, given, said=given)).in_its_folder()
        output = asked.run.output
        begins = asked.run.data is not None and bool(asked.model)  # else a folder without a run is none to lock
        locked = output is not None and os.path.isdir(output) and (begins or os.path.exists(output / REQUEST))
        if output is not None and is_main_process() and locked and not run.dry_run:
            alone.enter_context(alone_in(output))
        request = request_of(asked)
        require_heeded(request.conversion, given, dashes=True)
        _require_place(asked, request)
        require_extra("dcafy finetune", "train")
        if request.task == "detection":
            require_extra("dcafy finetune --task detection", "detection")
        require_trackers(run.trackers)
        parts = _tried(asked, request) if run.dry_run else _trained(asked, request)
    from dcafy.tables import shown

    print(shown(parts, terminal=sys.stdout.isatty()), end="")


def _put_back(folder: Path | None, run: RunOptions) -> None:
    """Puts back what a run that was killed before it began was to replace."""
    from dcafy.runs.place import put_back, was_broken_off
    from dcafy.training.folder import alone_in
    from dcafy.training.parallel import is_main_process

    if folder is None or run.dry_run or not is_main_process() or not was_broken_off(folder):
        return
    with alone_in(folder):
        put_back(folder)
    print(f"{printable(str(folder))} is as it was: the run that was to replace it had not begun.", file=sys.stderr)


def _require_place(asked: Asked, request: Request) -> None:
    """Nothing where the run may have its folder."""
    from dcafy.runs.place import require_place
    from dcafy.training.parallel import is_main_process

    output = asked.run.output
    if output is not None and is_main_process() and not asked.goes_on:
        # The other processes may not have read it yet.
        config = asked.run.config if os.environ.get("WORLD_SIZE", "1") != "1" else None
        uses = request.model, request.backbone, None if config is None else str(config)
        require_place(output, overwrite=asked.run.overwrite, uses=uses)


def _looked_over(asked: Asked, request: Request, arm: str) -> Subject:
    """What is trained; whatever is wrong with the network or the data shows here, before there is a run."""
    from dcafy.runs.run import require_arm, subject
    from dcafy.training.parallel import is_main_process

    for other in request.arms:
        require_arm(request, other)
    on = subject(request, seed=request.training.seed, arm=arm, file=asked.file)
    said = [item.name for item in dataclasses.fields(Conversion) if item.name in asked.given]
    if on.came_connected and said and not asked.goes_on:
        raise UsageError(
            f"{quoted(request.model, 200)} is connected already, so that --{said[0].replace('_', '-')} is of no use. "
            "Leave it out."
        )
    if is_main_process():
        amiss = on.data.amiss
        for text in amiss[:10]:
            print(printable(text), file=sys.stderr)
        if len(amiss) > 1:
            print(f"{len(amiss)} such places in all; --strict stops at the first.", file=sys.stderr)
    return on


def _tell(text: str) -> None:
    if not is_quiet():
        print(text, file=sys.stderr)


def _warn_of_random_weights(on: Subject, request: Request) -> None:
    """What the header tells; under --quiet there is none, and a warning is no progress."""
    from dcafy.runs.using import tell_random

    if is_quiet():
        tell_random(on.network, request.model)


def _tried(asked: Asked, request: Request) -> list[RenderableType]:
    """One batch through everything, of each arm; what that took, for the main process."""
    from dcafy.runs.header import header, in_words
    from dcafy.runs.run import trial
    from dcafy.training.parallel import finished, is_main_process

    trials: dict[str, Trial] = {}
    with contextlib.ExitStack() as ending:
        ending.callback(finished)
        for arm in request.arms or (request.arm,):
            on = _looked_over(asked, request, arm)
            if is_main_process() and not trials:
                _tell(header(request, on, None))
                _warn_of_random_weights(on, request)
            trials[arm] = trial(request, on)
    return in_words(trials, request) if is_main_process() else []


def _trained(asked: Asked, request: Request) -> list[RenderableType]:
    """Runs what was asked for; the summary, for the main process."""
    from dcafy.runs.header import header
    from dcafy.runs.place import in_place_of_another, let_go
    from dcafy.runs.request import REQUEST, read_request, write_request
    from dcafy.training.folder import alone_in
    from dcafy.training.parallel import finished, is_main_process
    from dcafy.training.telling import JsonLines

    output, log = asked.run.output, asked.run.json_log
    assert output is not None
    with contextlib.ExitStack() as alone:
        alone.callback(finished)
        if log is not None and is_main_process():
            JsonLines(log).require_writable()
        on = _looked_over(asked, request, (request.arms or (request.arm,))[-1])
        if is_main_process():
            alone.enter_context(alone_in(output))
            _require_place(asked, request)  # of whoever began there meanwhile
            before = read_request(output) if asked.goes_on and os.path.exists(output / REQUEST) else None
            _tell(header(request, on, output, trackers=asked.run.trackers, asked_before=before))
            if not asked.goes_on:
                _warn_of_random_weights(on, request)
                alone.enter_context(in_place_of_another(output))
            write_request(output, request)
        summary = _summary(asked, request, on, output)
        if is_main_process():
            let_go(output)
    return summary


def _summary(asked: Asked, request: Request, on: Subject, output: Path) -> list[RenderableType]:
    """The training, or all of a comparison; what came of it in words, for the main process."""
    from dcafy.runs.compare import compare
    from dcafy.runs.run import finish, train
    from dcafy.runs.summary import of_comparison, of_history
    from dcafy.training.bars import for_stderr
    from dcafy.training.parallel import is_main_process
    from dcafy.training.telling import JsonLines
    from dcafy.training.tracking import TRACKED, Tracked

    def listeners(turn: Turn | None = None) -> tuple[Listener, ...]:
        log, title = asked.run.json_log, "" if turn is None else turn.title
        logs: list[Listener] = [] if log is None else [JsonLines(log, steps=True, title=title)]
        if asked.run.trackers:
            own = "" if turn is None else turn.folder
            facts = {"model": request.model, "data": request.data, **dataclasses.asdict(request.conversion)}
            logs.append(Tracked(asked.run.trackers, output / TRACKED, own, facts))
        shown = () if is_quiet() else (for_stderr("" if turn is None else str(turn)),)
        return (*shown, *logs)

    if request.seeds:
        found = compare(request, output, file=asked.file, listener_for=listeners, is_main=is_main_process())
        return of_comparison(found) if is_main_process() else []
    seed = request.training.seed
    history = train(request, on, output, seed=seed, resume=asked.goes_on, listeners=listeners())
    if not is_main_process():
        return []
    finish(on, output)
    return of_history(history, output)
