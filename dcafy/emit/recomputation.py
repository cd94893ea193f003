"""Whether a checkpoint runs something for the first time or again: the one place that knows torch's private hooks.

``torch.utils.checkpoint`` (non-reentrant) puts saved-tensor hooks around what it runs. The hook of the first run has
the checkpoint's frame in its closure, the one of the second run a reference to it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint


def frames() -> tuple[tuple[Any, ...], tuple[tuple[Any, Any], ...]]:
    """The checkpoints that run now, outermost first: frames of those that run for the first time; (frame, number of the
    time) of those that run again.
    """
    if _top() is None:
        return (), ()
    first, again = [], []
    for hook in _hooks():
        hook = getattr(hook, "_torchdynamo_orig_callable", hook)
        cells = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=False)) if _plain(hook) else {}
        if "target_frame_ref" in cells:
            frame = cells["target_frame_ref"].cell_contents()
            if frame is not None:
                again.append((frame, cells["gid"].cell_contents))
        elif "frame" in cells:
            first.append(cells["frame"].cell_contents)
    return tuple(first), tuple(again)


def _plain(hook: Any) -> bool:
    return hasattr(hook, "__code__") and hook.__module__ == torch_checkpoint.__name__


def _top() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _hooks() -> list[Any]:
    """The pack hooks of the thread, outermost first; they are taken off and put back, as torch shows only the last."""
    taken = []
    while (top := _top()) is not None:
        taken.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    for pack, unpack in reversed(taken):
        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
    return [pack for pack, _ in reversed(taken)]


def backward() -> int:
    """The number of the backward pass that this thread is in; -1 outside of any."""
    return torch._C._current_graph_task_id()


def is_reentrant() -> bool:
    """Whether this runs inside a reentrant checkpoint's first forward, which has no gradients."""
    return any(code is _REENTRANT for code in _running())


_REENTRANT = torch_checkpoint.CheckpointFunction.forward.__code__


def _running() -> Iterator[Any]:
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back
