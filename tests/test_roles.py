"""Which nodes make extraction, transformation and fusion, as somebody wrote them down who read the models' sources.

Nodes that only give a tensor another shape are left out of the tables: where the pooled vector is reshaped on its
way into the transformation, either role could claim the reshape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from subjects import case, subject
from zoo import NETWORKS

import dcafy

SHAPE_ONLY = re.compile(
    r"(view|view_as|reshape|expand|expand_as|squeeze|unsqueeze|flatten|permute|transpose|contiguous|size|getattr"
    r"|getitem|dim)(_\d+)?"
)


@dataclass(frozen=True)
class Step:
    """One node of a role: what its name must look like, and whether the role may do without it."""

    pattern: str
    optional: bool = False

    def fits(self, node: str) -> bool:
        return re.fullmatch(self.pattern, node) is not None


def node_name(path: str) -> str:
    """The name torch.fx gives to the call of the leaf module at ``path``."""
    name = re.sub(r"[^0-9a-zA-Z_]+", "_", path)
    return re.sub(r"(?<=[a-z])([A-Z])", r"_\1", name).lower()


def leaf(path: str) -> Step:
    """A call of the module at ``path``."""
    return Step(re.escape(node_name(path)))


def again(path: str) -> Step:
    """A later call of a module in the row that ``path`` names: torch.fx counts such names on."""
    return Step(re.escape(node_name(path)) + r"_\d+")


def call(*names: str) -> Step:
    """A function or method of one of these names, whichever time it is called."""
    return Step(f"({'|'.join(names)})_?(_\\d+)?")


def perhaps(step: Step) -> Step:
    return Step(step.pattern, optional=True)


@dataclass(frozen=True)
class Roles:
    extraction: tuple[Step, ...]
    transformation: tuple[Step, ...]
    fusion: tuple[Step, ...]
    gate: str
    fusion_kind: str = "mul"


def leaves(block: str, *names: str) -> tuple[Step, ...]:
    return tuple(leaf(f"{block}.{name}") for name in names)


MEAN = (call("mean"),)
MUL = (call("mul"),)


def torchvision_se(gate: str = "sigmoid") -> Callable[[str], Roles]:
    return lambda p: Roles(
        leaves(p, "avgpool"), leaves(p, "fc1", "activation", "fc2", "scale_activation"), MUL, gate=gate
    )


def timm_se(p: str) -> Roles:
    """timm.layers.squeeze_excite.SEModule; ``bn`` is an Identity, the gate a class of timm around ``x.sigmoid()``."""
    bn = perhaps(leaf(f"{p}.bn"))
    steps = (leaf(f"{p}.fc1"), bn, leaf(f"{p}.act"), leaf(f"{p}.fc2"), call("sigmoid"))
    return Roles(MEAN, steps, MUL, gate="sigmoid")


def timm_efficientnet_se(gate: str) -> Callable[[str], Roles]:
    return lambda p: Roles(MEAN, leaves(p, "conv_reduce", "act1", "conv_expand", "gate"), MUL, gate=gate)


def timm_eca(p: str) -> Roles:
    return Roles(MEAN, (leaf(f"{p}.conv"), call("sigmoid")), MUL, gate="sigmoid")


def timm_global_context(p: str) -> Roles:
    """Softmax-weighted pooling ``x @ softmax(conv_attn(x))``, an MLP, added; no gate on the way."""
    extraction = (perhaps(leaf(f"{p}.conv_attn")), perhaps(call("softmax")), call("matmul"))
    mlp = (
        *leaves(p, "mlp_add.fc1", "mlp_add.norm", "mlp_add.act"),
        perhaps(leaf(f"{p}.mlp_add.drop")),
        leaf(f"{p}.mlp_add.fc2"),
    )
    return Roles(extraction, mlp, (call("add"),), gate="none", fusion_kind="add")


def timm_selective_kernel(p: str) -> Roles:
    """The branches are summed, pooled, mapped to one softmax over branches; fused by a weighted sum."""
    steps = (*leaves(p, "fc_reduce", "bn", "act", "fc_select"), call("softmax"))
    return Roles((perhaps(call("sum")), call("mean")), steps, (call("mul"), perhaps(call("sum"))), gate="softmax")


def timm_split_attention(p: str) -> Roles:
    steps = (*leaves(p, "fc1", "bn1", "act1", "fc2"), call("softmax"))
    return Roles((perhaps(call("sum")), call("mean")), steps, (call("mul"), perhaps(call("sum"))), gate="softmax")


def timm_effective_se(p: str) -> Roles:
    return Roles(MEAN, leaves(p, "fc", "gate"), MUL, gate="hard_sigmoid")


def timm_legacy_se(p: str) -> Roles:
    return Roles(MEAN, leaves(p, "fc1", "relu", "fc2", "sigmoid"), MUL, gate="sigmoid")


def se_linear(p: str) -> Roles:
    return Roles(leaves(p, "squeeze"), leaves(p, "excite.0", "excite.1", "excite.2", "excite.3"), MUL, gate="sigmoid")


def se_linear_again(p: str) -> Roles:
    """The same module, called a second time."""
    steps = tuple(again(f"{p}.excite") for _ in range(4))
    return Roles((again(f"{p}.squeeze"),), steps, MUL, gate="sigmoid")


def se_conv(p: str) -> Roles:
    steps = (leaf(f"{p}.reduce"), call("relu"), leaf(f"{p}.expand"), call("sigmoid"))
    return Roles((call("adaptive_avg_pool2d"),), steps, (call("mul", "imul"),), gate="sigmoid")


def se_in_place_context(p: str) -> Roles:
    """``mul_`` and ``sub_`` change G where it lies: no later node reads what they return."""
    layers = (leaf(f"{p}.reduce"), call("relu"), leaf(f"{p}.expand"), call("sigmoid"))
    return Roles(MEAN, (perhaps(call("mul")), perhaps(call("sub")), *layers), MUL, gate="sigmoid")


def se_dropout(p: str) -> Roles:
    steps = (*leaves(p, "reduce", "norm"), call("relu"), call("dropout"), leaf(f"{p}.expand"), call("hardsigmoid"))
    return Roles(MEAN, steps, MUL, gate="hard_sigmoid")


def global_context(p: str) -> Roles:
    extraction = (perhaps(leaf(f"{p}.weigh")), perhaps(call("softmax")), call("einsum"))
    steps = leaves(p, "transform.0", "transform.1", "transform.2", "transform.3")
    return Roles(extraction, steps, (call("add"),), gate="none", fusion_kind="add")


def gather_excite_global(p: str) -> Roles:
    return Roles((call("adaptive_avg_pool2d"),), (call("sigmoid"),), MUL, gate="sigmoid")


def gather_excite_extent(p: str) -> Roles:
    return Roles((call("avg_pool2d"),), (call("interpolate"), call("sigmoid")), MUL, gate="sigmoid")


def cbam_channel(p: str) -> Roles:
    """Two poolings through one MLP: the second calls count torch.fx's names on; ``mlp.0`` only flattens."""
    first = (perhaps(leaf(f"{p}.mlp.0")), *leaves(p, "mlp.1", "mlp.2", "mlp.3"))
    second = tuple(again(f"{p}.mlp") for _ in range(3))
    steps = (*first, perhaps(again(f"{p}.mlp")), *second, call("add"), call("sigmoid"))
    return Roles((call("avg_pool2d"), call("max_pool2d")), steps, MUL, gate="sigmoid")


def cbam_spatial(p: str) -> Roles:
    """Maximum and mean over channels, concatenated to one G of two channels; ``max`` returns a tuple."""
    extraction = (call("max"), call("mean"), call("cat"))
    steps = (*leaves(p, "conv", "norm"), call("sigmoid"))
    return Roles(extraction, steps, MUL, gate="sigmoid")


def bam_channel(p: str) -> Roles:
    """The channel half of a map that both halves make: they are added, gated, and 1 is added."""
    flatten, joined = perhaps(leaf(f"{p}.channel.flatten")), (call("add"), call("sigmoid"), call("add"))
    steps = (flatten, *leaves(f"{p}.channel", "fc1", "norm", "act", "fc2"), *joined)
    return Roles(leaves(p, "channel.pool"), steps, MUL, gate="sigmoid")


def bam_spatial(p: str) -> Roles:
    """The spatial half: its last layer is a convolution to one channel; the name is the whole module's second."""
    steps = (call("add"), call("sigmoid"), call("add"))
    return Roles(leaves(p.removesuffix("#2"), "spatial.project"), steps, MUL, gate="sigmoid")


def scse_channel(p: str) -> Roles:
    return Roles(MEAN, (leaf(f"{p}.fc1"), call("relu"), leaf(f"{p}.fc2"), call("sigmoid")), MUL, gate="sigmoid")


def scse_spatial(p: str) -> Roles:
    return Roles(leaves(p, "conv"), (call("sigmoid"),), MUL, gate="sigmoid")


def se_inline(p: str) -> Roles:
    steps = (leaf(f"{p}.fc1"), call("relu"), leaf(f"{p}.fc2"), call("sigmoid"))
    return Roles((call("avg_pool2d"),), steps, MUL, gate="sigmoid")


def root_forward(number: int, extraction: Step, fusion: Step) -> Callable[[str], Roles]:
    steps = (leaf(f"down{number}"), call("relu"), leaf(f"up{number}"), call("sigmoid"))
    return lambda _p: Roles((extraction,), steps, (fusion,), gate="sigmoid")


def se_nhwc(p: str) -> Roles:
    return Roles(MEAN, (leaf(f"{p}.fc1"), call("relu"), leaf(f"{p}.fc2"), call("sigmoid")), MUL, gate="sigmoid")


TABLE: dict[str, dict[str, Callable[[str], Roles]]] = {
    "torchvision:efficientnet_b0": {
        "features.1.0.block.1": torchvision_se(),
        "features.2.0.block.2": torchvision_se(),
        "features.7.0.block.2": torchvision_se(),
    },
    "torchvision:efficientnet_v2_s": {
        "features.4.0.block.2": torchvision_se(),
        "features.4.1.block.2": torchvision_se(),
    },
    "torchvision:mobilenet_v3_large": {
        "features.4.block.2": torchvision_se("hard_sigmoid"),
        "features.5.block.2": torchvision_se("hard_sigmoid"),
    },
    "torchvision:regnet_y_400mf": {
        "trunk_output.block1.block1-0.f.se": torchvision_se(),
        "trunk_output.block2.block2-0.f.se": torchvision_se(),
    },
    "torchvision:small_maxvit": {
        "blocks.0.layers.0.layers.MBconv.layers.squeeze_excitation": torchvision_se(),
        "blocks.0.layers.1.layers.MBconv.layers.squeeze_excitation": torchvision_se(),
        "blocks.3.layers.0.layers.MBconv.layers.squeeze_excitation": torchvision_se(),
    },
    "torchvision:maxvit_t": {
        "blocks.0.layers.0.layers.MBconv.layers.squeeze_excitation": torchvision_se(),
        "blocks.0.layers.1.layers.MBconv.layers.squeeze_excitation": torchvision_se(),
    },
    "timm:seresnet50": {"layer1.0.se": timm_se, "layer1.1.se": timm_se, "layer4.2.se": timm_se},
    "timm:efficientnet_b0": {
        "blocks.0.0.se": timm_efficientnet_se("sigmoid"),
        "blocks.1.0.se": timm_efficientnet_se("sigmoid"),
    },
    "timm:mobilenetv3_large_100": {
        "blocks.2.0.se": timm_efficientnet_se("hard_sigmoid"),
        "blocks.2.1.se": timm_efficientnet_se("hard_sigmoid"),
    },
    "timm:ecaresnet26t": {"layer1.0.se": timm_eca, "layer1.1.se": timm_eca},
    "timm:gcresnet50t": {"stages.0.0.attn": timm_global_context, "stages.0.1.attn": timm_global_context},
    "timm:skresnet18": {"layer1.0.conv1.attn": timm_selective_kernel, "layer1.1.conv1.attn": timm_selective_kernel},
    "timm:resnest14d": {"layer1.0.conv2": timm_split_attention, "layer2.0.conv2": timm_split_attention},
    "timm:ese_vovnet19b_dw": {"stages.0.blocks.0.attn": timm_effective_se, "stages.1.blocks.0.attn": timm_effective_se},
    "timm:legacy_seresnet18": {"layer1.0.se_module": timm_legacy_se, "layer1.1.se_module": timm_legacy_se},
    "se_linear": {"blocks.0.attention": se_linear, "blocks.3.attention": se_linear},
    "se_conv_in_place": {"blocks.0.attention": se_conv, "blocks.1.attention": se_conv},
    "se_in_place_context": {"blocks.0.attention": se_in_place_context, "blocks.1.attention": se_in_place_context},
    "se_dropout": {"blocks.0.attention": se_dropout, "blocks.1.attention": se_dropout},
    "global_context_add": {"blocks.0.attention": global_context, "blocks.1.attention": global_context},
    "ge_global": {"blocks.0.attention": gather_excite_global, "blocks.1.attention": gather_excite_global},
    "ge_extent": {"blocks.0.attention": gather_excite_extent, "blocks.1.attention": gather_excite_extent},
    "ge_extent_widths": {"blocks.3.attention": gather_excite_extent},
    "cbam": {
        "blocks.0.attention.channel": cbam_channel,
        "blocks.0.attention.spatial": cbam_spatial,
        "blocks.1.attention.channel": cbam_channel,
        "blocks.1.attention.spatial": cbam_spatial,
    },
    "bam": {"blocks.0.attention": bam_channel, "blocks.0.attention#2": bam_spatial, "blocks.1.attention": bam_channel},
    "scse": {"blocks.0.attention.cse": scse_channel, "blocks.0.attention.sse": scse_spatial},
    "scse_decoder": {"attention1.cse": scse_channel, "attention1.sse": scse_spatial},
    "se_inline": {"blocks.0": se_inline, "blocks.1": se_inline},
    "se_root_forward": {
        "root": root_forward(1, call("mean"), call("mul")),
        "root#2": root_forward(2, call("mean"), call("mul")),
        "root#3": root_forward(3, call("adaptive_avg_pool2d"), call("einsum")),
    },
    "se_nhwc": {"blocks.0.attention": se_nhwc, "blocks.1.attention": se_nhwc},
    "se_shared": {"se": se_linear},
    "se_branches": {"trunk": se_linear, "right.2": se_linear, "joined": se_linear},
}
"""Network -> block -> roles. A block is read off its source; what stands here was not taken from a plan."""

ROWS = [case(network, block, id=f"{network}-{block}") for network, blocks in TABLE.items() for block in blocks]


def fits(nodes: Sequence[str], steps: Sequence[Step]) -> bool:
    """Whether the nodes, without those that only reshape, are these steps in this order."""
    left = [node for node in nodes if not SHAPE_ONLY.fullmatch(node)]
    for step in steps:
        if left and step.fits(left[0]):
            left.pop(0)
        elif not step.optional:
            return False
    return not left


@pytest.mark.parametrize(("network", "name"), ROWS)
def test_roles_are_those_of_the_source(network: str, name: str) -> None:
    block = subject(network).plan.block(name)
    roles = TABLE[network][name](name)
    assert fits(block.extraction, roles.extraction), block.extraction
    assert fits(block.transformation, roles.transformation), block.transformation
    assert fits(block.fusion, roles.fusion), block.fusion
    assert block.gate == roles.gate
    assert block.fusion_kind == roles.fusion_kind


@pytest.mark.parametrize(("network", "name"), ROWS)
def test_no_row_fits_with_two_roles_exchanged(network: str, name: str) -> None:
    """What the comparison is worth: the table refuses a block whose roles are mixed up or incomplete."""
    block = subject(network).plan.block(name)
    roles = TABLE[network][name](name)
    assert not fits(block.transformation, roles.extraction)
    assert not fits(block.extraction, roles.transformation)
    assert not fits(block.fusion, roles.extraction)
    steps = [node for node in block.transformation if not SHAPE_ONLY.fullmatch(node)]
    assert not fits(steps[:-1], roles.transformation)
    assert not fits((*block.extraction, steps[0]), roles.extraction)


def test_every_network_has_a_row() -> None:
    assert set(TABLE) == {network.name for network in NETWORKS}


@pytest.mark.parametrize("network", [case(name) for name in TABLE])
def test_sizes_and_channels(network: str) -> None:
    """Channel blocks carry vectors, spatial blocks maps of few channels."""
    blocks: tuple[dcafy.AttentionBlock, ...] = subject(network).plan.blocks
    for block in blocks:
        assert block.channels >= 1
        if block.dimension == "channel":
            assert block.size is None
            assert block.channels >= 8
        else:
            assert block.size is not None
            assert len(block.size) == 2
            assert min(block.size) >= 4


def test_channels_are_those_of_the_model() -> None:
    blocks = {block.name: block for block in subject("cbam").plan.blocks}
    rows = {"channel": (16, 16, 24, 32), "spatial": (2, 2, 2, 2)}
    for half, channels in rows.items():
        assert tuple(blocks[f"blocks.{i}.attention.{half}"].channels for i in range(4)) == channels
    assert [blocks[f"blocks.{i}.attention.spatial"].size for i in range(4)] == [(32, 32), (32, 32), (16, 16), (16, 16)]
    assert tuple(block.channels for block in subject("se_nhwc").plan.blocks) == (16, 16, 24, 32)


@pytest.mark.parametrize("network", [case("torchvision:mobilenet_v3_large")])
def test_channels_are_those_of_a_library_model(network: str) -> None:
    assert tuple(block.channels for block in subject(network).plan.blocks)[:3] == (72, 120, 120)
