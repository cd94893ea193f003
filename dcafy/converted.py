"""What a user does with a connected model: its connections, their optimizer groups, freezing, and the way back."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from dcafy.emit.connection import Connection
from dcafy.emit.dca import Connections, connected_modules
from dcafy.errors import InputError
from dcafy.graph.copies import own_copy
from dcafy.graph.emitted import EmittedModule
from dcafy.graph.modes import keep_in_eval


def connections(model: nn.Module) -> dict[str, Connection]:
    """Name of the receiving block -> its :class:`Connection`, in the order data meets them.

    A block that hears several others has one under ``name<-source`` for each; a block with one map per branch (SK)
    has one under ``name[0]``, ``name[1]``, ... for each branch.

    Raises ``InputError`` for a model that was not converted.
    """
    return {name: dca.connection(name) for _, _, dca in _require_connected(model) for name in dca.addresses}


def parameter_groups(
    model: nn.Module, *, lr: float, connection_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups: the base, the matching layers' weights, and what no decay may shrink.

    No decay on α, β, norms and biases (everything of one dimension). ``connection_lr`` (default: ``lr``) is
    the rate of everything under ``dca``. Parameters that do not require a gradient are left out.

    >>> import dcafy, torch, torchvision
    >>> model = dcafy.convert(torchvision.models.mobilenet_v3_small(), verify=False)
    >>> optimizer = torch.optim.SGD(dcafy.parameter_groups(model, lr=0.01, connection_lr=0.1), momentum=0.9)
    >>> sorted({group["lr"] for group in optimizer.param_groups})
    [0.01, 0.1]
    """
    own = {id(p) for _, _, dca in _require_connected(model) for p in dca.parameters()}
    rates = {False: lr, True: lr if connection_lr is None else connection_lr}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in own, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": parameters, "lr": rates[ours], "weight_decay": weight_decay if decays else 0.0}
        for (ours, decays), parameters in groups.items()
    ]


def freeze_base(model: nn.Module) -> nn.Module:
    """``model`` with only ``dca.*`` trainable, like an adapter; batch norm of the base stays in eval.

    Frozen running statistics must not drift, so the base's batch norms stay in eval through ``.train()``.
    """
    own = {id(p) for _, _, dca in _require_connected(model) for p in dca.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            keep_in_eval(module)
    return model


def revert(model: nn.Module) -> nn.Module:
    """A new model without connections, with the base weights as they are now.

    Its state dict has exactly the keys of the model that was converted.
    """
    _require_connected(model)
    twin = own_copy(model)
    for _, module, _ in list(connected_modules(twin)):
        assert isinstance(module, EmittedModule)
        module.graph = _disconnected(module.graph)
        del module._modules["dca"]
    return twin


def _require_connected(model: nn.Module) -> list[tuple[str, nn.Module, Connections]]:
    found = list(connected_modules(model))
    if not found:
        raise InputError(f"{type(model).__name__} has no connections: convert it first with dcafy.convert(model).")
    return found


def _disconnected(graph: fx.Graph) -> fx.Graph:
    """The graph with G in the place of every connection, and without what only connections read."""
    for node in reversed(graph.nodes):
        if node.op == "call_module" and str(node.target).startswith("dca."):
            messages = node.args[1:]
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            for source in messages:
                _erase_unread(graph, source)
    graph.lint()
    return graph


def _erase_unread(graph: fx.Graph, node: Any) -> None:
    """A message that nobody hears any more, and what was computed for it alone."""
    if not isinstance(node, fx.Node) or node.users or node.op == "placeholder":
        return
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        _erase_unread(graph, source)
