"""The report from Python: a network and images in, findings and perhaps a page out."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from dcafy.analysis.values import check_images
from dcafy.disk import replaced
from dcafy.emit.dca import recipes
from dcafy.errors import UsageError
from dcafy.images.about import about, known, preparation_of
from dcafy.images.options import DataOptions
from dcafy.images.preparation import Preparation, preparation, with_resize
from dcafy.report.epochs import EpochLog, RunLog
from dcafy.report.findings import ORIGINAL, Findings, Wanted, look
from dcafy.report.labelled import labelled
from dcafy.report.page import page
from dcafy.report.pictures import as_pictures, labelled_pictures, read_pictures
from dcafy.runs.request import REQUEST, Request, read_request
from dcafy.trace.inputs import from_data
from dcafy.wording import needing

MOST = 64
"""How many images are looked at where nothing else is asked for."""


def make_report(
    model: nn.Module,
    images: Path | Tensor | None = None,
    output: Path | None = None,
    *,
    title: str = "",
    against: nn.Module | None = None,
    versus: str = ORIGINAL,
    target: int | None = None,
    how: Preparation | None = None,
    most: int = MOST,
    epochs: EpochLog | RunLog | None = None,
    data: str | None = None,
    options: DataOptions | None = None,
    command: str = "",
    follow_links: bool = False,
    told: Callable[[str], None] = lambda _: None,
) -> Findings:
    """What there is to report of ``model`` on ``images``, written to ``output`` as one HTML file where that is given.

    ``images``: a folder, or ``[N, C, H, W]`` prepared as the model wants them; those of ``data`` where absent.
    ``against``: the network to compare with, and ``versus`` what it is called; a connected model is compared with
    itself without connections where it is absent. ``target``: the class for Grad-CAM; the predicted ones where absent.
    ``how``: how images are made ready; the way of the model's weights where absent. ``most``: images that are looked
    at. ``epochs``: :func:`dcafy.report.read_run` or :func:`dcafy.report.read_epochs` of a run. ``data``: labelled
    images on which networks are measured and each connection is cut, a spec as for ``dcafy finetune --data``;
    ``options`` say which of them are held out. ``follow_links``: look also at images outside of the folder, to which
    links in it lead. ``told`` is called with what is being done, step by step.

    Raises ``UsageError`` for images that are none and for an output that cannot be written, before anything is
    computed; after any error ``output`` is as it was.

    >>> import dcafy, tempfile, torch, torchvision
    >>> from pathlib import Path
    >>> connected = dcafy.convert(torchvision.models.mobilenet_v3_small(), verify=False)
    >>> found = make_report(connected, torch.rand(2, 3, 64, 64))
    >>> [side.title for side in found.sides], found.drift.identical
    (['connections off', 'connected'], True)
    """
    how = how or prepared_for(model)
    with contextlib.ExitStack() as stack:
        write = None
        if output is not None:
            with needing("The report", "report"):
                for name in ("matplotlib", "jinja2", "captum"):
                    importlib.import_module(name)
            write = stack.enter_context(replaced(output))
        told("images")
        classes = about(model).classes
        labels = None if data is None else labelled(data, how, options or DataOptions(), known=classes)
        if isinstance(images, Tensor):
            check_images(images)
            pictures = as_pictures(images[:most], how)
        elif images is not None:
            named = classes if labels is None else labels.classes
            pictures = read_pictures(images, how, most=most, follow_links=follow_links, classes=named)
        elif labels is not None:
            pictures = labelled_pictures(labels, how, most)
        else:
            raise UsageError("There are no images to look at. Name a folder of images, or labelled ones as data.")
        run = epochs if isinstance(epochs, RunLog) else RunLog(epochs)
        titled, looks = title or type(model).__name__, write is not None
        wanted = Wanted(titled, against, versus, target, run, labels, looks, command)
        found = look(model, pictures, wanted, told=told)
        if write is not None:
            told("page")
            write(page(found))
    return found


def prepared_for(model: nn.Module, spec: str = "", image_size: int | None = None) -> Preparation:
    """How images are made ready for ``model``: as its weights want them, in the size that it was converted with.

    ``spec``: what the user called the model. The folder of a ``dcafy finetune`` run says how its images were made
    ready; a ``torchvision:`` or ``timm:`` name stands for that of its weights. ``image_size``: another side, in pixels.
    """
    if known(model) is not None:
        return preparation_of(model, spec, image_size)
    run = run_in(spec) if spec else None
    if run is not None:
        found = preparation(model, run.arch or run.model, image_size or run.images.image_size)
        return found if image_size or not run.images.val_resize else with_resize(found, run.images.val_resize)
    recipe = next((recipe for _, recipe in recipes(model)), None)
    if image_size is None and recipe is not None and recipe.model is None and recipe.inputs is not None:
        first = from_data(recipe.inputs)[0]
        image_size = first.shape[-1] if isinstance(first, Tensor) and first.ndim == 4 else None
    return preparation(model, spec, image_size)


def run_in(spec: str) -> Request | None:
    """What the ``dcafy finetune`` run was asked for that lies in the folder ``spec``; ``None`` where none does."""
    return read_request(Path(spec)) if os.path.isfile(os.path.join(spec, REQUEST)) else None
