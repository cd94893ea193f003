"""A folder -> a converted model."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dcafy.attention.inserted import inserted
from dcafy.checkpoint.architecture import built, with_insertions
from dcafy.checkpoint.description import Description, Facts, installed_versions
from dcafy.checkpoint.folder import Folder
from dcafy.checkpoint.hub import fetched, is_address
from dcafy.checkpoint.keys import Keys
from dcafy.checkpoint.state import restore
from dcafy.checkpoint.tensors import dtype_named, facts, fingerprint, is_connection, new_keys, put
from dcafy.conversion import convert
from dcafy.emit.dca import dca_of, is_connected
from dcafy.errors import CheckpointError, DcafyError, InputError, TracingError, UsageError
from dcafy.graph.copies import own_copy
from dcafy.images.about import put_about
from dcafy.trace.accepted import require_module
from dcafy.trace.inputs import from_data, in_dtype_of
from dcafy.wording import printable
from dcafy.zoos.fitting import difference
from dcafy.zoos.specs import has_random_weights_now, has_weights_now


def load(directory: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model that :func:`dcafy.save` or a command wrote to ``directory``: it computes the same, bit for bit.

    ``directory``: a folder, or ``hf://user/name[@revision]`` on the Hugging Face Hub (which needs the extra ``hub``).

    Modes and frozen parameters are as they were saved. The network is converted again with the saved plan, then
    given the saved tensors. It is ``model`` where that is given (a new model comes back, and ``model`` is left
    as it is); else torchvision or timm builds it by name, where the folder has one, without fetching weights.
    No other code runs, whatever the folder says. What is known of the network besides comes with it:
    :func:`dcafy.about` gives its classes, preprocessing and results, :func:`dcafy.transforms` the preprocessing.

    ``model``: the network as it was before :func:`dcafy.convert`, with or without the attention that was put in by
    :func:`dcafy.insert` or ``convert(attention=...)``. Its weights do not matter if the folder holds them; a folder
    saved with ``base=False`` needs the very weights that the connections were trained on.

    Raises ``CheckpointError`` for a folder that is damaged, was not written by dcafy, or does not fit the
    network, and says where they differ; ``InputError`` where ``model`` is not a plain module.

    >>> import dcafy, tempfile, torchvision
    >>> model, folder = torchvision.models.mobilenet_v3_small(), tempfile.mkdtemp()
    >>> dcafy.save(dcafy.convert(model), folder, base=False)
    >>> len(dcafy.connections(dcafy.load(folder, model)))
    8
    """
    if model is not None:
        _require_unconnected(model)
    spec = os.fspath(directory)
    folder = fetched(spec) if is_address(spec) else Folder(directory)
    description, tensors = folder.read()
    try:
        return _loaded(description, tensors, model)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}{_written_elsewhere(description)}") from error


def _require_unconnected(model: nn.Module) -> None:
    require_module(model)
    if is_connected(model):
        raise InputError(
            "The model is connected already. Pass the network as it was before dcafy.convert; "
            "dcafy.revert(model) gives it."
        )


def _loaded(description: Description, tensors: dict[str, Tensor], model: nn.Module | None) -> nn.Module:
    expected = _expected(description, tensors)
    base = {key: fact for key, fact in expected.items() if not is_connection(key)}
    if model is None:
        network = _built(description, base)
    else:
        network = _with_attention(model, description)
        own = {key: fact for key, fact in _state(network).items() if not is_connection(key)}  # it may have a dca itself
        has_attention = next(inserted(network), None) is not None
        _compare(base, own, "the network that was given", "" if has_attention else _AS_IT_WAS)
    if not description.weights.with_base:
        _require_no_base(description, tensors, new_keys(network))
        _require_same_weights(network, description.weights.base)
    converted = _converted(network, description, copy=network is model)
    if description.weights.keyed_by == "block":
        description, tensors = _rekeyed(description, tensors, converted)
        expected = _expected(description, tensors)
    state = _state(converted)
    # One module under two names has its connections under both; here there may be two modules.
    apart = {key for key in description.weights.tied if is_connection(key) and key not in state}
    expected = {key: fact for key, fact in expected.items() if key not in apart}
    held = converted.state_dict(keep_vars=True)
    once = {id(value): key for key, value in reversed(held.items())}
    state = {key: value for key, value in state.items() if key in expected or once[id(held[key])] == key}
    _compare(expected, state, "the network as it is converted here")
    put(
        converted,
        tensors,
        {key: fact.dtype for key, fact in expected.items()},
        {key: stored for key, stored in description.weights.tied.items() if key not in apart},
        description.weights.layouts,
    )
    restore(converted, description.state)
    _require_data(converted)
    has_weights_now(converted)
    if description.about is not None:
        put_about(converted, description.about)
        if description.about.random:
            has_random_weights_now(converted)
    return converted


def _rekeyed(
    description: Description, tensors: Mapping[str, Tensor], converted: nn.Module
) -> tuple[Description, dict[str, Tensor]]:
    """The description and the tensors of a folder of format 1, with the keys that connections have now."""
    assert description.plan is not None  # those of format 1 were all connected
    keys = Keys(converted, description.plan)
    weights, state = description.weights, description.state
    weights = dataclasses.replace(
        weights,
        tied={keys.now(key): keys.now(stored) for key, stored in weights.tied.items()},
        layouts={keys.now(key): layout for key, layout in weights.layouts.items()},
        keyed_by="module",
    )
    state = dataclasses.replace(
        state,
        modes={keys.now(path): mode for path, mode in state.modes.items()},
        kept_in_eval=tuple(map(keys.now, state.kept_in_eval)),
        frozen=tuple(map(keys.now, state.frozen)),
    )
    renamed = {keys.now(key): tensor for key, tensor in tensors.items()}
    return dataclasses.replace(description, weights=weights, state=state), renamed


def _expected(description: Description, tensors: Mapping[str, Tensor]) -> dict[str, Facts]:
    """Every key of the converted model's state dict, with dtype and shape."""
    stored = {key: Facts(str(t.dtype).removeprefix("torch."), tuple(t.shape), "") for key, t in tensors.items()}
    weights = description.weights
    for key, original in weights.tied.items():
        if original not in stored or key in stored:
            raise CheckpointError(f"{printable(key)} is said to be tied to {printable(original)}, which is not stored.")
    tied = {key: stored[original] for key, original in weights.tied.items()}
    if weights.base and (weights.with_base or fingerprint(weights.base) != weights.base_sha256):
        raise CheckpointError("its list of base weights is damaged. Save the model again, or copy the folder again.")
    for fact in weights.base.values():
        _dtype(fact.dtype)
    return {**weights.base, **stored, **tied}


def _require_no_base(description: Description, tensors: Mapping[str, Tensor], is_new: Callable[[str], bool]) -> None:
    """Nothing where what is stored is new to the base, and nothing of that stands among the base's own."""
    weights = description.weights
    if not all(is_new(key) and key not in weights.base for key in (*tensors, *weights.tied)):
        raise CheckpointError(f"its {weights.file} holds base weights too, which it should not.")


def _dtype(name: str) -> torch.dtype:
    try:
        return dtype_named(name)
    except KeyError:
        raise CheckpointError(f"its description names the dtype {printable(name)}, which does not exist.") from None


def _built(description: Description, base: Mapping[str, Facts]) -> nn.Module:
    """The network of the name in the folder; ``CheckpointError`` where there is none, or not enough to go with it."""
    network = printable(_name(description))
    if not description.weights.with_base:
        raise CheckpointError(
            f"it holds connections only (it was saved with base=False). Pass the {network} that they were trained in, "
            f"with its weights: {_PASS_IT}."
        )
    if description.model is None:
        raise CheckpointError(
            f"it does not say how its network is built: {network} was hand-written, or was changed in a way that "
            "torchvision and timm do not build. Pass the network as it was before dcafy.convert (its weights do not "
            f"matter): {_PASS_IT}."
        )
    shapes = {key: fact.shape for key, fact in base.items()}
    return built(description.model, description.insertions, shapes, description.inputs)


def _with_attention(model: nn.Module, description: Description) -> nn.Module:
    """``model``, which stays as it is, with the attention in it that was put in; itself where it has some."""
    if not description.insertions or next(inserted(model), None) is not None:
        return model
    try:
        return with_insertions(model, description.insertions, description.inputs, copy=True)
    except (UsageError, InputError, TracingError) as error:
        raise CheckpointError(
            f"the attention that was put in does not fit the network that was given: {error} Or pass the network with "
            "it: dcafy.insert(model, ...), as it was then."
        ) from error


_PASS_IT = "dcafy.load(directory, model=...), or --arch package.module:factory"


def _name(description: Description) -> str:
    if description.model is not None:
        return description.model.name
    return (description.plan.model if description.plan else "") or "a network"


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}


_AS_IT_WAS = " If an older dcafy put attention in, pass the network with it: dcafy.insert(model, ...), as it was then."


def _compare(saved: Mapping[str, Facts], network: Mapping[str, Tensor], what: str, advice: str = "") -> None:
    """Nothing where keys and shapes agree; else ``CheckpointError`` names what differs."""
    differs = difference(
        {key: fact.shape for key, fact in saved.items()}, {key: tuple(value.shape) for key, value in network.items()}
    )
    if differs:
        raise CheckpointError(f"its tensors do not fit {what}: {differs}.{advice}")


def _require_same_weights(network: nn.Module, base: Mapping[str, Facts]) -> None:
    """Nothing where the network has the base weights that the connections belong to."""
    state = _state(network)
    empty = next((key for key, value in state.items() if value.is_meta), None)
    if empty is not None:
        raise CheckpointError(f"it holds connections only, and {empty} of the network that was given has no data.")
    # A network that was cast after its weights were loaded is the same one, cast.
    others = [key for key, fact in base.items() if facts(state[key].to(_dtype(fact.dtype))) != fact]
    if others:
        shown = ", ".join(map(printable, others[:4])) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        raise CheckpointError(
            f"its connections belong to other base weights: {len(others)} of {len(base)} tensors of the network that "
            f"was given differ ({shown}). Pass the network with the weights it had when it was saved. If those are "
            "nowhere else, because the base was trained too, save again with base=True."
        )


def _converted(network: nn.Module, description: Description, *, copy: bool) -> nn.Module:
    if description.plan is None:
        return own_copy(network) if copy else network
    inputs = None if description.inputs is None else in_dtype_of(network, from_data(description.inputs))
    with warnings.catch_warnings():
        # Where the connections start says nothing about those that are loaded next.
        warnings.filterwarnings("ignore", message=".* not the identity at the start")
        try:
            converted: nn.Module = convert(
                network, example_inputs=inputs, plan=description.plan, copy=copy, verify=False, **description.options
            )
        except DcafyError as error:
            raise CheckpointError(f"its plan does not fit the network: {error}") from error
    if description.model is not None and not copy:
        dca = dca_of(converted)
        dca.recipe = dataclasses.replace(
            dca.recipe, model=description.model.name, arguments=description.model.arguments
        )
    return converted


def _require_data(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise CheckpointError(
                f"{name} is not in the folder, and the network that was given has no data for it. Build the network "
                "on the CPU and not on the meta device."
            )


def _written_elsewhere(description: Description) -> str:
    """What it was written with, where that is not what runs here."""
    here = installed_versions(description.model)
    others = {name: version for name, version in description.versions.items() if here.get(name, version) != version}
    if not others:
        return ""
    return f" (It was written with {', '.join(f'{printable(n)} {printable(v)}' for n, v in others.items())}.)"
