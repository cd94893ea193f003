"""Networks whose outer forwards no recording follows: what YOLOs, language-model libraries and detectors put around.

Each can be built in two ways, of the same modules with the same names:

``apart``      as people write it: lists that are written into, other outputs in training, decisions by content
otherwise      straight: every forward is a graph, and it returns one tensor
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import networks
import torch
import torch.nn.functional as F
from networks import Block, SELinear, conv_norm
from torch import Tensor, nn
from trained import seeded, trained_like

IMAGE = 32


def images(batch: int = 2, size: int = IMAGE, seed: int = 1) -> Tensor:
    """Random images that differ in brightness; the same ones at every call."""
    with seeded(seed):
        return torch.randn(batch, 3, size, size) + 0.5 * torch.randn(batch, 3, 1, 1)


def unit(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(conv_norm(inputs, outputs, stride=stride), nn.SiLU())


def unlikely(x: Tensor) -> bool:
    """A decision by what is in the images; it always falls the same way."""
    return bool(x.mean() > 1e6)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested outputs, in their order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def squares(value: Any) -> Tensor:
    """A loss of whatever outputs."""
    terms = [tensor.float().square().mean() for tensor in tensors(value) if tensor.requires_grad]
    return torch.stack(terms).sum()


# YOLO --------------------------------------------------------------------------------------------


class Detect(nn.Module):
    """YOLOv5's head: it writes into the list that it is given, keeps its grids, and gives raw maps in training."""

    def __init__(self, widths: tuple[int, ...], *, apart: bool, classes: int = 3) -> None:
        super().__init__()
        self.apart = apart
        self.outputs = classes + 5
        self.grids = [torch.empty(0) for _ in widths]
        self.convs = nn.ModuleList([nn.Conv2d(width, self.outputs, 1) for width in widths])
        self.strides = torch.tensor([8.0, 16.0, 32.0])

    def forward(self, maps: list[Tensor]) -> Any:
        if not self.apart:
            return torch.cat([conv(one).flatten(1) for conv, one in zip(self.convs, maps, strict=True)], 1)
        found = []
        for i, conv in enumerate(self.convs):
            maps[i] = conv(maps[i])
            n, _, height, width = maps[i].shape
            maps[i] = maps[i].view(n, 1, self.outputs, height, width).permute(0, 1, 3, 4, 2).contiguous()
            if not self.training:
                if self.grids[i].shape[2:4] != maps[i].shape[2:4]:
                    self.grids[i] = self.grid(height, width, maps[i])
                place, extent, rest = maps[i].sigmoid().split((2, 2, self.outputs - 4), 4)
                place = (place * 2 + self.grids[i]) * self.strides[i]
                found.append(torch.cat((place, (extent * 2) ** 2, rest), 4).view(n, -1, self.outputs))
        return maps if self.training else (torch.cat(found, 1), maps)

    def grid(self, height: int, width: int, like: Tensor) -> Tensor:
        rows, columns = torch.arange(height).to(like), torch.arange(width).to(like)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        return torch.stack((x, y), 2)[None, None] - 0.5


class Concat(nn.Module):
    def forward(self, maps: list[Tensor]) -> Tensor:
        return torch.cat(maps, 1)


class Yolo(nn.Module):
    """Layers in a row that are told where their inputs come from: attention at three depths and in the neck."""

    def __init__(self, attention: Callable[[int], nn.Module], *, apart: bool) -> None:
        super().__init__()
        rows: list[tuple[int | list[int], nn.Module]] = [
            (-1, unit(3, 16, 2)),
            (-1, attention(16)),  # 1
            (-1, unit(16, 24, 2)),
            (-1, attention(24)),  # 3
            (-1, unit(24, 24, 2)),
            (-1, attention(24)),  # 5
            (-1, nn.Upsample(scale_factor=2)),
            ([-1, 3], Concat()),
            (-1, unit(48, 24)),
            (-1, attention(24)),  # 9
            ([9, 5], Detect((24, 24), apart=apart)),
        ]
        for source, layer in rows:
            layer.f = source  # type: ignore[assignment]
        self.model = nn.Sequential(*(layer for _, layer in rows))

    def forward(self, x: Tensor) -> Any:
        kept: list[Any] = []
        for layer in self.model:
            if layer.f != -1:
                x = [x if source == -1 else kept[source] for source in layer.f]  # type: ignore[union-attr, assignment]
            x = layer(x)
            kept.append(x)
        return x


def yolo_se(apart: bool) -> nn.Module:
    return Yolo(SELinear, apart=apart)


def yolo_cbam(apart: bool) -> nn.Module:
    return Yolo(networks.CBAM, apart=apart)


# A library's classes around a backbone -----------------------------------------------------------


class ModelOutput(OrderedDict):
    """As transformers has it: a data class whose fields are items too; those that are ``None`` are left out."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None:
                super().__setitem__(field.name, value)

    def __getitem__(self, key: str | int) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


@dataclasses.dataclass
class BackboneOutput(ModelOutput):
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclasses.dataclass
class ClassifierOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclasses.dataclass
class Config:
    num_labels: int = 4
    use_return_dict: bool = True
    output_hidden_states: bool = False
    problem_type: str | None = None


class PreTrained(nn.Module):
    """What such libraries give every model: its configuration, its device, its dtype."""

    def __init__(self, config: Config, *, apart: bool) -> None:
        super().__init__()
        self.config = config
        self.apart = apart

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class Backbone(PreTrained):
    """Stages, an attention on what they give, and as many outputs as the caller asks for."""

    def __init__(self, config: Config, *, apart: bool) -> None:
        super().__init__(config, apart=apart)
        self.embedder = unit(3, 16, 2)
        self.stages = nn.ModuleList([Block(16, 16, 1, SELinear(16)), Block(16, 24, 2, SELinear(24))])
        self.neck = nn.Sequential(unit(24, 24), SELinear(24))
        self.pooler = nn.AdaptiveAvgPool2d(1)

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None
    ) -> Any:
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.use_return_dict
        x = self.embedder(pixel_values)
        states: tuple[Tensor, ...] = (x,)
        for stage in self.stages:
            x = stage(x)
            states = (*states, x)
        if self.apart and unlikely(x):
            raise ValueError("Only models without infinite values are supported.")
        x = self.neck(x)
        pooled = self.pooler(x)
        if not self.apart:
            return pooled
        if not return_dict:
            return (x, pooled, states) if output_hidden_states else (x, pooled)
        return BackboneOutput(x, pooled, states if output_hidden_states else None)


class ForImageClassification(PreTrained):
    """The head around it: labels are optional, the inputs go to the model's device, the loss is among the outputs."""

    def __init__(self, *, apart: bool) -> None:
        config = Config()
        super().__init__(config, apart=apart)
        self.backbone = Backbone(config, apart=apart)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(24, config.num_labels))

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        if not self.apart:
            return self.head(self.backbone(pixel_values))
        return_dict = self.config.use_return_dict if return_dict is None else return_dict
        outputs = self.backbone(pixel_values.to(self.device, self.dtype), output_hidden_states, return_dict)
        logits = self.head(outputs.pooler_output if return_dict else outputs[1])
        loss = None
        if labels is not None:
            if self.config.problem_type is None:
                single = labels.dtype == torch.long
                self.config.problem_type = "single_label_classification" if single else "multi_label_classification"
            if self.config.problem_type == "single_label_classification":
                loss = F.cross_entropy(logits.view(-1, self.config.num_labels), labels.to(self.device).view(-1))
            else:
                loss = F.binary_cross_entropy_with_logits(logits, labels.to(self.device))
        if not return_dict:
            return (loss, logits, *outputs[2:]) if loss is not None else (logits, *outputs[2:])
        return ClassifierOutput(loss, logits, outputs.hidden_states)


def library_classes(apart: bool) -> nn.Module:
    return ForImageClassification(apart=apart)


# A detector --------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """Two maps by name, as torchvision's backbones give them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 16, 2)
        self.layer1 = Block(16, 16, 1, SELinear(16))
        self.layer2 = Block(16, 24, 2, SELinear(24))
        self.lateral = nn.Conv2d(16, 24, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.layer1(self.stem(x))
        coarse = self.layer2(fine)
        return OrderedDict([("0", self.lateral(fine) + F.interpolate(coarse, scale_factor=2.0)), ("1", coarse)])


class Tower(nn.Module):
    """A part of the head, with attention, called once."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(unit(24, 24), SELinear(24))
        self.scores = nn.Conv2d(24, 1, 1)
        self.boxes = nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return self.scores(x).flatten(1), self.boxes(x).flatten(2)


class Detector(nn.Module):
    """Images of any sizes in a list; losses in training, as many boxes as there are in eval."""

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        self.apart = apart
        self.backbone = Pyramid()
        self.head = Tower()

    def forward(self, images: Any, targets: list[dict[str, Tensor]] | None = None) -> Any:
        if not self.apart:
            return torch.cat(self.head(self.backbone((images - 0.1) / 0.5)["0"])[:1], 1)
        if self.training and targets is None:
            raise ValueError("targets should not be None when in training mode")
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        batch = images[0].new_zeros((len(images), 3, height, width))
        for slot, image in zip(batch, images, strict=True):
            slot[:, : image.shape[1], : image.shape[2]].copy_((image - 0.1) / 0.5)
        scores, boxes = self.head(self.backbone(batch)["0"])
        if targets is not None and self.training:
            labels = torch.stack([target["labels"] for target in targets])
            return {"score": F.binary_cross_entropy_with_logits(scores[:, :1], labels), "box": boxes.abs().mean()}
        found = []
        for score, box in zip(scores.sigmoid(), boxes, strict=True):
            keep = torch.where(score > 0.4)[0]
            found.append({"scores": score[keep], "boxes": box[:, keep].T})
        return found


def detector(apart: bool) -> nn.Module:
    return Detector(apart=apart)


# Parts that a root keeps apart -------------------------------------------------------------------


class Around(nn.Module):
    """A root that is straight, or that looks at what is in its images."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        if self.apart and unlikely(x):
            return x
        return self.head(self.maps(x).mean((2, 3)))  # type: ignore[no-any-return]

    def maps(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def attended(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(unit(inputs, outputs, stride), SELinear(outputs))


class Rows(Around):
    """Two rows of blocks, and something between them."""

    def __init__(self, apart: bool, between: nn.Module) -> None:
        super().__init__(apart)
        self.first = nn.Sequential(unit(3, 16, 2), attended(16, 16), attended(16, 24, 2))
        self.between = between
        self.second = nn.Sequential(attended(24, 24), attended(24, 32))
        self.head = nn.Linear(32, 5)

    def maps(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class Decides(nn.Module):
    """A part that looks at what is in its maps, where it is ``apart``."""

    def __init__(self, inner: nn.Module, apart: bool) -> None:
        super().__init__()
        self.inner = inner
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        if self.apart and unlikely(x):
            return x
        return self.inner(x)


class OneByOne(Decides):
    """A part that loops over the images, where it is ``apart``."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.apart:
            return self.inner(x)
        return torch.cat([self.inner(image[None]) for image in x])


class Constant(Decides):
    """A part that nothing is learned in front of: what it gives is detached, or made without gradients."""

    how = "detach"

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "detach":
            return self.inner(x).detach()
        with torch.no_grad():
            return self.inner(x)


class WithoutGradients(Constant):
    how = "no_grad"


class Sides(Around):
    """Attention in a trunk, in each of two branches, and after they join."""

    def __init__(self, apart: bool) -> None:
        super().__init__(apart)
        self.trunk = attended(3, 16, 2)
        self.left, self.right, self.joined = attended(16, 16), attended(16, 16), attended(32, 24)
        self.head = nn.Linear(24, 5)

    def maps(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return self.joined(torch.cat((self.left(x), self.right(x)), 1))


class Tail(nn.Module):
    """A part with two blocks that do not reach one another."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = attended(16, 24)
        self.last = attended(24, 24)

    def forward(self, main: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        other = self.aside(other)
        return self.last(main), other


class NearestElsewhere(Around):
    """The nearest block before ``tail.last`` is in another part, though its own part has an earlier one."""

    def __init__(self, apart: bool) -> None:
        super().__init__(apart)
        self.stem, self.trunk, self.tail = attended(3, 16, 2), attended(16, 24, 2), Tail()
        self.head = nn.Linear(48, 5)

    def maps(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        last, aside = self.tail(self.trunk(x), x)
        return torch.cat((last, F.avg_pool2d(aside, 2)), 1)


class InTurns(Around):
    """Two containers whose elements run in turns; neither is called itself."""

    def __init__(self, apart: bool) -> None:
        super().__init__(apart)
        self.stem = unit(3, 16, 2)
        self.odd = nn.ModuleList([attended(16, 16), attended(16, 16)])
        self.even = nn.ModuleList([attended(16, 16), attended(16, 16)])
        self.head = nn.Linear(16, 5)

    def maps(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for odd, even in zip(self.odd, self.even, strict=True):
            x = even(odd(x))
        return x


class WithoutLayers(Around):
    """Gather-excite between convolutions: blocks without a parameter and without a child."""

    def __init__(self, apart: bool) -> None:
        super().__init__(apart)
        self.convs = nn.ModuleList([unit(3, 16, 2), unit(16, 16), unit(16, 24, 2)])
        self.gates = nn.ModuleList([networks.GatherExcite(16), networks.GatherExcite(16), networks.GatherExcite(24)])
        self.head = nn.Linear(24, 5)

    def maps(self, x: Tensor) -> Tensor:
        for conv, gate in zip(self.convs, self.gates, strict=True):
            x = gate(conv(x))
        return x


class UNet(networks.Decoder):
    """Channel and spatial attention of a decoder, each called by a root that looks at its images."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        if self.apart and unlikely(x):
            return x
        return super().forward(x)


def rows(between: Callable[[nn.Module, bool], nn.Module], inner: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    return lambda apart: Rows(apart, between(inner(), apart))


# All of them -------------------------------------------------------------------------------------


Chain = tuple[str, ...]


def _one_tensor(batch: Tensor, apart: bool) -> tuple[Any, ...]:
    return (batch,)


def _in_a_list(batch: Tensor, apart: bool) -> tuple[Any, ...]:
    return (list(batch),) if apart else (batch,)


@dataclasses.dataclass(frozen=True)
class Split:
    """One network, what is in it, and what it is called with.

    ``channel``, ``spatial``   its blocks, in the order data meets them
    ``branched``   (block, the one it hears), where the chain is none
    ``inputs``     positional inputs from a batch of images
    ``taught``     what comes with them in training
    ``seen``       the module that is given the same in both ways of writing (empty: both return the same)
    """

    name: str
    build: Callable[[bool], nn.Module]
    channel: Chain = ()
    spatial: Chain = ()
    branched: dict[str, str] = dataclasses.field(default_factory=dict)
    inputs: Callable[[Tensor, bool], tuple[Any, ...]] = _one_tensor
    taught: Callable[[Tensor], dict[str, Any]] = lambda batch: {}
    seen: str = ""

    def straight(self) -> nn.Module:
        """A new network as a graph, with trained-like values, in eval mode; the same one at every call."""
        with seeded(0):
            return trained_like(self.build(False), images(8))

    def apart(self) -> nn.Module:
        """The network as people write it, with the values of the straight one, in eval mode."""
        network = self.build(True).eval()
        network.load_state_dict(self.straight().state_dict(), strict=True)
        return network

    def example(self, *, apart: bool = True) -> Any:
        """An example as :func:`dcafy.convert` takes it."""
        return self.inputs(images(), apart)

    def links(self) -> set[tuple[str, str]]:
        """(who is heard, who hears) of every connection that the chains ask for."""
        made = (pair for chain in (self.channel, self.spatial) for pair in itertools.pairwise(chain))
        return {(self.branched.get(target, source), target) for source, target in made}


def _labels(batch: Tensor) -> dict[str, Any]:
    return {"labels": torch.arange(len(batch)) % 4}


def _targets(batch: Tensor) -> dict[str, Any]:
    return {"targets": [{"labels": torch.tensor([float(i % 2)])} for i in range(len(batch))]}


_DEPTHS = ("model.1", "model.3", "model.5", "model.9")
_IN_ROWS = ("first.1.1", "first.2.1", "second.0.1", "second.1.1")
_AROUND = ("first.1.1", "first.2.1", "between.inner.1", "second.0.1", "second.1.1")


def _one_by_one_of(kind: type[Decides]) -> Callable[[bool], nn.Module]:
    return rows(kind, lambda: unit(24, 24))


SPLITS = (
    Split("yolo with SE", yolo_se, _DEPTHS, seen="model.10"),
    Split(
        "yolo with CBAM",
        yolo_cbam,
        tuple(f"{at}.channel" for at in _DEPTHS),
        tuple(f"{at}.spatial" for at in _DEPTHS),
        seen="model.10",
    ),
    Split(
        "a library's classes",
        library_classes,
        ("backbone.stages.0.attention", "backbone.stages.1.attention", "backbone.neck.1"),
        taught=_labels,
        seen="head",
    ),
    Split(
        "detector",
        detector,
        ("backbone.layer1.attention", "backbone.layer2.attention", "head.body.1"),
        inputs=_in_a_list,
        taught=_targets,
        seen="head",
    ),
    Split("a part that decides", _one_by_one_of(Decides), _IN_ROWS),
    Split("a part that decides, with attention", rows(Decides, lambda: attended(24, 24)), _AROUND),
    Split("a part that loops over the images", _one_by_one_of(OneByOne), _IN_ROWS),
    Split(
        "branches",
        Sides,
        ("trunk.1", "left.1", "right.1", "joined.1"),
        branched={"right.1": "trunk.1"},
    ),
    Split(
        "the nearest block in another part",
        NearestElsewhere,
        ("stem.1", "trunk.1", "tail.aside.1", "tail.last.1"),
        branched={"tail.aside.1": "stem.1", "tail.last.1": "trunk.1"},
    ),
    Split("parts in turns", InTurns, ("odd.0.1", "even.0.1", "odd.1.1", "even.1.1")),
    Split(
        "decoder",
        UNet,
        ("attention1.cse", "attention2.cse"),
        ("attention1.sse", "attention2.sse"),
    ),
)
"""Those in which the straight network says who hears whom in the other."""

BY_NAME = {split.name: split for split in SPLITS}
