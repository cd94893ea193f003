"""How a file of weights is to be opened, as options."""

from __future__ import annotations

from dataclasses import dataclass

from dcafy.plan.options import setting


@dataclass(frozen=True)
class FileOptions:
    """What a user says about a file: whose weights it holds, which of them, and what it may do."""

    arch: str | None = setting(
        None,
        "What the weights in a file belong to: torchvision:NAME, timm:NAME or package.module:factory. Without it, "
        "dcafy names the architectures that fit.",
        metavar="SPEC",
    )
    prefix: str | None = setting(
        None,
        "Where the network lies among the weights in a file, such as student.backbone. Without it, dcafy looks for "
        "the one place that fits.",
        metavar="NAME",
    )
    ignore_head: bool = setting(
        False, "Leave the classifier of a file alone: the network keeps the untrained one that it is built with."
    )
    any_size: bool = setting(
        False, "Open a file that takes much more time or memory than others of its size; by default it is refused."
    )
    trust_pickle: bool = setting(
        False,
        "Open a pickle that wants more than tensors, plain data and known network classes. This runs code that the "
        "file chooses; by default it is refused.",
    )
