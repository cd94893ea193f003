"""``depth``: a block hears all earlier ones, weighed by a softmax over depth of q(G)·k(T̃ⱼ).

::

    f(αG, β·Σⱼ wⱼ ⊙ match(T̃ⱼ)),   wⱼ = softmax over j of q(G)·kⱼ(match(T̃ⱼ)) / √d

Layer attention as a retrofit (MRLA, arXiv 2302.03985, section 3; dynamic layer attention, arXiv 2406.13392; attention
residuals, arXiv 2603.15031): q is of the block's own context, each kⱼ of one message, and the softmax is taken head by
head. q and kⱼ are MRLA's, a convolution along channels, of values over their root mean square (as the keys of attention
residuals): the contexts of a trained network have any scale. A head has d of about 32 channels; in spatial attention
every place is one, and q and kⱼ are 3x3 convolutions channel by channel.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
from torch import Tensor, nn

from dcafy.emit.connection import Connection, JoinedConnection, joined
from dcafy.emit.matching import MATCHES
from dcafy.emit.mixing import Mixed


class DepthConnection(JoinedConnection):
    """G connected to the earlier blocks that its own context asks for; one α and one β for all of them.

    Each part has its ``key``; the first one has the ``query`` of all. A block that told nothing takes no part in the
    softmax.
    """

    def __init__(self, parts: list[Connection], mixed: Mixed) -> None:
        super().__init__(parts)
        matching = MATCHES[mixed.target.dimension]
        for part in parts:
            part.beta = parts[0].beta
            part.key = matching.convolution(mixed.extent, mixed.place)
            part.is_weighed = True
        parts[0].query = matching.convolution(mixed.extent, mixed.place)
        parts[0].group = matching.group(mixed.extent)  # type: ignore[assignment]

    def forward(self, G: Tensor, *messages: Tensor | None) -> Tensor:
        """G connected; ``messages``: T and G (or ``None``) of each block, one after the other."""
        parts: Any = self.parts
        told = [
            (part, part.matched(G, T, G_prev))
            for part, T, G_prev in zip(parts, messages[::2], messages[1::2], strict=True)
            if T is not None
        ]
        heard = [(part, message) for part, message in told if message is not None]
        first = parts[0]
        if not heard:
            return joined(first, G, ())
        weights = self.weights(G, heard)
        terms = [part.heard(G, weight * message) for (part, message), weight in zip(heard, weights, strict=True)]
        return joined(first, G, ((first.beta, functools.reduce(operator.add, terms)),))

    def weights(self, G: Tensor, heard: list[tuple[Any, Tensor]]) -> list[Tensor]:
        """What each message is weighed with, to be multiplied with it; they add up to 1 everywhere."""
        first: Any = self.parts[0]
        matching = MATCHES[first.dimension]
        query = matching.groups(first, G, first.query)
        keys = [matching.groups(first, message.expand_as(G), part.key) for part, message in heard]
        scores = torch.stack([(query * key).sum(-1) for key in keys]) / math.sqrt(first.group)
        return [matching.spread(first, weight, G) for weight in scores.softmax(0).to(G.dtype).unbind()]


def mix(parts: list[Connection], mixed: Mixed) -> nn.Module:
    """The module of a block; a plain connection where it hears one block only, for which there is nothing to weigh."""
    return parts[0] if len(parts) == 1 else DepthConnection(parts, mixed)
