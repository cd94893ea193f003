"""A trained classifier under a detector: its weights, its attention and its connections."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcafy.attention.inserted import insertions_of
from dcafy.attention.insertion import put
from dcafy.checkpoint.tensors import is_connection
from dcafy.conversion import convert, inspect
from dcafy.emit.dca import connections, is_connected, own_contexts, recipes
from dcafy.errors import InputError
from dcafy.graph.modes import keep_in_eval
from dcafy.graph.paths import above
from dcafy.plan.plan import Plan


def with_backbone(detector: nn.Module, classifier: nn.Module) -> nn.Module:
    """A copy of ``detector`` whose backbone computes what the same layers of ``classifier`` compute.

    ``detector``: a detector or segmenter of torchvision, or one like them, on the architecture of ``classifier``, which
    is not connected. ``classifier``: a network as :func:`dcafy.load` gives it, connected or not. The detector gets the
    attention that was inserted into the classifier, the weights and buffers of every layer that both have, and the same
    connections; FPN, heads and anchors stay as they are. Frozen batch norms take the statistics and stay frozen, and
    what lies in a layer that the detector does not train (``trainable_backbone_layers``) is not trained either, its
    attention and the connections into it among them.

    Raises ``InputError`` where no part of the detector has the classifier's layers.

    >>> import dcafy, torch
    >>> from torchvision.models import mobilenet_v3_large
    >>> from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn
    >>> classifier = dcafy.convert(mobilenet_v3_large(num_classes=10), verify=False)
    >>> detector = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None, num_classes=3)
    >>> detector = with_backbone(detector, classifier)
    >>> len(dcafy.connections(detector)), len(dcafy.connections(classifier))
    (7, 7)
    """
    if is_connected(detector):
        raise InputError("The detector is connected already. Pass it as it was built, or take dcafy.revert(detector).")
    own = _own(classifier)
    place = _place(detector, own)
    made = copy.deepcopy(detector)
    inserted = insertions_of(classifier)
    for done in inserted:
        where = place.ours + ("*" if done.where == "auto" else done.where.removeprefix(place.theirs))
        made = put(made, **{**dataclasses.asdict(done), "where": where}, copy=False)
    recipe = next((recipe for _, recipe in recipes(classifier)), None)
    if recipe is not None:
        made = convert(made, plan=_moved(recipe.plan, inspect(made), place), copy=False, verify=False)
    _take(made, own, classifier, place)
    _freeze(made, detector)
    return made


_STAGES = tuple(f"layer{number}" for number in range(1, 5))
"""The stages of a ResNet, as torchvision calls them."""


def with_settled_backbone(detector: nn.Module, classifier: nn.Module) -> nn.Module:
    """What :func:`with_backbone` gives, to be trained as detectors are that begin with a trained backbone.

    Batch norms of the backbone keep their statistics, for batches of detectors have few images. Of a ResNet, the stem
    and the first stage are not trained. So do torchvision, where it fetches the weights, and the published training
    (``norm_eval``, ``frozen_stages=1``). A detector that leaves out some of its backbone itself chooses what.
    """
    place = _place(detector, _own(classifier))
    stages = dict(detector.get_submodule(place.ours.rstrip(".")).named_children())
    untouched = all(parameter.requires_grad for child in stages.values() for parameter in child.parameters())
    made = with_backbone(detector, classifier)
    body = made.get_submodule(place.ours.rstrip("."))
    if untouched and all(name in stages for name in _STAGES):
        for name, child in body.named_children():
            child.requires_grad_(name in _STAGES[1:])  # with the attention and the connections that came along
    for module in body.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            keep_in_eval(module)
    return made


def _own(classifier: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in classifier.state_dict().items() if not is_connection(key)}


@dataclass(frozen=True)
class _Place:
    """The same layers: ``ours`` is the prefix of their paths in the detector, ``theirs`` in the classifier."""

    ours: str
    theirs: str

    def moved(self, name: str) -> str:
        """The name, in the detector, of a block or connection of the classifier."""
        return "<-".join(self.ours + part.removeprefix(self.theirs) for part in name.split("<-"))


def _place(detector: nn.Module, own: dict[str, Tensor]) -> _Place:
    """Where most of the classifier's tensors have a place, by name and shape."""
    shapes = {key: value.shape for key, value in detector.state_dict().items()}
    parts = [f"{path}." if path else "" for path, _ in detector.named_modules()]
    starts = ["", *dict.fromkeys(f"{key.partition('.')[0]}." for key in own)]
    found = [
        (sum(shapes.get(ours + key.removeprefix(theirs)) == value.shape for key, value in own.items()
             if key.startswith(theirs)), _Place(ours, theirs))
        for theirs in starts
        for ours in parts
    ]  # fmt: skip
    fitting, place = max(found, key=lambda item: item[0])
    needed = [key for key in shapes if key.startswith(place.ours)]
    if fitting < len(needed) // 2 or not fitting:
        raise InputError(
            f"{type(detector).__name__} has no part with the layers of this classifier ({', '.join(list(own)[:3])}, "
            "...). Build it on the architecture of the classifier, such as torchvision's retinanet_resnet50_fpn for a "
            "resnet50."
        )
    return place


def _moved(plan: Plan, known: Plan, place: _Place) -> Plan:
    """The links of the classifier's ``plan`` between blocks that the detector has (``known``)."""
    there = {block.name for block in known.blocks}
    chains = []
    for chain in plan.chains:
        links = [
            dataclasses.replace(link, source=place.moved(link.source), target=place.moved(link.target))
            for link in chain.links
        ]
        kept = tuple(link for link in links if {link.source, link.target} <= there)
        blocks = tuple(name for name in map(place.moved, chain.blocks) if name in there)
        chains.append(dataclasses.replace(chain, blocks=blocks, links=kept))
    alone = tuple(dataclasses.replace(one, name=place.moved(one.name)) for one in plan.alone)
    return dataclasses.replace(known, chains=tuple(chains), alone=tuple(one for one in alone if one.name in there))


@torch.no_grad()
def _take(made: nn.Module, own: dict[str, Tensor], classifier: nn.Module, place: _Place) -> None:
    """Gives ``made`` the values of the classifier, layer by layer and connection by connection."""
    for key, value in made.state_dict().items():
        if key.startswith(place.ours) and not is_connection(key):
            theirs = own.get(place.theirs + key.removeprefix(place.ours))
            if theirs is not None and theirs.shape == value.shape:
                value.copy_(theirs)
    if is_connected(classifier):
        ours = _all_of(made)
        for name, connection in _all_of(classifier).items():
            if place.moved(name) in ours:
                ours[place.moved(name)].load_state_dict(connection.state_dict())


def _all_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every connection, and what is left of those that were dropped."""
    return {**connections(model), **own_contexts(model)}


def _freeze(made: nn.Module, detector: nn.Module) -> None:
    """Attention and connections in layers that the detector does not train are not trained, either."""
    trained = {name: parameter.requires_grad for name, parameter in detector.named_parameters()}

    def frozen(path: str) -> bool:
        for outer in above(path):
            around = [flag for name, flag in trained.items() if name.startswith(f"{outer}.")]
            if around:
                return not any(around)
        return False

    for name, parameter in made.named_parameters():
        if name not in trained and not is_connection(name) and frozen(name):
            parameter.requires_grad_(False)
    if is_connected(made):
        for name, connection in _all_of(made).items():
            if frozen(name.partition("<-")[0]):
                connection.requires_grad_(False)
