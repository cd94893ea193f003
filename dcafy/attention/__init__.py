"""The attentions of the paper as plain modules, one file each, and putting them where there are none."""

from typing import TYPE_CHECKING

from dcafy.fronts import front

if TYPE_CHECKING:
    from dcafy.attention.bam import BAM
    from dcafy.attention.cbam import CBAM
    from dcafy.attention.dia import DIA
    from dcafy.attention.eca import ECA
    from dcafy.attention.gc import GC
    from dcafy.attention.ge import GEPlain, GETheta
    from dcafy.attention.kinds import ATTENTIONS
    from dcafy.attention.mrla import MRLA
    from dcafy.attention.rla import RLA
    from dcafy.attention.se import SE
    from dcafy.attention.sge import SGE
    from dcafy.attention.sk import SK

__all__ = ["ATTENTIONS", "BAM", "CBAM", "DIA", "ECA", "GC", "MRLA", "RLA", "SE", "SGE", "SK", "GEPlain", "GETheta"]

_HOME = {
    "ATTENTIONS": "kinds",
    "BAM": "bam",
    "CBAM": "cbam",
    "DIA": "dia",
    "ECA": "eca",
    "GC": "gc",
    "GEPlain": "ge",
    "GETheta": "ge",
    "MRLA": "mrla",
    "RLA": "rla",
    "SE": "se",
    "SGE": "sge",
    "SK": "sk",
}

__getattr__, __dir__ = front(__name__, _HOME)
