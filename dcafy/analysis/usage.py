"""Does the network listen? What each connection says, and what it costs to cut it.

The contribution ratio (paper 4.5) says how large β is beside α, not whether anything depends on it: a large β may
scale a message that is next to nothing, or one that the layers behind it ignore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcafy.emit.connection import Connection, JoinedConnection
from dcafy.emit.dca import connections
from dcafy.errors import InputError
from dcafy.graph.modes import evaluating
from dcafy.wording import reason_of


@dataclass(frozen=True)
class ConnectionUsage:
    """One connection, as a data set shows it.

    ``contribution``     |β| / (|α| + |β|) (paper 4.5)
    ``message_share``    ‖β·match(T̃)‖ / (‖αG‖ + ‖β·match(T̃)‖), over all images
    ``loss_change``      loss with β = 0, minus the loss as it is; above 0 where the connection helps
    ``accuracy_change``  the same of the top-1 accuracy, a fraction; below 0 where the connection helps
    """

    name: str
    dimension: str
    alpha: float
    beta: float
    contribution: float
    message_share: float
    loss_change: float
    accuracy_change: float


@dataclass(frozen=True)
class Usage:
    """Every connection in the order of the data, and the network with all of them cut at once.

    ``loss`` (mean cross-entropy) and ``accuracy`` (a fraction) are those of the network as it is, on ``images`` images.
    """

    images: int
    loss: float
    accuracy: float
    connections: tuple[ConnectionUsage, ...]
    loss_change: float
    accuracy_change: float

    def changes(self, all_: str) -> list[tuple[str, float, float]]:
        """(name, loss change, accuracy change) of every connection, and of all at once under the name ``all_``."""
        rows = [(row.name, row.loss_change, row.accuracy_change) for row in self.connections]
        return [*rows, (all_, self.loss_change, self.accuracy_change)]


@torch.no_grad()
def usage(model: nn.Module, loader: Iterable[Any], *, device: torch.device | str | None = None) -> Usage:
    """What cutting each connection (β = 0), one at a time and all, does to loss and accuracy.

    ``model``: a converted classifier with outputs ``[N, classes]``. ``loader``: batches of images and labels, the same
    ones whenever it is gone through; it is gone through once as it is, once for each connection and once for all.
    ``device``: where the batches go; default: where the model is. Modes and parameters are as they were.

    Raises ``InputError`` for a model without connections, a loader without labelled batches, and batches or labels
    that the model does not take.

    >>> import dcafy, torch, torchvision
    >>> model = dcafy.convert(torchvision.models.mobilenet_v3_small(num_classes=3), verify=False)
    >>> found = dcafy.usage(model, [(torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 0]))])
    >>> found.connections[0].message_share, found.connections[0].loss_change  # a fresh connection says nothing
    (0.0, 0.0)
    """
    own = connections(model)
    where = device or next(model.parameters()).device
    with evaluating(model):
        with measured_shares(model) as shares:
            images, loss, accuracy = _scores(model, loader, where)
        found = shares()
        rows = []
        for name, connection in own.items():
            with _cut([connection]):
                _, cut_loss, cut_accuracy = _scores(model, loader, where)
            alpha, beta = float(connection.alpha), float(connection.beta)
            changes = (cut_loss - loss, cut_accuracy - accuracy)
            contribution = connection.contribution()
            rows.append(ConnectionUsage(name, connection.dimension, alpha, beta, contribution, found[name], *changes))
        with _cut(own.values()):
            _, cut_loss, cut_accuracy = _scores(model, loader, where)
    return Usage(images, loss, accuracy, tuple(rows), cut_loss - loss, cut_accuracy - accuracy)


@torch.no_grad()
def message_shares(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """Connection -> ‖β·match(T̃)‖ / (‖αG‖ + ‖β·match(T̃)‖) over all of these images; modes are as they were.

    ``batches``: inputs of the model, on its device. Raises ``InputError`` for a model without connections.
    """
    with evaluating(model), measured_shares(model) as shares:
        for images in batches:
            model(images)
    return shares()


@contextmanager
def measured_shares(model: nn.Module) -> Iterator[Callable[[], dict[str, float]]]:
    """Inside it the model's passes are measured; what it yields gives the message share of every connection."""
    squares = {name: [0.0, 0.0] for name in connections(model)}
    names = {id(connection): name for name, connection in connections(model).items()}

    def add(part: Connection, context: Tensor, message: tuple[Tensor | None, ...]) -> None:
        total = squares[names[id(part)]]
        total[0] += float((part.alpha.to(context.dtype) * context).double().square().sum())
        T_prev, G_prev = message or (None, None)
        if T_prev is not None:
            term = part.beta.to(context.dtype) * part.matched(context, T_prev, G_prev)
            total[1] += float(term.double().square().sum())

    def hear(module: nn.Module, given: tuple[Any, ...]) -> None:
        context, *messages = given
        if isinstance(module, JoinedConnection):
            for part, *pair in zip(module.parts, messages[::2], messages[1::2], strict=True):
                assert isinstance(part, Connection)
                add(part, context, tuple(pair))
        elif isinstance(module, Connection):
            add(module, context, tuple(messages))

    parts = {id(part) for m in model.modules() if isinstance(m, JoinedConnection) for part in m.parts}
    heard = [m for m in model.modules() if isinstance(m, Connection | JoinedConnection) and id(m) not in parts]
    handles = [module.register_forward_pre_hook(hear) for module in heard]
    try:
        yield lambda: {name: _share(own**0.5, message**0.5) for name, (own, message) in squares.items()}
    finally:
        for handle in handles:
            handle.remove()


def _share(own: float, message: float) -> float:
    return message / (own + message) if own + message else 0.0


def _scores(model: nn.Module, loader: Iterable[Any], device: torch.device | str) -> tuple[int, float, float]:
    """(images, mean cross-entropy, top-1 accuracy) over the loader; images labelled -1 do not count."""
    images, loss, right = 0, 0.0, 0
    for batch in loader:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise InputError("The loader should give batches of images and labels, as (images, labels).")
        inputs, labels = _moved(batch[0], device), _moved(batch[1], device)
        outputs = _outputs(model, inputs)
        _check_labels(labels, *outputs.shape)
        counted = labels >= 0
        images += int(counted.sum())
        loss += float(F.cross_entropy(outputs.float(), labels.long(), reduction="sum", ignore_index=-1))
        right += int(((outputs.argmax(1) == labels) & counted).sum())
    if not images:
        raise InputError("The loader gave no images, so there is nothing to measure. Pass one that is not used up.")
    return images, loss / images, right / images


def _moved(value: Any, device: torch.device | str) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputError(
            f"The loader gives images and labels of {type(value).__name__}, and tensors are needed. Collate them first."
        )
    return value.to(device)


def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    try:
        outputs = model(inputs)
    except Exception as error:  # any forward may refuse its input in any way
        raise InputError(
            f"{type(model).__name__} does not run on a batch of the loader, of shape {tuple(inputs.shape)}: "
            f"{reason_of(error)}. Give it batches that it accepts."
        ) from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(inputs):
        raise InputError("The model is no classifier: its outputs are not of shape [N, classes].")
    return outputs


def _check_labels(labels: Tensor, images: int, classes: int) -> None:
    if labels.shape != (images,) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(
            f"Labels of shape {tuple(labels.shape)} and {labels.dtype} are no class numbers for {images} images. Give "
            "whole numbers, [N]."
        )
    for label in (int(labels.min()), int(labels.max())) if images else ():
        if not -1 <= label < classes:
            raise InputError(
                f"A label is {label}, and the model has {classes} classes, counted from 0. Give labels that are among "
                "them, or -1 for images that do not count."
            )


@contextmanager
def _cut(cut: Iterable[Connection]) -> Iterator[None]:
    """Inside it β of these connections is 0."""
    before = [(connection.beta, connection.beta.clone()) for connection in cut]
    try:
        for beta, _ in before:
            beta.zero_()
        yield
    finally:
        for beta, value in before:
            beta.copy_(value)
