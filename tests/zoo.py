"""The networks that the rules are shown on, and what a reader of their sources finds in them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import networks
import timm
import torch
import torchvision
from torch import nn
from trained import seeded, trained

Names = tuple[str, ...]
Links = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Expected:
    """The attention blocks of a network in the order data meets them, by dimension, and who hears whom.

    ``skipped``  blocks that follow another and cannot hear it
    """

    channel: Names = ()
    spatial: Names = ()
    links: Links = ()
    skipped: Names = ()


@dataclass(frozen=True)
class Network:
    """One network with attention: how it is built, on which images it runs, and what is in it.

    ``other``   another image size; ``None`` where the architecture takes one only
    """

    name: str
    build: Callable[[], nn.Module]
    expected: Callable[[nn.Module], Expected] = field(repr=False)
    image: int = 64
    other: int | None = 48

    def images(self, batch: int = 2, size: int | None = None, seed: int = 1) -> torch.Tensor:
        """Random images that differ in brightness, contrast and colour, so that pooled contexts differ too."""
        with seeded(seed):
            noise = torch.randn(batch, 3, size or self.image, size or self.image)
            return noise * (0.5 * torch.rand(batch, 1, 1, 1) + 0.75) + 0.5 * torch.randn(batch, 3, 1, 1)

    def trained(self) -> nn.Module:
        """A new network with trained-like values; the same one at every call."""
        return trained(self.build, self.images(8))


def pairs(names: Names) -> Links:
    """Each name with the one after it: the links of a chain that does not branch."""
    return tuple(itertools.pairwise(names))


def one_chain(*class_names: str) -> Callable[[nn.Module], Expected]:
    """Every module of these classes is one channel block, and all stand in one chain."""

    def expected(model: nn.Module) -> Expected:
        names = tuple(path for path, module in model.named_modules() if type(module).__name__ in class_names)
        assert names, f"no module is a {' or '.join(class_names)}"
        return Expected(channel=names, links=pairs(names))

    return expected


def channel_chain(*names: str) -> Callable[[nn.Module], Expected]:
    return lambda _model: Expected(channel=names, links=pairs(names))


def both_chains(channel: Names, spatial: Names) -> Callable[[nn.Module], Expected]:
    return lambda _model: Expected(channel=channel, spatial=spatial, links=pairs(channel) + pairs(spatial))


def in_blocks(inner: str, blocks: int = 4) -> Names:
    return tuple(f"blocks.{index}.{inner}" if inner else f"blocks.{index}" for index in range(blocks))


def torchvision_network(name: str, *classes: str, image: int = 128, other: int | None = 96, **options: Any) -> Network:
    build = functools.partial(torchvision.models.get_model, name, weights=None, **options)
    return Network(f"torchvision:{name}", build, one_chain(*classes), image, other)


def timm_network(name: str, *classes: str, image: int = 128, other: int | None = 96, **options: Any) -> Network:
    build = functools.partial(timm.create_model, name, **options)
    return Network(f"timm:{name}", build, one_chain(*classes), image, other)


DROPS = {"drop_rate": 0.2, "drop_path_rate": 0.2}


def small_maxvit() -> nn.Module:
    """What ``maxvit_t`` is made of, at a fraction of its cost: blocks of two layers and of one, windows and grids."""
    return torchvision.models.MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=2,
        block_channels=[16, 16, 24, 32],
        block_layers=[2, 1, 1, 1],
        head_dim=8,
        stochastic_depth_prob=0.2,
        num_classes=10,
    )


LIBRARY_NETWORKS = (
    Network("torchvision:small_maxvit", small_maxvit, one_chain("SqueezeExcitation"), image=64, other=None),
    torchvision_network("efficientnet_b0", "SqueezeExcitation"),
    torchvision_network("efficientnet_v2_s", "SqueezeExcitation"),
    torchvision_network("mobilenet_v3_large", "SqueezeExcitation"),
    torchvision_network("regnet_y_400mf", "SqueezeExcitation"),
    torchvision_network("maxvit_t", "SqueezeExcitation", image=224, other=None),
    timm_network("seresnet50", "SEModule", **DROPS),
    timm_network("efficientnet_b0", "SqueezeExcite", **DROPS),
    timm_network("mobilenetv3_large_100", "SqueezeExcite", **DROPS),
    timm_network("ecaresnet26t", "EcaModule", **DROPS),
    timm_network("gcresnet50t", "GlobalContext", **DROPS),
    timm_network("skresnet18", "SelectiveKernelAttn", **DROPS),
    timm_network("resnest14d", "SplitAttn", **DROPS),
    timm_network("ese_vovnet19b_dw", "EffectiveSEModule", **DROPS),
    timm_network("legacy_seresnet18", "SEModule", drop_rate=0.2),
)

BRANCHES = Expected(
    channel=("trunk", "left.2", "right.2", "joined"),
    links=(("trunk", "left.2"), ("trunk", "right.2"), ("right.2", "joined")),
)

GATHER_OVER_4 = functools.partial(networks.GatherExcite, extent=4)
GE_WIDTHS = Expected(
    spatial=in_blocks("attention"),
    links=tuple((f"blocks.{i}.attention", f"blocks.{i + 1}.attention") for i in range(3)),
)
"""Feature maps of 16 and of 24 channels: the layers of ``channel_match`` bring one to the other at each place."""


def hand_written(name: str, build: Callable[[], nn.Module], expected: Callable[[nn.Module], Expected]) -> Network:
    return Network(name, build, expected)


def attention_network(name: str, attention: Callable[[int], nn.Module], **sites: str) -> Network:
    """A small residual network with ``attention`` in each of its blocks; ``sites`` say where, by dimension."""
    channel, spatial = (in_blocks(sites[key]) if key in sites else () for key in ("channel", "spatial"))
    build = functools.partial(networks.with_attention, attention)
    return hand_written(name, build, both_chains(channel, spatial))


HAND_WRITTEN_NETWORKS = (
    attention_network("se_linear", networks.SELinear, channel="attention"),
    attention_network("se_conv_in_place", networks.SEConv, channel="attention"),
    attention_network("se_in_place_context", networks.SEInPlaceContext, channel="attention"),
    attention_network("se_dropout", networks.SEDropout, channel="attention"),
    attention_network("global_context_add", networks.GlobalContext, channel="attention"),
    attention_network("ge_global", networks.GatherExcite, channel="attention"),
    hand_written(
        "ge_extent",
        functools.partial(networks.with_attention, GATHER_OVER_4, (16, 16, 16, 16)),
        both_chains((), in_blocks("attention")),
    ),
    hand_written(
        "ge_extent_widths",
        functools.partial(networks.with_attention, GATHER_OVER_4),
        lambda _model: GE_WIDTHS,
    ),
    attention_network("cbam", networks.CBAM, channel="attention.channel", spatial="attention.spatial"),
    attention_network("bam", networks.BAM, channel="attention", spatial="attention#2"),
    attention_network("scse", networks.SCSE, channel="attention.cse", spatial="attention.sse"),
    hand_written("se_inline", networks.inline_network, channel_chain(*in_blocks(""))),
    hand_written("se_root_forward", networks.RootForward, channel_chain("root", "root#2", "root#3")),
    hand_written("se_nhwc", networks.ChannelsLastNetwork, channel_chain(*in_blocks("attention"))),
    hand_written("se_shared", networks.SharedAttention, channel_chain("se", "se#2", "se#3")),
    hand_written("se_branches", networks.Branches, lambda _model: BRANCHES),
    hand_written(
        "scse_decoder",
        networks.Decoder,
        both_chains(("attention1.cse", "attention2.cse"), ("attention1.sse", "attention2.sse")),
    ),
)

NETWORKS = LIBRARY_NETWORKS + HAND_WRITTEN_NETWORKS
"""Those that every rule is shown on, and whose roles were read off their sources."""

SMALL_CBAM = hand_written(
    "cbam of three blocks",
    functools.partial(networks.with_attention, networks.CBAM, (16, 16, 24)),
    both_chains(in_blocks("attention.channel", 3), in_blocks("attention.spatial", 3)),
)

OTHERS = (
    torchvision_network("mobilenet_v3_small", "SqueezeExcitation"),
    timm_network("seresnet18", "SEModule"),
    timm_network("seresnext26d_32x4d", "SEModule"),
    timm_network("mobilenetv3_small_100", "SqueezeExcite"),
    SMALL_CBAM,
)
"""Those of single tests."""

BY_NAME = {network.name: network for network in NETWORKS + OTHERS}

QUICK = {
    "torchvision:small_maxvit",
    "torchvision:regnet_y_400mf",
    "timm:legacy_seresnet18",
    "timm:skresnet18",
    *(network.name for network in (*HAND_WRITTEN_NETWORKS, SMALL_CBAM)),
}
"""Those whose tests plain ``pytest`` runs; those of the others are ``slow``."""

EVERY_HOST = {"se_linear", "cbam", "bam", "se_inline", "se_root_forward", "se_shared", "scse_decoder"}
"""One for each way in which modules hold attention: by itself, in two modules, in a container's elements, in a block
and in the root that do more, in one that is called several times, in a decoder."""
