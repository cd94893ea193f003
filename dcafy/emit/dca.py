"""The submodule ``dca`` of a connected module: its connections and the recipe; and finding them in a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dcafy.emit.connection import Connection
from dcafy.graph.paths import free_name
from dcafy.plan.plan import Plan


@dataclass(frozen=True)
class Recipe:
    """How a model was converted: enough to do it again.

    ``plan``      what was connected, with every link's settings filled in
    ``options``   the options of :func:`dcafy.convert`
    ``model``     ``torchvision:NAME`` or ``timm:NAME`` where known
    ``arguments`` what the network is built with besides the name
    ``inputs``    the example it was traced with, as :func:`dcafy.trace.inputs.as_data` writes it down
    """

    plan: Plan
    options: dict[str, Any]
    model: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    inputs: Any = None


class Connections(nn.Module):
    """The submodule ``dca``: every connection at the path of the block that hears, and the recipe.

    ``bypassed_hooks``: the modules of the network, as seen from the graph, with hooks that no longer fire.
    """

    bypassed_hooks: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.addresses: dict[str, str] = {}

    def add(self, names: dict[str, str], module: nn.Module, *, at: str) -> str:
        """Where ``module`` went, as a path below ``dca``: ``at``, or close to it.

        ``names``: name of each connection in it -> its path inside the module. Outer blocks are to be
        added before inner ones.
        """
        parent: nn.Module = self
        *containers, last = at.split(".")
        path = []
        for part in containers:
            part = part if part in parent._modules and part != "match" else free_name(parent, part)
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
            path.append(part)
        path.append(free_name(parent, last))
        parent.add_module(path[-1], module)
        address = ".".join(path)
        for name, inner in names.items():
            self.addresses[name] = f"{address}.{inner}" if inner else address
        return address

    def connection(self, name: str) -> Connection:
        """The connection of that name: the name of the block that hears, as in :func:`dcafy.connections`."""
        found = self.get_submodule(self.addresses[name])
        assert isinstance(found, Connection)
        return found


def connected_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Connections]]:
    """(path, module, its ``dca``) of every connected graph in ``model``: the root, or its islands."""
    for path, module in model.named_modules():
        dca = getattr(module, "dca", None)
        if isinstance(dca, Connections):
            yield path, module, dca


def is_connected(model: nn.Module) -> bool:
    """Whether anything in ``model`` is connected."""
    return next(connected_modules(model), None) is not None
