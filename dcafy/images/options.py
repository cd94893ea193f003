"""Where images come from and how they are shown, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass

from dcafy.plan.options import check, setting


@dataclass(frozen=True)
class DataOptions:
    """Where the images come from and how they are shown to the network."""

    val_fraction: float = setting(
        0.2, "The part of the images to validate on, where the data has no part of its own.", above=0, below=1
    )
    image_size: int | None = setting(
        None,
        "Side of the images in pixels. [default: what the weights were trained with, else the network's own]",
        least=1,
    )
    val_resize: int | None = setting(
        None,
        "The shorter side, in pixels, to which validation images are resized before the centre is cut. [default: what "
        "the weights were trained with]",
        least=1,
    )
    augment: str = setting(
        "auto",
        "How training images are varied: none, shift (by an eighth), standard (random resized crop and flip), trivial "
        "(standard and TrivialAugment); auto is shift for digits and fashion, else standard. As in paper 4.1, that is "
        "by --recipe paper, it is standard with --crop-scale 0.1 --crop-ratio 1.25.",
        choices=("auto", "none", "shift", "standard", "trivial"),
    )
    crop_scale: float = setting(0.35, "The least part of an image's area that a random crop has.", above=0, below=1)
    crop_ratio: float = setting(4 / 3, "The largest ratio of a random crop's sides, before it is resized.", least=1)
    download: bool = setting(False, "Fetch a torchvision data set that is not there.")
    follow_links: bool = setting(
        False, "Read also what links in a folder of images lead to outside of it. [default: name, count and skip it]"
    )
    strict: bool = setting(False, "Stop at an image that cannot be read. [default: name, count and skip it]")

    def __post_init__(self) -> None:
        check(self)
