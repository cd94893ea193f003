"""Does the network listen? What each connection says, what the network makes of it, and what could be left out.

The contribution ratio (paper 4.5) says how large β is beside α, not whether anything depends on it: a large β may
scale a message that is next to nothing, or one that the layers behind it ignore. And a message is mostly the same for
every image: what is lost with it may be a bias, which another layer could have learned, or what it says of the image.
So each connection is changed in three ways, and so is the state that units hand on by themselves (``rla``, ``dia``)::

    cut        no message                     what the connection is worth in all
    mean       the average of its messages    what it is worth that messages differ between images
    shuffled   the message of another image   what it is worth that a message is of this very image
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dcafy.analysis.contributions import contributions
from dcafy.analysis.ears import Ear, eager, hearing, run, state_name
from dcafy.analysis.listening import ALL, KINDS, ConnectionUsage, Effect, States, StateUsage, Usage
from dcafy.analysis.looked import Looked, unwrapped
from dcafy.attention.inserted import hearing_states
from dcafy.attention.starting import unspoken
from dcafy.emit.dca import connections, is_connected
from dcafy.emit.relay import Relay
from dcafy.errors import InputError
from dcafy.graph.modes import evaluating
from dcafy.plan.blocks import Contribution


@torch.no_grad()
def usage(model: nn.Module, loader: Iterable[Any], *, device: torch.device | str | None = None) -> Usage:
    """What the network makes of each connection, one at a time and all: cut, shuffled, and its mean message.

    The same of the state that each unit hears where attention was put in that hands one on (``rla``, ``dia``), which is
    in ``states``.

    ``model``: a converted classifier with outputs ``[N, classes]``. ``loader``: batches of images and labels, in mixed
    order; it is gone through twice, and each batch is run as it is and three times for each connection. What is left
    out of the network at no cost is looked for with a few more turns. ``device``: where the batches go; default: where
    the model is. The model is as it was; ``print`` the result to see a table, and the call that drops what nobody
    listens to.

    Raises ``InputError`` for a model without connections and such a state, a loader without labelled batches, and
    batches or labels that the model does not take.

    >>> import dcafy, torch, torchvision
    >>> model = dcafy.convert(torchvision.models.mobilenet_v3_small(num_classes=3), verify=False)
    >>> found = dcafy.usage(model, [(torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 0]))])
    >>> found.connections[0].message_share, found.connections[0].cut.loss  # a fresh connection says nothing
    (0.0, 0.0)
    """
    units = hearing_states(unwrapped(model))
    own = contributions(model) if is_connected(model) or not units else ()
    if not own and not units:
        raise InputError(f"{type(model).__name__} has no connections any more: all of them have been dropped.")
    look = Looked(unwrapped(model), loader, device or next(model.parameters()).device)
    with look.listening():
        look.measure()
        asked = {(row.name, kind): {row.name: kind} for row in own for kind in KINDS}
        asked |= {(ALL, kind): {row.name: kind for row in own} for kind in KINDS}
        asked |= {(name, kind): {name: kind} for name in map(state_name, units) for kind in KINDS}
        asked |= {(state_name(ALL), kind): dict.fromkeys(map(state_name, units), kind) for kind in KINDS}
        effects = {key: _effect(rows) for key, rows in look.changed(asked).items()}
        links, without = _unheard(own, effects, unspoken(look.model) if own else frozenset()), None
        while unheard := look.leaving_last(links):
            together = look.changed({(ALL, "cut"): {name: "cut" for link in unheard for name in link}})
            without = _known(_effect(together[ALL, "cut"]))
            if without.is_negligible:
                break
            links = unheard[: len(unheard) // 2]  # together they are worth something: those of least effect, then
        images, loss, accuracy = look.as_it_is()
    rows = tuple(
        ConnectionUsage(
            row.name,
            row.dimension,
            row.alpha,
            row.beta,
            row.ratio,
            look.ears[row.name].share,
            look.ears[row.name].varying,
            look.moved(row.name),
            _known(effects[row.name, "cut"]),
            effects[row.name, "shuffled"],
            _known(effects[row.name, "mean"]),
        )
        for row in own
    )
    left_out = {name for link in unheard for name in link}
    return Usage(
        images,
        loss,
        accuracy,
        rows,
        _known(effects[ALL, "cut"]),
        effects[ALL, "shuffled"],
        _known(effects[ALL, "mean"]),
        look.alike,
        tuple(row.name for row in own if row.name in left_out),
        without if unheard else None,
        look.unread,
        _states(units, effects, look.ears) if units else None,
    )


def listeners(model: nn.Module) -> int:
    """How many there are whose messages :func:`usage` changes: connections, and modules that hear a state."""
    return (len(connections(model)) if is_connected(model) else 0) + len(hearing_states(model))


def _states(
    units: Mapping[str, Relay], effects: Mapping[tuple[str, str], Effect | None], ears: Mapping[str, Ear]
) -> States:
    def changed(path: str) -> tuple[Effect, Effect | None, Effect]:
        cut, shuffled, mean = (effects[state_name(path), kind] for kind in KINDS)
        return _known(cut), shuffled, _known(mean)

    rows = tuple(
        StateUsage(path, ", ".join(relay.hears), ears[state_name(path)].varying, *changed(path))
        for path, relay in units.items()
    )
    return States(rows, *changed(ALL))


def _known(effect: Effect | None) -> Effect:
    assert effect is not None
    return effect


def _effect(differences: Tensor) -> Effect | None:
    """Of rows (loss, right), one for each image: what a change makes of it; ``None`` without any."""
    number = len(differences)
    if not number:
        return None
    loss, accuracy = differences.mean(0).tolist()
    if number == 1:
        return Effect(loss, None, accuracy, None, number)
    errors = (differences.std(0) / number**0.5).tolist()
    return Effect(loss, errors[0], accuracy, errors[1], number)


def _unheard(
    own: Sequence[Contribution], effects: Mapping[tuple[str, str], Effect | None], unspoken: Collection[str]
) -> list[list[str]]:
    """The links that cost nothing when they are cut, each by its connections, those that cost least first.

    To have said nothing yet is another thing than not being listened to.
    """
    links: dict[str, list[str]] = {}
    for row in own:
        links.setdefault(re.sub(r"\[\d+\]", "", row.name), []).append(row.name)
    spoken = {row.name for row in own} - set(unspoken)
    cut = {row.name: _known(effects[row.name, "cut"]) for row in own}
    whole = [names for names in links.values() if all(cut[name].is_negligible for name in names)]
    whole = [names for names in whole if not spoken.isdisjoint(names)]
    return sorted(whole, key=lambda names: max(cut[name].loss for name in names))


@torch.no_grad()
def message_shares(model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """Connection -> ‖β·match(T̃)‖ / (‖αG‖ + ‖β·match(T̃)‖) over all of these images; modes are as they were.

    ``batches``: inputs of the model, on its device. Raises ``InputError`` for a model without connections.
    """
    names = list(connections(model))
    with evaluating(model), eager(), hearing(model) as ears:
        for ear in ears.values():
            ear.measures = True
        for images in batches:
            run(model, images, ears)
    return {name: ears[name].share for name in names}
