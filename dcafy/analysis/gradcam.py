"""Grad-CAM by stage: where a network looks (paper Fig. 1, top, and Fig. 4), as captum computes it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from dcafy import plots
from dcafy.amounts import fixed
from dcafy.analysis.tapped import Tapped, tapped
from dcafy.analysis.values import check_images
from dcafy.display import Shown
from dcafy.errors import InputError, NoAttentionError, UsageError
from dcafy.tables import Column, Sheet
from dcafy.wording import counted, needing, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEEN = 8
"""How many images a notebook shows."""


@dataclass(frozen=True, repr=False)
class StageMaps(Shown):
    """One stage: ``name`` of the module it ends with, and its Grad-CAM ``maps``, ``[N, h, w]``, none negative."""

    name: str
    maps: Tensor

    def to_dict(self) -> dict[str, Any]:
        """The maps as JSON-ready data: lists of rows for each image."""
        return {"name": self.name, "maps": self.maps.tolist()}

    def _headline(self) -> str:
        return f"{self.name}, maps {list(self.maps.shape)}"

    def _records(self) -> list[dict[str, Any]]:
        return [
            {"stage": self.name, "image": number, "mean": float(one.mean()), "largest": float(one.max())}
            for number, one in enumerate(self.maps)
        ]

    def _parts(self) -> Iterator[Sheet]:
        rows = ((str(row["image"]), fixed(row["mean"]), fixed(row["largest"])) for row in self._records())
        titles = ("image", "mean", "largest")
        yield Sheet(tuple(Column(title, "number") for title in titles), tuple(rows), self.name)


@dataclass(frozen=True, repr=False)
class GradCam(Shown):
    """``targets``: the class that was looked for in each image, ``[N]``; ``stages``: the maps of each stage."""

    targets: Tensor
    stages: tuple[StageMaps, ...]

    def to_dict(self) -> dict[str, Any]:
        """The maps as JSON-ready data: lists of rows for each image, by stage."""
        return {"targets": self.targets.tolist(), "stages": {one.name: one.maps.tolist() for one in self.stages}}

    def plot(self, images: Tensor | None = None) -> list[Axes]:
        """The maps, a row for each image and a column for each stage (matplotlib).

        ``images``: ``[N, C, H, W]``, those that the maps are of, which then lie under them, each shown from its darkest
        to its brightest value.
        """
        made = plots.grid(len(self.targets), len(self.stages), width=2.0, height=2.1)
        for number, target in enumerate(self.targets.tolist()):
            for place, stage in enumerate(self.stages):
                ax, heat = made[number * len(self.stages) + place], stage.maps[number].detach().cpu()
                title = f"{stage.name}, class {target}"
                if images is None:
                    plots.picture(ax, heat.numpy(), title=title)
                else:
                    plots.picture(ax, _visible(images[number]), title=title, heat=heat.numpy())
        return made

    def _headline(self) -> str:
        sizes = ", ".join(f"{one.name} {'x'.join(map(str, one.maps.shape[1:]))}" for one in self.stages)
        return f"Grad-CAM of {counted(len(self.targets), 'image')}, {counted(len(self.stages), 'stage')}: {sizes}"

    def _records(self) -> list[dict[str, Any]]:
        targets = self.targets.tolist()
        return [{**row, "target": targets[row["image"]]} for stage in self.stages for row in stage._records()]

    def _parts(self) -> Iterator[Sheet]:
        rows = ((stage.name, "x".join(map(str, stage.maps.shape[1:]))) for stage in self.stages)
        yield Sheet((Column("stage", "name"), Column("size")), tuple(rows), "stages")

    def _body(self) -> Iterator[Sheet]:
        yield from ()  # of the stages the headline tells all

    def _picture(self) -> str:
        head = "".join(f"<th>{escape(printable(stage.name))}</th>" for stage in self.stages)
        rows = []
        for number, target in enumerate(self.targets.tolist()[:SEEN]):
            cells = "".join(f"<td>{_heat(stage.maps[number])}</td>" for stage in self.stages)
            rows.append(f"<tr><td>image {number}, class {target}</td>{cells}</tr>")
        left = len(self.targets) - SEEN
        more = f"<p>... {counted(left, 'image')} more</p>" if left > 0 else ""
        return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{more}"


def _heat(heat: Tensor) -> str:
    """A map as a small picture, from nothing (black) to its most (white)."""
    level = heat.detach().float().cpu() / heat.max().clamp_min(1e-12).cpu()
    made = Image.fromarray((level * 255).round().to(torch.uint8).numpy())
    file = io.BytesIO()
    made.resize((96, 96), Image.Resampling.BILINEAR).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" width="96" height="96" alt="">'


def _visible(image: Tensor) -> Any:
    """An image ``[C, H, W]`` as an array ``[H, W, C]`` from 0 to 1; of other than 3 channels the mean."""
    shown = image.detach().float().cpu()
    shown = shown if len(shown) == 3 else shown.mean(0, keepdim=True)
    low, high = shown.min(), shown.max()
    return ((shown - low) / (high - low).clamp(min=1e-12)).permute(1, 2, 0).numpy()


def grad_cam(
    model: nn.Module,
    images: Tensor,
    *,
    target: int | Tensor | None = None,
    stages: Sequence[str] | None = None,
) -> GradCam:
    """Grad-CAM maps of every stage of ``model`` for ``images``, computed by captum's ``LayerGradCam``.

    ``images``: ``[N, C, H, W]``, prepared as the model wants them. ``target``: a class, or one for each image; the
    predicted ones where absent. ``stages``: paths of modules to look behind, such as ``("layer3", "layer4")``. Where
    absent, one for each size of the feature maps, from the first attention block on: the last outermost module that
    yields maps of this size (``layer1`` to ``layer4`` of a ResNet). In a connected network, which computes inside
    such a module without calling it, the hook point is put behind the module's output in a copy.

    Raises ``InputError`` where the model is no classifier, ``UsageError`` for a class or a module that it does not
    have, ``NoAttentionError`` for a network without attention unless stages are given.

    >>> import dcafy.analysis, torch, torchvision
    >>> cams = dcafy.analysis.grad_cam(torchvision.models.mobilenet_v3_small(), torch.rand(1, 3, 96, 96))
    >>> [stage.name for stage in cams.stages]
    ['features.1', 'features.3', 'features.8', 'features.12']
    """
    check_images(images)
    return cams_of(tapped(model, images[:2]), images, target=target, stages=stages)


def cams_of(
    copy: Tapped, images: Tensor, *, target: int | Tensor | None = None, stages: Sequence[str] | None = None
) -> GradCam:
    """:func:`grad_cam` of a tapped copy."""
    with needing("Grad-CAM", "report"):
        from captum.attr import LayerGradCam
    chosen = tuple(copy.points) if stages is None else tuple(stages)
    if not chosen:
        raise NoAttentionError(
            "The model has no attention, so dcafy knows none of its stages. Name the modules to look behind: "
            "stages=('layer3', 'layer4')."
        )
    points = {name: _point(copy, name) for name in chosen}
    targets = _targets(copy.model, images, target)
    made = []
    for name, point in points.items():
        inputs = images.detach().clone().requires_grad_()  # else captum sets it, and warns
        with torch.enable_grad():
            maps = LayerGradCam(copy.model, point).attribute(inputs, target=targets, relu_attributions=True)
        made.append(StageMaps(name, maps.detach()[:, 0]))
    return GradCam(targets.cpu(), tuple(made))


def _point(copy: Tapped, name: str) -> nn.Module:
    if name in copy.points:
        return copy.points[name]
    try:
        return copy.model.get_submodule(name)
    except AttributeError as error:
        raise UsageError(f"The model has no module {name!r} for Grad-CAM to look behind.") from error


def _targets(model: nn.Module, images: Tensor, target: int | Tensor | None) -> Tensor:
    """One class for each image; ``UsageError`` or ``InputError`` where the model's output has none such."""
    with torch.no_grad():
        scores = model(images)
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        what = f"a tensor {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise InputError(f"Grad-CAM asks for a class, and the model yields {what}, not scores [N, classes].")
    if target is None:
        return scores.argmax(dim=1)
    wanted = torch.as_tensor(target, device=scores.device).expand(len(images))
    if wanted.min() < 0 or wanted.max() >= scores.shape[1]:
        raise UsageError(f"There is no class {target}: the model tells the classes 0 to {scores.shape[1] - 1} apart.")
    return wanted
