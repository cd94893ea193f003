"""Whether what a module returns is made the same way in both modes: a graph takes it apart as it was in eval."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_structure

from dcafy.draws import drawing_apart
from dcafy.graph.nodes import as_plain, node_value, values_of
from dcafy.graph.paths import within
from dcafy.trace.fold import CannotEnter
from dcafy.trace.recording import Recording
from dcafy.wording import reason_of


def require_one_form(recording: Recording, is_called: Callable[[str], bool]) -> None:
    """Raises :class:`CannotEnter` for a module that stays a call and returns a container of another form in training.

    ``is_called``: whether the module at a path stays a call. Looked at are those in which something decides by the
    mode, or is kept whole. (YOLO's heads: a tensor and a list in eval, the list in training.)
    """
    doubtful = recording.mode_read.keys() | recording.kept_whole.keys()
    calls = [(call.path, call.args, call.kwargs, values_of(call.output)) for call in recording.calls]
    leaves = (n for n in recording.graph.nodes if n.op == "call_module" and n.target in recording.kept_whole)
    calls += [(str(node.target), node.args, node.kwargs, node_value(node)) for node in leaves]
    for path, args, kwargs, value in calls:
        taken_apart = not isinstance(value, Tensor | fx.Node | None)
        if not (path and taken_apart and is_called(path) and any(within(inner, path) for inner in doubtful)):
            continue
        twin = copy.deepcopy(recording.modules[path]).train()
        try:
            with torch.no_grad():
                given: tuple[Any, dict[str, Any]] = values_of(args), values_of(kwargs)
                trained: Any = as_plain(drawing_apart(functools.partial(twin, *given[0], **given[1])))
        except Exception as error:  # without data, or without targets, it may fail in any way
            raise CannotEnter({path: f"what it returns in training cannot be seen: {reason_of(error)}"}) from error
        if tree_structure(trained) != tree_structure(value):
            raise CannotEnter({path: "what it returns has another form in training than in eval"})
