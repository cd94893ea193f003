"""What a report says, before it has any form: everything is computed here, and nothing is drawn."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcafy.analysis.complexity import Complexity, complexity
from dcafy.analysis.contributions import contributions, recorded_plan
from dcafy.analysis.gradcam import GradCam, cams_of
from dcafy.analysis.listening import Usage
from dcafy.analysis.tapped import Tapped, tapped
from dcafy.analysis.usage import message_shares, usage
from dcafy.analysis.values import AttentionValues, values_of
from dcafy.checkpoint.description import versions_of
from dcafy.converted import revert
from dcafy.emit.dca import is_connected
from dcafy.errors import InputError
from dcafy.plan.blocks import Contribution
from dcafy.plan.drawing import Lane, lanes_by_name
from dcafy.plan.plan import Plan
from dcafy.report.epochs import EpochLog
from dcafy.report.labelled import Labelled
from dcafy.report.pictures import Pictures
from dcafy.version import __version__
from dcafy.zoos.specs import has_random_weights

BATCH = 8
MOST_CAMS = 8
"""How many images are shown with their Grad-CAM maps."""

ORIGINAL, CONNECTED = "original", "connected"


@dataclass(frozen=True)
class Wanted:
    """What is looked at.

    ``against``  the other network; the reverted one where absent
    ``target``   the class for Grad-CAM; the predicted ones where absent
    ``epochs``   the log of the fine-tuning
    ``data``     labelled images on which connections are cut, whose classes are named
    ``looks``    whether Grad-CAM is computed
    """

    title: str
    against: nn.Module | None = None
    target: int | None = None
    epochs: EpochLog | None = None
    data: Labelled | None = None
    looks: bool = True
    command: str = ""


@dataclass(frozen=True)
class Side:
    """One of the two networks: its attention values, its Grad-CAM maps, its size and cost, the names of its classes.

    ``random``: whether nothing was loaded into the network that a zoo built, so that nothing here tells of training.
    """

    title: str
    values: tuple[AttentionValues, ...]
    cams: GradCam | None
    complexity: Complexity
    classes: tuple[str, ...] = ()
    random: bool = False

    def named(self, number: int) -> str:
        """A class by its number, and by its name where that is known."""
        return f"class {number}" + (f", {self.classes[number]}" if number < len(self.classes) else "")


@dataclass(frozen=True)
class Drift:
    """How far two networks' outputs lie apart: bit-identical or not, the largest difference, equal predictions."""

    identical: bool
    largest: float
    agreeing: float | None


@dataclass(frozen=True)
class Findings:
    """Everything that a report tells; ``sides`` has the original before the connected network."""

    title: str
    command: str
    plan: Plan
    lanes: tuple[Lane, ...]
    contributions: tuple[Contribution, ...]
    shares: Mapping[str, float]
    sides: tuple[Side, ...]
    pictures: Pictures
    no_cams: str
    drift: Drift | None
    epochs: EpochLog | None
    usage: Usage | None
    versions: Mapping[str, str]


def look(model: nn.Module, pictures: Pictures, wanted: Wanted, *, told: Callable[[str], None]) -> Findings:
    """What there is to report of ``model``; ``told`` is called with what is being done, step by step."""
    connected = is_connected(model)
    other = wanted.against if wanted.against is not None or not connected else revert(model)
    told("finding attention")
    copy = tapped(model, _given(model, pictures)[:2])
    titled = [(CONNECTED if connected else wanted.title, model, copy)]
    if other is not None:
        titled.insert(0, (ORIGINAL, other, tapped(other, _given(other, pictures)[:2])))
    told("predictions")
    scores = [_outputs(tap.model, _given(network, pictures)) for _, network, tap in titled]
    reason = _no_cams(wanted, copy, scores[-1])
    sides = []
    for (title, network, tap), output in zip(titled, scores, strict=True):
        given = _given(network, pictures)
        told(f"attention values, {title}")
        values = values_of(tap, given, batch_size=BATCH)
        told(f"Grad-CAM, {title}")
        target, stages = _target(wanted, output, scores[-1]), _names(copy, tap)
        cams = None if reason or not stages else cams_of(tap, given[:MOST_CAMS], target=target, stages=stages)
        cost, classes = complexity(network, given[:1]), _classes(wanted, output)
        sides.append(Side(title, values, cams, cost, classes, has_random_weights(network)))
    told("connections")
    shares = message_shares(model, torch.split(_given(model, pictures), BATCH)) if connected else {}
    told("cutting connections" if wanted.data is not None else "numbers")
    return Findings(
        title=wanted.title,
        command=wanted.command,
        plan=_plan(model, copy, wanted.title, connected=connected),
        lanes=_lanes(copy),
        contributions=contributions(model) if connected else (),
        shares=shares,
        sides=tuple(sides),
        pictures=pictures,
        no_cams=reason,
        drift=_drift(*scores) if len(scores) == 2 else None,
        epochs=wanted.epochs,
        usage=usage(model, wanted.data.batches) if connected and wanted.data is not None else None,
        versions={
            "dcafy": __version__,
            "python": platform.python_version(),
            **versions_of("torch", "torchvision", "timm", "captum", "matplotlib"),
        },
    )


def _plan(model: nn.Module, copy: Tapped, title: str, *, connected: bool) -> Plan:
    """The plan that the model was converted with, else the one that it would be converted with."""
    plan = recorded_plan(model) if connected else copy.plan
    return dataclasses.replace(plan, model=title, skipped=plan.skipped + copy.unread)


def _lanes(copy: Tapped) -> tuple[Lane, ...]:
    """One lane for each stage, with the size of its maps on these images."""
    lanes = []
    for stage in copy.stages:
        shape = copy.sizes.get(stage.name, ())
        size = f" · {'×'.join(map(str, shape[2:]))}" if shape else ""
        lanes.append(Lane(f"{stage.name}{size}", stage.blocks))
    placed = {name for lane in lanes for name in lane.blocks}
    left = tuple(block.name for block in copy.plan.blocks if block.name not in placed)
    return (*lanes, Lane("after the last stage", left)) if placed and left else tuple(lanes) or lanes_by_name(copy.plan)


def _given(model: nn.Module, pictures: Pictures) -> Tensor:
    """The images where the model is, in the precision that it computes with."""
    first = next((p for p in model.parameters() if p.is_floating_point()), pictures.tensor)
    return pictures.tensor.to(first.device, first.dtype)


def _outputs(model: nn.Module, images: Tensor) -> Any:
    """What the model yields, one tensor where every batch gives one."""
    with torch.no_grad():
        parts = [model(part) for part in torch.split(images, BATCH)]
    return torch.cat(parts).float().cpu() if all(isinstance(part, Tensor) for part in parts) else parts


def _no_cams(wanted: Wanted, copy: Tapped, scores: Any) -> str:
    """Why there is no Grad-CAM; empty where there is."""
    if not wanted.looks:
        return "it was not asked for"
    if not copy.points:
        return "the network has no attention, so that there are no stages to look behind"
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        return "the network is no classifier: its outputs are not scores of shape [N, classes]"
    return ""


def _target(wanted: Wanted, scores: Any, chosen: Tensor) -> int | Tensor | None:
    """The class that is asked for; else what the connected network predicts, where both know the same classes."""
    if wanted.target is not None:
        return wanted.target
    return chosen.argmax(dim=1)[:MOST_CAMS] if isinstance(scores, Tensor) and scores.shape == chosen.shape else None


def _classes(wanted: Wanted, scores: Any) -> tuple[str, ...]:
    """The names of the classes that the network tells apart, where the labelled images are of as many."""
    names = wanted.data.classes if wanted.data is not None else ()
    return names if isinstance(scores, Tensor) and scores.ndim == 2 and scores.shape[1] == len(names) else ()


def _names(copy: Tapped, other: Tapped) -> tuple[str, ...]:
    """The stages to look behind: a network's own; where it has no attention, those of the connected one."""
    if other.points:
        return tuple(other.points)
    modules = dict(other.model.named_modules())
    return tuple(name for name in copy.points if name in modules)


def _drift(original: Any, connected: Any) -> Drift | None:
    if not isinstance(original, Tensor) or not isinstance(connected, Tensor) or original.shape != connected.shape:
        return None
    agreeing = None
    if original.ndim == 2:
        agreeing = float((original.argmax(1) == connected.argmax(1)).float().mean())
    if not torch.isfinite(original).all() or not torch.isfinite(connected).all():
        raise InputError("A network's outputs are not finite. Look at its weights, and at the images.")
    return Drift(torch.equal(original, connected), float((original - connected).abs().max()), agreeing)
