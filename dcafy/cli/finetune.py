"""``dcafy finetune``: a network connected and trained on; it can be stopped at any moment and gone on with."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dcafy import errors
from dcafy.cli.app import command
from dcafy.cli.configured import given_options, with_options
from dcafy.cli.help import Command, is_quiet
from dcafy.cli.options import Model, Settings, settings_given
from dcafy.images.options import DataOptions
from dcafy.plan.options import Conversion, Inserting
from dcafy.runs.options import ARMS, RunOptions, chosen
from dcafy.sources.options import FileOptions
from dcafy.training.options import TrainingConfig
from dcafy.wording import printable, quoted

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dcafy.runs.request import Request


class _Comparing(Command):
    """A command whose ``--compare`` may have a value, several, or none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_with_arms(args)))


def _with_arms(args: list[str]) -> Iterator[str]:
    """The arguments with one value behind each ``--compare``: the arms that stand there, or the usual two."""
    left = list(args)
    while left:
        argument = left.pop(0)
        if argument != "--compare":
            yield argument
            continue
        arms = []
        while left and (left[0] in ARMS or ("," in left[0] and not left[0].startswith("-"))):
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
    model: Model,
    run: RunOptions,
    training: TrainingConfig,
    images: DataOptions,
    conversion: Conversion,
    file: FileOptions,
    settings: Settings = None,
) -> None:
    """Connect a network and train it on. Under torchrun it trains in several processes or on several machines."""
    if run.resume and run.output is None:
        run, model = dataclasses.replace(run, output=Path(model)), ""
    if run.output is None:
        raise errors.UsageError("-o names no folder. Write -o runs/NAME: checkpoints, log and model go there.")
    given, output = given_options(context), run.output
    if "seeds" in given and not (run.arms or run.resume):
        raise errors.UsageError("--seeds says how many seeds are compared. Add --compare, or choose one with --seed.")
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as alone:
        from dcafy.runs.request import REQUEST, Request
        from dcafy.training.folder import alone_in
        from dcafy.training.parallel import is_main_process

        begins = run.data is not None and bool(model)  # else a folder without a run is none to lock
        if is_main_process() and os.path.isdir(output) and (begins or os.path.exists(output / REQUEST)):
            alone.enter_context(alone_in(output))
        if run.resume and os.path.exists(output / REQUEST):
            asked = _known(output, model, given)
        elif run.data is None or not model:
            raise errors.UsageError(
                f"There is no run in {quoted(str(output), 200)} to go on with."
                if run.resume
                else "--data names no images. Write --data imagefolder:PATH, or --data digits to try."
            )
        else:
            _require_some_use(run, given)
            found = chosen(run, training, images, conversion, given)
            if found.training.schedule == "multistep":
                found.training.falls_at  # noqa: B018 (says what is wrong with them)
            asked = Request(
                model,
                run.data,
                file.arch,
                settings_given(settings),
                found.conversion,
                found.images,
                found.training,
                run.seeds if run.arms else 0,
                found.task,
                "plain" if run.plain else "connected",
                run.arms,
                run.recipe,
                None if run.backbone is None else str(run.backbone),
                prefix=file.prefix,
                ignore_head=file.ignore_head,
                keep=run.keep,
            ).anchored()
            if is_main_process():
                _require_free(output)
        parts = _run(asked, output, run, file)
    from dcafy.tables import shown

    print(shown(parts, terminal=sys.stdout.isatty()), end="")


def _require_some_use(run: RunOptions, given: Mapping[str, Any]) -> None:
    """Nothing where every option of a conversion is of use to something that is trained."""
    trained = run.arms or (("plain",) if run.plain else ("connected",))
    options = {item.name for item in dataclasses.fields(Conversion)}
    inserting = {item.name for item in dataclasses.fields(Inserting)}
    useful = options if "connected" in trained else set() if trained == ("plain",) else inserting
    for name in given:
        if name in options - useful:
            what = (
                "--plain trains the network as it is" if run.plain else f"--compare {','.join(trained)} connects none"
            )
            more = "; --compare attention trains it with attention, unconnected" if name in inserting else ""
            raise errors.UsageError(f"{what}, so that --{name.replace('_', '-')} is of no use{more}. Leave it out.")


def _require_free(output: Path) -> None:
    """Nothing where a run may begin."""
    from dcafy.runs.request import REQUEST, require_empty

    if os.path.exists(output / REQUEST):
        raise errors.UsageError(
            f"There is a run in {quoted(str(output), 200)} already. Go on with it: dcafy finetune {output} "
            "--resume. Or name another folder."
        )
    require_empty(output)


def _known(output: Path, model: str, given: dict[str, Any]) -> Request:
    """The request of the run in ``output``, which the options on the command line may repeat but not change."""
    from dcafy.checkpoint.hub import is_address
    from dcafy.runs.request import read_request
    from dcafy.zoos.specs import runs_code

    asked = read_request(output)
    for spec in filter(None, (asked.model, asked.arch)):
        how = "is built by code" if runs_code(spec) else "comes from the Hub" if is_address(spec) else ""
        if how and spec not in (model, given.get("arch")):
            raise errors.UsageError(
                f"The network of this run {how}: {spec}. Name it, so that it is opened because you say so: "
                + (f"--arch {spec}." if spec == asked.arch else f"dcafy finetune {spec} -o {output} --resume")
            )
    if asked.images.follow_links and not given.get("follow_links"):
        raise errors.UsageError(
            "This run reads what links lead to outside of its folder of images. Say that it may: --follow-links."
        )
    again = dataclasses.replace(asked, model=model or asked.model, data=given.get("data") or asked.data).anchored()
    given = {**given, "model": again.model, "data": again.data}
    if "settings" in given:
        given["settings"] = settings_given(given["settings"])
    known = {
        **{
            name: getattr(asked, name)
            for name in ("model", "data", "task", "recipe", "backbone", "arch", "settings", *_PLACES)
        },
        "plain": asked.arm == "plain",
        "compare": ",".join(asked.arms) or None,
        "seeds": max(asked.seeds, 1),
        "keep": asked.keep,
        **dataclasses.asdict(asked.conversion),
        **dataclasses.asdict(asked.images),
        **dataclasses.asdict(asked.training),
    }
    if "backbone" in given:
        given["backbone"] = dataclasses.replace(asked, backbone=str(given["backbone"])).anchored().backbone
    if "compare" in given:
        given["compare"] = ",".join(RunOptions(compare=given["compare"]).arms)
    for name, value in given.items():
        if name in known and name not in (*_MAY_CHANGE, "download") and known[name] != value:
            raise errors.UsageError(
                f"The run in {quoted(str(output), 200)} was started {_as_given(name, known[name])}. Leave it out to "
                "go on with it, or start another run."
            )
    changed = {name: given[name] for name in _MAY_CHANGE if name in given}
    images = dataclasses.replace(asked.images, download=given.get("download", False))  # no file chooses to fetch
    return dataclasses.replace(asked, images=images, training=dataclasses.replace(asked.training, **changed))


_PLACES = ("prefix", "ignore_head")
"""Options that say where among the weights in a file the network is."""

_MAY_CHANGE = ("workers", "cpu", "checkpoint_steps")
"""Options of a training that do not change what it computes."""


def _as_given(name: str, value: Any) -> str:
    """In words, how a run was started."""
    option = {"model": "MODEL", "settings": "--set"}.get(name, f"--{name.replace('_', '-')}")
    if value is None or value is False or value == {}:
        return f"without {option}"
    if isinstance(value, dict):
        value = " ".join(f"{key}={item}" for key, item in value.items())
    return f"with {option}" if value is True else f"with {option} {value}"


def _tell(amiss: tuple[str, ...]) -> None:
    """Names what was found wrong with the labels, and counts it."""
    for text in amiss[:10]:
        print(printable(text), file=sys.stderr)
    if len(amiss) > 1:
        print(f"{len(amiss)} such places in all; --strict stops at the first.", file=sys.stderr)


def _run(asked: Request, output: Path, run: RunOptions, file: FileOptions) -> list[RenderableType]:
    """Runs what was asked for; the summary, for the main process."""
    from dcafy.runs.request import write_request
    from dcafy.runs.run import finish, require_arm, subject, train
    from dcafy.runs.summary import of_comparison, of_history
    from dcafy.runs.using import tell_random
    from dcafy.training.folder import alone_in
    from dcafy.training.parallel import finished, is_main_process
    from dcafy.training.telling import JsonLines, Listener, for_stderr

    def listeners(title: str = "") -> tuple[Listener, ...]:
        log = () if run.json_log is None else (JsonLines(run.json_log, steps=True, title=title),)
        return log if is_quiet() else (for_stderr(title), *log)

    with contextlib.ExitStack() as alone:
        alone.callback(finished)
        # Whatever is wrong with the network, the data or the log shows here, before there is a run.
        if run.json_log is not None and is_main_process():
            JsonLines(run.json_log).require_writable()
        for arm in asked.arms[:-1]:
            require_arm(asked, arm)
        on = subject(asked, seed=asked.training.seed, arm=(asked.arms or (asked.arm,))[-1], file=file)
        if is_main_process():
            tell_random(on.network, asked.model)
            _tell(on.data.amiss)
            alone.enter_context(alone_in(output))
            if not run.resume:
                _require_free(output)  # of whoever began there meanwhile
            write_request(output, asked)
        if asked.seeds:
            from dcafy.runs.compare import compare

            comparison = compare(asked, output, file=file, listener_for=listeners, is_main=is_main_process())
            return of_comparison(comparison) if is_main_process() else []
        history = train(asked, on, output, seed=asked.training.seed, resume=run.resume, listeners=listeners())
        if not is_main_process():
            return []
        finish(on, output)
        return of_history(history, output)
