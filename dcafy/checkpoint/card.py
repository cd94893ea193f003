"""The card of a folder, ``README.md``: what the network is and what was measured of it, for people.

Nothing in it is reckoned or supposed: what was not measured is not there. Names in it are somebody's data, and shown as
text. A card that somebody has written or changed is his, and stays.
"""

from __future__ import annotations

import hashlib
import html
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dcafy.analysis.complexity import Complexity, complexity
from dcafy.checkpoint.description import Description
from dcafy.disk import content
from dcafy.emit.dca import connections, is_connected
from dcafy.graph.copies import data_free_copy
from dcafy.images.about import About
from dcafy.wording import counted, few, one_line, printable
from dcafy.zoos.specs import RANDOM

log = logging.getLogger(__name__)

CARD = "README.md"

_LARGEST = 2**20
"""Bytes of a card that is looked at."""

_SHOWN = 30
"""Connections and classes that are named."""

_SIGNED = re.compile(rb"(?s)(.*)<!-- written by dcafy: ([0-9a-f]{64}) -->\n")

_LOSSES = ("loss",)
"""What is measured and is no fraction."""


@dataclass(frozen=True)
class Measured:
    """What was measured of a network as it was saved.

    ``cost``   parameters and multiply-adds of one image; ``None`` where it does not run without data
    ``betas``  receiving block -> (α, β, contribution ratio)
    """

    parameters: int
    cost: Complexity | None
    betas: Mapping[str, tuple[float, float, float]]


def measured(model: nn.Module, about: About | None) -> Measured:
    """What a card tells of ``model``, which is left as it is."""
    rows = {}
    if is_connected(model):
        for name, one in connections(model).items():
            rows[name] = (one.alpha.item(), one.beta.item(), one.contribution())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Measured(parameters, _cost(model, about), rows)


def _cost(model: nn.Module, about: About | None) -> Complexity | None:
    how = None if about is None or about.task != "classification" else about.preparation
    if how is None:
        return None
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    try:
        return complexity(
            data_free_copy(model), torch.zeros(1, how.channels, *how.size, device="meta", dtype=first.dtype)
        )
    except Exception as error:  # a network that decides by its values; then its cost is not told
        log.info("its cost was not counted: %s", one_line(error))
        return None


def card(description: Description, found: Measured) -> str:
    """The text of the card."""
    text = "\n".join(_lines(description, found)) + "\n"
    return f"{text}<!-- written by dcafy: {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_ours(path: Path) -> bool:
    """Whether there is no card at ``path``, or one that is as dcafy has written it."""
    try:
        signed = _SIGNED.fullmatch(content(path, _LARGEST))
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return signed is not None and hashlib.sha256(signed[1]).hexdigest().encode() == signed[2]


_PIPELINES = {"classification": "image-classification", "detection": "object-detection"}
"""Task -> what the Hub calls it."""


def _lines(description: Description, found: Measured) -> Iterator[str]:
    about, built, plan = description.about, description.model, description.plan
    task = None if about is None else about.task
    yield from ("---", "library_name: dcafy", "tags:", "- dcafy", "- pytorch")
    if task is not None:
        yield f"pipeline_tag: {_PIPELINES[task]}"
    yield from ("---", "")
    name = _shown(built.name if built is not None else (plan.model if plan is not None else "") or "A network")
    yield f"# {name}{', connected' if found.betas else ''}"
    yield ""
    if found.betas:
        yield (
            f"Its attention blocks are connected ({counted(len(found.betas), 'connection')}) as in *DCANet: Learning "
            "Connected Attentions for Convolutional Neural Networks* (arXiv 2007.05099), by dcafy."
        )
        yield ""
    if built is not None and built.arguments:
        given = ", ".join(f"{key}={value!r}" for key, value in built.arguments.items())
        yield f"- Built with {_shown(given)}"
    if description.insertions:
        yield f"- Inserted attention: {_shown(', '.join(one.attention for one in description.insertions))}"
    if about is not None:
        yield from _known(about)
    if not description.weights.with_base:
        yield "- This folder holds only what dcafy added; it belongs to the base weights that it was trained on"
    yield f"- Parameters: {found.parameters:,}"
    if found.cost is not None and about is not None and about.preparation is not None:
        height, width = about.preparation.size
        yield f"- Cost: {found.cost.gflops:.3f}e9 multiply-adds for one image of {height} x {width} pixels"
    yield from ("", "```python", "import dcafy", "")
    yield from ('model = dcafy.load("path/of/this/folder")  # or "hf://user/name"', "```", "")
    if found.betas:
        yield from ("| receiving block | α | β | contribution ratio |", "|---|---|---|---|")
        for receiver, (alpha, beta, ratio) in list(found.betas.items())[:_SHOWN]:
            yield f"| {_shown(receiver)} | {alpha:.4f} | {beta:+.4f} | {ratio:.4f} |"
        if len(found.betas) > _SHOWN:
            yield f"\nand {len(found.betas) - _SHOWN} more."
        yield ""
    versions = ", ".join(f"{name} {version}" for name, version in description.versions.items())
    yield f"Saved with {_shown(versions)}."


def _known(about: About) -> Iterator[str]:
    if about.random:
        yield f"- **{RANDOM.partition(' (')[0]}**: nothing was learned, and what it gives says nothing"
    if about.trained is not None:
        trained = about.trained
        yield f"- Trained for {counted(trained.epochs, 'epoch')} on {_shown(without_folders(trained.data))}"
        for name, value in trained.metrics.items():
            if name != "images":
                number = f"{value:.4f}" if name in _LOSSES else f"{value:.2%}"
                images = trained.metrics.get("images")
                yield f"- Validation {_shown(name)}: {number}" + (f" ({images:.0f} images)" if images else "")
    if about.classes:
        yield f"- {len(about.classes)} classes: {_shown(few(list(map(printable, about.classes)), _SHOWN))}"
    how = about.preparation
    if how is not None:
        height, width = how.size
        yield f"- Images: {height} x {width} pixels in {counted(how.channels, 'channel')}"


def without_folders(data: str) -> str:
    """The spec of a data set with the last part of each path: where it lies on somebody's disk is nobody's business.

    >>> without_folders("imagefolder:/home/me/flowers"), without_folders("digits")
    ('imagefolder:flowers', 'digits')
    """
    return ":".join(part.rstrip("/\\").replace("\\", "/").rpartition("/")[2] for part in data.split(":"))


def _shown(text: str) -> str:
    """Somebody's text in Markdown: it shows itself, and is no markup."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~@])", r"\\\1", html.escape(printable(text)))
