"""What a user does with a connected model: its connections, their optimizer groups, freezing, and the way back."""

from __future__ import annotations

from typing import Any

from torch import nn

from dcafy.attention.inserted import inserted_modules, inserted_parameters
from dcafy.emit.dca import connections, dca_of, is_ours, own_modules, own_parameters, require_connected
from dcafy.emit.root import close_runs
from dcafy.graph.copies import own_copy
from dcafy.graph.modes import keep_in_eval
from dcafy.graph.rewritten import SAID, restore
from dcafy.graph.rows import graph_from
from dcafy.graph.source import require_writable


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    connection_lr: float | None = None,
    scale_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Optimizer groups: the base, the matching layers' weights, α and β, and what no decay may shrink.

    No decay on α, β, norms and biases (everything of one dimension). ``connection_lr`` (default: ``lr``) is the rate of
    everything under ``dca``; ``scale_lr`` is that of α and β, where they have their own. Inserted attention has that of
    the base. Parameters that do not require a gradient are left out.

    >>> import dcafy, torch, torchvision
    >>> model = dcafy.convert(torchvision.models.mobilenet_v3_small(), verify=False)
    >>> optimizer = torch.optim.SGD(dcafy.parameter_groups(model, lr=0.01, connection_lr=0.1), momentum=0.9)
    >>> sorted({group["lr"] for group in optimizer.param_groups})
    [0.01, 0.1]
    """
    require_connected(model)
    own, scales = own_parameters(model), {id(c.alpha) for c in connections(model).values()}
    scales |= {id(c.beta) for c in connections(model).values()}
    connection_lr = lr if connection_lr is None else connection_lr
    scale_lr = connection_lr if scale_lr is None else scale_lr
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            ours = id(parameter) in own
            rate = scale_lr if id(parameter) in scales else connection_lr if ours else lr
            groups.setdefault((ours, rate, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": weight_decay if decays else 0.0}
        for (_, rate, decays), parameters in groups.items()
    ]


def freeze_base(model: nn.Module) -> nn.Module:
    """``model`` with only ``dca.*`` and inserted attention trainable, like an adapter; its batch norms stay in eval.

    Frozen running statistics must not drift, so the base's batch norms stay in eval through ``.train()``. Attention
    that :func:`dcafy.insert` put in is no base: it starts as a no-op, and with its last layer frozen at zero nothing
    behind it would get a gradient. Statistics that connections and inserted attention keep themselves go on moving.
    """
    require_connected(model)
    own = own_parameters(model) | inserted_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)
    new = own_modules(model) | inserted_modules(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and id(module) not in new:
            keep_in_eval(module)
    return model


def revert(model: nn.Module) -> nn.Module:
    """A new model without connections, of the user's own classes, with the base weights as they are now.

    Its state dict has exactly the keys of the model that was converted; inserted attention is part of that.
    """
    require_connected(model)
    twin = own_copy(model)
    for module in [module for module in twin.modules() if is_ours(dca_of(module))]:
        before = getattr(dca_of(module), "before", None)
        if before is not None:
            graph = graph_from(before.rows)
            require_writable(graph)
            module.graph = graph  # type: ignore[assignment]
        restore(module)
        close_runs(module)
        own = dca_of(module)
        for held in (module._modules, module.__dict__):
            for name in [name for name, value in held.items() if value is own]:
                del held[name]
        module.__dict__.pop(SAID, None)
    return twin
