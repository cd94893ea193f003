"""The exported file: written, read back by what will run it, compared on real pictures, and only then in its place."""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcafy.disk import replace_file
from dcafy.emit.dca import example_of
from dcafy.emit.whole import flat
from dcafy.errors import InputError, TracingError, UsageError, VerificationError
from dcafy.export import detectors
from dcafy.export.examples import examples
from dcafy.export.options import TOLERANCE, ExportOptions
from dcafy.images.about import About, about, preparation_of
from dcafy.records import written
from dcafy.version import __version__
from dcafy.wording import needing, one_line, quoted

log = logging.getLogger("dcafy")


@dataclass(frozen=True)
class Exported:
    """A file that was written: what of its input is open, and how far it was from the network, on how many pictures.

    ``difference``: the largest one, over the largest output. ``pictures``: where they are from.
    """

    file: Path
    open_batch: bool
    open_size: bool
    difference: float
    images: int
    pictures: str


@dataclass(frozen=True)
class Kind:
    """One kind of file: ``write`` (program, path, metadata), and ``reads``: path -> what runs it on a batch."""

    write: Callable[[Any, Path, dict[str, str]], None]
    reads: Callable[[Path], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class _Ready:
    """What can be written (with its metadata), and how far the file is then from the network; on which pictures."""

    write: Callable[[Path, dict[str, str]], None]
    apart: Callable[[Path], float]
    open_batch: bool
    open_size: bool
    images: int
    pictures: str


def export(model: nn.Module, options: ExportOptions, *, spec: str = "the model") -> Exported:
    """``model`` as ONNX or as a program of ``torch.export``, in the file that the options name.

    Batch, height and width are open where the network lets them be; a detector's file takes one picture ``[3, H, W]``.
    Preprocessing and classes are in the file's metadata, under ``dcafy``. The file is read back by onnxruntime or
    torch, and compared with the network on real pictures; it is only there if they agree to 1e-5 of the largest output.
    ``model`` is left as it is.

    Raises ``UsageError`` for a name that says no kind and for a file that is there, ``InputError`` for a network that
    gives neither scores nor boxes or cannot be exported, ``VerificationError`` where the outputs differ,
    ``CheckpointError`` where the disk refuses.
    """
    output = options.output
    if output is None or _suffix(options) not in KINDS:
        given = "-o names no file." if output is None else f"-o {quoted(str(output), 200)} says no kind of file."
        raise UsageError(f"{given} Write -o NAME.onnx, or -o NAME.pt2 for a program of torch.export.")
    if output.is_dir():
        raise UsageError(f"-o {quoted(str(output), 200)} is a folder. Name a file in it.")
    if os.path.lexists(output) and not options.overwrite:
        raise UsageError(f"{quoted(str(output), 200)} is there already. Name another file, or add --overwrite.")
    found = about(model)
    if found.task is None:
        raise InputError(f"{spec!r} gives neither scores of classes nor boxes, and only such networks are exported.")
    if found.task == "classification":
        found = About(found.task, found.classes, preparation_of(model, spec, options.image_size), found.trained)
    network = copy.deepcopy(model).eval().cpu().float()
    ready = (_classifier if found.task == "classification" else _detector)(network, found, options, spec)
    metadata = {"dcafy": json.dumps(_metadata(found, spec), allow_nan=False)}
    measured: list[float] = []

    def write(beside: Path) -> None:
        ready.write(beside, metadata)
        measured.append(ready.apart(beside))
        if not measured[0] <= TOLERANCE:
            raise VerificationError(
                f"{quoted(str(output), 200)} was not written: it computes something else than the network, by "
                f"{measured[0]:.1e} of the largest output, and {TOLERANCE:g} is allowed. Try the other kind of file "
                "(.onnx, .pt2), or --fixed."
            )

    replace_file(output, write, then="Make room, or name another file.")
    return Exported(output, ready.open_batch, ready.open_size, measured[0], ready.images, ready.pictures)


def _classifier(network: nn.Module, found: About, options: ExportOptions, spec: str) -> _Ready:
    pictures, source = examples(found, options.images)
    images = torch.stack(pictures)
    with torch.no_grad():
        try:
            expected = network(images)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"{spec!r} does not run on pictures of shape {list(images.shape[1:])}: {one_line(error)[:200]}. Choose "
                "their size with --image-size."
            ) from error
    if not isinstance(expected, Tensor):
        raise InputError(f"{spec!r} gives {type(expected).__name__}, not one tensor, so it cannot be exported.")
    kind = KINDS[_suffix(options)]
    program, open_batch, open_size = _program(_plain(network), network, images, fixed=options.fixed, spec=spec)
    return _Ready(
        lambda path, metadata: kind.write(program, path, metadata),
        lambda path: _apart(kind.reads(path), network, images, open_batch, open_size),
        open_batch, open_size, len(images), source,
    )  # fmt: skip


def _detector(network: nn.Module, found: About, options: ExportOptions, spec: str) -> _Ready:
    if options.image_size is not None:
        raise UsageError("--image-size is for classifiers; a detector resizes its images itself. Leave it out.")
    detectors.require_onnx(_suffix(options), spec)
    pictures, source = examples(found, options.images)
    pictures = detectors.telling_first(network, pictures, spec)
    content, open_size = detectors.recorded(network, pictures, spec, fixed=options.fixed)
    return _Ready(
        lambda path, metadata: detectors.with_metadata(content, metadata, path),
        lambda path: detectors.compared(path, network, pictures, spec, open_size=open_size),
        False, open_size, len(pictures), source,
    )  # fmt: skip


def _suffix(options: ExportOptions) -> str:
    return "" if options.output is None else options.output.suffix.lower()


def _plain(network: nn.Module) -> nn.Module:
    """The network as one plain graph where messages pass in it by the wire, and it can be written so."""
    if example_of(network) is None:
        return network
    try:
        return flat(network).eval()
    except TracingError as error:
        log.info("no plain graph can be written, so the network itself is exported: %s", one_line(error))
        return network


def _metadata(found: About, spec: str) -> dict[str, Any]:
    return {"model": os.path.basename(spec), "dcafy_version": __version__, **written(found)}


# --- the program ----------------------------------------------------------------------------------------


def _program(plain: nn.Module, network: nn.Module, images: Tensor, *, fixed: bool, spec: str) -> tuple[Any, bool, bool]:
    """The exported program, and whether its batch and its size are open; as open as the network lets it be."""
    batch = torch.cat([images] * 2)[: max(len(images), 2)]  # a batch of one would be taken for a constant
    tries: list[dict[int, Any]] = [{0: torch.export.Dim("batch")}, {}]
    if not fixed:
        tries.insert(0, {0: torch.export.Dim("batch"), **dict.fromkeys((2, 3), torch.export.Dim.AUTO)})
    why = ""
    for shapes in tries:
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = torch.export.export(plain, (batch,), dynamic_shapes=(shapes,), strict=False)
        except Exception as error:  # torch.export fails in many ways, none of them with an error of its own
            why = why or one_line(error)[:200]
            continue
        shape = next(node.meta["val"].shape for node in program.graph.nodes if node.name in _inputs(program))
        opened = [isinstance(side, torch.SymInt) for side in shape]
        size = opened[2] and opened[3]
        if size and not _right_elsewhere(program, network, batch):
            why = why or "at another size it computes otherwise"
            continue
        for what, missed in (("batch", not opened[0]), ("size", not size and not fixed)):
            if missed:
                log.warning("%s: its %s is fixed in the file%s", spec, what, f" ({why})" if why else "")
        return program, opened[0], size
    raise InputError(f"{spec!r} cannot be exported by torch.export: {why}.")


def _inputs(program: Any) -> Sequence[str]:
    names: Sequence[str] = program.graph_signature.user_inputs
    return names


@torch.no_grad()
def _right_elsewhere(program: Any, network: nn.Module, batch: Tensor) -> bool:
    """Whether the program computes what the network does on pictures of other sizes, where that runs on them."""
    run = program.module()
    for other in _others(batch):
        try:
            expected = network(other)
        except (RuntimeError, AssertionError, ValueError):
            continue
        try:
            if not _relative(run(other), expected) <= TOLERANCE:
                return False
        except (RuntimeError, AssertionError, ValueError):
            return False
    return True


def _others(batch: Tensor) -> list[Tensor]:
    """The pictures at half as large again, and wider than high."""
    height, width = batch.shape[2:]
    sizes = ((height + height // 2, width + width // 2), (height, width + 32))
    return [nn.functional.interpolate(batch[:1], size=size, mode="bilinear") for size in sizes]


# --- the kinds ------------------------------------------------------------------------------------------


def _write_onnx(program: Any, path: Path, metadata: dict[str, str]) -> None:
    with needing("ONNX", "export", "onnx, onnxscript and onnxruntime"):
        import onnxruntime  # noqa: F401 - missing it is told before the work is done
        import onnxscript  # noqa: F401
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any = torch.onnx.export(
            program, (), dynamo=True, verbose=False, input_names=["images"], output_names=["scores"]
        )
    made.model.metadata_props.update(metadata)
    made.save(str(path))


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def _write_program(program: Any, path: Path, metadata: dict[str, str]) -> None:
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files=metadata)


def _read_program(path: Path) -> Callable[[Tensor], Tensor]:
    with path.open("rb") as file:
        run: Callable[[Tensor], Tensor] = torch.export.load(file).module()
    return run


KINDS = {".onnx": Kind(_write_onnx, _read_onnx), ".pt2": Kind(_write_program, _read_program)}
"""How a file's name ends -> what is written."""


# --- comparing ------------------------------------------------------------------------------------------


@torch.no_grad()
def _apart(run: Callable[[Tensor], Tensor], network: nn.Module, images: Tensor, batch: bool, size: bool) -> float:
    """The largest difference over the largest output, of several numbers of pictures and sizes where they are open."""
    whole = torch.cat([images] * 2)[: max(len(images), 2)]
    shown = [whole, *([whole[:1]] if batch else ()), *(_others(whole) if size else ())]
    worst = 0.0
    for given in shown:
        try:
            expected = network(given)
        except (RuntimeError, AssertionError, ValueError):
            continue  # the network itself does not take that size
        worst = max(worst, _relative(run(given), expected))
    return worst


def _relative(given: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest output; not a number where the outputs are none."""
    if given.shape != expected.shape:
        return float("inf")
    largest = expected.abs().max().item()
    difference = (given.double() - expected.double()).abs().max().item()
    return difference / largest if largest else difference
