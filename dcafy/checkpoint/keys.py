"""The keys of connections in folders of format 1, which had them all under one ``dca``, by the path of the block.

::

    dca.layer1.1.se.match.0.weight            ─▶  layer1.1.se.dca.match.0.weight
    dca.layer2.0.conv2.branch1.alpha          ─▶  layer2.0.conv2.attn.dca.branch1.alpha
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from dcafy.emit.connection import Connection
from dcafy.emit.dca import connected_hosts, connection_at, connections, dca_of
from dcafy.graph.paths import free_name, joined
from dcafy.plan.plan import Plan


class Keys:
    """Keys of format 1, and paths of modules, as a converted model has them now."""

    def __init__(self, converted: nn.Module, plan: Plan) -> None:
        now = {
            id(connection_at(dca_of(module), address)): joined(path, "dca", address)
            for path, module, ends in connected_hosts(converted)
            for _, address in ends.addresses
        }
        made = connections(converted)
        self._places = {then: now[id(made[name])] for name, then in _addresses(made, plan).items()}

    def now(self, key: str) -> str:
        """The key or path that stands for ``key``; itself where that is none of a connection."""
        for then in _outwards(key):
            if then in self._places:
                return self._places[then] + key[len(then) :]
        return key


def _outwards(key: str) -> Iterable[str]:
    parts = key.split(".")
    return (".".join(parts[:n]) for n in range(len(parts), 0, -1))


def _addresses(made: dict[str, Connection], plan: Plan) -> dict[str, str]:
    """Name of each connection -> where format 1 had it: ``dca``, the block's path, and the branch and source if any."""
    roots: dict[str, nn.Module] = {}
    targets: dict[str, list[str]] = {}
    for name in made:
        targets.setdefault(_target(name), []).append(name)
    found: dict[str, str] = {}
    # Outer blocks came before inner ones, and a name that was taken got an underscore.
    for target in sorted(targets, key=lambda target: _local(target, plan)[1].count(".")):
        island, local = _local(target, plan)
        tree = roots.setdefault(island, _Tree())
        branches: dict[str, list[str]] = {}
        for name in targets[target]:
            branch = re.search(r"\[(\d+)\](?:<-|$)", name.removeprefix(target))
            branches.setdefault(f"branch{branch[1]}" if branch else "", []).append(name)
        for suffix, names in branches.items():
            several = "<-" in names[0].removeprefix(target)
            at = joined(island, "dca", _put(tree, joined(local, suffix), made[names[0]], several))
            for i, name in enumerate(names):
                found[name] = f"{at}.parts.{i}" if several else at
    return found


class _Tree(nn.Module):
    """Has the names that were taken in the container of all connections."""

    addresses = recipe = add = connection = bypassed_hooks = None


class _Joined(nn.Module):
    """Has the names that were taken in a connection of several sources."""

    schema = None

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList()


def _put(tree: nn.Module, at: str, connection: Connection, several: bool) -> str:
    parent = tree
    *containers, last = at.split(".")
    path = []
    for part in containers:
        part = part if part in parent._modules and part != "match" else free_name(parent, part)
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
        path.append(part)
    path.append(free_name(parent, last))
    shell = Connection(connection.dimension, nn.Identity())
    parent.add_module(path[-1], _Joined() if several else shell)
    return ".".join(path)


def _target(name: str) -> str:
    return re.sub(r"\[\d+\]$", "", name.partition("<-")[0])


def _local(target: str, plan: Plan) -> tuple[str, str]:
    """The island that a block lies in, or the root; and its name as seen from there."""
    around = (path for path in plan.islands if f"{target}.".startswith((f"{path}.", f"{path}#")))
    island = max(around, key=len, default="")
    return island, target.removeprefix(f"{island}.") if island else target
