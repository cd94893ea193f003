"""What was saved: a network, a state dict, or a training program's checkpoint around one of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from dcafy.errors import SourceError
from dcafy.sources.insides import Odd, look_over
from dcafy.sources.options import FileOptions
from dcafy.sources.pickles import Unread
from dcafy.wording import few, short

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

_NO_WEIGHTS = {"optimizer", "optimizers", "optimizer_states", "opt", "scaler", "lr_scheduler", "scheduler"}
"""Keys of checkpoints whose tensors belong to no network."""


def network_or_weights(content: Any, spec: str, options: FileOptions) -> nn.Module | dict[str, torch.Tensor]:
    """The network or the state dict that was saved, also where it lies inside a training checkpoint.

    The keys come without what wrappers (DataParallel, torch.compile ...) put into them. Where no key says which dict
    holds the weights (``student`` and ``teacher``), or the prefix of the options leads elsewhere, all of the
    checkpoint's are one state dict. ``SourceError`` says what was found instead.
    """
    shown = short(repr(spec), 200)
    path, value = _search(content, ()) or ((), None)
    if isinstance(value, nn.Module):
        try:
            look_over(value, trusted=options.trust_pickle)
        except Odd as error:
            raise SourceError(f"{shown} holds a network with odd insides: {error}.") from error
        _say_where(content, path, shown)
        return value
    state = None if value is None else _unwrapped(value)
    if options.prefix is not None:
        return _under(options.prefix, (state or {}, _unwrapped(dict(_everything(content)))), shown)
    if state is None:
        state = _unwrapped(dict(_everything(content)))
    if not state:
        raise SourceError(f"{shown} holds {_described(content)}: neither a network nor a state dict.")
    _say_where(content, path, shown)
    return _dense(state, shown)


def _say_where(content: Any, path: tuple[str, ...], shown: str) -> None:
    if path:
        also = [repr(key) for key in _HOLDERS if content.get(key) is not None and key != path[0]]
        others = f" ({', '.join(also)} passed over)" if also else ""
        log.info("taking what %s holds under %s%s", shown, " > ".join(map(repr, path)), others)


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
    if not isinstance(content, Mapping) or not content or not all(isinstance(key, str) for key in content):
        return False
    kept = [value for key, value in content.items() if not key.endswith("_extra_state")]
    return bool(kept) and all(isinstance(value, torch.Tensor | Unread) or _is_array(value) for value in kept)


def _is_array(value: Any) -> bool:
    """Whether it is numbers of numpy's, as Detectron2 and others keep weights."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype.isnative and value.itemsize <= 8


def _everything(content: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor in the dicts of a checkpoint, each dict once, by a key that leads through them."""
    pending, seen = [("", content, 0)], set[int]()
    while pending:
        start, holder, depth = pending.pop()
        if not isinstance(holder, Mapping) or depth > _DEEPEST or id(holder) in seen:
            continue
        seen.add(id(holder))
        for key, value in holder.items():
            if isinstance(key, str) and isinstance(value, torch.Tensor | Unread):
                yield f"{start}{key}", value
            elif isinstance(key, str) and (depth or key not in _NO_WEIGHTS):
                pending.append((f"{start}{key}.", value, depth + 1))


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with its keys as the bare network has them."""
    bare = {".".join(part for part in key.split(".") if part not in _WRAPPERS): value for key, value in state.items()}
    # torch.optim.swa_utils.AveragedModel keeps its own count beside the network's weights.
    counted = bare.pop("n_averaged", None)
    while bare and all(key.startswith("module.") for key in bare):
        bare = {key.removeprefix("module."): value for key, value in bare.items()}
    return bare if bare or counted is None else {"n_averaged": counted}


def _under(prefix: str, states: tuple[Mapping[str, Any], ...], shown: str) -> dict[str, torch.Tensor]:
    """The weights under that prefix, without it, of the first of these dicts that has any."""
    start = ".".join(part for part in prefix.split(".") if part not in _WRAPPERS).rstrip(".") + "."
    for state in states:
        found = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        if found:
            return _dense(found, shown)
    firsts = dict.fromkeys(short(key.partition(".")[0], 40) for state in states for key in state)
    raise SourceError(f"{shown} has nothing under --prefix {short(prefix)}. It has: {few(list(firsts), 8)}.")


def _dense(state: Mapping[str, Any], shown: str) -> dict[str, torch.Tensor]:
    """The state dict, if a network's parameters can be what it holds."""
    state = {key: torch.from_numpy(value.copy()) if _is_array(value) else value for key, value in state.items()}
    for key, value in state.items():
        what = value.what if isinstance(value, Unread) else None
        if isinstance(value, torch.Tensor) and (value.layout != torch.strided or value.is_quantized or value.is_nested):
            what = "a sparse, quantized or nested tensor"
        elif isinstance(value, torch.Tensor) and value.is_meta:
            what = "a tensor without data (of the meta device)"
        if what is not None:
            raise SourceError(f"{shown}: {short(key)} is {what}, and dcafy works on networks of dense tensors.")
    return state


def _described(content: Any) -> str:
    """What an object is, for a message."""
    if isinstance(content, Mapping):
        keys = ", ".join(short(str(key), 60) for key in list(content)[:6])
        return f"a dict with {len(content)} entries ({keys}{', ...' if len(content) > 6 else ''})" if content else "{}"
    if isinstance(content, torch.Tensor):
        return f"one tensor of shape {tuple(content.shape)}"
    return f"a {type(content).__name__}"
