"""Does connecting attention help? A study with power on small networks, whose controls say what it is that helps.

    python benchmarks/accuracy.py                        # the main comparison, then what is exploratory
    python benchmarks/accuracy.py --only 'switch/*' --seeds 3
    python benchmarks/accuracy.py --device cuda --share 0/4   # a quarter of it on a GPU, all arms of a seed at once
    python benchmarks/accuracy.py --report               # the tables alone, from the rows that there are

One row of ``results/accuracy.jsonl`` is one training of one network under one seed; the same command goes on where a
stopped one was. Arms of one setting and seed start from the same weights and see the same images in the same order, on
every device.

What is expected, written down before any run that counts:

1. *centred* is above *vanilla* and above *connected* (eq. 3) in ``switch`` and ``cued``; *connected* is not.
2. *own message* is above *vanilla* as well: most of a gain is the normalised context. What an earlier block adds to it
   (*centred* minus *own message*) is small: under half a point.
3. *shuffled* is not above *vanilla*: it is the content of a message that helps.
4. (Added when four rows were there.) Ten times the rate is no disadvantage to eq. 3: *connected x1* is *connected*,
   within half a point.
5. *α alone* is *vanilla*. *normalised* is *centred* or less: its message is one of three things that a norm sees.
6. Where early layers pool what later ones have lost (``switch``, ``cued``, ``gain``, ``noise``) connecting adds
   something; in ``wide``, a residual network with a large field of view, it adds nothing.
7. ``tuned``: as ``switch``, and smaller.
8. (Before any of these was run.) ``inserted``: *inserted* is above *vanilla*, a network without attention that is
   fine-tuned; *inserted, connected* is *inserted* within half a point, and *inserted, centred* is above both.
9. (As 8.) ``blur`` and ``cast`` are as ``gain`` and ``noise``. Networks of ``mobile``, whose shortcuts carry what early
   layers saw wherever there is no stride, gain less than the same tasks do without shortcuts, and more than ``wide``.
10. (Before any of these was run.) ``tuned, adamw``, with the optimizer and the rates that ``dcafy finetune`` has where
    it is told nothing: *centred* is above *vanilla*, and by less than in ``tuned``.
"""

from __future__ import annotations

import argparse
import base64
import copy
import dataclasses
import gzip
import json
import math
import operator
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dcafy
from dcafy.attention import CBAM, ECA, GC, SE
from dcafy.attention.gate import Gate
from dcafy.attention.inserted import hearing_states, inserted_parameters
from dcafy.converted import undecayed
from dcafy.emit.connection import Connection
from dcafy.emit.dca import is_connected, own_parameters, scale_parameters
from dcafy.training.options import LEARNING_RATES, WEIGHT_DECAYS

sys.path.insert(0, str(Path(__file__).parent))

RESULTS = Path(__file__).parent / "results" / "accuracy.jsonl"

# --- data: unlimited pairs of Fashion-MNIST ----------------------------------------------------------------------

Garments = tuple[Tensor, Tensor]
"""Images of 28 x 28 from 0 to 1, and their classes."""

Pairs = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""(one garment, another one, chance) -> the images, and which of the two each asks for: 0 or 1."""


def garments(folder: Path, part: str, classes: range) -> Garments:
    """Fashion-MNIST's ``train`` or ``t10k``, those of some classes, numbered from 0."""

    def values(name: str, header: int) -> Tensor:
        data = gzip.decompress((folder / f"{part}-{name}-ubyte.gz").read_bytes())
        return torch.frombuffer(bytearray(data[header:]), dtype=torch.uint8)

    labels = values("labels-idx1", 8).long() - classes.start
    images = values("images-idx3", 16).view(-1, 1, 28, 28).float() / 255
    kept = (labels >= 0) & (labels < len(classes))
    return images[kept], labels[kept]


def _which(count: int, chance: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (count,), generator=chance)


def _noise(like: Tensor, chance: torch.Generator, scale: float = 0.05) -> Tensor:
    return scale * torch.randn(like.shape, generator=chance)


def switch(one: Tensor, other: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both summed, the second upside down; a patch of 2 x 2 in a corner says which."""
    asked = _which(len(one), chance)
    x = F.interpolate(one + other.flip(2), size=16, mode="area")
    x = x + _noise(x, chance)
    x[:, :, :2, :2] = (2.0 * asked - 1).view(-1, 1, 1, 1) + _noise(x[:, :, :2, :2], chance)
    return 2 * x - 1.2, asked


def cued(one: Tensor, other: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each in a channel of its own; a patch of 4 x 4 in a corner of a third one says which."""
    asked = _which(len(one), chance)
    x = F.interpolate(torch.cat((one, other), 1), size=16, mode="area")
    cue = -torch.ones_like(x[:, :1])
    cue[:, :, :4, :4] = (2.0 * asked - 1).view(-1, 1, 1, 1)
    x = torch.cat((2 * x - 1, cue), 1)
    return x + _noise(x, chance, 0.2), asked


def gain(one: Tensor, other: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """The first one in a cast of colour: each channel with a gain and an offset of its own, a nuisance."""
    x = F.interpolate(one, size=16, mode="area").repeat(1, 3, 1, 1)
    scale = torch.exp(1.2 * torch.randn((len(x), 3, 1, 1), generator=chance))
    x = scale * (x + torch.randn((len(x), 3, 1, 1), generator=chance))
    return x + _noise(x, chance), torch.zeros(len(x), dtype=torch.long)


def noise(one: Tensor, other: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """The first one in noise whose level differs from image to image, a nuisance."""
    x = F.interpolate(one, size=16, mode="area")
    level = torch.exp(torch.randn((len(x), 1, 1, 1), generator=chance) - 1)
    return 2 * x - 1 + level * torch.randn(x.shape, generator=chance), torch.zeros(len(x), dtype=torch.long)


def cast(one: Tensor, other: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """The first one in a cast of colour: each channel with an offset of its own, a nuisance."""
    x = F.interpolate(one, size=16, mode="area").repeat(1, 3, 1, 1)
    x = x + 2 * torch.randn((len(x), 3, 1, 1), generator=chance)
    return x + _noise(x, chance, 0.2), torch.zeros(len(x), dtype=torch.long)


def blur(one: Tensor, other: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """The first one, blurred along rows and columns by widths of the image's own, a nuisance."""
    x = F.interpolate(one, size=16, mode="area")
    places = torch.arange(-7, 8)
    widths = torch.exp(torch.randn((2, len(x), 1), generator=chance) - 0.5)
    rows, columns = torch.softmax(-0.5 * (places / widths).square(), 2)
    padded = F.pad(x, (7, 7, 7, 7), mode="replicate").transpose(0, 1)
    x = F.conv2d(padded, rows.view(-1, 1, 15, 1), groups=len(x))
    x = F.conv2d(x, columns.view(-1, 1, 1, 15), groups=len(columns)).transpose(0, 1)
    return 2 * x - 1 + _noise(x, chance), torch.zeros(len(x), dtype=torch.long)


def plain(one: Tensor, other: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """The first one as it is, at its full size, a little shifted."""
    shift = torch.randint(-2, 3, (2,), generator=chance)
    x = torch.roll(one, (int(shift[0]), int(shift[1])), (2, 3))
    return 2 * x - 1, torch.zeros(len(x), dtype=torch.long)


# --- networks ------------------------------------------------------------------------------------------------------

Attend = Callable[[int], nn.Module]

ATTENTION: dict[str, Attend] = {
    "none": lambda channels: nn.Identity(),
    "se": lambda channels: SE(channels, max(channels // 8, 1), init="paper"),
    "eca": lambda channels: ECA(channels, init="paper"),
    "cbam": lambda channels: CBAM(channels, max(channels // 8, 1), init="paper"),
    "gc": lambda channels: GC(channels, max(channels // 8, 1), init="paper"),
}
"""Name -> the attention of a unit, with bottlenecks of 8 channels."""


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    padding = kernel // 2
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


def inverted(inputs: int, outputs: int, attend: Attend, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    """MobileNetV2's bottleneck with attention on the wide map, and without a shortcut."""
    wide = 4 * inputs
    return nn.Sequential(
        *(*_conv(inputs, wide), nn.ReLU()),
        *(*_conv(wide, wide, kernel, stride, groups=wide), nn.ReLU()),
        attend(wide),
        *_conv(wide, outputs),
    )


class Narrow(nn.Module):
    """Six inverted bottlenecks of 8 and 16 channels, no shortcuts, with a small field of view."""

    def __init__(self, channels: int, classes: int, attend: Attend) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(channels, 8, 3), nn.ReLU())
        self.units = nn.Sequential(
            inverted(8, 8, attend),
            inverted(8, 8, attend, stride=2),
            inverted(8, 16, attend, kernel=1),
            inverted(16, 16, attend, stride=2),
            inverted(16, 16, attend, kernel=1),
            inverted(16, 16, attend, kernel=1),
        )
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.units(self.stem(x))).mean((2, 3)))


class Shortcut(nn.Sequential):
    """A bottleneck, added to what goes into it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Mobile(Narrow):
    """As MobileNetV2 has it: six inverted bottlenecks of 8 and 16 channels, with shortcuts but where a stride is."""

    def __init__(self, channels: int, classes: int, attend: Attend) -> None:
        super().__init__(channels, classes, attend)
        self.units = nn.Sequential(
            Shortcut(*inverted(8, 8, attend)),
            inverted(8, 16, attend, stride=2),
            Shortcut(*inverted(16, 16, attend, kernel=1)),
            inverted(16, 16, attend, stride=2),
            Shortcut(*inverted(16, 16, attend, kernel=1)),
            Shortcut(*inverted(16, 16, attend, kernel=1)),
        )


class Residual(nn.Module):
    """A residual unit of two convolutions, with attention before the addition."""

    def __init__(self, inputs: int, outputs: int, attend: Attend, stride: int, kernels: tuple[int, int]) -> None:
        super().__init__()
        first, second = kernels
        self.body = nn.Sequential(
            *(*_conv(inputs, outputs, first, stride), nn.ReLU()), *_conv(outputs, outputs, second), attend(outputs)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Wide(nn.Module):
    """Six residual units of 16, 32 and 64 channels; ``local``: each place sees 7 px around itself."""

    def __init__(self, channels: int, classes: int, attend: Attend, *, local: bool = False) -> None:
        super().__init__()
        kernels = ((3, 1), (1, 1), (1, 1)) if local else ((3, 3),) * 3
        self.stem = nn.Sequential(*_conv(channels, 16, 3), nn.ReLU())
        units: list[nn.Module] = []
        for stage, width in enumerate((16, 32, 64)):
            inputs = 16 if not stage else width // 2
            units.append(Residual(inputs, width, attend, 2 if stage else 1, kernels[stage]))
            units.append(Residual(width, width, attend, 1, kernels[stage]))
        self.units = nn.Sequential(*units)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.units(self.stem(x)).mean((2, 3)))


def local(channels: int, classes: int, attend: Attend) -> nn.Module:
    return Wide(channels, classes, attend, local=True)


# --- arms ----------------------------------------------------------------------------------------------------------

Prepare = Callable[[nn.Module, Connection], None]
"""What an arm changes in a connection; first the network, for the widths of the block that hears."""


@dataclass(frozen=True)
class Arm:
    """One way of training.

    ``options``   of the conversion; ``None`` for a network that is not converted
    ``prepare``   what changes each connection after that
    ``attention`` whether the network has any
    ``inserted``  what is put in first, as an exact no-op
    ``order``     added to the seed of the order of the images
    ``rates``     rates of the matching layers, and of α and β, over that of the base
    ``faster``    the rate of what was put in over that of the base
    ``heard``     what becomes of everything that is handed on from unit to unit
    ``few``       how many seeds, where not as many as the setting's other arms
    """

    words: str
    options: dict[str, Any] | None = None
    prepare: Prepare | None = None
    attention: bool = True
    inserted: str | None = None
    order: int = 0
    rates: tuple[float, float] = (10.0, 10.0)
    faster: float = 1.0
    heard: Callable[[Tensor], Tensor] | None = None
    few: int = 0


def of_another(heard: Tensor) -> Tensor:
    """What another image of the batch hears."""
    return heard.roll(1, 0)


def alpha_alone(network: nn.Module, connection: Connection) -> None:
    connection.beta.requires_grad_(False)
    connection.match.requires_grad_(False)


def own_message(network: nn.Module, connection: Connection) -> None:
    """The very layers of *centred*, but for the width that goes in, fed with the block's own G."""
    if isinstance(connection.match, nn.Sequential):
        layers = [layer for layer in connection.match if isinstance(layer, nn.Linear)]
        if layers:
            connection.match[0] = nn.Linear(layers[-1].out_features, layers[0].out_features)
        else:
            connection.match = nn.Identity()  # a map of places, of the block's own size
    connection.bounded = False
    connection.register_forward_pre_hook(lambda module, given: (given[0], given[0], None))


class PerChannel(nn.Module):
    """A weight for each channel of a message, beside the β of all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def _centre(connection: Connection) -> nn.BatchNorm1d:
    assert isinstance(connection.centre, nn.BatchNorm1d)
    return connection.centre


def per_channel(network: nn.Module, connection: Connection) -> None:
    centre = _centre(connection)
    connection.centre = nn.Sequential(centre, PerChannel(centre.num_features))


def by_layer_norm(network: nn.Module, connection: Connection) -> None:
    connection.centre = nn.LayerNorm(_centre(connection).num_features, elementwise_affine=False)


def normalised_first(network: nn.Module, connection: Connection) -> None:
    if isinstance(connection.match, nn.Sequential):
        first = connection.match[0]
        assert isinstance(first, nn.Linear)
        connection.match = nn.Sequential(nn.BatchNorm1d(first.in_features, affine=False), *connection.match)


PLAIN, CENTRED = {"message": "plain"}, {"message": "centred"}

MAIN = {
    "vanilla": Arm("the network as it is"),
    "connected": Arm("eq. 3", PLAIN),
    "centred": Arm("eq. 3 with centred messages", CENTRED),
    "own message": Arm("the same layers on the block's own G", CENTRED, own_message),
    "shuffled": Arm("centred messages of another image", CENTRED, heard=of_another),
    "normalised": Arm("f as published: LayerNorm and ReLU", {**PLAIN, "schema": "normalised"}),
    "α alone": Arm("eq. 3 with β = 0 for good", PLAIN, alpha_alone),
    "connected x1": Arm("eq. 3, connections at the rate of the base", PLAIN, rates=(1.0, 1.0)),
    "centred x1": Arm("centred, connections at the rate of the base", CENTRED, rates=(1.0, 1.0)),
}
"""The main comparison; where not said, connections have 10 times the rate of the base."""

CONTROLS = {
    "no attention": Arm("without its attention", attention=False),
    "other order": Arm("the images in another order; exploratory", order=10_000, few=6),
}

OPTIONS = {
    "topology own": Arm("each block hears itself, centred, without layers", {**CENTRED, "topology": "own"}),
    "tree": Arm("a binary tree, centred", {**CENTRED, "topology": "tree"}),
    "dense": Arm("all earlier blocks, centred", {**CENTRED, "topology": "dense"}),
    "depth": Arm("all earlier blocks, weighed by a softmax over depth, centred", {**CENTRED, "topology": "depth"}),
    "per-channel β": Arm("centred, with a weight per channel", CENTRED, per_channel),
    "by LayerNorm": Arm("LayerNorm without affine in the place of centring", CENTRED, by_layer_norm),
    "T̃ normalised": Arm("centred before the match and after it", CENTRED, normalised_first),
    "centred x50": Arm("connections at 50 times the rate", CENTRED, rates=(50.0, 50.0)),
    "match x1": Arm("α and β at 10 times the rate, layers at the base's", CENTRED, rates=(1.0, 10.0)),
    "α, β x1": Arm("layers at 10 times the rate, α and β at the base's", CENTRED, rates=(10.0, 1.0)),
}
"""What else was tried, in one setting."""

FAMILY = {
    "dense": OPTIONS["dense"],
    "depth": OPTIONS["depth"],
    "hub": Arm("each block hears an LSTM cell that has read all before it in its stage", {**PLAIN, "topology": "hub"}),
    "rla": Arm("a recurrent map along the units, beside their attention", inserted="rla"),
    "rla alone": Arm("a recurrent map along the units, and no attention", attention=False, inserted="rla"),
    "mrla": Arm("recurrent layer attention in the place of its attention", attention=False, inserted="mrla"),
    "dia": Arm("an LSTM cell for each stage in the place of its attention", attention=False, inserted="dia"),
}
"""Other published ways to connect attention across depth (``docs/family.md``), in one setting."""

SE_PUT_IN = "SE put into the units"

INSERTED = {
    "vanilla": MAIN["vanilla"],
    "inserted": Arm(f"{SE_PUT_IN}", inserted="se"),
    "inserted x10": Arm(f"{SE_PUT_IN}, at 10 times the rate", inserted="se", faster=10.0),
    "inserted, connected": Arm(f"{SE_PUT_IN}, connected by eq. 3", PLAIN, inserted="se"),
    "inserted, centred": Arm(f"{SE_PUT_IN}, connected, centred", CENTRED, inserted="se"),
    "inserted, own message": Arm(f"{SE_PUT_IN}, centred layers on its own G", CENTRED, own_message, inserted="se"),
    "inserted x10, connected": Arm(f"{SE_PUT_IN}, at 10 times the rate, by eq. 3", PLAIN, inserted="se", faster=10.0),
    "inserted x10, centred": Arm(f"{SE_PUT_IN}, at 10 times the rate, centred", CENTRED, inserted="se", faster=10.0),
}
"""Attention for a trained network that has none: what of it is the attention's, and what the connections'."""

ALONG = ("rla", "mrla", "dia")
CHANGED: dict[str, Callable[[Tensor], Tensor] | None] = {
    "": None,
    ", shuffled": of_another,
    ", unheard": torch.zeros_like,
}
"""Control -> what becomes of what is handed on: another image's, or nothing."""

INSERTED_FAMILY = {
    "vanilla": MAIN["vanilla"],
    **{name: Arm(f"{name} put into the units", inserted=name) for name in ALONG},
    **{
        f"{name} x10{control}": Arm(f"{name}, at 10 times the rate{control}", inserted=name, faster=10.0, heard=heard)
        for control, heard in CHANGED.items()
        for name in ALONG
    },
}
"""Other ways to connect attention, for a trained network that has none."""


def _few(*names: str) -> dict[str, Arm]:
    return {name: {**MAIN, **CONTROLS}[name] for name in names}


FEW = _few("vanilla", "no attention", "connected", "centred", "own message")
BY_ADAMW = _few("vanilla", "connected", "centred", "own message", "centred x1")


# --- settings ------------------------------------------------------------------------------------------------------


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups, lr, cuda: torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True, fused=cuda),  # paper 4.1
    "adamw": lambda groups, lr, cuda: torch.optim.AdamW(groups, lr, fused=cuda, capturable=cuda),
}
"""By the names that ``dcafy finetune`` has for them, with its momentum."""


@dataclass(frozen=True)
class Setting:
    """Data, network and budget; ``main``: one of the three with 20 seeds, the others are exploratory with 5.

    ``optimizer``  one of :data:`OPTIMIZERS`
    ``classes``    of garments that are to be named
    ``before``     classes that a network was trained on before, and is fine-tuned from
    ``of``         the setting that it continues: runs of the same arm and seed are that one's
    """

    name: str
    words: str
    pairs: Pairs
    network: Callable[[int, int, Attend], nn.Module]
    attention: str = "se"
    steps: int = 1500
    lr: float = 0.1
    batch: int = 100
    optimizer: str = "sgd"
    main: bool = False
    classes: range = range(10)
    before: range | None = None
    of: str = ""
    arms: dict[str, Arm] = field(default_factory=lambda: FEW)

    def seeds(self, arm: str) -> range:
        few = self.arms[arm].few if arm in self.arms else 0
        return range(few or (20 if self.main else 5))

    @property
    def budget(self) -> dict[str, Any]:
        """What decides a row beside setting, arm and seed: rows of another budget are not taken together."""
        own = {"steps": self.steps, "lr": self.lr, "batch": self.batch, "classes": len(self.classes)}
        return own if self.optimizer == "sgd" else {**own, "optimizer": self.optimizer}


SWITCH = "two garments summed, one upside down; a patch in a corner, seen early only, says which one to name"
CUED = "two garments in channels of their own; a patch in a third, out of sight of the convolutions, says which"
NARROW = "narrow inverted bottlenecks without shortcuts"
MOBILE = "narrow inverted bottlenecks with shortcuts but where a stride is"

TUNED: dict[str, Any] = {"steps": 600, "lr": 0.03, "classes": range(5, 10), "before": range(5)}
"""The budget of what is fine-tuned: from five classes to the five others."""

FIVE_TO_FIVE = "trained on five classes, fine-tuned to the five others"
SWITCH_TUNED = f"{SWITCH}; {NARROW}, {FIVE_TO_FIVE}"

NUISANCES: dict[str, tuple[Pairs, str]] = {
    "gain": (gain, "one garment, each channel with a gain and an offset"),
    "noise": (noise, "one garment in noise of any level"),
    "cast": (cast, "one garment, each channel with an offset"),
    "blur": (blur, "one garment, blurred by any width"),
}
"""Name -> a task with a global nuisance, and what it is."""

SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("switch", f"{SWITCH}; {NARROW}", switch, Narrow, main=True, arms={**MAIN, **CONTROLS}),
        Setting("cued", f"{CUED}; residual units", cued, local, main=True, arms={**MAIN, **CONTROLS}),
        Setting(
            "tuned",
            SWITCH_TUNED,
            *(switch, Narrow),
            **TUNED,
            main=True,
            arms={name: arm for name, arm in {**MAIN, **CONTROLS}.items() if arm.attention},
        ),
        Setting("switch, options", f"{SWITCH}; {NARROW}", switch, Narrow, of="switch", arms={**FEW, **OPTIONS}),
        Setting("cued, family", f"{CUED}; residual units", cued, local, of="cued", arms={**FEW, **FAMILY}),
        *(
            Setting(f"cued {name}", f"{CUED}; residual units, {name.upper()}", cued, local, name)
            for name in ("eca", "cbam", "gc")
        ),
        *(Setting(name, f"{NUISANCES[name][1]}; {NARROW}", NUISANCES[name][0], Narrow) for name in ("gain", "noise")),
        Setting("wide", f"{SWITCH}; wide residual units that see all of it (a control)", switch, Wide),
        Setting("plain", f"Fashion-MNIST at its full size; {NARROW}", plain, Narrow),
        *(Setting(name, f"{NUISANCES[name][1]}; {NARROW}", NUISANCES[name][0], Narrow) for name in ("cast", "blur")),
        Setting("switch, mobile", f"{SWITCH}; {MOBILE}", switch, Mobile),
        *(Setting(f"{name}, mobile", f"{words}; {MOBILE}", task, Mobile) for name, (task, words) in NUISANCES.items()),
        Setting(
            "tuned, options",
            SWITCH_TUNED,
            *(switch, Narrow),
            **TUNED,
            arms={name: arm for name, arm in {**FEW, **OPTIONS}.items() if arm.attention},
        ),
        Setting(
            "tuned, adamw",
            f"{SWITCH_TUNED}, by AdamW",
            *(switch, Narrow),
            **{**TUNED, "lr": LEARNING_RATES["adamw"]},
            optimizer="adamw",
            arms=BY_ADAMW,
        ),
        Setting(
            "inserted",
            f"{CUED}; residual units without attention, {FIVE_TO_FIVE}",
            *(cued, local, "none"),
            **TUNED,
            arms=INSERTED,
        ),
        Setting(
            "inserted, family",
            f"{CUED}; residual units without attention, {FIVE_TO_FIVE}",
            *(cued, local, "none"),
            **TUNED,
            of="inserted",
            arms=INSERTED_FAMILY,
        ),
    )
}


def home(setting: Setting, arm: str) -> str:
    """The name of the setting under which runs of an arm are kept."""
    return setting.of if setting.of and arm in SETTINGS[setting.of].arms else setting.name


# --- one run -------------------------------------------------------------------------------------------------------

VALIDATION = 10_000


Trained = list[tuple[nn.Module, torch.optim.Optimizer]]
"""Networks that are trained side by side, on the same images, each with its optimizer."""


def stepped(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """One step of training."""
    loss = F.cross_entropy(network(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class InTurn:
    """A step of each network after the other."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.rates = [[group["lr"] for group in optimizer.param_groups] for _, optimizer in trained]

    def __call__(self, x: Tensor, y: Tensor, part: float) -> None:
        for (network, optimizer), rates in zip(self.trained, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = part * rate
            stepped(network, optimizer, x, y)


class Study:
    """The data, and the networks that others are fine-tuned from; ``gates``: what their attention values come from."""

    gates: tuple[type[nn.Module], ...] = (Gate,)

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder = folder
        self.device = torch.device(device)
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "one core of a CPU"
        self.machine = f"{name}, torch {torch.__version__}"
        self.layout = torch.channels_last if device == "cpu" else torch.contiguous_format  # a third faster on a CPU
        self._garments: dict[Any, Garments] = {}
        self._trained: dict[Any, nn.Module] = {}

    def garments(self, part: str, classes: range) -> Garments:
        key = part, classes
        if key not in self._garments:
            self._garments[key] = garments(self.folder, part, classes)
        return self._garments[key]

    def batch(self, setting: Setting, part: str, count: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images drawn anew, and the class of the garment that each asks for."""
        images, labels = self.garments(part, setting.classes)
        one, other = (torch.randint(0, len(labels), (count,), generator=chance) for _ in range(2))
        x, asked = setting.pairs(images[one], images[other], chance)
        y = torch.where(asked == 0, labels[one], labels[other])
        return x.to(self.device).contiguous(memory_format=self.layout), y.to(self.device)

    def validation(self, setting: Setting) -> Iterator[tuple[Tensor, Tensor]]:
        """The same images for every network."""
        chance = torch.Generator().manual_seed(5)
        return (self.batch(setting, "t10k", 500, chance) for _ in range(VALIDATION // 500))

    def network(self, setting: Setting, seed: int, *, attention: bool = True) -> nn.Module:
        """An untrained network; what all arms have in common is the same under one seed."""
        torch.manual_seed(seed)
        x, _ = self.batch(setting, "train", 2, torch.Generator().manual_seed(0))
        attend = ATTENTION[setting.attention if attention else "none"]
        return self._placed(setting.network(x.shape[1], len(setting.classes), attend))

    def _placed(self, network: nn.Module) -> nn.Module:
        return network.to(self.device, memory_format=self.layout)  # type: ignore[call-overload, no-any-return]

    def start(self, setting: Setting, seed: int, *, attention: bool) -> nn.Module:
        """What an arm begins with: an untrained network, or one that was trained on other classes."""
        if setting.before is None:
            return self.network(setting, seed, attention=attention)
        key = setting.of or setting.name, seed
        if key not in self._trained:
            first = dataclasses.replace(
                setting, classes=setting.before, before=None, steps=2 * setting.steps, lr=0.1, optimizer="sgd"
            )
            network = self.network(first, seed)
            self.train([(network, MAIN["vanilla"])], first, seed + 5000)
            self._trained = {key: network}
        network = copy.deepcopy(self._trained[key])
        torch.manual_seed(seed)
        network.fc = nn.Linear(network.fc.in_features, len(setting.classes))  # type: ignore[arg-type, union-attr]
        return self._placed(network)

    def train(self, arms: list[tuple[nn.Module, Arm]], setting: Setting, seed: int) -> None:
        """The setting's optimizer, a short warm-up, and a cosine to 0: networks of one order."""
        cuda = self.device.type == "cuda"
        trained: Trained = []
        for network, arm in arms:
            groups = _groups(network.train(), setting, arm)
            trained.append((network, OPTIMIZERS[setting.optimizer](groups, setting.lr, cuda)))
        (order,) = {arm.order for _, arm in arms}
        chance = torch.Generator().manual_seed(seed + order)
        if cuda:
            from accuracy_cuda import SideBySide

            step: Callable[[Tensor, Tensor, float], None] = SideBySide(trained)
        else:
            step = InTurn(trained)
        for number in range(setting.steps):
            part = min(1.0, 20 * (number + 1) / setting.steps) * 0.5 * (1 + math.cos(math.pi * number / setting.steps))
            step(*self.batch(setting, "train", setting.batch, chance), part)

    @torch.no_grad()
    def scores(self, network: nn.Module, setting: Setting) -> tuple[Tensor, float]:
        """For each validation image whether it is named rightly; and the mean loss."""
        network.eval()
        right, loss = [], 0.0
        for x, y in self.validation(setting):
            output = network(x)
            right.append(output.argmax(1) == y)
            loss += float(F.cross_entropy(output, y, reduction="sum"))
        named = torch.cat(right).cpu()
        return named, loss / len(named)

    def run(self, setting: Setting, names: Iterable[str], seed: int) -> Iterator[dict[str, Any]]:
        """Trains arms that see the images in one order, and gives what each of them measured."""
        began = time.process_time()
        made = {name: self.made(setting, setting.arms[name], seed) for name in names}
        self.train([(network, setting.arms[name]) for name, (network, _) in made.items()], setting, seed)
        seconds = (time.process_time() - began) / len(made)
        for name, (network, base) in made.items():
            yield self.measured(network, base, setting, name, seed, seconds)

    def made(self, setting: Setting, arm: Arm, seed: int) -> tuple[nn.Module, int]:
        """The network that an arm trains, and how many parameters it had before anything was connected."""
        network = self.start(setting, seed, attention=arm.attention)
        base = sum(p.numel() for p in network.parameters())
        if arm.options is not None or arm.inserted is not None:
            torch.manual_seed(7000 + seed)
            x, _ = self.batch(setting, "train", 2, torch.Generator().manual_seed(0))
            network = self._placed(_converted(network.cpu(), x.cpu(), arm))
        return network, base

    def measured(
        self, network: nn.Module, base: int, setting: Setting, name: str, seed: int, seconds: float
    ) -> dict[str, Any]:
        """A row: what a network that was trained says of the validation images."""
        arm, began = setting.arms[name], time.process_time()
        right, loss = self.scores(network, setting)
        row = {
            "setting": setting.name,
            "arm": name,
            "seed": seed,
            **setting.budget,
            "device": self.device.type,
            "machine": self.machine,
            "accuracy": round(float(right.double().mean()), 5),
            "loss": round(loss, 5),
            "parameters": base,
            "added": sum(p.numel() for p in network.parameters() if p.requires_grad) - base,
            **self.maps(network, setting),
        }
        if arm.options is not None:
            betas = [connection.beta for connection in dcafy.connections(network).values()]
            row["beta"] = round(sum(float(beta.detach().abs()) for beta in betas) / len(betas), 4)
            for beta in betas:
                beta.data.zero_()
            cut, cut_loss = self.scores(network, setting)
            row["cut"], row["cut_loss"] = round(float(cut.double().mean()), 5), round(cut_loss, 5)
        row["seconds"] = round(seconds + time.process_time() - began, 1)
        row["right"] = packed(right)
        return row

    @torch.no_grad()
    def maps(self, network: nn.Module, setting: Setting) -> dict[str, float]:
        """Paper Fig. 1: the share of attention values from 0.4 to 0.6, and how they spread over channels."""
        seen: list[Tensor] = []

        def see(gate: nn.Module, given: Any, T: Tensor) -> None:
            seen.append(T / 2 if getattr(gate, "doubled", False) else T)  # 2σ, of what is put in as a no-op

        gates = [module for module in network.modules() if isinstance(module, self.gates)]
        handles = [gate.register_forward_hook(see) for gate in gates]
        x, _ = self.batch(setting, "t10k", 500, torch.Generator().manual_seed(6))
        network.eval()
        network(x)
        for handle in handles:
            handle.remove()
        if not seen:
            return {}
        near = sum(float(((T - 0.5).abs() < 0.1).double().mean()) for T in seen) / len(seen)
        spread = sum(float(T.flatten(1).std(1).mean()) for T in seen) / len(seen)
        return {"near_half": round(near, 4), "spread": round(spread, 4)}


def _converted(network: nn.Module, example: Tensor, arm: Arm) -> nn.Module:
    if arm.inserted is not None:
        network = dcafy.insert(network, arm.inserted, reduction=8, example_inputs=example)
    if arm.options is not None:
        network = dcafy.convert(network, example_inputs=example, verify=False, **arm.options)
    for connection in dcafy.connections(network).values() if arm.prepare is not None else ():
        arm.prepare(network, connection)
    if arm.heard is not None:
        _hear(network, arm.heard)
    return network


def _hear(network: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Has every unit hear what ``change`` makes of what the units before hand on: states, or messages."""

    def changed(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: change(own(*given))

    for relay in hearing_states(network).values():
        relay.__dict__["heard"] = changed(relay.heard)
    for connection in dcafy.connections(network).values() if is_connected(network) else ():
        connection.__dict__["matched"] = changed(connection.matched)


def _groups(network: nn.Module, setting: Setting, arm: Arm) -> list[dict[str, Any]]:
    match, scale = (setting.lr * (1.0 if arm.options is None else rate) for rate in arm.rates)
    own, scales, put_in = own_parameters(network), scale_parameters(network), inserted_parameters(network)
    apart = undecayed(network)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in network.parameters():
        if p.requires_grad:
            rate = setting.lr * arm.faster if id(p) in put_in else setting.lr
            if id(p) not in put_in or arm.options is not None:
                rate = scale if id(p) in scales else match if id(p) in own else rate
            groups.setdefault((rate, 0.0 if id(p) in apart else WEIGHT_DECAYS[setting.optimizer]), []).append(p)
    return [{"params": part, "lr": rate, "weight_decay": decay} for (rate, decay), part in groups.items()]


def packed(right: Tensor) -> str:
    """One bit for each validation image."""
    numbers = (right.view(-1, 8).int() << torch.arange(8)).sum(1).to(torch.uint8)
    return base64.b85encode(zlib.compress(bytes(numbers.tolist()))).decode()


def unpacked(text: str) -> Tensor:
    numbers = torch.frombuffer(bytearray(zlib.decompress(base64.b85decode(text))), dtype=torch.uint8)
    return ((numbers[:, None] >> torch.arange(8)) & 1).bool().flatten()


# --- all runs ------------------------------------------------------------------------------------------------------

Key = tuple[str, str, int]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows; what a killed run left half written is taken off the file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def valid(row: dict[str, Any]) -> bool:
    """Whether a row is of a setting and arm that there are, with the budget that they have now."""
    setting = SETTINGS.get(row["setting"])
    return setting is not None and row["arm"] in setting.arms and setting.budget.items() <= row.items()


def due(settings: list[Setting], seeds: int | None) -> Iterator[Key]:
    """Every run, in order: vanilla networks first, whose spread says whether a setting can show anything."""
    main = [setting for setting in settings if setting.main]
    for setting in main:
        yield from ((setting.name, "vanilla", seed) for seed in range(min(4, seeds or 4)))
    for group in (main, [setting for setting in settings if not setting.main]):
        asked = ((one, arm, range(seeds) if seeds else one.seeds(arm)) for one in group for arm in one.arms)
        keys = [(home(setting, arm), arm, seed) for setting, arm, of_arm in asked for seed in of_arm]
        yield from sorted(keys, key=operator.itemgetter(2))


def carried_on(
    study: Study, path: Path, rows: list[dict[str, Any]], keys: Iterable[Key], settings: Mapping[str, Setting]
) -> None:
    """Makes what is not there yet of the runs asked for, into ``rows`` and the file; on a GPU a seed's all at once."""
    done = {(row["setting"], row["arm"], row["seed"]) for row in rows}
    groups: dict[Any, list[str]] = {}
    for name, arm, seed in dict.fromkeys(keys):
        if (name, arm, seed) not in done:
            alone = arm if study.device.type == "cpu" else settings[name].arms[arm].order
            groups.setdefault((name, seed, alone), []).append(arm)
    for (name, seed, _), arms in groups.items():
        for row in study.run(settings[name], arms, seed):
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            rows.append(row)
            print(f"{name}, {row['arm']}, seed {seed}: {row['accuracy']:.2%} in {row['seconds']} s", flush=True)


def shared(text: str) -> tuple[int, int]:
    """``"1/4"`` -> 1, 4."""
    mine, _, all_of_them = text.partition("/")
    if not 0 <= int(mine) < int(all_of_them):
        raise ValueError
    return int(mine), int(all_of_them)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="GLOB", help="runs such as 'switch/*' or 'cued/centred'")
    parser.add_argument("--seeds", type=int, help="another number of them")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="Fashion-MNIST")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--share", type=shared, default=(0, 1), metavar="I/N", help="every N-th seed from the I-th on")
    parser.add_argument("--report", action="store_true", help="write the tables, and run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, globs = [row for row in read(options.results) if valid(row)], options.only or ["*"]
    if not options.report:
        mine, all_of_them = options.share
        keys = [
            (name, arm, seed)
            for name, arm, seed in due(list(SETTINGS.values()), options.seeds)
            if seed % all_of_them == mine and any(fnmatch(f"{name}/{arm}", glob) for glob in globs)
        ]
        carried_on(Study(options.data, options.device), options.results, rows, keys, SETTINGS)
    from accuracy_report import report, spreads

    print(spreads(rows))
    options.results.with_suffix(".md").write_text(report(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
