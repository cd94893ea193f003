"""What a run is asked to do: by the options that were given, or by the folder of the run that goes on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcafy.checkpoint.architecture import may_be_given
from dcafy.checkpoint.hub import is_address
from dcafy.errors import UsageError
from dcafy.images.options import DataOptions
from dcafy.plan.options import Conversion, Inserting
from dcafy.runs.options import RunOptions, chosen
from dcafy.runs.request import REQUEST, Request, read_request
from dcafy.sources.options import FileOptions
from dcafy.training.checkpoint import CHECKPOINT, standing_in
from dcafy.training.options import TrainingConfig
from dcafy.wording import printable, quoted
from dcafy.zoos.specs import runs_code


@dataclass(frozen=True)
class Asked:
    """All options of a command, and by name those that were ``given``, here or in a file; the others have defaults.

    ``said``: those that stand on the command line. ``named_by_folder``: whether MODEL was the folder of the run.
    """

    model: str
    settings: Mapping[str, Any]
    run: RunOptions
    training: TrainingConfig
    images: DataOptions
    conversion: Conversion
    file: FileOptions
    given: Mapping[str, Any]
    said: Mapping[str, Any]
    named_by_folder: bool = False

    @property
    def goes_on(self) -> bool:
        """Whether a run in a folder goes on: ``RUN --resume``, ``-o RUN --resume``, ``RUN --epochs MORE``."""
        return (
            self.run.resume
            or self.named_by_folder
            or (self.run.output is None and self.run.data is None and os.path.exists(Path(self.model) / REQUEST))
        )

    def in_its_folder(self) -> Asked:
        """The same with the folder of the run that goes on as its output, which MODEL may have named.

        Where all that a run needs is named and none is there, there is one to begin: it was killed that early.
        """
        run = self.run
        named = run.output is not None and run.data is not None and self.model != ""
        if run.resume and named and not os.path.exists(Path(run.output or "") / REQUEST):
            return dataclasses.replace(self, run=dataclasses.replace(run, resume=False))
        if not self.goes_on or self.run.output is not None:
            return self
        run = dataclasses.replace(self.run, output=Path(self.model))
        return dataclasses.replace(self, run=run, model="", named_by_folder=True)


def request_of(asked: Asked) -> Request:
    """The request of the run that is asked for; ``UsageError`` says what is missing, or does not go together."""
    run, output = asked.run, asked.run.output
    if output is None and not run.dry_run:
        raise UsageError("-o names no folder. Write -o runs/NAME: checkpoints, log and model go there.")
    if "seeds" in asked.said and not (run.arms or asked.goes_on):
        raise UsageError("--seeds says how many seeds are compared. Add --compare, or choose one with --seed.")
    if asked.goes_on and output is not None and os.path.exists(output / REQUEST):
        if run.overwrite:
            raise UsageError("--overwrite replaces a run, and this one is to go on. Leave one of the two out.")
        return _going_on(asked, output)
    if run.resume:
        raise UsageError(f"There is no run in {quoted(str(output), 200)} to go on with.")
    if not asked.model:
        raise UsageError("MODEL names no network, such as timm:resnet18@DEFAULT, a file of weights, or a folder.")
    if run.data is None:
        raise UsageError("--data names no images. Write --data FOLDER, or --data digits to try.")
    _require_some_use(run, asked.said)
    found = chosen(run, asked.training, asked.images, asked.conversion, asked.given)
    if found.training.schedule == "multistep":
        found.training.falls_at  # noqa: B018 (says what is wrong with them)
    return Request(
        asked.model,
        run.data,
        asked.file.arch,
        asked.settings,
        found.conversion,
        found.images,
        found.training,
        run.seeds if run.arms else 0,
        found.task,
        "plain" if run.plain else "connected",
        run.arms,
        run.recipe,
        None if run.backbone is None else str(run.backbone),
        prefix=asked.file.prefix,
        ignore_head=asked.file.ignore_head,
        keep=run.keep,
    ).anchored()


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
            raise UsageError(f"{what}, so that --{name.replace('_', '-')} is of no use{more}. Leave it out.")


# --- a run that goes on ---------------------------------------------------------------------------------


def _going_on(asked: Asked, output: Path) -> Request:
    """The request of the run in ``output``, which the options may repeat but not change, but for those that may."""
    known = read_request(output)
    given = dict(asked.given)
    _require_said_again(known, output, asked.model, given)
    again = dataclasses.replace(known, model=asked.model or known.model, data=given.get("data") or known.data)
    given |= {"model": again.anchored().model, "data": again.anchored().data}
    if "settings" in given:
        given["settings"] = asked.settings
    if "backbone" in given:
        given["backbone"] = dataclasses.replace(known, backbone=str(given["backbone"])).anchored().backbone
    if "compare" in given:
        given["compare"] = ",".join(asked.run.arms)
    _require_the_same(known, output, given)
    changed = {name: given[name] for name in _MAY_CHANGE if name in given}
    if "epochs" in given:
        changed["epochs"] = _epochs_in_all(known, output, given["epochs"])
    elif not asked.run.resume:
        raise UsageError(
            f"{quoted(str(output), 200)} is the folder of a run. Train it further with --epochs, go on with it with "
            "--resume, or begin another one from its model: --data FOLDER -o ANOTHER."
        )
    images = dataclasses.replace(known.images, download=given.get("download", False))  # no file chooses to fetch
    again = dataclasses.replace(known, images=images, training=dataclasses.replace(known.training, **changed))
    if again.training.schedule == "multistep":
        again.training.falls_at  # noqa: B018 (says what is wrong with them)
    return again


def _require_said_again(known: Request, output: Path, model: str, given: Mapping[str, Any]) -> None:
    """Nothing where all that a request may not choose by itself stands on the command line as well."""
    for spec in filter(None, (known.model, known.arch)):
        how = "is built by code" if runs_code(spec) else "comes from the Hub" if is_address(spec) else ""
        if how and spec not in (model, given.get("arch")):
            raise UsageError(
                f"The network of this run {how}: {spec}. Name it, so that it is opened because you say so: "
                + (f"--arch {spec}." if spec == known.arch else f"dcafy finetune {spec} -o {output} --resume")
            )
    for key, value in known.settings.items():
        if not may_be_given(key, value) and "settings" not in given:
            raise UsageError(
                f"This run gives its network {printable(key)}, which a file may not choose. Say it again: --set "
                f"{printable(key)}=..."
            )
    if known.images.follow_links and not given.get("follow_links"):
        raise UsageError(
            "This run reads what links lead to outside of its folder of images. Say that it may: --follow-links."
        )


def _require_the_same(known: Request, output: Path, given: Mapping[str, Any]) -> None:
    """Nothing where the options repeat what the run was asked for; ``UsageError`` names the one that does not."""
    theirs = {
        **{name: getattr(known, name) for name in ("model", "data", "task", "recipe", "backbone", "arch", "settings")},
        **{name: getattr(known, name) for name in ("prefix", "ignore_head", "keep")},
        "plain": known.arm == "plain",
        "compare": ",".join(known.arms) or None,
        "seeds": max(known.seeds, 1),
        **dataclasses.asdict(known.conversion),
        **dataclasses.asdict(known.images),
        **dataclasses.asdict(known.training),
    }
    for name, value in given.items():
        if name in theirs and name not in (*_MAY_CHANGE, "download", "epochs") and theirs[name] != value:
            raise UsageError(
                f"The run in {quoted(str(output), 200)} was started {_as_given(name, theirs[name])}. Leave it out to "
                "go on with it, or start another run."
            )


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


def _epochs_in_all(known: Request, output: Path, epochs: int) -> int:
    """How many epochs the run has in the end; more than it was asked for only once it has ended."""
    asked, shown = known.training.epochs, printable(str(output))
    if epochs < asked:
        raise UsageError(
            f"The run in {quoted(str(output), 200)} has {asked} epochs. --epochs says how many there are in all: "
            f"choose more than {asked} to train it further."
        )
    if epochs > asked:
        for place in places_of(known, output):
            found = standing_in(place / CHECKPOINT)
            done = 0 if found is None else found.epoch
            if done != asked:
                raise UsageError(
                    f"{quoted(str(place), 200)} has not ended: {done} of {asked} epochs are done. Go on with it first: "
                    f"dcafy finetune {shown} --resume"
                )
    return epochs


def places_of(request: Request, output: Path) -> list[Path]:
    """The folders in which the trainings of a run stand: its own, or one for each seed and arm of a comparison."""
    if not request.seeds:
        return [output]
    seeds = range(request.training.seed, request.training.seed + request.seeds)
    return [output / "seeds" / f"{seed}-{arm}" for seed in seeds for arm in request.arms]
