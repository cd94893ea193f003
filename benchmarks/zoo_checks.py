"""What is examined of one network of a zoo: how it traced, what was found, and whether the rules hold.

``zoo.py`` runs this for whole lists of networks, each in its own process; ``tests/test_zoo.py`` for a few.
"""

from __future__ import annotations

import contextlib
import copy
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

import dcafy
from dcafy import converted, survey
from dcafy.errors import DcafyError, InputError, TracingError
from dcafy.graph.copies import data_free_copy
from dcafy.trace.inputs import guesses
from dcafy.wording import reason_of
from dcafy.zoos.specs import parse

Row = dict[str, Any]
"""Everything that is known about one network, as JSON-ready data."""

NEEDED = 30
"""Bytes for each parameter of a network that is checked: two copies, gradients, and what is compared."""

SIDES = (96, 128, 160, 192, 224, 256)
"""Reduced image sides, in the order they are tried."""

DROPS = {"drop_rate": 0.2, "drop_path_rate": 0.2}
"""Randomness in training mode, for every network that has such settings."""

NOT_WHOLE = "not traced as a whole"
"""How a plan says that the root's forward is no graph, whether or not any island holds attention."""

OPTICAL_FLOW = "torchvision.models.optical_flow"
DETECTION = "torchvision.models.detection"


class NotApplicable(Exception):
    """Why a check says nothing about this network."""


# -- one network -----------------------------------------------------------------------------------


def family(model: nn.Module) -> str:
    """The zoo's own word for a kind of network: the file, or the folder, that defines it."""
    parts = type(model).__module__.split(".")
    if "quantization" in parts:
        return "torchvision.quantization"
    return f"{parts[0]}.{parts[2]}" if len(parts) > 2 else ".".join(parts)


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def example_of(model: nn.Module) -> tuple[Tensor, ...] | None:
    """Inputs without data for what a guess cannot know; ``None`` leaves it to dcafy."""
    if type(model).__module__.startswith(OPTICAL_FLOW):
        return (torch.empty(2, 3, 128, 128, device="meta"), torch.empty(2, 3, 128, 128, device="meta"))
    return None


def in_child(connection: Any, spec: str, stage: str, expected: list[str] | None, memory: float) -> None:
    """Sends the row of one network, and what is known of it before each step, within so many GB."""
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # meta kernels may segfault
    torch.set_num_threads(1)
    connection.send(examine(spec, stage, expected, connection.send, memory=memory))


def examine(
    spec: str,
    stage: str,
    expected: list[str] | None = None,
    report: Callable[[Row], None] = id,
    *,
    memory: float = 12,
) -> Row:
    """The row of one network; ``report`` is given what is known so far before each step.

    ``stage``     ``inspect`` (without weights) or ``full``
    ``expected``  modules that hold attention, where somebody has listed them
    ``memory``    GB; networks that do not fit are only inspected
    """
    row: Row = {"model": spec, "stage": stage, "seconds": {}, "step": "build"}
    report(row)
    model = _inspected(spec, row, report)
    if model is None:
        return row
    if expected is not None:
        row["step"] = "score"
        row.update(score(model, row["blocks"], expected))
    if stage == "full":
        _checked(spec, model, row, report, memory)
    row["step"] = "bare trace"
    report(row)
    row["bare"] = _bare_trace(model, row["seconds"])
    if row["traced"] == "root" and (row["settled"] or row["bare"] != "traced"):
        row["traced"] = "values"
    row["step"] = "done"
    return row


def _inspected(spec: str, row: Row, report: Callable[[Row], None]) -> nn.Module | None:
    """The network, inspected; without storage where that works (detectors look at scores and boxes)."""
    _warm_up()
    for on_meta in (True, False):
        row["seconds"].clear()
        try:
            with _timed(row["seconds"], "build"):
                model = parse(spec, {}).build(on_meta=on_meta).eval()
        except Exception as error:  # a network that its own zoo cannot build says nothing about dcafy
            row.update(traced="not built", error=reason_of(error))
            continue
        row.update(family=family(model), parameters=parameter_count(model), on_meta=on_meta, step="inspect")
        report(row)
        try:
            with _timed(row["seconds"], "inspect"), _stopwatches(row["seconds"], _INSPECT):
                known = survey.survey(model, example_of(model))
        except (TracingError, InputError) as error:
            row.update(traced="not", error=str(error))
            continue
        except Exception as error:  # a bug of dcafy; the run goes on and the table says so
            row.update(traced="not", error=f"BUG: {reason_of(error)}")
            continue
        row.pop("error", None)
        row.update(_facts(known))
        return model
    row["step"] = "done"
    return None


def _facts(known: survey.Survey) -> Row:
    plan = known.plan
    apart = any(item.name == plan.model and item.reason.startswith(NOT_WHOLE) for item in plan.skipped)
    return {
        "traced": "islands" if plan.islands or apart else "root",
        "settled": sum(len(region.recording.settled) for region in known.network.regions),
        "kept_whole": {
            f"{region.path}.{path}": why
            for region in known.network.regions
            for path, why in region.recording.kept_whole.items()
        },
        "islands": list(plan.islands),
        "blocks": [block.name for block in plan.blocks],
        "dimensions": [block.dimension for block in plan.blocks],
        "links": len(plan.links),
        "skipped": [[item.name, item.reason] for item in plan.skipped],
        "example": [list(v.shape) for v in known.inputs if isinstance(v, Tensor)],
    }


def _warm_up() -> None:
    """Torch loads its meta kernels at first use, once per process; no network is charged with that."""
    survey.survey(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )


def _bare_trace(model: nn.Module, seconds: dict[str, float]) -> str:
    """``traced``, or why ``torch.fx.symbolic_trace`` fails on the network."""
    twin = data_free_copy(model)
    try:
        with _timed(seconds, "bare"):
            fx.symbolic_trace(twin)
    except Exception as error:  # networks fail in every way
        return reason_of(error)
    return "traced"


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds of one core that are spent inside: the clock of a shared machine says more and less."""
    start = time.process_time()
    try:
        yield
    finally:
        seconds[name] = round(seconds.get(name, 0.0) + time.process_time() - start, 4)


@contextlib.contextmanager
def _stopwatches(seconds: dict[str, float], parts: tuple[tuple[Any, str, str], ...]) -> Iterator[None]:
    """Inside it these parts of the path, as (home, function, name), are timed under their names."""

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _timed(seconds, name):
                return function(*args, **kwargs)

        return call

    originals = [(home, attribute, getattr(home, attribute)) for home, attribute, _ in parts]
    try:
        for home, attribute, name in parts:
            setattr(home, attribute, timed(name, getattr(home, attribute)))
        yield
    finally:
        for home, attribute, original in originals:
            setattr(home, attribute, original)


_INSPECT: tuple[tuple[Any, str, str], ...] = (
    (survey, "recorded", "trace"),
    (survey, "find", "find"),
    (survey, "message_of", "link"),
    (survey, "earlier", "link"),
    (survey, "links_in", "link"),
)
_EMIT = (converted, "connect", "emit")


# -- the yardstick ---------------------------------------------------------------------------------


def score(model: nn.Module, found: list[str], expected: list[str]) -> Row:
    """Which expected modules were found, and which blocks are in no expected module.

    A module is found where a block has its path or lies inside it; or lies around it with nothing but
    ``Sequential`` in between, and is in no other expected module.
    """
    modules = dict(model.named_modules())
    left = dict.fromkeys(name.split("#")[0] for name in found)
    disputed = [path for path in expected if _is_switched_off(modules[path])]
    missed = []
    for path in (path for path in expected if path not in disputed):
        inside = [name for name in left if f"{name}.".startswith(f"{path}.")]
        if not inside:
            missed.append(path)
        for name in inside:
            del left[name]
    for path in list(missed):
        around = next((name for name in left if _around(name, path, modules)), None)
        if around is not None:
            missed.remove(path)
            del left[around]
    return {"expected": len(expected), "disputed": disputed, "missed": missed, "extra": list(left)}


def _is_switched_off(module: nn.Module) -> bool:
    """Whether a module that some list counts as attention computes none in this very network.

    timm's GhostNetV3 has the decoupled attention of its ghost modules only where ``mode`` is ``shortcut``:
    elsewhere ``short_conv`` is an identity that its forward never calls.
    """
    return type(module).__name__ == "GhostModuleV3" and isinstance(module.short_conv, nn.Identity)


def _around(name: str, path: str, modules: dict[str, nn.Module]) -> bool:
    if not path.startswith(f"{name}."):
        return False
    levels = path.split(".")
    above = [".".join(levels[:i]) for i in range(name.count(".") + 1, len(levels))]
    return all(isinstance(modules[level], nn.Sequential) for level in above)


# -- the rules, on real weights --------------------------------------------------------------------


@dataclass
class Subject:
    """A network with trained-like values in eval mode, and its conversion.

    ``shape``  of one input, without the batch; ``other`` another one that the network takes, if any
    """

    model: nn.Module
    shape: tuple[int, ...]
    other: tuple[int, ...] | None
    converted: nn.Module = field(init=False)

    def inputs(self, batch: int = 2, shape: tuple[int, ...] | None = None, seed: int = 1) -> Tensor:
        """Images that differ in brightness, contrast and colour, so that pooled contexts differ too."""
        shape = shape or self.shape
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(batch, *shape, generator=generator)
        level = (batch, shape[0], *(1 for _ in shape[1:]))
        return noise * (0.5 * torch.rand(level, generator=generator) + 0.75) + 0.5 * torch.randn(
            level, generator=generator
        )

    def familiar(self) -> Tensor:
        """The images that the network's statistics are those of: on these its gates are not saturated."""
        return self.inputs(8, seed=1)

    @property
    def detects(self) -> bool:
        """Whether the network takes targets in training, and returns losses."""
        return type(self.model).__module__.startswith(DETECTION)

    def trains_on(self, batch: int, seed: int) -> tuple[Any, ...]:
        """The arguments of a call in training mode."""
        images = self.inputs(batch, seed=seed)
        if not self.detects:
            return (images,)
        box = torch.tensor([[8.0, 8.0, 60.0, 70.0], [20.0, 16.0, 90.0, 80.0]])
        targets = [{"boxes": box.clone(), "labels": torch.tensor([1, 2])} for _ in images]
        return (list(images), targets)


def _checked(spec: str, meta: nn.Module, row: Row, report: Callable[[Row], None], memory: float) -> None:
    """Adds the outcome of every check to ``row``: ``ok``, ``n/a: why`` or ``failed: how``."""
    if not row["links"]:
        return
    most = int(memory * 1000 / NEEDED)
    if row["parameters"] > most * 10**6:
        why = f"n/a: over {most} M parameters, only inspected within {memory:g} GB"
        row["checks"] = dict.fromkeys(["convert", *CHECKS], why)
        return
    row["step"] = "real weights"
    report(row)
    outcomes = row["checks"] = dict.fromkeys(["convert", *CHECKS], "failed: not reached")
    try:
        subject = subject_of(spec, meta)
        row["image"] = list(subject.shape)
        convert_subject(subject, row)
    except DcafyError as error:
        outcomes["convert"] = f"failed: {type(error).__name__}: {error}"
        return
    except Exception as error:  # a bug; the table says so
        outcomes["convert"] = f"failed: BUG: {reason_of(error)}"
        return
    outcomes["convert"] = "ok"
    for name, check in CHECKS.items():
        row["step"] = name
        report(row)
        try:
            with _timed(row["seconds"], name):
                problem = check(subject)
            outcomes[name] = f"failed: {problem}" if problem else "ok"
        except NotApplicable as reason:
            outcomes[name] = f"n/a: {reason}"
        except Exception as error:  # the original ran; whatever the converted one raises is a failure
            outcomes[name] = f"failed: {reason_of(error)}"


def subject_of(spec: str, meta: nn.Module) -> Subject:
    """The network with real weights, at the smallest image side that it takes."""
    shape = _reduced(meta)
    native = next(iter(guesses(meta)))[0].shape[1:]
    settings: dict[str, Any] = dict(DROPS)
    if shape is None and spec.startswith("timm:"):
        model, shape = _resized(spec, tuple(native))
    else:
        model = _built(spec, settings)
        shape = shape or tuple(native)
    subject = Subject(model.eval(), shape, None)
    trained_like(subject)
    larger = (shape[0], *(side * 4 // 3 for side in shape[1:]))
    if subject.detects or _runs(meta, larger):  # a detector does not run without data, and takes any size
        subject.other = larger
    return subject


def convert_subject(subject: Subject, row: Row) -> None:
    """Converts the network, and notes in ``row`` the time and what is other than without weights."""
    with _timed(row["seconds"], "convert"):
        plan = dcafy.inspect(subject.model, example_inputs=subject.inputs())
        with _stopwatches(row["seconds"], (_EMIT,)):
            subject.converted = dcafy.convert(subject.model, example_inputs=subject.inputs(), plan=plan)
    if [block.name for block in plan.blocks] != row["blocks"]:
        row.setdefault("notes", []).append(
            f"{len(plan.blocks)} blocks at {list(subject.shape)}, {len(row['blocks'])} at {row['example']}"
        )


def _reduced(meta: nn.Module) -> tuple[int, ...] | None:
    native = next(iter(guesses(meta)))[0].shape[1:]
    if len(native) != 3:
        return None
    sides = [side for side in SIDES if side < native[-1]]
    return next(((native[0], side, side) for side in sides if _runs(meta, (native[0], side, side))), None)


def _runs(meta: nn.Module, shape: tuple[int, ...]) -> bool:
    twin = data_free_copy(meta)
    try:
        with torch.no_grad():
            twin(torch.empty(2, *shape, device="meta"))
    except Exception:  # networks refuse sizes in every way
        return False
    return True


def _resized(spec: str, native: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
    """A network that is built for one image size, built for a smaller one where that works."""
    for side in (side for side in (128, 224) if side < native[-1]):
        shape = (native[0], side, side)
        with contextlib.suppress(Exception):  # no such setting, or no such size
            parse(spec, {"img_size": side}).build(on_meta=True)(torch.empty(2, *shape, device="meta"))
            return _built(spec, {**DROPS, "img_size": side}), shape
    return _built(spec, dict(DROPS)), native


def _built(spec: str, settings: dict[str, Any]) -> nn.Module:
    """The network with drop rates above zero, if it has any."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if not spec.startswith("timm:"):
            return parse(spec, {}).build()
        essential = {key: value for key, value in settings.items() if key not in DROPS}
        for offered in (settings, {k: v for k, v in settings.items() if k != "drop_path_rate"}):
            with contextlib.suppress(DcafyError):  # its constructor has no such setting
                return parse(spec, offered).build()
        return parse(spec, essential).build()


def trained_like(subject: Subject) -> None:
    """Values as after training: no gain at zero, batch norm statistics of such images, off by some percent."""
    model = subject.model
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                _move(parameter, bias="bias" in name)
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        handles = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
        model.eval()(subject.familiar())
        for handle in handles:
            handle.remove()


def _take_statistics(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Statistics of what reaches a norm in this very call, off by some percent.

    Each norm sees what those before it make of the images with the statistics that they keep: errors do not
    grow from norm to norm, until in a deep network every gate is saturated.
    """
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    axes = [axis for axis in range(args[0].ndim) if axis != 1]
    mean, var = args[0].mean(axes), args[0].var(axes, correction=0)
    norm.running_mean.copy_(mean + 0.05 * torch.randn_like(mean) * var.sqrt())
    norm.running_var.copy_(var * (torch.rand_like(var) * 0.4 + 0.8) + 1e-6)


def _move(parameter: Tensor, *, bias: bool) -> None:
    """Put one parameter where training could have left it."""
    constant = bool((parameter == parameter.flatten()[0]).all())
    per_channel = parameter.ndim < 2 or parameter[0].numel() == 1
    if bias:
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    elif constant and per_channel and not parameter.any():
        # What starts at zero ends small. At full size the branches of a hundred blocks add up until every
        # gate is saturated, and nothing is alive in the original either.
        parameter.copy_(torch.rand_like(parameter) * 0.2 + 0.1)
    elif constant and per_channel:
        parameter.copy_(torch.rand_like(parameter) * 0.4 + 0.7)  # gains: norms, layer scale
    elif constant:
        parameter.copy_(torch.randn_like(parameter) / max(parameter[0].numel(), 1) ** 0.5)
    else:
        parameter.add_(torch.randn_like(parameter) * parameter.std(), alpha=0.3)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in tensors(item)]


def difference(ours: Any, theirs: Any) -> str | None:
    """How two outputs differ; ``None`` where they are the same bits and finite."""
    left, right = tensors(ours), tensors(theirs)
    if len(left) != len(right) or not left:
        return f"{len(right)} output tensors became {len(left)}"
    for a, b in zip(left, right, strict=True):
        if a.shape != b.shape:
            return f"the output {tuple(b.shape)} became {tuple(a.shape)}"
        if not torch.equal(a, b):
            return f"the outputs differ by {float((a - b).abs().max()):.3g} of {float(b.abs().max()):.3g}"
        if not b.isfinite().all():
            raise NotApplicable("the original's own output is not finite on these values")
    return None


def _evaluated(model: nn.Module, images: Tensor) -> Any:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return model(images)


def check_identity(subject: Subject) -> str | None:
    """Eval outputs are the same bits, and depend on the input."""
    images = subject.inputs()
    output = _evaluated(subject.model, images)
    other = _evaluated(subject.model, subject.inputs(seed=5))
    if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(tensors(output), tensors(other), strict=False)):
        raise NotApplicable("with these values the original gives one output for all inputs")
    return difference(_evaluated(subject.converted, images), output)


def check_batches(subject: Subject) -> str | None:
    """Eval outputs at other batch sizes are the same bits."""
    for batch in (1, 3):
        images = subject.inputs(batch, seed=2)
        problem = difference(_evaluated(subject.converted, images), _evaluated(subject.model, images))
        if problem:
            return f"at batch {batch}: {problem}"
    return None


def check_sizes(subject: Subject) -> str | None:
    """Eval outputs at another image size are the same bits."""
    if subject.other is None:
        raise NotApplicable("the original takes images of one size")
    images = subject.inputs(shape=subject.other, seed=3)
    try:
        expected = _evaluated(subject.model, images)
    except Exception as error:  # without data it took the size: not every kernel looks at shapes there
        raise NotApplicable(f"the original takes images of one size ({reason_of(error)})") from error
    return difference(_evaluated(subject.converted, images), expected)


def check_training(subject: Subject) -> str | None:
    """Train outputs under one seed are the same bits, and so are the buffers afterwards."""
    original, converted = copy.deepcopy(subject.model).train(), copy.deepcopy(subject.converted).train()
    outputs = []
    for model in (converted, original):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(11)
            outputs.append(model(*subject.trains_on(4, seed=11)))
    problem = difference(*outputs)
    if problem:
        return problem
    after = dict(converted.named_buffers())
    changed = [name for name, buffer in original.named_buffers() if not _alike(buffer, after[name])]
    return f"{len(changed)} buffers differ afterwards, the first is {changed[0]}" if changed else None


def _alike(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()))


def _objective(model: nn.Module, subject: Subject) -> Tensor:
    """A number that every part of the output goes into; detectors give it in training mode only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        if not subject.detects:
            return sum(
                (t.float().square().mean() for t in tensors(model.eval()(subject.familiar()[:2]))), torch.zeros(())
            )
        model.train()
        return sum(model(*subject.trains_on(2, seed=4)).values(), torch.zeros(()))


def check_liveness(subject: Subject) -> str | None:
    """Every β moves the output, every new parameter gets a gradient, and from the second step on one that is not 0."""
    converted = copy.deepcopy(subject.converted)
    parameters = {n: p for n, p in converted.named_parameters() if "dca" in n.split(".")}
    for name, parameter in converted.named_parameters():
        parameter.requires_grad_(name in parameters)
    optimizer = torch.optim.Adam(parameters.values(), lr=0.02)
    for step in range(2):
        optimizer.zero_grad()
        _objective(converted, subject).backward()
        lost = [name for name, p in parameters.items() if p.grad is None]
        if lost:
            return f"no gradient for {len(lost)} parameters, the first is {lost[0]}"
        due = [name for name in parameters if step > 0 or name.endswith((".alpha", ".beta"))]
        dead = [name for name in due if not parameters[name].grad.any()]  # type: ignore[union-attr]
        dead = [name for name in dead if not _moves(converted, subject, name)]
        if dead:
            return f"a gradient of zero in step {step + 1} for {len(dead)} parameters, the first is {dead[0]}"
        optimizer.step()
    return None


def _moves(converted: nn.Module, subject: Subject, name: str) -> bool:
    """Whether a large change of one parameter, whose gradient has vanished, changes the output.

    Where a gate is saturated, half as much again of G changes nothing; none of it (α = 0) does.
    """
    before = _objective(copy.deepcopy(converted), subject)
    for change in (0.5, -1.0):
        moved = copy.deepcopy(converted)
        with torch.no_grad():
            dict(moved.named_parameters())[name].add_(change)
            if not torch.equal(_objective(moved, subject), before):
                return True
    return False


def check_keys(subject: Subject) -> str | None:
    """The original's keys are there in their order with their values; every other key says ``dca``."""
    source, result = subject.model.state_dict(), subject.converted.state_dict()
    own = [key for key in result if "dca" not in key.split(".")]
    if own != list(source):
        return f"keys differ: {sorted(set(own) ^ set(source))[:3] or 'only in their order'}"
    changed = [key for key in source if not torch.equal(source[key], result[key])]
    return f"{len(changed)} values differ, the first is {changed[0]}" if changed else None


CHECKS: dict[str, Callable[[Subject], str | None]] = {
    "identity": check_identity,
    "batches": check_batches,
    "sizes": check_sizes,
    "training": check_training,
    "liveness": check_liveness,
    "keys": check_keys,
}
"""Name -> the check; it returns what is wrong, ``None`` where nothing is, or raises ``NotApplicable``."""
