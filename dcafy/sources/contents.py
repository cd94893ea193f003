"""What was saved: a network, a state dict, or a training program's checkpoint around one of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dcafy.errors import SourceError
from dcafy.wording import printable

log = logging.getLogger(__name__)

_HOLDERS = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "ema",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "net",
    "network",
    "module",
    "weights",
    "params",
    "params_ema",
)
"""Keys under which training programs keep the weights, in the order in which they are taken."""

_DEEPEST = 3
"""How many checkpoint dicts may lie inside one another: ``{"ema": {"module": {...}}}`` occurs."""

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Components that torch.compile, FSDP and activation checkpointing put into keys, anywhere."""


def network_or_weights(content: Any, spec: str) -> nn.Module | dict[str, torch.Tensor]:
    """The network or the state dict that was saved, also where it lies inside a training checkpoint.

    The keys come without what wrappers (DataParallel, torch.compile ...) put into them. ``SourceError``
    says what was found instead.
    """
    found = _search(content, ())
    if found is None:
        raise SourceError(f"{spec!r} holds {_described(content)}: neither a network nor a state dict.")
    path, value = found
    if path:
        also = [repr(key) for key in _HOLDERS if content.get(key) is not None and key != path[0]]
        others = f" ({', '.join(also)} passed over)" if also else ""
        log.info("taking what %s holds under %s%s", spec, " > ".join(map(repr, path)), others)
    return value if isinstance(value, nn.Module) else _unwrapped(value)


def _search(content: Any, path: tuple[str, ...]) -> tuple[tuple[str, ...], Any] | None:
    """Where the first network or state dict lies, and it."""
    if isinstance(content, nn.Module) or _is_state_dict(content):
        return path, content
    if not isinstance(content, Mapping) or len(path) >= _DEEPEST:
        return None
    for key in _HOLDERS:
        found = _search(content[key], (*path, key)) if key in content else None
        if found is not None:
            return found
    return None


def _is_state_dict(content: Any) -> bool:
    if not isinstance(content, Mapping) or not content:
        return False
    kept = [value for key, value in content.items() if not str(key).endswith("_extra_state")]
    return (
        all(isinstance(key, str) for key in content)
        and bool(kept)
        and all(isinstance(value, torch.Tensor) for value in kept)
    )


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with its keys as the bare network has them."""
    bare = {".".join(part for part in key.split(".") if part not in _WRAPPERS): value for key, value in state.items()}
    # torch.optim.swa_utils.AveragedModel keeps its own count beside the network's weights.
    counted = bare.pop("n_averaged", None)
    while bare and all(key.startswith("module.") for key in bare):
        bare = {key.removeprefix("module."): value for key, value in bare.items()}
    return bare if bare or counted is None else {"n_averaged": counted}


def _described(content: Any) -> str:
    """What an object is, for a message."""
    if isinstance(content, Mapping):
        keys = ", ".join(printable(str(key)) for key in list(content)[:6])
        return f"a dict with {len(content)} entries ({keys}{', ...' if len(content) > 6 else ''})" if content else "{}"
    if isinstance(content, torch.Tensor):
        return f"one tensor of shape {tuple(content.shape)}"
    return f"a {type(content).__name__}"
