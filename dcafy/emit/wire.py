"""How a message gets from block to block: told by the module that makes it, heard by the one that needs it.

::

    a run:   teller  ──tell(T, G)──▶  lines  ──hear──▶  reader: f(αG, β·match(T̃))

What is on the lines belongs to a run. A root's call opens one on its thread and closes it however it ends; outside of
any, what a thread runs is one loose run, which begins anew when a module is called more often than the recording has
it: a part hears what ran just before it. Each reader hears a message once. A non-reentrant checkpoint that runs a block
again gives it what it heard the first time. A message is heard only by a G of its kind and batch size.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, fx, nn

from dcafy.emit.dca import connected_hosts, connection_at, dca_of, ends_of, require_connected, scale_parameters
from dcafy.emit.ends import Ends, Heard, Line, Port, Told, Wire, wires_of
from dcafy.emit.recomputation import backward, frames, is_reentrant
from dcafy.wording import warn


class _Contents:
    """What is on the lines of some wires in one run, while the run is not the thread's own."""

    def __init__(self, wires: tuple[Wire, ...], task: int, root: nn.Module) -> None:
        self.wires = wires
        self.messages: list[list[Any]] = [[None] * len(wire.lines) for wire in wires]
        self.counts: list[list[int]] = [[0] * len(wire.counts) for wire in wires]
        self.tasks: list[int | None] = [task] * len(wires)
        self.roots: list[Any] = [root] * len(wires)

    def swap(self) -> None:
        """Puts this on the lines, and keeps what was there."""
        for i, wire in enumerate(self.wires):
            self.messages[i], messages = _messages_on(wire), self.messages[i]
            self.counts[i], counts = [getattr(one.here, "count", 0) for one in wire.counts], self.counts[i]
            self.tasks[i], task = getattr(wire.here, "task", None), self.tasks[i]
            for line, message in zip(wire.lines, messages, strict=True):
                line.here.message = message
            for one, count in zip(wire.counts, counts, strict=True):
                one.here.count = count
            wire.here.task = task
            self.roots[i], root = getattr(wire.here, "root", None), self.roots[i]
            wire.here.root = root


def _messages_on(wire: Wire) -> list[Any]:
    return [getattr(line.here, "message", None) for line in wire.lines]


class run:
    """A run of the wire, opened by hand: what blocks tell inside it is heard inside it, and nowhere else.

    The call of a connected model opens one by itself. This is for parts of one that are called in turns: enter the same
    run again, and its blocks go on where they were.

    Raises ``InputError`` for a model in which nothing is connected: no blocks, nor units that hand a state on.

    >>> import dcafy, torch, torchvision
    >>> model = dcafy.convert(torchvision.models.mobilenet_v3_small(), verify=False).eval()
    >>> x, y = torch.rand(2, 1, 3, 64, 64)
    >>> first, second = dcafy.run(model), dcafy.run(model)
    >>> with first:
    ...     a = model.features[:6](x)
    >>> with second:
    ...     b = model.features[:6](y)
    >>> with first:
    ...     a = model.features[6:](a)
    >>> torch.equal(a, model.features(x))
    True
    """

    def __init__(self, model: nn.Module) -> None:
        ends = [*(ends for _, _, ends in connected_hosts(model)), *map(ends_of, model.modules())]
        wires = tuple(dict.fromkeys(one.wire for one in ends if one is not None))
        if not wires:
            require_connected(model)
        self._contents = _Contents(wires, backward(), model)

    def __enter__(self) -> None:
        _put_open((*_opened(), self._contents))

    def __exit__(self, *error: object) -> None:
        runs = _opened()
        last = len(runs) - 1 - runs[::-1].index(self._contents)
        _put_open(runs[:last] + runs[last + 1 :])


def _put_open(runs: tuple[_Contents, ...]) -> None:
    """These are the runs that are open by hand; what the last one has is on the lines."""
    before = _opened()[-1:]
    if before != runs[-1:]:
        for contents in before + runs[-1:]:
            contents.swap()
    _open.runs = runs


_open = threading.local()


def _opened() -> tuple[_Contents, ...]:
    """The runs that this thread has opened by hand, the last one last."""
    runs: tuple[_Contents, ...] = getattr(_open, "runs", ())
    return runs


class Opened:
    """The run of one call of a root."""

    def __init__(self, root: nn.Module) -> None:
        # What was pickled before a root could have several wires has its one on its dca.
        wires = wires_of(root) or (dca_of(root).wire,)
        self.contents = _Contents(wires, -1 if torch.compiler.is_compiling() else backward(), root)

    def __enter__(self) -> None:
        self.contents.swap()

    def __exit__(self, *error: object) -> None:
        self.contents.swap()


def _now(ends: Ends, port: Port) -> Heard | Told | None:
    """What happens at ``port`` in this call of its module; the first port of a call counts it."""
    if ends.count is None:
        return port.calls[0]
    here = ends.count.here
    count: int = getattr(here, "count", 0)
    if port.enters:
        if count >= len(port.calls):
            _begin_anew(ends)
            count = 0
        count += 1
        here.count = count
    return port.calls[max(count, 1) - 1]


def _begin_anew(ends: Ends) -> None:
    """Nothing is told and nobody called any more, but for what was just told to this very module."""
    own = [line for port in ends.ports for line in _lines(port.calls[0])]
    kept = [getattr(line.here, "message", None) for line in own]
    for line in ends.wire.lines:
        line.here.message = None
    for count in ends.wire.counts:
        count.here.count = 0
    for line, message in zip(own, kept, strict=True):
        line.here.message = message


def _lines(what: Heard | Told | None) -> list[Line]:
    """The lines on which something is heard."""
    pairs = what.sources if isinstance(what, Heard) else ()
    return [line for pair in pairs if pair is not None for line in pair if line is not None]


def tell(dca: Any, number: int, *values: Tensor) -> None:
    """Puts values of a block on the lines to those who hear them in this run."""
    if _is_kept(values[0]):
        values[0].tracer.on_wire(tell, dca, number, *values)  # type: ignore[attr-defined]
        return
    if not torch.compiler.is_compiling() and not _is_proxy(values[0]) and frames()[1]:
        return  # a checkpoint runs this again: whoever hears it has kept what was told
    ends: Ends = dca.ends
    told = _now(ends, ends.ports[number])
    if told is None:
        return
    assert isinstance(told, Told)
    task = -1 if torch.compiler.is_compiling() else backward()
    for lines, value in zip(told.lines, values, strict=True):
        for line in lines:
            line.here.message = value
            line.here.task = task


def hear(dca: Any, number: int, G: Tensor) -> Tensor:
    """G connected to what the blocks before have told: f(αG, β·match(T̃)); αG where nothing is to be heard."""
    if _is_kept(G):
        heard_as_node: Tensor = G.tracer.on_wire(hear, dca, number, G)  # type: ignore[attr-defined]
        return heard_as_node
    heard, messages = _received(dca, number, G)
    if heard is None:
        return G
    if None in heard.sources:  # it hears itself: never what is kept for a second run, but the G of this one
        own = [(G, None) if pair is None else messages[2 * i : 2 * i + 2] for i, pair in enumerate(heard.sources)]
        messages = tuple(value for pair in own for value in pair)
    connection = connection_at(dca, heard.connection)
    traced = torch.compiler.is_compiling() or _is_proxy(G)
    if not traced and dca.training and torch.is_grad_enabled() and not connection.alpha.requires_grad:
        _check_frozen(dca.ends.wire)
    result: Tensor = connection(G, *messages)
    return result


hear.is_connection = True  # type: ignore[attr-defined]


def hear_state(relay: Any, number: int, like: Tensor, width: int, rank: int) -> Tensor:
    """The state that the unit before has told in this run, ``[N, width, ...]``; zeros where there is none.

    ``like``: what has the state's batch, its ``rank`` and its places at the start.
    """
    if _is_kept(like):
        told: Tensor = like.tracer.on_wire(hear_state, relay, number, like, width, rank)  # type: ignore[attr-defined]
        return told
    _, messages = _received(relay, number, like)
    if messages and messages[0] is not None:
        heard: Tensor = messages[0]
        return heard
    return like.new_zeros((like.shape[0], width, *(like.shape[i] for i in range(2, rank))))


def _received(dca: Any, number: int, G: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """What a port hears in this call, and its messages: in the second run of a checkpoint those of the first."""
    ends: Ends = dca.ends
    port = ends.ports[number]
    traced = torch.compiler.is_compiling() or _is_proxy(G)
    first, again = ((), ()) if traced else frames()
    if again:
        heard, messages = _kept(*again[-1], port)
    else:
        heard = _now(ends, port)
        messages = () if heard is None else _messages(ends.wire, heard, G, traced)
        if heard is not None and not traced:
            _check_checkpoints(dca, heard, messages)
    for frame in first:
        _keep(frame, port, heard, messages)
    return heard, messages


def behind_layer(module: nn.Module, output: Any) -> Any:
    """What a layer hands on: its output, told and connected."""
    dca: Any = module.dca
    for number, port in enumerate(dca.ends.ports):
        if any(isinstance(what, Told) for what in port.calls):
            tell(dca, number, output)
        else:
            output = hear(dca, number, output)
    return output


def _messages(wire: Wire, heard: Any, G: Tensor, traced: bool) -> tuple[Any, ...]:
    """T and G (or ``None``) of each block that is heard, one after the other; ``None`` twice where nothing was told."""
    found: list[Any] = []
    for pair, same_batch in zip(heard.sources, heard.batch, strict=True):
        if pair is None:
            found += [None, None]
            continue
        first, second = pair
        T = _take(first)
        G_prev = None if second is None else _take(second)
        if T is not None and not torch.compiler.is_compiling() and getattr(first.here, "task", -1) != backward():
            T = G_prev = None  # told outside of this backward pass, for another run
        if T is None and heard.source in wire.before and getattr(wire.here, "root", None) is not None:
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break()  # whether a block was taken out is no question for a compiled graph
            T, G_prev = _instead(wire, heard)
        missing = T is None or (second is not None and G_prev is None)
        if not missing and not _is_for(T, G, same_batch, traced):
            _tell_lost(heard, T, G)
            missing = True
        if missing:
            T = G_prev = None
        if T is not None and not traced and T.device != G.device:  # a model that is spread over devices
            T, G_prev = T.to(G.device), None if G_prev is None else G_prev.to(G.device)
        found += [T, G_prev]
    return tuple(found)


def _instead(wire: Wire, heard: Heard) -> tuple[Any, Any]:
    """What the block before a source told, where the user has taken the source out of the model."""
    there = {what.source for _, _, ends in connected_hosts(wire.here.root) for what in ends.told}
    gone = heard.source
    while gone not in there and gone in wire.before:
        before, first, second = wire.before[gone]
        T, G_prev = _take(wire.lines[first]), None if second is None else _take(wire.lines[second])
        if T is not None:
            return T, G_prev
        gone = before
    return None, None


def _take(line: Line) -> Any:
    """What is on the line, which is empty afterwards."""
    message = getattr(line.here, "message", None)
    if message is not None:
        line.here.message = None
    return message


def _is_for(message: Any, G: Any, same_batch: bool, traced: bool) -> bool:
    """Whether a message is of G's kind: a tensor of the same tracer, fake mode and functorch level, and batch size."""
    if torch.compiler.is_compiling():
        return True
    plain = type(message) is Tensor and type(G) is Tensor
    if not (_level(message) == _level(G) and message.is_meta == G.is_meta if plain else _kind(message) == _kind(G)):
        return False
    if traced or not same_batch or torch._C._get_tracing_state() is not None:
        return True
    ours, theirs = G.shape[0], message.shape[0]
    return type(ours) is not int or type(theirs) is not int or ours == theirs


def _tell_lost(heard: Any, *ends: Any) -> None:
    """Tells a recorder of a message that its graph would not have, as one end of the wire is no node of it."""
    for tracer in (value.tracer for value in ends if _is_proxy(value)):
        if hasattr(tracer, "unwritten"):
            tracer.unwritten.setdefault(tracer.owner, f"what {heard.reader} hears would be lost in it")


def _is_proxy(value: Any) -> bool:
    return issubclass(type(value), fx.Proxy)


def _is_kept(value: Any) -> bool:
    """Whether a recorder writes this down, and wants to see where the wire ends."""
    return _is_proxy(value) and getattr(value.tracer, "connections", None) == "kept"


def _kind(value: Any) -> Any:
    if _is_proxy(value):
        return id(value.tracer)
    mode = getattr(value, "fake_mode", None)
    return (None if mode is None else id(mode)), _level(value), value.is_meta


_level = torch._C._functorch.maybe_get_level


# --- checkpoints --------------------------------------------------------------------------------------------


def _keep(frame: Any, port: Port, heard: Any, messages: tuple[Any, ...]) -> None:
    """Keeps what was heard with the checkpoint's frame, and as long as that lives."""
    kept = frame.__dict__.setdefault("_dcafy_heard", {})
    plain = tuple(m if m is None else m.detach().requires_grad_(m.requires_grad) for m in messages)
    kept.setdefault(id(port), []).append((heard, plain))


def _kept(frame: Any, time: Any, port: Port) -> Any:
    """What was heard at the port when the checkpoint ran first, in the order of calls."""
    turns = frame.__dict__.setdefault("_dcafy_turns", {})
    key = id(port), time
    turn = turns.get(key, 0)
    turns[key] = turn + 1
    return frame.__dict__["_dcafy_heard"][id(port)][turn]


_warned: set[str] = set()


def _check_checkpoints(dca: Any, heard: Any, messages: tuple[Any, ...]) -> None:
    """Warns of a reentrant checkpoint in its first forward, and raises in its second, where nothing is heard."""
    wire: Wire = dca.ends.wire
    if dca.training and not torch.is_grad_enabled() and wire.token not in _warned and is_reentrant():
        _warned.add(wire.token)
        warn(
            "A reentrant checkpoint runs connected attention blocks: no gradient passes between blocks of different "
            "checkpoints. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )
    if not heard.sources or any(message is not None for message in messages) or None in heard.sources:
        return
    task = backward()
    if task != -1 and getattr(wire.here, "task", None) != task:
        raise RuntimeError(
            f"The attention block {heard.reader} runs inside a backward pass and hears nothing of the block before it: "
            "a reentrant checkpoint runs it again. Use checkpoint(..., use_reentrant=False). If it is a part of the "
            "model that you run there yourself, put `with dcafy.run(model):` around it."
        )


# --- connections that stand still ---------------------------------------------------------------------------

_looked_at: set[str] = set()


def _check_frozen(wire: Wire) -> None:
    """Warns, once, of connections that stand still in a model that trains: wrappers freeze what they do not know."""
    root: nn.Module | None = getattr(wire.here, "root", None)
    if root is None or wire.token in _looked_at:
        return
    _looked_at.add(wire.token)
    trained = {id(p) for p in root.parameters() if p.requires_grad}
    # Layers that train behind a β that stands at 0 change nothing: all-linear of peft wraps the matches.
    if trained and not trained & scale_parameters(root):
        warn(
            f"The connections of {type(root).__name__} are frozen while other parts of it train: they stay as they "
            "are. With peft, pass modules_to_save=['dca']; else set requires_grad of the parameters of "
            "dcafy.connections(model)."
        )
