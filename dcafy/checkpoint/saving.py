"""A converted model -> a folder."""

from __future__ import annotations

import dataclasses
import os

import torch
from torch import nn

from dcafy.attention.inserted import hands_on, insertions_of
from dcafy.checkpoint.architecture import recognised
from dcafy.checkpoint.card import card, measured
from dcafy.checkpoint.description import FILES, Built, Description, Weights, installed_versions
from dcafy.checkpoint.folder import Folder
from dcafy.checkpoint.state import state_of
from dcafy.checkpoint.tensors import fingerprint, new_keys, pack
from dcafy.emit.dca import Recipe, example_of, is_connected, recipes
from dcafy.errors import InputError
from dcafy.images.about import About, about, known
from dcafy.images.preparation import preparation
from dcafy.trace.accepted import require_module
from dcafy.trace.inputs import as_data
from dcafy.zoos.specs import blueprint_of, has_random_weights


def save(dca: nn.Module, directory: str | os.PathLike[str], *, base: bool = True) -> None:
    """A folder from which :func:`dcafy.load` gives ``dca`` back: ``dcafy.json``, ``model.safetensors``, ``README.md``.

    ``base=False``: only the connections, and attention that dcafy put in, in ``connections.safetensors``, beside a
    fingerprint of the base weights that they belong to. A network that torchvision or timm builds is noted by its name.
    Nothing is pickled.

    A folder that :func:`save` wrote before is replaced all at once: killed half-way, it is as it was. Tensors
    that share memory are stored once; optimizer state, gradients and hooks are not stored.

    A network into which :func:`dcafy.insert` put attention that hands a state on (``rla``, ``dia``) is stored as well.

    Raises ``InputError`` for any other that was not converted, or with a tensor that safetensors cannot hold;
    ``CheckpointError`` where the folder cannot be written or holds other things.

    >>> import dcafy, tempfile, torch, torchvision
    >>> connected = dcafy.convert(torchvision.models.mobilenet_v3_small()).eval()
    >>> folder = tempfile.mkdtemp()
    >>> dcafy.save(connected, folder)
    >>> x = torch.rand(1, 3, 224, 224)
    >>> torch.equal(dcafy.load(folder)(x), connected(x))
    True
    """
    require_module(dca)
    if is_connected(dca) or not hands_on(dca):
        _recipe(dca)
    store(dca, directory, base=base)


def store(model: nn.Module, directory: str | os.PathLike[str], *, base: bool = True) -> None:
    """A folder as :func:`save` writes it, also of a network without connections (the original of a comparison)."""
    recipe = _recipe(model) if is_connected(model) else None
    folder = Folder(directory)
    folder.require_replaceable()
    is_new = new_keys(model)
    packed = pack(model, kept=lambda key: base or is_new(key))
    of_base = {key: facts for key, facts in packed.facts.items() if not is_new(key)}
    what = known(model)
    if recipe is not None:
        inputs = recipe.inputs
    else:  # as attention was inserted
        size, example = None if what is None else what.preparation, example_of(model)
        if size is not None:
            inputs = as_data((torch.zeros(2, size.channels, *size.size),))
        else:
            inputs = None if example is None else as_data(example.inputs)
    built = recognised(model, recipe, inputs)
    description = Description(
        versions=installed_versions(built),
        model=built,
        insertions=insertions_of(model),
        about=_about(model, built),
        options={} if recipe is None else recipe.options,
        inputs=inputs,
        weights=Weights(
            file=FILES[base],
            sha256=fingerprint({key: packed.facts[key] for key in packed.tensors}),
            base_sha256=fingerprint(of_base),
            base={} if base else of_base,
            tied=packed.tied,
            layouts=packed.layouts,
        ),
        state=state_of(model),
        plan=None if recipe is None else recipe.plan,
    )
    folder.replace(description, packed.tensors, card(description, measured(model, description.about)))


def _about(model: nn.Module, built: Built | None) -> About | None:
    """What is known of the network; of one that a zoo builds, what the zoo knows."""
    found = known(model)
    if found is None and built is None:
        return None
    if found is None:
        assert built is not None
        found = about(model)
        if found.preparation is not None and blueprint_of(model) is None:
            found = dataclasses.replace(found, preparation=preparation(model, built.name))
    return dataclasses.replace(found, random=has_random_weights(model))


def _recipe(model: nn.Module) -> Recipe:
    """How ``model`` was converted; ``InputError`` where it is not the whole of a converted model."""
    require_module(model)
    if not is_connected(model):
        raise InputError(
            f"{type(model).__name__} has no connections, and dcafy.save stores converted models. Convert it first "
            "with dcafy.convert(model), or store model.state_dict() with safetensors."
        )
    found = dict(recipes(model))
    if "" not in found:
        where = f"inside it at {next(iter(found))!r}" if found else "around it"
        raise InputError(
            f"The converted network is not what was passed, but lies {where}. Save the very module that dcafy.convert "
            "returned, and the rest around it on its own."
        )
    return found[""]
