"""Whom a block hears in each run: of a root, of parts, opened by hand, inside another one, after one that failed."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
import pickle
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from restated import (
    EVERY,
    FIVE,
    NETWORKS,
    PROGRAMS,
    SE,
    A,
    B,
    Chain,
    Fork,
    Forward,
    Once,
    Residual,
    RestatedChain,
    Route,
    Shared,
    Thrice,
    Told,
    again,
    apply,
    assert_equal,
    assert_same,
    chain,
    converted,
    failing,
    fork,
    half_of,
    in_order,
    in_parts,
    loss,
    one_forward,
    outcome,
    over,
    per_block,
    per_stretch,
    shared,
    two_forwards,
)
from torch import Tensor, nn
from trained import images

import dcafy


@pytest.mark.parametrize("network", NETWORKS)
def test_the_restatement_is_the_connected_network(network: str) -> None:
    """What the other tests stand on: equal to the bit, and every connection shows."""
    d, restated = NETWORKS[network]()
    for x in (A, FIVE):
        assert torch.equal(d(x), restated(x))
    for connection in dcafy.connections(d).values():
        with torch.no_grad():
            before, beta = restated(A), connection.beta.clone()
            connection.beta.zero_()
            assert (restated(A) - before).abs().max() > 1e-5
            assert torch.equal(d(A), restated(A))
            connection.beta.copy_(beta)


@pytest.mark.parametrize(("network", "kind"), [("chain", Chain), ("fork", Fork), ("shared", Shared)])
def test_the_forward_is_the_users_own(network: str, kind: type[nn.Module]) -> None:
    """Of the user's class, with every block and container called."""
    d, _ = NETWORKS[network]()
    assert isinstance(d, kind)
    assert isinstance(d, torch.fx.GraphModule)
    parts = {name: module for name, module in d.named_modules() if isinstance(module, (SE, Residual, Thrice))}
    called = []
    for name, module in parts.items():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    d(A)
    assert set(called) == set(parts) != set()


# Runs inside runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("place", ["register_forward_pre_hook", "register_forward_hook"])
@pytest.mark.parametrize("route", [in_order, per_block, per_stretch])
def test_a_forward_inside_a_forward_has_a_run_of_its_own(route: Route, place: str, gradients: bool) -> None:
    """Also where the outer one runs again, and the inner one with it."""
    d, restated = chain()
    d.route = route
    inner, outer = [], [True]

    def look(*_: Any) -> None:
        if outer:
            outer.clear()
            with torch.set_grad_enabled(gradients):
                inner.append(d(B).detach())
            outer.append(True)

    getattr(d.blocks[1].se, place)(look)
    assert_same(d, one_forward, d, restated)
    assert len(inner) == (1 if route is in_order else 2)
    assert all(torch.equal(output, restated(B)) for output in inner)


def test_a_failure_inside_a_forward_that_goes_on() -> None:
    """The inner run ends with its failure; the outer one hears its own messages."""
    d, restated = chain()

    def look(*_: Any) -> None:
        looking.remove()
        with failing(d.blocks[3], ArithmeticError):
            d(B)

    looking = d.blocks[1].register_forward_hook(look)
    assert torch.equal(d(A), restated(A))


def test_a_student_and_its_teacher() -> None:
    """A copy and another conversion, run in the middle of a forward."""
    d, restated = chain()
    twin, (other, other_restated) = copy.deepcopy(d), chain()
    with torch.no_grad():
        for connection in dcafy.connections(twin).values():
            connection.beta.mul_(2)
    seen: list[Tensor] = []
    d.blocks[1].register_forward_hook(lambda *_: seen.extend((twin(B), other(B))))
    assert torch.equal(d(A), restated(A))
    assert torch.equal(seen[0], RestatedChain(twin)(B))
    assert torch.equal(seen[1], other_restated(B))


# Blocks that do not run --------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [in_order, per_block])
@pytest.mark.parametrize("earlier", [A, FIVE], ids=["same_batch", "other_batch"])
@pytest.mark.parametrize(
    "runs",
    [
        pytest.param([(0, 1), (0, 2, 3, 4)], id="early_exit_then_teller_skipped"),
        pytest.param([(0, 1, 4), (0, 1, 2, 3, 4)], id="blocks_skipped_then_whole"),
        pytest.param([(0,), (1, 2, 3, 4)], id="only_the_first_then_the_others"),
        pytest.param([(0, 1, 2, 3), (4,)], id="all_but_the_last_then_it_alone"),
    ],
)
def test_a_reader_never_hears_an_older_run(runs: list[tuple[int, ...]], earlier: Tensor, route: Route) -> None:
    """Whoever is skipped tells nothing: f is αG for who hears it."""
    d, restated = chain()

    def program(forward: Forward) -> None:
        first, second = (loss(forward(x, numbers)) for x, numbers in zip((earlier, B), runs, strict=True))
        (first + second).backward()

    def forward(x: Tensor, numbers: tuple[int, ...]) -> Tensor:
        d.route = over(numbers, route)
        return d(x)

    assert_same(d, program, forward, restated, whole=False)


def test_of_several_messages_those_are_heard_that_were_told() -> None:
    d, restated = chain(topology="dense")
    d.route = over((0, 2, 3, 4), in_order)
    assert torch.equal(d(A), restated(A, (0, 2, 3, 4)))


@pytest.mark.parametrize("call", [apply, again])
@pytest.mark.parametrize("orders", [("right", "left"), ("left",), ("right",)], ids="_".join)
def test_branches_in_another_order_than_recorded(orders: tuple[str, ...], call: Any) -> None:
    """A message is heard by each of its readers, whichever comes first, whoever is missing."""
    d, restated = fork()
    d.call = call

    def program(forward: Forward) -> None:
        (loss(forward(A, ("left", "right"))) + loss(forward(B, orders)) + loss(forward(A, orders))).backward()

    def forward(x: Tensor, order: tuple[str, ...]) -> Tensor:
        d.order = order
        return d(x)

    assert_same(d, program, forward, restated)


# Parts -------------------------------------------------------------------------------------------------

Step = tuple[tuple[int, ...], int | None]

SCRIPTS: dict[str, list[Step]] = {
    "all_at_once": [(EVERY, None)],
    "all_at_once_again": [(EVERY, None), (EVERY, None)],
    "in_order": [((0, 1), None), ((2, 3, 4), 0)],
    "in_order_again": [((0, 1), None), ((2, 3, 4), 0), ((0, 1), None), ((2, 3, 4), 2)],
    "one_by_one": [((0,), None), ((1,), 0), ((2,), 1), ((3,), 2), ((4,), 3)],
    "alone": [((2, 3, 4), None)],
    "alone_again": [((2, 3, 4), None), ((2, 3, 4), None)],
    "the_last_first": [((3, 4), None), ((2,), None), ((0, 1), None)],
    "the_front_again": [((0, 1), None), ((0, 1), None), ((2, 3, 4), 1)],
    "the_rear_again": [((0, 1), None), ((2, 3, 4), 0), ((2, 3, 4), None)],
    "a_teller_left_out": [((0, 1), None), ((0,), None), ((2, 3, 4), None)],
    "tellers_left_out": [((0, 1), None), ((4,), None)],
    "the_rear_before_and_after": [((2, 3, 4), None), ((0, 1), None), ((2, 3, 4), 1)],
}
"""Parts that run one after the other, as (their blocks, the step that they hear; ``None``: nobody)."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_part_hears_what_ran_just_before_it(script: str) -> None:
    """And else nothing: f is then αG."""
    d, restated = chain()
    told: list[Told] = []
    for seed, (numbers, heard) in enumerate(SCRIPTS[script]):
        x = restated.part(range(numbers[0]), d.stem(images(2, 8, seed=seed)))
        wanted, now = restated.through(numbers, x, {} if heard is None else told[heard])
        assert torch.equal(d.blocks[numbers[0] : numbers[-1] + 1](x), wanted)
        told.append(now)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("route", [in_order, again])
def test_parts_in_order_are_the_whole(route: Route, program: str) -> None:
    d, restated = chain()
    assert_same(d, PROGRAMS[program], in_parts(d, route), restated)


def test_parts_around_other_runs() -> None:
    """A whole forward, a backward and a run by hand in between are not heard, and take nothing away."""
    d, restated = chain()
    x = again(d.blocks[:2], d.stem(A))
    loss(d(B)).backward()
    with dcafy.run(d):
        in_parts(d)(B)
    torch.autograd.grad(x.sum(), list(d.blocks[0].parameters()), retain_graph=True)
    assert torch.equal(d.blocks[2:](x), restated.part(EVERY, d.stem(A)))


def test_a_conversion_leaves_nothing_to_be_heard() -> None:
    """Though it runs the network, to compare it with the original."""
    d = converted(Chain(8, 8, 12, 8, 8), verify=True)
    restated = RestatedChain(d)
    for first in (4, 2, 1):
        x = restated.part(range(first), d.stem(A))
        assert torch.equal(d.blocks[first](x), restated.part((first,), x))


@pytest.mark.parametrize("batch", [1, 5])
def test_a_message_of_another_batch_size_is_not_heard(batch: int) -> None:
    d, restated = chain()
    d.blocks[:2](d.stem(A))
    x = restated.part((0, 1), d.stem(images(batch, 8)))
    assert torch.equal(d.blocks[2:](x), restated.part((2, 3, 4), x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_part_trains_on_what_another_told_without_gradients(mode: Any) -> None:
    d, restated = chain()

    def program(forward: Forward) -> None:
        loss(forward(A)).backward()

    def by_parts(x: Tensor) -> Tensor:
        with mode():
            x = d.blocks[:2](d.stem(x))
        return d.blocks[2:](x.clone())

    def wanted(x: Tensor) -> Tensor:
        with torch.no_grad():
            x, told = restated.through((0, 1), d.stem(x))
        return restated.through((2, 3, 4), x, told)[0]

    assert_same(d, program, by_parts, wanted, whole=False)


def test_a_forward_without_its_hooks() -> None:
    """``d.forward(x)`` is the connected network, whichever parts ran before."""
    d, restated = chain()
    for numbers in ((0, 1), (3, 4), (2,)):
        x = restated.part(range(numbers[0]), d.stem(B))
        d.blocks[numbers[0] : numbers[-1] + 1](x)
        for _ in range(2):
            assert torch.equal(d.forward(A), restated(A))


def test_parts_of_a_module_that_is_called_several_times() -> None:
    d, restated = shared()
    for x in map(d.stem, (A, B, A)):
        assert torch.equal(d.body(x), restated.body(x))
        assert torch.equal(d(A), restated(A))


# Runs that are opened by hand --------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_by_hand(program: str) -> None:
    d, restated = chain()

    def forward(x: Tensor) -> Tensor:
        with dcafy.run(d):
            return in_parts(d, per_block)(x)

    assert_same(d, PROGRAMS[program], forward, restated)


def in_turn(d: Any) -> tuple[Tensor, Tensor]:
    front, rear = d.blocks[:2], d.blocks[2:]
    one, other = dcafy.run(d), dcafy.run(d)
    with one:
        a = front(d.stem(A))
    with other:
        b = front(d.stem(B))
    with one:
        a = rear(a)
    with other:
        b = rear(b)
    return a, b


def one_around_the_other(d: Any) -> tuple[Tensor, Tensor]:
    front, rear = d.blocks[:2], d.blocks[2:]
    with dcafy.run(d):
        a = front(d.stem(A))
        with dcafy.run(d):
            b = rear(front(d.stem(B)))
        a = rear(a)
    return a, b


def entered_twice(d: Any) -> tuple[Tensor, Tensor]:
    front, rear = d.blocks[:2], d.blocks[2:]
    one, other = dcafy.run(d), dcafy.run(d)
    with one:
        a = front(d.stem(A))
        with other:
            b = front(d.stem(B))
            with one:
                a = rear(a)
            b = rear(b)
    return a, b


def loose_around(d: Any) -> tuple[Tensor, Tensor]:
    front, rear = d.blocks[:2], d.blocks[2:]
    a = front(d.stem(A))
    with dcafy.run(d):
        b = rear(front(d.stem(B)))
    return rear(a), b


def by_generators(d: Any) -> tuple[Tensor, Tensor]:
    def steps(x: Tensor) -> Iterator[Tensor]:
        run = dcafy.run(d)
        x = d.stem(x)
        for block in d.blocks:
            with run:
                x = block(x)
            yield x

    *_, last = zip(steps(A), steps(B), strict=True)
    return last


@pytest.mark.parametrize("program", [in_turn, one_around_the_other, entered_twice, loose_around, by_generators])
def test_interleaved_runs(program: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
    d, restated = chain()
    for output, x in zip(program(d), (A, B), strict=True):
        assert torch.equal(output, restated.part(EVERY, d.stem(x)))


@pytest.mark.parametrize("first", [1, 2, 3])
def test_runs_that_are_not_closed_in_order_leave_nothing(first: int) -> None:
    """As generators do that hold one open while others go on: what they hear is theirs to mind, and ends with them."""
    d, restated = chain()

    def steps(x: Tensor) -> Iterator[Tensor]:
        with dcafy.run(d):
            for block in d.blocks[:3]:
                x = block(x)
                yield x

    with contextlib.suppress(RuntimeError):
        for _ in itertools.zip_longest(steps(d.stem(A)), steps(d.stem(B)), steps(d.stem(A))):
            pass
    x = restated.part(range(first), d.stem(A))
    assert torch.equal(d.blocks[first:](x), restated.part(range(first, 5), x))
    assert_same(d, two_forwards, in_parts(d), restated)
    assert_same(d, two_forwards, d, restated)


def test_parts_of_a_student_and_its_teacher() -> None:
    """A copy speaks as the original does: where their parts alternate, each has a run."""
    d, _ = chain()
    twin = copy.deepcopy(d)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.9)
    runs = {d: dcafy.run(d), twin: dcafy.run(twin)}
    maps = {}
    for model, run in runs.items():
        with run:
            maps[model] = model.blocks[:2](model.stem(A))
    for model, run in runs.items():
        with run:
            assert torch.equal(model.blocks[2:](maps[model]), RestatedChain(model).part(EVERY, model.stem(A)))


def test_parts_inside_a_forward() -> None:
    d, restated = chain()

    def by_hand() -> Tensor:
        with dcafy.run(d):
            return in_parts(d)(B)

    inside = Once(by_hand)
    d.blocks[1].se.register_forward_pre_hook(inside)
    assert torch.equal(d(A), restated(A))
    assert torch.equal(inside.seen, restated(B))


# Runs that fail, and what is left over -----------------------------------------------------------------


class Failure(BaseException):
    """As ``KeyboardInterrupt``: not an ``Exception``."""


@pytest.mark.parametrize("error", [ValueError, Failure])
@pytest.mark.parametrize("place", ["root", "run", "part", "checkpoint", "backward"])
def test_a_right_run_after_one_that_failed(place: str, error: type[BaseException]) -> None:
    d, restated = chain()
    if place in ("checkpoint", "backward"):
        d.route = per_block
    for _ in range(2):
        with failing(d.blocks[2].se.transform, error, call=2 if place == "backward" else 1):
            if place == "run":
                with dcafy.run(d):
                    d.blocks(d.stem(A))
            elif place == "part":
                d.blocks(d.stem(A))
            else:
                loss(d(A)).backward()
        if place != "part":
            x = restated.part((0, 1), d.stem(B))
            assert torch.equal(d.blocks[2:](x), restated.part((2, 3, 4), x))
        assert_same(d, two_forwards, in_parts(d) if place == "part" else d, restated)


def forward_and_backward(d: Any) -> None:
    loss(d(A)).backward()


def forward_without_gradients(d: Any) -> None:
    with torch.no_grad():
        d(A)


def forward_that_nobody_uses(d: Any) -> None:
    d(A)


def early_exit(d: Any) -> None:
    d.route = over((0, 1), d.route)
    d(A)


def left_out(d: Any) -> None:
    d.route = over((0, 2, 3, 4), d.route)
    d(A)


def failed_forward(d: Any) -> None:
    with failing(d.blocks[2], ValueError):
        d(A)


def failed_backward(d: Any) -> None:
    output = d(A)
    output.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss(output).backward()


def failed_run(d: Any) -> None:
    with failing(d.blocks[2], ValueError), dcafy.run(d):
        d.blocks(d.stem(A))


def half_a_run(d: Any) -> None:
    with dcafy.run(d):
        d.blocks[:2](d.stem(A))


def all_parts(d: Any) -> None:
    in_parts(d)(A)


def thread_with_a_part(d: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(half_of, d).result()


@pytest.mark.parametrize("route", [in_order, per_block])
@pytest.mark.parametrize(
    "program",
    [
        forward_and_backward,
        forward_without_gradients,
        forward_that_nobody_uses,
        early_exit,
        left_out,
        failed_forward,
        failed_backward,
        failed_run,
        half_a_run,
        all_parts,
        thread_with_a_part,
    ],
)
def test_nothing_stays_alive(program: Callable[[Any], None], route: Route) -> None:
    """Neither messages nor the maps that they were made of, once the program has let them go."""
    d, _ = chain()
    d.route = route
    maps: list[weakref.ref[Tensor]] = []
    for module in d.blocks.modules():
        if isinstance(module, (nn.Conv2d, nn.Sigmoid)):
            module.register_forward_hook(lambda _module, _inputs, output: maps.append(weakref.ref(output)))
    output = d(A)  # the references do say what lives
    assert any(ref() is not None for ref in maps) == (route is in_order)
    del output
    gc.freeze()  # only what the program leaves is looked through
    try:
        program(d)
        gc.collect()
    finally:
        gc.unfreeze()
    assert len(maps) > 10
    assert [number for number, ref in enumerate(maps) if ref() is not None] == []


# Blocks that are copied and shared ---------------------------------------------------------------------


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "save": saved_and_loaded,
}


@pytest.mark.parametrize("path", ["blocks.0", "blocks.1.se", "blocks.2", "blocks"])
@pytest.mark.parametrize("copied", COPIES)
def test_a_part_that_is_copied_and_put_back(copied: str, path: str) -> None:
    """It speaks to the others as before."""
    d, restated = chain()
    wanted = outcome(dict(d.named_parameters()), two_forwards, restated)
    parent, _, name = path.rpartition(".")
    setattr(d.get_submodule(parent), name, COPIES[copied](d.get_submodule(path)))
    d.zero_grad()
    assert_equal(outcome(dict(d.named_parameters()), two_forwards, d), wanted)
    assert_equal(outcome(dict(d.named_parameters()), two_forwards, in_parts(d)), wanted)


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_of_the_whole(copied: str) -> None:
    d, restated = chain()
    twin = COPIES[copied](d)
    assert isinstance(twin, Chain)
    twin.route = per_block
    assert_same(twin, two_forwards, twin, RestatedChain(twin))
    assert torch.equal(twin(A), restated(A))


def test_a_block_of_two_copies() -> None:
    """Each hears its own run, whichever network it runs in."""
    d, restated = chain()
    twin = copy.deepcopy(d)
    twin.blocks[1] = d.blocks[1]
    d.blocks[0](d.stem(B))
    for _ in range(2):
        assert_same(twin, two_forwards, twin, RestatedChain(twin))
        assert_same(d, two_forwards, d, restated)
    inside = Once(lambda: twin(B))
    d.blocks[1].se.register_forward_pre_hook(inside)
    assert torch.equal(d(A), restated(A))
    assert torch.equal(inside.seen, restated(B))


def test_a_block_of_another_conversion_hears_and_tells_nothing() -> None:
    """Blocks of the same name in two networks are not the same blocks."""
    d, _ = chain()
    other, _ = chain()
    other.blocks[1] = d.blocks[1]
    restated = RestatedChain(other)

    def forward(x: Tensor) -> Tensor:
        x, _ = restated.through((0,), other.stem(x))
        x, _ = restated.through((1,), x)
        x, _ = restated.through((2, 3, 4), x)
        return other.head(x.mean((2, 3)))

    assert torch.equal(other(A), forward(A))
    assert not torch.equal(other(A), restated(A))
