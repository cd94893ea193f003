"""A detector as ONNX, compared with the detector itself box by box.

How many boxes there are hangs on what is in the picture, and torch.export takes no such network (none of torchvision's
detectors, as of torch 2.14). The exporter before it does: it records one run, in which torchvision's own code keeps the
sizes of the picture open.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dcafy.errors import InputError, UsageError
from dcafy.export.options import TOLERANCE
from dcafy.wording import needing, one_line

log = logging.getLogger("dcafy")

OUTPUTS = ("boxes", "scores", "labels")
"""What the file gives of one picture, in this order; masks and keypoints of detectors that have them come after."""

Found = Mapping[str, Tensor]
"""What is found in one picture, by name."""


def recorded(network: nn.Module, pictures: Sequence[Tensor], spec: str, *, fixed: bool) -> tuple[bytes, bool]:
    """The ONNX file of a detector, and whether the size of its pictures is open; the first picture is recorded.

    Raises ``InputError`` where it cannot be recorded.
    """
    names = [*found_by(network, pictures[0], spec)]
    content = _recorded(network, pictures[0], names, spec, fixed=fixed)
    if fixed or _agrees(content, network, pictures, spec):
        return content, not fixed
    log.warning("%s: its size is fixed in the file (at another size it computes otherwise)", spec)
    return _recorded(network, pictures[0], names, spec, fixed=True), False


def telling_first(network: nn.Module, pictures: Sequence[Tensor], spec: str) -> list[Tensor]:
    """The pictures, the one with the most boxes first; ``InputError`` where what is found could not be compared."""
    scores = [found_by(network, picture, spec)["scores"] for picture in pictures]
    order = sorted(range(len(pictures)), key=lambda place: -len(scores[place]))
    first = scores[order[0]]
    if not len(first):
        raise InputError(
            f"{spec!r} finds nothing in the pictures that the file would be compared on, so it is not written. Name "
            "pictures with such objects: --images FOLDER."
        )
    if len(first) > 1 and first.max() - first.min() < _ALIKE * first.max():
        raise InputError(
            f"{spec!r} gives all boxes the same score, as untrained detectors do: which of them it tells hangs on "
            "rounding, and no file can be compared with it. Train it first, or name one with weights."
        )
    return [pictures[place] for place in order]


_ALIKE = 1e-3
"""Scores of one picture that differ by less, of the largest, are in no order that another library would find again."""


def found_by(network: nn.Module, picture: Tensor, spec: str) -> dict[str, Tensor]:
    """What the network finds in one picture ``[3, H, W]``, with boxes, scores and labels first."""
    with torch.no_grad():
        try:
            found = network([picture])[0]
            return {name: found[name] for name in (*OUTPUTS, *(name for name in found if name not in OUTPUTS))}
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            raise InputError(f"{spec!r} does not run as a detector does: {one_line(error)[:200]}.") from error


class _Whole(nn.Module):
    """A detector of one picture: ``[3, H, W]`` -> its outputs as a tuple."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        (found,) = self.network([picture])
        return tuple(found[name] for name in self.names)


def _recorded(network: nn.Module, picture: Tensor, names: Sequence[str], spec: str, *, fixed: bool) -> bytes:
    boxes = {name: {0: "found"} for name in names}
    try:
        with warnings.catch_warnings(), torch.no_grad(), tempfile.TemporaryDirectory() as place:
            warnings.simplefilter("ignore")
            file = Path(place) / "detector.onnx"
            torch.onnx.export(
                _Whole(network, names).eval(), (picture,), str(file), dynamo=False, opset_version=17,
                input_names=["image"], output_names=list(names),
                dynamic_axes=boxes if fixed else {"image": {1: "height", 2: "width"}, **boxes},
            )  # fmt: skip
            return file.read_bytes()
    except Exception as error:  # the exporter fails in many ways, none of them with an error of its own
        raise InputError(f"{spec!r} cannot be exported by torch.onnx: {one_line(error)[:200]}.") from error


def with_metadata(content: bytes, metadata: Mapping[str, str], path: Path) -> None:
    """Writes the file, with these entries in it."""
    with needing("ONNX", "export", "onnx, onnxscript and onnxruntime"):
        import onnx
    model = onnx.load_from_string(content)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


def runs(model: bytes | Path) -> Callable[[Tensor], dict[str, Tensor]]:
    """What runs the file on one picture."""
    with needing("ONNX", "export", "onnx, onnxscript and onnxruntime"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of shapes that the recording left open
    given = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(picture: Tensor) -> dict[str, Tensor]:
        found = session.run(None, {"image": picture.numpy()})
        return {name: torch.from_numpy(values) for name, values in zip(names, found, strict=True)}

    return run


def _agrees(content: bytes, network: nn.Module, pictures: Sequence[Tensor], spec: str) -> bool:
    """Whether the file finds the same in pictures of other sizes."""
    run = runs(content)
    for picture in others(pictures):
        expected = found_by(network, picture, spec)
        try:
            if not apart(run(picture), expected) <= TOLERANCE:
                return False
        except Exception:  # onnxruntime's own errors, where a size is baked into the file
            return False
    return True


def others(pictures: Sequence[Tensor]) -> Iterator[Tensor]:
    """The pictures themselves, of which some are of other sizes, and the first one higher and wider."""
    yield from pictures
    height, width = pictures[0].shape[1:]
    for size in ((height + height // 2, width), (height, width + 32)):
        yield nn.functional.interpolate(pictures[0][None], size=size, mode="bilinear")[0]


@torch.no_grad()
def apart(found: Found, expected: Found) -> float:
    """How far two findings are from each other: the largest difference over the largest value, of each output.

    Boxes are compared each with the nearest of its class, for equal scores come in any order. Infinite where their
    number or their classes differ.
    """
    if any(found[name].shape != expected[name].shape for name in OUTPUTS):
        return float("inf")
    if not len(expected["scores"]):
        return 0.0
    far = torch.where(found["labels"][:, None] != expected["labels"], torch.inf, 0.0).double()
    for name in ("boxes", "scores"):
        here, there = (side[name].double().reshape(len(side[name]), -1) for side in (found, expected))
        largest = float(there.abs().max()) or 1.0
        far = far.maximum((here[:, None] - there).abs().amax(2) / largest)
    return float(torch.maximum(far.amin(0).max(), far.amin(1).max()))


@torch.no_grad()
def hangs_on_rounding(network: nn.Module, pictures: Sequence[Tensor], spec: str) -> bool:
    """Whether the network tells other boxes once its weights differ by a millionth, which is what rounding does."""
    moved = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    for parameter in moved.parameters():
        parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=generator))
    return any(apart(found_by(moved, one, spec), found_by(network, one, spec)) > TOLERANCE for one in pictures)


def require_onnx(suffix: str, spec: str) -> None:
    """Nothing for a name that says ONNX; ``UsageError`` where a detector would become a program of torch.export."""
    if suffix != ".onnx":
        raise UsageError(
            f"{spec!r} is a detector, and torch.export takes none: how many boxes there are hangs on the picture. "
            "Write -o NAME.onnx."
        )


@torch.no_grad()
def compared(path: Path, network: nn.Module, pictures: Sequence[Tensor], spec: str, *, open_size: bool) -> float:
    """How far the file is from the network, on the pictures and, with ``open_size``, at other sizes.

    ``InputError`` where that cannot be told, for the network itself finds others as soon as anything is rounded.
    """
    run = runs(path)
    shown = [*others(pictures)] if open_size else [one for one in pictures if one.shape == pictures[0].shape]
    most = max(apart(run(picture), found_by(network, picture, spec)) for picture in shown)
    if most > TOLERANCE and hangs_on_rounding(network, shown, spec):
        raise InputError(
            f"{spec!r} gives many boxes almost the same score: which of them it tells hangs on rounding (with weights "
            "that differ by a millionth it tells others itself), and no file can be compared with it. Train it "
            "further, or name other pictures: --images FOLDER."
        )
    return most
