"""What the submodules of an untraceable module are called with, seen by running it once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dcafy.draws import drawing_apart
from dcafy.graph.copies import data_free_copy, shared_copy
from dcafy.graph.evaluator import KEEPS_LAYOUT, Evaluator
from dcafy.graph.nodes import tensors_in
from dcafy.trace.inputs import real_inputs, without_data
from dcafy.trace.recording import Observed
from dcafy.wording import reason_of


def observe(module: nn.Module, inputs: Observed, evaluator: Evaluator) -> dict[str, Observed] | str:
    """Path -> inputs of the first call of every submodule, in the order of the calls; or why it did not run."""

    def watched(twin: nn.Module, run: Callable[[], Any]) -> dict[str, Observed]:
        seen: dict[str, Observed] = {}
        with contextlib.ExitStack() as hooks:
            for path, child in twin.named_modules():
                if path:

                    def note(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                        seen.setdefault(path, Observed(without_data(args), without_data(kwargs)))

                    hooks.callback(child.register_forward_pre_hook(note, with_kwargs=True).remove)
            run()
        return seen

    return ran(module, inputs, evaluator, watched)


Found = TypeVar("Found")


def ran(
    module: nn.Module, inputs: Observed, evaluator: Evaluator, watched: Callable[[nn.Module, Callable[[], Any]], Found]
) -> Found | str:
    """What ``watched`` makes of a copy of ``module`` and of what runs it on the inputs; or why it did not run.

    It is run without data where that works, else on the example (detectors look at scores and boxes). On a
    guessed example its values mean nothing, and no time is spent on computing them.
    """

    def run(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
        with torch.no_grad():
            return drawing_apart(lambda: watched(twin, lambda: twin.eval()(*args, **kwargs)))

    try:
        return run(_without_computing(data_free_copy(module), evaluator), inputs.args, inputs.kwargs)
    except Exception as error:  # any forward may fail on meta tensors in any way
        reason = reason_of(error)
    if any(p.device.type == "meta" for p in module.parameters()):
        return reason
    try:
        twin = shared_copy(module)
        given = (inputs.args if inputs.real is None else inputs.real, inputs.kwargs)
        if all(value.device.type == "meta" for value in tensors_in(given)):
            twin = _without_computing(twin, evaluator)
        return run(twin, *real_inputs(given, module))
    except Exception as error:  # as above; the caller tells the user
        return reason_of(error)


_COSTLY = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


def _without_computing(module: nn.Module, evaluator: Evaluator) -> nn.Module:
    """``module``, whose layers yield what has the right shape and nothing else: no data, or zeros."""

    def yielded(layer: nn.Module, value: Tensor, *rest: Any) -> Any:
        shape = evaluator.module(layer, (without_data(value), *rest), {})
        nothing = torch.zeros(shape.shape, dtype=shape.dtype, device=value.device)
        return nothing + 0 * value.detach().flatten()[:1].sum()  # so that it comes of the input, as it should

    for layer, blank in zip(module.modules(), data_free_copy(module).modules(), strict=True):
        if type(layer) in KEEPS_LAYOUT:
            layer.__dict__["forward"] = lambda value, *_: value.detach() if isinstance(value, Tensor) else value
        elif type(layer) in _COSTLY:
            layer.__dict__["forward"] = functools.partial(yielded, blank)
    return module
