"""What is exported and how it is checked, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dcafy.plan.options import check, setting

TOLERANCE = 1e-5
"""How far outputs of the file may differ from the network's, of the largest output."""


@dataclass(frozen=True)
class ExportOptions:
    """What is exported, and on what it is checked."""

    output: Path | None = setting(
        None, "The file to write: NAME.onnx, or NAME.pt2 for torch.export.", metavar="FILE", short="-o"
    )
    image_size: int | None = setting(
        None, "Side of the images in pixels. [default: what the network was trained with]", least=1
    )
    images: Path | None = setting(
        None,
        "Pictures on which the file is checked. [default: those that the network was trained on, where they are there]",
        metavar="FOLDER",
    )
    fixed: bool = setting(
        False, "One size of images only. [default: any height and width that the network takes, where it can]"
    )
    cut: bool = setting(False, "Without the connections (β = 0).")
    overwrite: bool = setting(False, "Replace a file that is there.")

    def __post_init__(self) -> None:
        check(self)
