"""Attention written by hand, the ways people write it, in networks small enough to run hundreds of times.

Nothing here is shared with the package: these are the strangers' networks that it has to understand.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 16, 24, 32)
"""Widths along the chain: one link between equal channels, two between different ones."""
STRIDES = (1, 1, 2, 1)


# Channel attention -------------------------------------------------------------------------------


class SELinear(nn.Module):
    """Squeeze-excitation as most repositories write it: ``Linear``, ``view``, ``expand_as``."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.excite = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c, _, _ = x.size()
        context = self.squeeze(x).view(n, c)
        scale = self.excite(context).view(n, c, 1, 1)
        return x * scale.expand_as(x)


class SEConv(nn.Module):
    """Squeeze-excitation with 1x1 convolutions, fused in place with ``*=``."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // reduction, 1)
        self.expand = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.adaptive_avg_pool2d(x, 1)
        scale = F.relu(self.reduce(scale), inplace=True)
        scale = torch.sigmoid(self.expand(scale))
        x *= scale
        return x


class SEInPlaceContext(nn.Module):
    """Squeeze-excitation that changes its own context in place: what is passed on must be read before."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, channels // reduction)
        self.expand = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        context = x.mean((2, 3))
        context.mul_(2.0).sub_(0.25)
        scale = self.expand(F.relu(self.reduce(context))).sigmoid_()
        return x.mul(scale[:, :, None, None])


class SEDropout(nn.Module):
    """Squeeze-excitation whose forward reads its own ``training``."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // reduction, 1)
        self.norm = nn.BatchNorm2d(channels // reduction)
        self.expand = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.relu(self.norm(self.reduce(x.mean((2, 3), keepdim=True))))
        scale = F.dropout(scale, 0.25, self.training)
        return torch.mul(x, F.hardsigmoid(self.expand(scale)))


class GlobalContext(nn.Module):
    """Global context (GC): softmax-weighted pooling, a bottleneck with LayerNorm, fused by addition."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.weigh = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.LayerNorm(channels // reduction),
            nn.ReLU(),
            nn.Linear(channels // reduction, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weigh(x).flatten(2).softmax(dim=-1)
        context = torch.einsum("ncp,nop->nc", x.flatten(2), weights)
        return x + self.transform(context)[..., None, None]


class GatherExcite(nn.Module):
    """Gather-excite without parameters (GE-θ⁻): pooling over an extent, interpolation, sigmoid."""

    def __init__(self, channels: int, extent: int = 0) -> None:
        super().__init__()
        self.extent = extent

    def forward(self, x: Tensor) -> Tensor:
        if self.extent == 0:
            return x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1))
        context = F.avg_pool2d(x, self.extent, stride=self.extent)
        return x * torch.sigmoid(F.interpolate(context, size=x.shape[-2:], mode="nearest"))


# Channel and spatial attention together ----------------------------------------------------------


class ChannelGate(nn.Module):
    """CBAM's channel half: average and maximum through one shared MLP."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.mlp = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels, hidden),
            nn.ReLU(),
            nn.Linear(hidden, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        extent = (x.size(2), x.size(3))
        average = self.mlp(F.avg_pool2d(x, extent, stride=extent))
        maximum = self.mlp(F.max_pool2d(x, extent, stride=extent))
        scale = torch.sigmoid(average + maximum)
        return x * scale.unsqueeze(2).unsqueeze(3).expand_as(x)


class SpatialGate(nn.Module):
    """CBAM's spatial half: maximum and mean over the channels, 7x7 convolution, BN."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(1, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        context = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        return x * torch.sigmoid(self.norm(self.conv(context)))


class CBAM(nn.Module):
    """Channel attention, then spatial attention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel = ChannelGate(channels)
        self.spatial = SpatialGate()

    def forward(self, x: Tensor) -> Tensor:
        return self.spatial(self.channel(x))


class BAM(nn.Module):
    """Bottleneck attention: a channel branch and a spatial branch, added, gated and applied once."""

    def __init__(self, channels: int, reduction: int = 4, dilation: int = 2) -> None:
        super().__init__()
        hidden = channels // reduction
        self.channel = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc1=nn.Linear(channels, hidden),
                norm=nn.BatchNorm1d(hidden),
                act=nn.ReLU(),
                fc2=nn.Linear(hidden, channels),
            )
        )
        self.spatial = nn.Sequential(
            OrderedDict(
                reduce=nn.Conv2d(channels, hidden, 1),
                norm=nn.BatchNorm2d(hidden),
                act=nn.ReLU(),
                dilated=nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation),
                norm2=nn.BatchNorm2d(hidden),
                act2=nn.ReLU(),
                project=nn.Conv2d(hidden, 1, 1),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        channel = self.channel(x)[:, :, None, None].expand_as(x)
        spatial = self.spatial(x).expand_as(x)
        return (1 + torch.sigmoid(channel + spatial)) * x


class ChannelSE(nn.Module):
    """scSE's channel half."""

    def __init__(self, channels: int, reduction: int = 2) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        scale = torch.sigmoid(self.fc2(torch.relu(self.fc1(x.view(n, c, -1).mean(dim=2)))))
        return torch.mul(x, scale.view(n, c, 1, 1))


class SpatialSE(nn.Module):
    """scSE's spatial half: a 1x1 convolution to one channel is the extraction."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(x))


class SCSE(nn.Module):
    """Concurrent spatial and channel squeeze-excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cse = ChannelSE(channels)
        self.sse = SpatialSE(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.cse(x) + self.sse(x)


# Networks around them ----------------------------------------------------------------------------


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """A basic residual block with attention before the addition."""

    def __init__(self, inputs: int, outputs: int, stride: int, attention: nn.Module) -> None:
        super().__init__()
        self.conv1 = conv_norm(inputs, outputs, stride=stride)
        self.conv2 = conv_norm(outputs, outputs)
        self.attention = attention
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        return F.relu(self.attention(y) + self.shortcut(x))


class Classifier(nn.Module):
    """Stem, a row of blocks, global pooling and a linear head with functional dropout."""

    def __init__(self, blocks: Sequence[nn.Module], stem: int = WIDTHS[0], features: int = WIDTHS[-1]) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, stem, stride=2), nn.ReLU())
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(features, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.pool(self.blocks(self.stem(x))).flatten(1)
        return self.head(F.dropout(features, 0.1, self.training))


def with_attention(attention: Callable[[int], nn.Module], widths: Sequence[int] = WIDTHS) -> Classifier:
    """A classifier with one attention module per residual block."""
    inputs = (widths[0], *widths[:-1])
    blocks = [Block(i, o, s, attention(o)) for i, o, s in zip(inputs, widths, STRIDES, strict=False)]
    return Classifier(blocks, stem=widths[0], features=widths[-1])


class InlineBlock(nn.Module):
    """A residual block that has the attention's layers and does the attention itself."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_norm(inputs, outputs, stride=stride)
        self.conv2 = conv_norm(outputs, outputs)
        self.fc1 = nn.Conv2d(outputs, outputs // 4, 1)
        self.fc2 = nn.Conv2d(outputs // 4, outputs, 1)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.conv1(x)))
        w = F.avg_pool2d(out, out.size(2))  # the images are square
        w = F.relu(self.fc1(w))
        w = torch.sigmoid(self.fc2(w))
        out = out * w
        out += self.shortcut(x)
        return F.relu(out)


def inline_network() -> Classifier:
    inputs = (WIDTHS[0], *WIDTHS[:-1])
    return Classifier([InlineBlock(i, o, s) for i, o, s in zip(inputs, WIDTHS, STRIDES, strict=True)])


class RootForward(nn.Module):
    """Three attentions written straight into the network's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_norm(3, 16, stride=2)
        self.conv2 = conv_norm(16, 16)
        self.conv3 = conv_norm(16, 24, stride=2)
        self.down1, self.up1 = nn.Linear(16, 4), nn.Linear(4, 16)
        self.down2, self.up2 = nn.Linear(16, 4), nn.Linear(4, 16)
        self.down3, self.up3 = nn.Linear(24, 6), nn.Linear(6, 24)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        s = torch.sigmoid(self.up1(F.relu(self.down1(x.mean(dim=(2, 3))))))
        x = x * s[:, :, None, None]
        x = F.relu(self.conv2(x))
        s = torch.sigmoid(self.up2(F.relu(self.down2(x.mean(dim=(2, 3))))))
        x = x * s.reshape(x.shape[0], -1, 1, 1)
        x = F.relu(self.conv3(x))
        s = F.adaptive_avg_pool2d(x, (1, 1)).squeeze(-1).squeeze(-1)
        s = torch.sigmoid(self.up3(F.relu(self.down3(s))))
        x = torch.einsum("nchw,nc->nchw", x, s)
        return self.head(x.mean(dim=(2, 3)))


class ChannelsLastSE(nn.Module):
    """Squeeze-excitation on ``[N, H, W, C]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // 4)
        self.fc2 = nn.Linear(channels // 4, channels)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.fc2(F.relu(self.fc1(x.mean((1, 2), keepdim=True))))
        return x * torch.sigmoid(scale)


class ChannelsLastBlock(nn.Module):
    """A block that keeps its feature maps as ``[N, H, W, C]``."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = conv_norm(inputs, outputs, stride=stride)
        self.mlp = nn.Sequential(nn.Linear(outputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))
        self.attention = ChannelsLastSE(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return x + self.attention(self.mlp(x))


class ChannelsLastNetwork(nn.Module):
    """A network in NHWC throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, WIDTHS[0], stride=2), nn.ReLU())
        inputs = (WIDTHS[0], *WIDTHS[:-1])
        rows = zip(inputs, WIDTHS, STRIDES, strict=True)
        self.blocks = nn.ModuleList([ChannelsLastBlock(i, o, s) for i, o, s in rows])
        self.head = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class SharedAttention(nn.Module):
    """One attention module, called after each of three convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 16, stride=2), nn.ReLU())
        self.convs = nn.ModuleList([conv_norm(16, 16) for _ in range(3)])
        self.se = SELinear(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv in self.convs:
            x = F.relu(x + self.se(conv(x)))
        return self.head(x.mean((2, 3)))


class Branches(nn.Module):
    """Attention in a trunk, in each of two parallel branches, and after they join."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 16, stride=2), nn.ReLU())
        self.trunk = SELinear(16)
        self.left = nn.Sequential(conv_norm(16, 16), nn.ReLU(), SELinear(16))
        self.right = nn.Sequential(conv_norm(16, 24, stride=2), nn.ReLU(), SELinear(24))
        self.fuse = conv_norm(40, 32)
        self.joined = SELinear(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(self.stem(x))
        left, right = self.left(x), self.right(x)
        x = torch.cat((left, F.interpolate(right, scale_factor=2)), dim=1)
        x = self.joined(F.relu(self.fuse(x)))
        return self.head(x.mean((2, 3)))


class Decoder(nn.Module):
    """A small U-Net with scSE in its decoder; the output is a map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 16, stride=2), nn.ReLU())
        self.down1 = nn.Sequential(conv_norm(16, 24, stride=2), nn.ReLU())
        self.down2 = nn.Sequential(conv_norm(24, 32, stride=2), nn.ReLU())
        self.up1 = nn.Sequential(conv_norm(56, 24), nn.ReLU())
        self.attention1 = SCSE(24)
        self.up2 = nn.Sequential(conv_norm(40, 16), nn.ReLU())
        self.attention2 = SCSE(16)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        middle = self.down1(fine)
        x = self.down2(middle)
        x = torch.cat((F.interpolate(x, size=middle.shape[-2:], mode="nearest"), middle), dim=1)
        x = self.attention1(self.up1(x))
        x = torch.cat((F.interpolate(x, size=fine.shape[-2:], mode="nearest"), fine), dim=1)
        x = self.attention2(self.up2(x))
        return self.head(x)


# Networks without attention ----------------------------------------------------------------------


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class GatedLinearUnit(nn.Module):
    """GLU over channels, with a full-size gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv(x).chunk(2, dim=1)
        return value * torch.sigmoid(gate)


class HandLayerNorm(nn.Module):
    """Layer norm over the channels, written out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) * torch.rsqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class InstanceNorm(nn.Module):
    """Instance norm, written out: the statistics are those of squeeze-excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        std = x.var((2, 3), keepdim=True, unbiased=False).add(1e-5).sqrt()
        return (x - mean) / std * self.weight


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2's GRN."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        strength = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        relative = strength / (strength.mean(dim=1, keepdim=True) + 1e-6)
        return self.gamma * (x * relative) + self.beta + x


class DropPath(nn.Module):
    """Stochastic depth, written out: the mask is a random number per image."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.8)
        return x * mask / 0.8


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class NonLocal(nn.Module):
    """Self-attention over positions (an embedded Gaussian non-local block)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 2, 1)
        self.key = nn.Conv2d(channels, channels // 2, 1)
        self.value = nn.Conv2d(channels, channels // 2, 1)
        self.project = nn.Conv2d(channels // 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        query = self.query(x).flatten(2).transpose(1, 2)
        key = F.max_pool2d(self.key(x), 2).flatten(2)
        value = F.max_pool2d(self.value(x), 2).flatten(2).transpose(1, 2)
        y = torch.matmul(torch.softmax(query @ key, dim=-1), value)
        return x + self.project(y.transpose(1, 2).reshape(n, -1, h, w))


class FeaturePyramid(nn.Module):
    """Top-down addition of upsampled coarse maps to fine ones (FPN)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 16, stride=2), nn.ReLU())
        self.down1 = nn.Sequential(conv_norm(16, 24, stride=2), nn.ReLU())
        self.down2 = nn.Sequential(conv_norm(24, 32, stride=2), nn.ReLU())
        self.down3 = nn.Sequential(conv_norm(32, 32, stride=4), nn.ReLU())
        self.lateral = nn.ModuleList([nn.Conv2d(c, 16, 1) for c in (16, 24, 32, 32)])
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for down in (self.down1, self.down2, self.down3):
            maps.append(down(maps[-1]))
        top = self.lateral[3](maps[3])
        for index in (2, 1, 0):
            lateral = self.lateral[index](maps[index])
            top = lateral + F.interpolate(top, size=lateral.shape[-2:], mode="nearest")
        return self.head(top.mean((2, 3)))


class UNetAdd(nn.Module):
    """A U-Net whose skip connections are added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 16, stride=2), nn.ReLU())
        self.down1 = nn.Sequential(conv_norm(16, 24, stride=2), nn.ReLU())
        self.down2 = nn.Sequential(conv_norm(24, 32, stride=4), nn.ReLU())
        self.up1 = nn.ConvTranspose2d(32, 24, 4, stride=4)
        self.up2 = nn.ConvTranspose2d(24, 16, 2, stride=2)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        middle = self.down1(fine)
        x = middle + self.up1(self.down2(middle))
        return self.head(fine + self.up2(x))


class AttentionPoolHead(nn.Module):
    """Soft pooling as the head: weights meet the map, but what comes out is a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 16, stride=2), nn.ReLU(), conv_norm(16, 32, stride=2), nn.ReLU())
        self.weigh = nn.Conv2d(32, 1, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        weights = torch.softmax(self.weigh(x).flatten(2), dim=-1)
        pooled = (x.flatten(2) * weights).sum(dim=-1)
        return self.head(pooled)


class FastNormalizedFusion(nn.Module):
    """BiFPN's weighted sum: the weights are parameters, not attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 16, stride=2), nn.ReLU())
        self.down = nn.Sequential(conv_norm(16, 16, stride=4), nn.ReLU())
        self.weights = nn.Parameter(torch.ones(2))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        coarse = F.interpolate(self.down(fine), scale_factor=4)
        weights = F.relu(self.weights)
        weights = weights / (weights.sum() + 1e-4)
        return self.head((weights[0] * fine + weights[1] * coarse).mean((2, 3)))
