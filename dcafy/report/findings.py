"""What a report says, before it has any form: everything is computed here, and nothing is drawn."""

from __future__ import annotations

import dataclasses
import itertools
import math
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dcafy.analysis.complexity import Complexity, complexity
from dcafy.analysis.contributions import contributions, recorded_plan
from dcafy.analysis.gradcam import GradCam, cams_of
from dcafy.analysis.listening import Usage
from dcafy.analysis.stages import Stage
from dcafy.analysis.tapped import Tapped, tapped
from dcafy.analysis.usage import listeners, message_shares, usage
from dcafy.analysis.values import AttentionValues, values_of
from dcafy.attention.inserted import HandedOn, handed_on
from dcafy.checkpoint.description import versions_of
from dcafy.converted import revert
from dcafy.emit.dca import is_connected
from dcafy.errors import InputError
from dcafy.graph.rewritten import original_class
from dcafy.images.about import Trained, about, known
from dcafy.plan.blocks import Contribution
from dcafy.plan.drawing import Lane, lanes_by_name
from dcafy.plan.plan import Plan
from dcafy.report.epochs import RunLog
from dcafy.report.labelled import Labelled
from dcafy.report.pictures import Pictures
from dcafy.runs.evidence import Difference, over_images
from dcafy.runs.timing import forward_times
from dcafy.version import __version__
from dcafy.zoos.specs import blueprint_of, has_random_weights

BATCH = 8
MOST_CAMS = 8
"""How many images are shown with their Grad-CAM maps."""

ORIGINAL, OFF, CONNECTED = "original", "connections off", "connected"
"""What the sides are called: another network, the same one without its connections, and with them."""


@dataclass(frozen=True)
class Wanted:
    """What is looked at.

    ``against``  the other network, and ``versus`` what it is called; the same one without connections where absent
    ``target``   the class for Grad-CAM; the predicted ones where absent
    ``run``      the log of the fine-tuning
    ``data``     labelled images on which networks are measured and connections are cut, whose classes are named
    ``looks``    whether Grad-CAM is computed
    """

    title: str
    against: nn.Module | None = None
    versus: str = ORIGINAL
    target: int | None = None
    run: RunLog = field(default_factory=RunLog)
    data: Labelled | None = None
    looks: bool = True
    command: str = ""


@dataclass(frozen=True)
class Score:
    """Of ``images`` labelled ones ``right`` were recognised; ``low`` to ``high`` is the 95% interval (Wilson, 1927)."""

    right: int
    images: int

    @property
    def value(self) -> float:
        """The accuracy, a fraction."""
        return self.right / self.images

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self._end(-1)

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self._end(1)

    def _end(self, sign: int) -> float:
        z, n, p = 1.959964, self.images, self.value
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return min(max((p + z * z / (2 * n) + sign * half) / (1 + z * z / n), 0.0), 1.0)


@dataclass(frozen=True)
class Prediction:
    """The class that a network sees in an image, by number, and its softmax probability."""

    number: int
    probability: float


@dataclass(frozen=True)
class Side:
    """One of the two networks.

    ``values``       its attention values
    ``cams``         its Grad-CAM maps of the images that are shown
    ``complexity``   its size and cost; ``seconds``: what two images take at best, and ``unsteady``: how many times as
                     long they take as a rule
    ``classes``      the names of its classes
    ``predictions``  what it sees in each image; empty for what is no classifier
    ``score``        how many of the labelled images it recognises
    ``outputs``      how many classes it tells apart; 0 for what is no classifier
    ``random``       whether nothing was loaded into the network that a zoo built: nothing here tells of training
    """

    title: str
    values: tuple[AttentionValues, ...]
    cams: GradCam | None
    complexity: Complexity
    classes: tuple[str, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    score: Score | None = None
    seconds: float = 0.0
    unsteady: float = 1.0
    outputs: int = 0
    random: bool = False

    def named(self, number: int) -> str:
        """A class by its number, and by its name where it has another."""
        name = self.classes[number] if number < len(self.classes) else str(number)
        return f"class {number}" + ("" if name == str(number) else f", {name}")


@dataclass(frozen=True)
class Drift:
    """How far two networks' outputs lie apart: bit-identical or not, the largest difference, equal predictions."""

    identical: bool
    largest: float
    agreeing: float | None


@dataclass(frozen=True)
class Findings:
    """Everything that a report tells; ``sides`` has the other network before the connected one.

    ``chosen``   the images that are shown: changed predictions first, then wrong ones
    ``gain``     the difference of the sides' accuracies on the labelled images
    ``network``  what it is called: its class, and how a zoo calls it where one built it
    ``data``     what these are
    ``trained``  what the network's folder says it was trained on
    ``handed``   attention in it that hands a state on from unit to unit (``rla``, ``dia``)
    """

    title: str
    command: str
    plan: Plan
    lanes: tuple[Lane, ...]
    contributions: tuple[Contribution, ...]
    shares: Mapping[str, float]
    sides: tuple[Side, ...]
    pictures: Pictures
    chosen: tuple[int, ...]
    no_cams: str
    drift: Drift | None
    gain: Difference | None
    run: RunLog
    usage: Usage | None
    network: str
    data: str
    trained: Trained | None
    versions: Mapping[str, str]
    handed: tuple[HandedOn, ...] = ()

    @property
    def connected(self) -> Side:
        """The network that the report is about."""
        return self.sides[-1]


@dataclass(frozen=True)
class _Looked:
    """A network, what it is called, its tapped copy, and its outputs for the pictures."""

    title: str
    network: nn.Module
    copy: Tapped
    scores: Any

    @property
    def outputs(self) -> int:
        """How many classes it tells apart; 0 for what is no classifier."""
        return self.scores.shape[1] if isinstance(self.scores, Tensor) and self.scores.ndim == 2 else 0


def look(model: nn.Module, pictures: Pictures, wanted: Wanted, *, told: Callable[[str], None]) -> Findings:
    """What there is to report of ``model``; ``told`` is called with what is being done, step by step."""
    connected = is_connected(model)
    other = wanted.against if wanted.against is not None or not connected else revert(model)
    own_title = wanted.title if wanted.title != wanted.versus else f"{wanted.title}, looked at"
    titled = {CONNECTED if connected else own_title: model}
    if other is not None:
        titled = {OFF if wanted.against is None else wanted.versus: other, **titled}
    told("finding attention")
    copies = {title: tapped(network, _like(network, pictures.tensor[:2])) for title, network in titled.items()}
    told("predictions")
    looked = [
        _Looked(title, titled[title], copy, _outputs(copy.model, _like(titled[title], pictures.tensor)))
        for title, copy in copies.items()
    ]
    own = looked[-1]
    if len(looked) == 2:
        _require_finite(*looked)
    predicted = [_predictions(one) for one in looked]
    chosen = _chosen(pictures, predicted)
    reason = _no_cams(wanted, own)
    taken = forward_times(titled, _two(model, pictures))
    sides, rights = [], []
    for one, predictions in zip(looked, predicted, strict=True):
        given = _like(one.network, pictures.tensor)
        told(f"attention values, {one.title}")
        values = values_of(one.copy, given, batch_size=BATCH)
        told(f"Grad-CAM, {one.title}")
        target, stages = _target(wanted, one, own, chosen), _names(own.copy, one.copy)
        cams = None if reason or not stages else cams_of(one.copy, given[list(chosen)], target=target, stages=stages)
        told(f"accuracy, {one.title}")
        rights.append(_right(one, wanted.data))
        sides.append(
            Side(
                one.title,
                values,
                cams,
                complexity(one.network, given[:1]),
                _classes(model, wanted, one),
                predictions,
                None if rights[-1] is None else Score(sum(rights[-1]), len(rights[-1])),
                min(taken[one.title]),
                statistics.median(taken[one.title]) / min(taken[one.title]),
                one.outputs,
                has_random_weights(one.network),
            )
        )
    told("connections")
    shares = message_shares(model, torch.split(_like(model, pictures.tensor), BATCH)) if connected else {}
    told("cutting connections" if wanted.data is not None else "numbers")
    return Findings(
        title=wanted.title,
        command=wanted.command,
        plan=_plan(model, own.copy, wanted.title, connected=connected),
        lanes=_lanes(own.copy),
        contributions=contributions(model) if connected else (),
        shares=shares,
        sides=tuple(sides),
        pictures=pictures,
        chosen=chosen,
        no_cams=reason,
        drift=_drift(*(one.scores for one in looked)) if len(looked) == 2 else None,
        gain=_gain(rights),
        run=wanted.run,
        usage=_usage(model, wanted, heard=bool(listeners(model))),
        network=_called(model),
        data="" if wanted.data is None else wanted.data.spec,
        trained=getattr(known(model), "trained", None),
        versions={
            "dcafy": __version__,
            "python": platform.python_version(),
            **versions_of("torch", "torchvision", "timm", "captum", "matplotlib"),
        },
        handed=handed_on(model),
    )


def _called(model: nn.Module) -> str:
    built, name = blueprint_of(model), original_class(model).__name__
    return name if built is None else f"{name} ({built.spec})"


def _usage(model: nn.Module, wanted: Wanted, *, heard: bool) -> Usage | None:
    """What the network makes of what is heard in it, on the labelled images; else what its run says of it."""
    if not heard or wanted.data is None:
        return wanted.run.usage if heard else None
    return usage(model, [(_like(model, images), labels) for images, labels in wanted.data.batches()])


def _plan(model: nn.Module, copy: Tapped, title: str, *, connected: bool) -> Plan:
    """The plan that the model was converted with, else the one that it would be converted with."""
    plan = recorded_plan(model) if connected else copy.plan
    return dataclasses.replace(plan, model=title, skipped=plan.skipped + copy.unread)


def _lanes(copy: Tapped) -> tuple[Lane, ...]:
    """The stages with the size of their maps on these images, split wherever blocks work on another size."""
    lanes = [lane for stage in copy.stages for lane in _lanes_of(stage, copy.sizes.get(stage.name, ())[2:])]
    placed = {name for lane in lanes for name in lane.blocks}
    left = tuple(block.name for block in copy.plan.blocks if block.name not in placed)
    return (*lanes, Lane("after the last stage", left)) if placed and left else tuple(lanes) or lanes_by_name(copy.plan)


def _lanes_of(stage: Stage, seen: tuple[int, ...]) -> Iterator[Lane]:
    """A stage as a lane, and others for blocks in it that work on another size, in the order of the data.

    ``seen``: the size of its maps on these images; attention in small maps is found on larger images than these.
    """

    def real(size: tuple[int, ...]) -> tuple[int, ...]:
        known = len(seen) == len(size) == len(stage.size)
        return tuple(-(-n * s // r) for n, s, r in zip(size, seen, stage.size, strict=True)) if known else size

    whole, last = Lane(stage.name, (), real(stage.size), stage.channels), None
    for size, run in itertools.groupby(zip(stage.blocks, stage.maps, strict=True), lambda each: each[1][-2:]):
        blocks, maps = zip(*run, strict=True)
        if len(maps[0]) < 3 or size == stage.size:
            last = dataclasses.replace(whole, blocks=blocks)
        else:
            last = Lane(blocks[0].rpartition(".")[0] or blocks[0], blocks, real(size), maps[-1][-3])
        yield last
    if last is None or last.title != stage.name:
        yield whole


def _like(model: nn.Module, images: Tensor) -> Tensor:
    """The images where the model is, in the precision that it computes with."""
    first = next((p for p in model.parameters() if p.is_floating_point()), images)
    return images.to(first.device, first.dtype)


def _two(model: nn.Module, pictures: Pictures) -> Tensor:
    return _like(model, pictures.tensor[:2])


def _outputs(model: nn.Module, images: Tensor) -> Any:
    """What the model yields, one tensor where every batch gives one."""
    with torch.no_grad():
        parts = [model(part) for part in torch.split(images, BATCH)]
    return torch.cat(parts).float().cpu() if all(isinstance(part, Tensor) for part in parts) else parts


def _predictions(looked: _Looked) -> tuple[Prediction, ...]:
    if not looked.outputs:
        return ()
    most = looked.scores.softmax(1).max(1)
    return tuple(map(Prediction, most.indices.tolist(), most.values.tolist()))


def _chosen(pictures: Pictures, predicted: Sequence[Sequence[Prediction]]) -> tuple[int, ...]:
    """The images to show: those of which the networks see different things, then wrong ones, then the first."""

    def rank(image: int) -> int:
        seen = [predictions[image].number for predictions in predicted if predictions]
        truth = pictures.truth[image] if pictures.truth else None
        return 0 if len(set(seen)) > 1 else 1 if seen and truth is not None and seen[-1] != truth else 2

    return tuple(sorted(range(len(pictures)), key=rank)[:MOST_CAMS])


def _right(looked: _Looked, data: Labelled | None) -> list[bool] | None:
    """Of each labelled image whether it is recognised; ``None`` where the network does not tell such classes apart."""
    if data is None or looked.outputs <= int(data.labels.max()):
        return None
    scores = _outputs(looked.copy.model, _like(looked.network, data.images))
    found: list[bool] = (scores.argmax(1) == data.labels).tolist()
    return found


def _gain(rights: Sequence[list[bool] | None]) -> Difference | None:
    """The connected network's accuracy minus the other's, paired over the images."""
    if len(rights) < 2 or rights[0] is None or rights[1] is None:
        return None
    return over_images(list(map(float, rights[1])), list(map(float, rights[0])))


def _no_cams(wanted: Wanted, looked: _Looked) -> str:
    """Why there is no Grad-CAM; empty where there is."""
    if not wanted.looks:
        return "it was not asked for"
    if not looked.copy.points:
        return "the network has no attention, so that there are no stages to look behind"
    if not looked.outputs:
        return "the network is no classifier: its outputs are not scores of shape [N, classes]"
    return ""


def _target(wanted: Wanted, looked: _Looked, own: _Looked, chosen: Sequence[int]) -> int | Tensor | None:
    """The class that is asked for; else what the connected network predicts, where both know the same classes."""
    if wanted.target is not None:
        return wanted.target
    return own.scores[list(chosen)].argmax(dim=1) if 0 < looked.outputs == own.outputs else None


def _classes(model: nn.Module, wanted: Wanted, looked: _Looked) -> tuple[str, ...]:
    """The names of the classes that the network tells apart, where as many are known."""
    names = wanted.data.classes if wanted.data is not None else about(model).classes
    return tuple(names) if looked.outputs == len(names) else ()


def _names(copy: Tapped, other: Tapped) -> tuple[str, ...]:
    """The stages to look behind: a network's own; where it has no attention, those of the connected one."""
    if other.points:
        return tuple(other.points)
    modules = dict(other.model.named_modules())
    return tuple(name for name in copy.points if name in modules)


def _require_finite(*looked: _Looked) -> None:
    for one in looked:
        if isinstance(one.scores, Tensor) and not torch.isfinite(one.scores).all():
            raise InputError("A network's outputs are not finite. Look at its weights, and at the images.")


def _drift(original: Any, connected: Any) -> Drift | None:
    if not isinstance(original, Tensor) or not isinstance(connected, Tensor) or original.shape != connected.shape:
        return None
    agreeing = None
    if original.ndim == 2:
        agreeing = float((original.argmax(1) == connected.argmax(1)).float().mean())
    return Drift(torch.equal(original, connected), float((original - connected).abs().max()), agreeing)
