"""``along``: how attention that is connected by nature hears the unit before it in its stage: ``αG + β·(λ ⊙ o)``.

λ is a number for each channel (MRLA-light's, arXiv 2302.03985, eq. 8), which starts at 1.
"""

from __future__ import annotations

from torch import nn

from dcafy.emit.connection import Connection
from dcafy.emit.mixing import Mixed


def mix(parts: list[Connection], mixed: Mixed) -> nn.Module:
    """The connection, whose matching layer is λ."""
    (part,) = parts
    channels = mixed.extent[0]
    scale = nn.Conv2d(channels, channels, 1, groups=channels, bias=False, **mixed.place)
    nn.init.ones_(scale.weight)
    part.match = nn.Sequential(scale)
    return part
