"""Networks without attention, many of which look like it: nothing is found, nothing is converted."""

from __future__ import annotations

import functools
from collections.abc import Callable

import networks
import pytest
import timm
import torch
import torchvision
from networks import with_attention
from torch import Tensor, nn
from trained import seeded

import dcafy


class Gated(nn.Module):
    """A full-size sigmoid gate computed by a 3x3 convolution: gating, not attention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate(x))


class SelfCalibrated(nn.Module):
    """Self-calibrated convolution: its pooling leaves one place at some sizes, which does not make it global."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(8)
        self.down = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        context = nn.functional.interpolate(self.down(self.pool(x)), size=x.shape[2:])
        return self.conv(x) * torch.sigmoid(x + context)


class WeightsByEinsum(nn.Module):
    """A gate computed by two 1x1 convolutions that are written as contractions with a weight."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(channels // 4, channels) * 0.3)
        self.up = nn.Parameter(torch.randn(channels, channels // 4) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("oc,bchw->bohw", self.down, x).relu()
        return x * torch.sigmoid(torch.einsum("oc,bchw->bohw", self.up, hidden))


class WeightsByMatmul(WeightsByEinsum):
    """The same with matrix products on a channels-last map."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1)
        return (y * torch.sigmoid((y @ self.down.T).relu() @ self.up.T)).permute(0, 3, 1, 2)


class UnfoldedConvolution(nn.Module):
    """A gate computed by a depthwise convolution that sums over its unfolded windows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, channels, 9, 1))

    def forward(self, x: Tensor) -> Tensor:
        windows = nn.functional.unfold(x, 3, padding=1).view(*x.shape[:2], 9, -1)
        return x * torch.sigmoid((windows * self.weight).sum(2).view(x.shape))


class Maxout(nn.Module):
    """A gate computed by a layer that takes the largest of eight."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x * torch.sigmoid(self.conv(x).view(n, 8, c, h, w).max(1)[0])


class TokensFirst(nn.Module):
    """Tokens [L, N, C]: what is left of a mean over the first axis has the batch where others have channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).permute(2, 0, 1)
        tokens = tokens * torch.sigmoid(self.gate(tokens.mean(0, keepdim=True)))
        return tokens.permute(1, 2, 0).reshape(x.shape)


class Conditioned(nn.Module):
    """Two stages that another image scales, by what a pooling left of it."""

    def __init__(self) -> None:
        super().__init__()
        self.style = nn.Sequential(networks.conv_norm(3, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.scales = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.stem = networks.conv_norm(3, 16)
        self.convs = nn.ModuleList([networks.conv_norm(16, 16) for _ in range(2)])

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x, style = self.stem(x), self.style(other)
        for conv, scale in zip(self.convs, self.scales, strict=True):
            x = conv(x * torch.sigmoid(scale(style))[:, :, None, None])
        return x


class MinMaxScale(nn.Module):
    """Each image brought to the range 0 to 1: reductions and a product, but nothing learned and no gate."""

    def forward(self, x: Tensor) -> Tensor:
        low = x.amin((1, 2, 3), keepdim=True)
        high = x.amax((1, 2, 3), keepdim=True)
        return (x - low) * (1.0 / (high - low + 1e-5))


class Involution(nn.Module):
    """A kernel for every place, computed from it, with which its window is summed up."""

    def __init__(self, channels: int, *, pooled: bool = False, bounded: bool = False) -> None:
        super().__init__()
        self.pooled, self.bounded = pooled, bounded
        self.reduce, self.span = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, 9 * 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = nn.functional.interpolate(nn.functional.avg_pool2d(x, 2), size=(h, w)) if self.pooled else x
        kernel = self.span(self.reduce(y).relu()).view(n, 4, 1, 9, h, w)
        kernel = kernel.softmax(3) if self.bounded else kernel
        windows = nn.functional.unfold(x, 3, padding=1).view(n, 4, c // 4, 9, h, w)
        return (kernel * windows).sum(3).view(n, c, h, w)


class InvolutionByShifts(Involution):
    """The same with windows that are nine shifted maps."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        kernel = self.span(self.reduce(x).relu()).view(n, 4, 9, h, w).softmax(2)
        padded = nn.functional.pad(x, (1, 1, 1, 1))
        shifted = [padded[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)]
        windows = torch.stack(shifted, 2).view(n, 4, c // 4, 9, h, w)
        return (kernel[:, :, None] * windows).sum(3).view(n, c, h, w)


class BinaryConvolution(nn.Module):
    """A convolution of signs, scaled at every place by the mean of the numbers there (XNOR-Net)."""

    def __init__(self, channels: int, *, pooled: bool = False) -> None:
        super().__init__()
        self.conv, self.pooled = nn.Conv2d(channels, channels, 3, padding=1, bias=False), pooled
        self.register_buffer("window", torch.full((1, 1, 3, 3), 1 / 9))

    def forward(self, x: Tensor) -> Tensor:
        means = x.abs().mean(1, keepdim=True)
        scale = (
            nn.functional.avg_pool2d(means, 3, 1, 1)
            if self.pooled
            else nn.functional.conv2d(means, self.window, padding=1)
        )
        return self.conv(x.sign()) * scale * self.conv.weight.abs().mean((1, 2, 3)).view(1, -1, 1, 1)


class Experts(nn.Module):
    """Classifiers on one pooled vector, which a gate on the same vector weighs."""

    def __init__(self, bound: Callable[[Tensor], Tensor], classes: int = 500) -> None:
        super().__init__()
        self.features = nn.Sequential(
            networks.conv_norm(3, 16, stride=2), nn.ReLU(), networks.conv_norm(16, 32, stride=2)
        )
        self.gate, self.bound = nn.Linear(32, 4), bound
        self.experts = nn.ModuleList([nn.Linear(32, classes) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        v = self.features(x).mean((2, 3))
        return (self.bound(self.gate(v))[:, :, None] * torch.stack([expert(v) for expert in self.experts], 1)).sum(1)


class ExpertsOneByOne(Experts):
    """The same, expert by expert."""

    def forward(self, x: Tensor) -> Tensor:
        v = nn.functional.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        weights = self.bound(self.gate(v))
        return sum(weights[:, i : i + 1] * expert(v) for i, expert in enumerate(self.experts))  # type: ignore[return-value]


class HandNormGate(nn.Module):
    """A gate on X itself, whose logits are normalised by hand: its reductions are no context."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        z = (z - z.mean((2, 3), keepdim=True)) / (z.var((2, 3), keepdim=True) + 1e-5).sqrt()
        return x * torch.sigmoid(self.second(z))


class GatedDecoder(nn.Module):
    """An autoencoder that raises what it pooled, with gated convolutions; ``skip``: beside its encoder's map."""

    def __init__(self, *, skip: bool = False, whole: bool = False) -> None:
        super().__init__()
        self.skip, self.whole = skip, whole
        self.first, self.second = networks.conv_norm(3, 16), networks.conv_norm(16, 16)
        self.value, self.gate = (nn.Conv2d(32 if skip else 16, 16, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        high = self.first(x)
        low = self.second(nn.functional.max_pool2d(high, 2))
        low = nn.functional.adaptive_avg_pool2d(low, 1) if self.whole else low
        raised = nn.functional.interpolate(low, size=high.shape[2:])
        y = torch.cat([high, raised], 1) if self.skip else raised
        return self.value(y) * torch.sigmoid(self.gate(y))


class Retinex(nn.Module):
    """Images that masks of one channel brighten, one after the other."""

    def __init__(self, mask: Callable[[], nn.Module], *, brightest: bool = False) -> None:
        super().__init__()
        self.masks, self.brightest = nn.ModuleList([mask() for _ in range(2)]), brightest

    def forward(self, x: Tensor) -> Tensor:
        for mask in self.masks:
            light = torch.sigmoid(mask(x.amax(1, keepdim=True) if self.brightest else x))
            x = x / (light + 0.1) * light.pow(0.4) if not self.brightest else x * light
        return x


def mask(inputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(inputs, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1))


def tv(name: str) -> Callable[[], nn.Module]:
    return functools.partial(torchvision.models.get_model, name, weights=None)


def tm(name: str, **options: float) -> Callable[[], nn.Module]:
    return functools.partial(timm.create_model, name, **options)


def small(layer: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
    return functools.partial(with_attention, layer)


NEGATIVES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "torchvision resnet18": (tv("resnet18"), 128),
    "torchvision convnext_tiny (layer scale)": (tv("convnext_tiny"), 128),
    "torchvision densenet121": (tv("densenet121"), 128),
    "torchvision vit_b_16": (tv("vit_b_16"), 224),
    "torchvision mobilenet_v2": (tv("mobilenet_v2"), 128),
    "torchvision googlenet": (functools.partial(tv("googlenet"), init_weights=False), 128),
    "torchvision shufflenet_v2_x0_5": (tv("shufflenet_v2_x0_5"), 128),
    "timm resnet18 (drop path)": (tm("resnet18", drop_path_rate=0.2), 128),
    "timm convnext_atto (layer scale)": (tm("convnext_atto", ls_init_value=0.1), 128),
    "timm convnextv2_atto (GRN)": (tm("convnextv2_atto"), 128),
    "timm resnetv2_50d_frn (filter response norm)": (tm("resnetv2_50d_frn"), 128),
    "timm resnetv2_50d_evos (EvoNorm)": (tm("resnetv2_50d_evos"), 128),
    "timm vit_tiny_patch16_224": (tm("vit_tiny_patch16_224"), 224),
    "timm swin_tiny_patch4_window7_224": (tm("swin_tiny_patch4_window7_224"), 224),
    "timm mixer_s32_224": (tm("mixer_s32_224"), 224),
    "timm gmixer_24_224 (GLU)": (tm("gmixer_24_224"), 224),
    "plain blocks": (small(lambda _c: nn.Identity()), 64),
    "swish": (small(lambda _c: networks.Swish()), 64),
    "gated convolution": (small(Gated), 64),
    "self-calibrated convolution": (small(SelfCalibrated), 56),
    "weights by einsum": (small(WeightsByEinsum), 64),
    "weights by matmul": (small(WeightsByMatmul), 64),
    "convolution by unfolding": (small(UnfoldedConvolution), 64),
    "maxout": (small(Maxout), 64),
    "tokens first": (small(TokensFirst), 64),
    "glu": (small(networks.GatedLinearUnit), 64),
    "layer norm by hand": (small(networks.HandLayerNorm), 64),
    "instance norm by hand": (small(networks.InstanceNorm), 64),
    "min-max scale": (small(lambda _c: MinMaxScale()), 64),
    "grn": (small(networks.GlobalResponseNorm), 64),
    "drop path": (small(lambda _c: networks.DropPath()), 64),
    "layer scale": (small(networks.LayerScale), 64),
    "non-local": (small(networks.NonLocal), 64),
    "fpn add": (networks.FeaturePyramid, 64),
    "u-net skip add": (networks.UNetAdd, 64),
    "attention pooling head": (networks.AttentionPoolHead, 64),
    "involution": (small(Involution), 64),
    "involution behind a pooling": (small(functools.partial(Involution, pooled=True)), 64),
    "involution with bounded kernels": (small(functools.partial(Involution, bounded=True)), 64),
    "involution by shifts": (small(InvolutionByShifts), 64),
    "binary convolution": (small(BinaryConvolution), 64),
    "binary convolution, pooled": (small(functools.partial(BinaryConvolution, pooled=True)), 64),
    "experts": (functools.partial(Experts, functools.partial(torch.softmax, dim=1)), 64),
    "experts with a gate each": (functools.partial(Experts, torch.sigmoid), 64),
    "experts one by one": (functools.partial(ExpertsOneByOne, torch.sigmoid), 64),
    "gate normalised by hand": (small(HandNormGate), 64),
    "gated decoder": (GatedDecoder, 64),
    "gated decoder of one vector": (functools.partial(GatedDecoder, whole=True), 64),
    "gated decoder with a skip": (functools.partial(GatedDecoder, skip=True), 64),
    "illumination": (functools.partial(Retinex, mask(3)), 64),
    "illumination of the brightest colour": (functools.partial(Retinex, mask(1), brightest=True), 64),
    "weighted feature fusion": (networks.FastNormalizedFusion, 64),
}

CASES = [
    pytest.param(build, size, training, id=f"{name}{' in train mode' if training else ''}")
    for name, (build, size) in NEGATIVES.items()
    for training in (False, True)
    if not training or size == 64 or "drop path" in name
]


@pytest.mark.parametrize(("build", "size", "training"), CASES)
def test_no_block(build: Callable[[], nn.Module], size: int, training: bool) -> None:
    with seeded(0):
        model = build().train(training)
    plan = dcafy.inspect(model, example_inputs=torch.randn(2, 3, size, size))
    assert plan.blocks == ()
    assert plan.chains == ()
    assert plan.links == ()
    assert model.training == training


def test_a_condition_from_another_input_is_no_attention() -> None:
    images = torch.randn(2, 3, 64, 64)
    assert dcafy.inspect(Conditioned(), example_inputs=(images, images.flip(0))).blocks == ()


@pytest.mark.parametrize("name", ["torchvision resnet18", "swish", "u-net skip add"])
def test_convert_says_how_to_add_attention(name: str) -> None:
    build, size = NEGATIVES[name]
    with pytest.raises(dcafy.DcafyError, match=r"(?i)attention") as caught:
        dcafy.convert(build(), example_inputs=torch.randn(2, 3, size, size))
    assert type(caught.value).__name__ == "NoAttentionError"


def test_the_zoo_would_notice() -> None:
    """The same small network with squeeze-excitation in the same place has its four blocks."""
    model = with_attention(networks.SELinear)
    assert len(dcafy.inspect(model, example_inputs=torch.randn(2, 3, 64, 64)).blocks) == 4
