"""A wire among threads, compiled code, traces and transforms: nobody hears what was told elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from restated import (
    EVERY,
    NETWORKS,
    A,
    B,
    Chain,
    Forward,
    RestatedChain,
    Route,
    assert_same,
    chain,
    converted,
    failing,
    half_of,
    in_order,
    in_parts,
    loss,
    one_forward,
    one_without_gradients,
    outcome,
    per_block,
    per_stretch,
    two_forwards,
    two_sizes,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from trained import images

# Threads -----------------------------------------------------------------------------------------------


@pytest.fixture
def impatient() -> Iterator[None]:
    """Threads that give way to each other in the middle of everything."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def wrong_in_threads(forward: Forward, wanted: Forward, rounds: int = 15, threads: int = 4) -> list[int]:
    """The threads, each with images of its own, in which an output or a gradient by the images is not the wanted."""

    def outcome_of(forward: Forward, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        output = forward(x)
        return [output.detach(), *torch.autograd.grad(loss(output), x)]

    given = [images(2, 8, seed=seed) for seed in range(threads)]
    right = [outcome_of(wanted, x) for x in given]
    started = threading.Barrier(threads)

    def work(number: int) -> list[int]:
        started.wait()
        outcomes = [outcome_of(forward, given[number]) for _ in range(rounds)]
        return [number for made in outcomes if not all(map(torch.equal, made, right[number]))]

    with ThreadPoolExecutor(threads) as pool:
        return [number for wrong in pool.map(work, range(threads)) for number in wrong]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("route", [in_order, per_block, per_stretch])
def test_threads_on_one_model(route: Route) -> None:
    d, restated = chain()
    d.route = route
    assert wrong_in_threads(d, restated) == []


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("route", [in_order, per_block])
def test_parts_in_threads(route: Route) -> None:
    d, restated = chain()
    half_of(d)  # what another thread is in the middle of
    assert wrong_in_threads(in_parts(d, route), restated) == []


def test_a_thread_hears_no_other() -> None:
    """Neither one that runs beside it nor one that has ended, whose number it may have."""
    d, restated = chain()
    x = restated.part((0, 1), d.stem(B))
    wanted = restated.part((2, 3, 4), x)
    half_of(d)
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(d.blocks[2:], x).result(), wanted)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(half_of, d).result()


# Compiled blocks ---------------------------------------------------------------------------------------


class Compiler:
    """The backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            self.runs += 1
            return graph.forward(*given)

        return run


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    torch._dynamo.reset()
    yield Compiler()
    torch._dynamo.reset()


FIRST_CONVERTED_THEN_COMPILED = """
import torch
from restated import A, converted, Chain
d = converted(Chain(8, 8))
length = torch.compile(lambda *given: given[0] + len(given), backend="eager", fullgraph=True)
assert torch.equal(length(A, A), A + 2)
"""


@pytest.mark.slow
def test_a_conversion_leaves_the_compiler_as_it_is() -> None:
    """Also where it is the conversion that imports it, in the middle of a recording."""
    tests = Path(__file__).parents[1]
    program = [sys.executable, "-c", FIRST_CONVERTED_THEN_COMPILED]
    subprocess.run(program, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tests), *sys.path))})


@pytest.mark.slow
def test_compiled_blocks_beside_eager_ones(compiler: Compiler) -> None:
    d, restated = chain()
    for number in (1, 2):
        d.blocks[number].compile(backend=compiler, fullgraph=True)
    for program in (one_forward, two_sizes, one_without_gradients):
        assert_same(d, program, d, restated)
    assert_same(d, two_forwards, in_parts(d), restated)
    assert compiler.runs == 2 * (1 + 2 + 2 + 2)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.5", reason="compiles each module apart, whatever it is")
def test_more_compiled_blocks_than_one_code_is_compiled_for(compiler: Compiler) -> None:
    """Blocks of one class that are compiled one by one meet few compilations: each runs as one graph."""
    d = converted(Chain(*[8] * 12))
    restated = RestatedChain(d)
    for block in d.blocks:
        block.compile(backend=compiler, fullgraph=True)
    assert_same(d, one_forward, d, restated)
    compiler.runs = 0
    assert_same(d, two_forwards, d, restated)
    assert compiler.runs == 2 * 12


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_threads_on_blocks_that_are_compiled_beside_eager_ones(compiler: Compiler) -> None:
    d, restated = chain()
    for number in (1, 2):
        d.blocks[number].compile(backend=compiler)
    assert torch.equal(d(A), restated(A))
    assert wrong_in_threads(d, restated) == []
    assert wrong_in_threads(in_parts(d), restated) == []


@pytest.mark.slow
def test_the_whole_compiled(compiler: Compiler) -> None:
    """As one graph, also where parts have told something before."""
    d, restated = chain()
    half_of(d)
    compiled = torch.compile(d, backend=compiler, fullgraph=True)
    assert_same(d, two_forwards, compiled, restated)
    x = restated.part((0, 1), d.stem(B))
    d.blocks[2:](x)
    compiler.runs = 0
    assert_same(d, two_forwards, compiled, restated)
    assert compiler.runs == 2


@pytest.mark.slow
def test_compiled_parts(compiler: Compiler) -> None:
    d, restated = chain()
    front, rear = (torch.compile(part, backend=compiler, fullgraph=True) for part in (d.blocks[:2], d.blocks[2:]))
    for x in (A, B):
        x = d.stem(x)
        assert torch.equal(rear(front(x)), restated.part(EVERY, x))
    assert torch.equal(rear(x), restated.part((2, 3, 4), x))


@pytest.mark.slow
def test_checkpoints_inside_a_compiled_network(compiler: Compiler) -> None:
    d, restated = chain()
    d.route = per_block
    assert_same(d, two_forwards, torch.compile(d, backend=compiler), restated)


# Traces, fake tensors, transforms ----------------------------------------------------------------------


def test_a_traced_part_leaves_nothing_for_an_eager_one() -> None:
    d, restated = chain()
    x = d.stem(A)
    traced = torch.fx.symbolic_trace(d.blocks[:2])
    h = restated.part((0, 1), x)
    assert torch.equal(d.blocks[2:](h), restated.part((2, 3, 4), h))
    assert torch.equal(traced(x), h)
    assert torch.equal(torch.fx.symbolic_trace(d)(B), restated(B))
    assert_same(d, two_forwards, d, restated)


def test_an_eager_part_leaves_nothing_for_a_traced_one() -> None:
    """What it told is no constant of the trace."""
    d, restated = chain()
    half_of(d)
    x = restated.part((0, 1), d.stem(B))
    assert torch.equal(torch.fx.symbolic_trace(d.blocks[2:])(x), restated.part((2, 3, 4), x))


def test_a_trace_that_fails_leaves_nothing() -> None:
    d, restated = chain()
    for block in d.blocks[2:]:
        with failing(block, ValueError):
            torch.fx.symbolic_trace(d)
    x = restated.part((0, 1), d.stem(B))
    assert torch.equal(d.blocks[2:](x), restated.part((2, 3, 4), x))
    assert_same(d, two_forwards, d, restated)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_trace_is_the_connected_network(network: str) -> None:
    d, restated = NETWORKS[network]()
    traced = torch.fx.symbolic_trace(d)
    for x in (A, B):
        assert torch.equal(traced(x), restated(x))


def test_a_fake_run_leaves_nothing_for_a_real_one() -> None:
    d, restated = chain()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        half = d.blocks[:2](d.stem(mode.from_tensor(A)))
    x = restated.part((0, 1), d.stem(A))
    assert half.shape == x.shape
    output = d.blocks[2:](x)
    assert type(output) is Tensor
    assert torch.equal(output, restated.part((2, 3, 4), x))


def test_functional_gradients() -> None:
    """Of a batch and of each image in it, beside eager parts that are in the middle of something."""
    d, restated = chain()
    parameters = {name: parameter.detach() for name, parameter in d.named_parameters()}

    def total(values: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return loss(torch.func.functional_call(d, values, (x,)))

    wanted = outcome(dict(d.named_parameters()), one_forward, restated)
    half = d.blocks[:2](d.stem(B))
    whole = torch.func.grad(total)(parameters, A)
    each = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))(parameters, A.unsqueeze(1))
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(each[name].sum(0), wanted[name], rtol=1e-4, atol=1e-5)
    assert torch.equal(d.blocks[2:](half), restated.part(EVERY, d.stem(B)))
    assert_same(d, two_forwards, d, restated)


def test_messages_do_not_cross_a_transform() -> None:
    """Neither from inside a transform to the tensors outside nor the other way."""
    d, restated = chain()
    x = restated.part((0, 1), d.stem(A))
    for transformed in (
        torch.func.grad(lambda h: d.blocks[:2](h).sum()),
        torch.func.vmap(lambda h: d.blocks[:2](h[None])[0]),
    ):
        transformed(d.stem(B))
        assert torch.equal(d.blocks[2:](x), restated.part((2, 3, 4), x))
    half_of(d)
    inside = torch.func.grad(lambda h: d.blocks[2:](h).square().sum())(x)
    torch.testing.assert_close(inside, torch.func.grad(lambda h: restated.part((2, 3, 4), h).square().sum())(x))
