"""Small networks with attention, converted; and each once more without a wire, to be compared with to the bit.

A restatement hands (T, G) from block to block, on the very layers and connections of the converted network. What a
user's program does with forwards, parts and backwards must have the same outcome on both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from trained import images

import dcafy
from dcafy.emit.connection import JoinedConnection

A, B = images(2, 8, seed=1), images(2, 8, seed=2)
FIVE = images(5, 8, seed=3)
EVERY = (0, 1, 2, 3, 4)
"""The blocks of :func:`chain`."""

Blocks = nn.Sequential
Forward = Callable[..., Tensor]
Route = Callable[[Blocks, Tensor], Tensor]
Message = tuple[Tensor, Tensor]
Told = Mapping[str, Message]


# The networks ------------------------------------------------------------------------------------------


class SE(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.transform(x.mean((2, 3)))[:, :, None, None]


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.se = SE(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.se(self.conv(x)))


def in_order(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


class Chain(nn.Module):
    """Residual blocks, of two widths. ``route`` is how a user's program goes through them; it may change later."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.Sequential(*map(Residual, (widths[0], *widths), widths))
        self.head = nn.Linear(widths[-1], 4)
        self.route: Route = in_order

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.route(self.blocks, self.stem(x)).mean((2, 3)))


class Fork(nn.Module):
    """A trunk that two branches hear. ``order``: which of them run, and in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.trunk = Residual(8, 8)
        self.left, self.right = Residual(8, 12), Residual(8, 12)
        self.joined = Residual(12, 8)
        self.order = ("left", "right")
        self.call: Callable[[nn.Module, Tensor], Tensor] = apply

    def forward(self, x: Tensor) -> Tensor:
        x = self.call(self.trunk, self.stem(x))
        maps = {name: self.call(getattr(self, name), x) for name in self.order}
        return self.call(self.joined, sum_of(maps)).mean((2, 3))


def apply(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def sum_of(maps: Mapping[str, Tensor]) -> Tensor:
    """In one order, so that sums are equal to the bit."""
    return functools.reduce(torch.add, [maps[name] for name in sorted(maps)])


class Thrice(nn.Module):
    """One attention module that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)])
        self.se = SE(8)
        self.call: Callable[[nn.Module, Tensor], Tensor] = apply

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(x + self.call(self.se, conv(x)))
        return x


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = Thrice()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


# The same without a wire -------------------------------------------------------------------------------


class Restated:
    """A converted network that passes on by hand what was told: block -> (T, G), from call to call.

    ``hears``: block -> the blocks that it hears.
    """

    def __init__(self, model: Any, hears: Mapping[str, Sequence[str]]) -> None:
        self.model = model
        made = dcafy.connections(model)
        self.links = {
            name: {source: made[name] if name in made else made[f"{name}<-{source}"] for source in sources}
            for name, sources in hears.items()
        }
        assert sum(map(len, self.links.values())) == len(made)

    def block(self, name: str, x: Tensor, told: Told) -> tuple[Tensor, Told]:
        """A residual block's output, and what was told up to then."""
        block = self.model.get_submodule(name)
        shortcut = block.shortcut(x)  # first, as in the forward: gradients are added up in the same order
        y, told = self.attention(f"{name}.se", block.se, block.conv(x), told)
        return torch.relu(shortcut + y), told

    def attention(self, name: str, se: Any, x: Tensor, told: Told) -> tuple[Tensor, Told]:
        G = x.mean((2, 3))
        T = se.transform(self.connected(name, G, told))
        return x * T[:, :, None, None], {**told, name: (T, G)}

    def connected(self, name: str, G: Tensor, told: Told) -> Tensor:
        """f(αG, Σ β·match(T ⊙ G)) over the blocks that told something; αG where none did."""
        links = self.links.get(name)
        if links is None:
            return G
        heard = [source for source in links if source in told]
        if not heard:
            return next(iter(links.values())).alpha * G
        if len(links) == 1:
            return links[heard[0]](G, *told[heard[0]])
        joined = JoinedConnection([links[source] for source in heard])
        return joined(G, *[value for source in heard for value in told[source]])


class RestatedChain(Restated):
    def __init__(self, model: Any, topology: str = "chain") -> None:
        names = [f"blocks.{number}.se" for number in range(len(model.blocks))]
        first = {"chain": lambda number: number - 1, "dense": lambda number: 0}[topology]
        super().__init__(model, {names[n]: names[first(n) : n] for n in range(1, len(names))})

    def through(self, numbers: Iterable[int], x: Tensor, told: Told | None = None) -> tuple[Tensor, Told]:
        """The output of these blocks, one after the other, and what was told up to then."""
        told = told or {}
        for number in numbers:
            x, told = self.block(f"blocks.{number}", x, told)
        return x, told

    def part(self, numbers: Iterable[int], x: Tensor) -> Tensor:
        """The output of blocks before which nothing was told."""
        return self.through(numbers, x)[0]

    def __call__(self, x: Tensor, numbers: Iterable[int] | None = None) -> Tensor:
        numbers = range(len(self.model.blocks)) if numbers is None else numbers
        return self.model.head(self.part(numbers, self.model.stem(x)).mean((2, 3)))


class RestatedFork(Restated):
    def __init__(self, model: Any) -> None:
        super().__init__(model, {"left.se": ["trunk.se"], "right.se": ["trunk.se"], "joined.se": ["right.se"]})

    def __call__(self, x: Tensor, order: Sequence[str] = ("left", "right")) -> Tensor:
        x, told = self.block("trunk", self.model.stem(x), {})
        maps = {}
        for name in order:
            maps[name], told = self.block(name, x, told)
        return self.block("joined", sum_of(maps), told)[0].mean((2, 3))


class RestatedShared(Restated):
    def __init__(self, model: Any) -> None:
        super().__init__(model, {"body.se#2": ["body.se"], "body.se#3": ["body.se#2"]})

    def body(self, x: Tensor) -> Tensor:
        told: Told = {}
        for name, conv in zip(("body.se", "body.se#2", "body.se#3"), self.model.body.convs, strict=True):
            y, told = self.attention(name, self.model.body.se, conv(x), told)
            x = torch.relu(x + y)
        return x

    def __call__(self, x: Tensor) -> Tensor:
        return self.model.head(self.body(self.model.stem(x)).mean((2, 3)))


def converted(network: nn.Module, **options: Any) -> Any:
    """The converted network, its α and β at random: never where a connection would not show."""
    d = dcafy.convert(network, example_inputs=A, **{"verify": False, **options})
    with torch.no_grad():
        for number, connection in enumerate(dcafy.connections(d).values()):
            connection.alpha.uniform_(0.5, 1.5)
            connection.beta.uniform_(0.5, 1.5).mul_((-1) ** number)
    return d


def chain(**options: Any) -> tuple[Any, RestatedChain]:
    d = converted(Chain(8, 8, 12, 8, 8), **options)
    return d, RestatedChain(d, **options)


def fork() -> tuple[Any, RestatedFork]:
    d = converted(Fork())
    return d, RestatedFork(d)


def shared() -> tuple[Any, RestatedShared]:
    d = converted(Shared())
    return d, RestatedShared(d)


NETWORKS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "chain": chain,
    "dense": functools.partial(chain, topology="dense"),
    "fork": fork,
    "shared": shared,
}


# What a program leaves in the gradients ----------------------------------------------------------------

Program = Callable[[Forward], None]


def loss(output: Tensor) -> Tensor:
    return output.square().sum()


def outcome(parameters: Mapping[str, Tensor], program: Program, forward: Forward) -> dict[str, Tensor | None]:
    """Every output and gradient of a program, in the order of its forwards."""
    outputs: dict[str, Tensor | None] = {}

    def noted(*given: Any) -> Tensor:
        output = forward(*given)
        outputs[f"output {len(outputs)}"] = output.detach()
        return output

    for parameter in parameters.values():
        parameter.grad = None
    program(noted)
    return {**outputs, **{name: parameter.grad for name, parameter in parameters.items()}}


def assert_equal(
    actual: Mapping[str, Tensor | None], wanted: Mapping[str, Tensor | None], *, whole: bool = True
) -> None:
    """To the bit; ``whole``: no gradient is missing."""
    assert list(actual) == list(wanted)
    for name, value in wanted.items():
        other = actual[name]
        if value is None or other is None:
            assert value is other, name
            assert not whole, name
        else:
            assert torch.equal(value, other), f"{name}: {(value - other).abs().max()} off"


def assert_same(d: nn.Module, program: Program, forward: Forward, restated: Forward, *, whole: bool = True) -> None:
    """A program has the same outcome on both."""
    parameters = dict(d.named_parameters())
    assert_equal(outcome(parameters, program, forward), outcome(parameters, program, restated), whole=whole)


def one_forward(forward: Forward) -> None:
    loss(forward(A)).backward()


def two_forwards(forward: Forward) -> None:
    (loss(forward(A)) + loss(forward(B))).backward()


def two_sizes(forward: Forward) -> None:
    (loss(forward(A)) + loss(forward(FIVE))).backward()


def last_one_first(forward: Forward) -> None:
    first, last = loss(forward(A)), loss(forward(B))
    last.backward()
    first.backward()


def one_is_never_used(forward: Forward) -> None:
    used = loss(forward(A))
    forward(B)
    used.backward()


def one_without_gradients(forward: Forward) -> None:
    used = loss(forward(A))
    with torch.no_grad():
        forward(B)
    used.backward()


def two_backwards(forward: Forward) -> None:
    both = loss(forward(A)) + loss(forward(B))
    both.backward(retain_graph=True)
    both.backward()


def gradient_penalty(forward: Forward) -> None:
    x = A.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(forward(x)), x, create_graph=True)
    (loss(gradient) + loss(forward(B))).backward()


def forward_in_the_backward(forward: Forward) -> None:
    def look(_: Tensor) -> None:
        forward(B)

    output = forward(A)
    output.register_hook(look)
    loss(output).backward()


def step_in_the_backward(forward: Forward) -> None:
    def step(_: Tensor) -> None:
        with torch.enable_grad():
            loss(forward(B)).backward()

    output = forward(A)
    output.register_hook(step)
    loss(output).backward()


def backward_in_another_thread(forward: Forward) -> None:
    both = loss(forward(A)) + loss(forward(B))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(both.backward).result()


def in_half_precision(forward: Forward) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = forward(A)
    loss(output.float()).backward()


def saved_tensors_looked_at(forward: Forward) -> None:
    """As pictures of graphs do it: outside of a backward, as often as somebody looks."""
    both = loss(forward(A)) + loss(forward(B))
    for _ in range(2):
        for node in nodes_below(both):
            for name in dir(node):
                if name.startswith("_saved_"):
                    getattr(node, name)
    both.backward()


def nodes_below(output: Tensor) -> list[Any]:
    """The nodes of autograd's graph."""
    found: dict[Any, None] = {}
    pending: list[Any] = [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in found:
            found[node] = None
            pending += [below for below, _ in node.next_functions]
    return list(found)


PROGRAMS: dict[str, Program] = {
    program.__name__: program
    for program in (
        one_forward,
        two_forwards,
        two_sizes,
        last_one_first,
        one_is_never_used,
        one_without_gradients,
        two_backwards,
        gradient_penalty,
        forward_in_the_backward,
        step_in_the_backward,
        backward_in_another_thread,
        in_half_precision,
        saved_tensors_looked_at,
    )
}


# How programs run it ----------------------------------------------------------------------------------


def again(function: Any, x: Tensor, **options: Any) -> Tensor:
    """``function(x)``, to be run again in the backward."""
    return checkpoint(function, x, use_reentrant=False, **options)


def per_block(blocks: Blocks, x: Tensor, **options: Any) -> Tensor:
    for block in blocks:
        x = again(block, x, **options)
    return x


def per_stretch(blocks: Blocks, x: Tensor) -> Tensor:
    return again(blocks[2:], again(blocks[:2], x))


def in_parts(d: Any, route: Route = in_order) -> Forward:
    """The forward by parts of the network, called one after the other."""
    return lambda x: d.head(route(d.blocks[2:], route(d.blocks[:2], d.stem(x))).mean((2, 3)))


def half_of(d: Any) -> None:
    """A part whose messages nobody has heard yet."""
    d.blocks[:2](d.stem(A))


def over(numbers: Iterable[int], route: Route) -> Route:
    """A route over these blocks only, as early exits and LayerDrop take."""
    return lambda blocks, x: route(nn.Sequential(*[blocks[number] for number in numbers]), x)


@contextmanager
def failing(module: nn.Module, error: type[BaseException], call: int = 1) -> Iterator[None]:
    """The call of ``module`` of this number fails; so does the program inside, with that error."""
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise error

    handle = module.register_forward_hook(fail)
    with pytest.raises(error):
        yield
    handle.remove()
    assert len(calls) >= call


class Once:
    """A hook that runs a program the first time, and keeps its result."""

    def __init__(self, program: Callable[[], Tensor]) -> None:
        self.program: Callable[[], Tensor] | None = program

    def __call__(self, *_: Any) -> None:
        if self.program is not None:
            program, self.program = self.program, None
            self.seen = program()
