"""What one thread converts, another does not notice: names of torch, its random numbers, the mode of a model."""

from __future__ import annotations

import builtins
import contextlib
import functools
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import with_attention
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import dcafy
from dcafy.analysis.complexity import complexity
from dcafy.draws import OwnDraws, drawing_apart
from dcafy.errors import DcafyError
from dcafy.graph.counting import multiply_adds
from dcafy.sources import open_model
from dcafy.threads import ONE_AT_A_TIME, Swap

X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

OWNERS = (torch, builtins, math, nn.Module, torch.no_grad, torch.enable_grad, torch.inference_mode, torch.autocast)
OWNERS += (random, np.random, torch.set_grad_enabled, torch.autograd.Function, torch.random, F, torch_module)


def names() -> dict[tuple[str, str], int]:
    """Every name that could stand for something else, and what it stands for."""
    owners = [(str(owner), vars(owner)) for owner in (*OWNERS, networks, sys.modules[__name__])]
    return {(owner, name): id(value) for owner, held in owners for name, value in held.items() if name[0] != "_"} | {
        (owner, name): id(held[name]) for owner, held in owners for name in held if name in DUNDERS
    }


DUNDERS = ("__call__", "__getattr__", "__enter__", "__init__")


@torch.compile(backend="eager", fullgraph=True)
def compiled(x: Tensor) -> Tensor:
    return x.sin() + 1


@pytest.fixture(autouse=True)
def everything_is_as_it_was() -> Iterator[None]:
    dcafy.inspect(network(), example_inputs=X)  # what is imported on the way is imported,
    compiled(torch.zeros(1))  # and what torch.compile replaces for good is replaced
    before, interval = names(), sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)
    changed = [name for name, value in names().items() if before.get(name, value) != value]
    assert not changed
    assert torch.is_grad_enabled()
    assert not is_in_torch_dispatch_mode()
    assert ONE_AT_A_TIME.acquire(blocking=False)
    ONE_AT_A_TIME.release()


def network() -> nn.Module:
    return with_attention(networks.SELinear)


class Ordinary(nn.Module):
    """Calls what a recording replaces: factories, ``len``, ``isinstance``, contexts, parameters by name; and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(16, 16), nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[0], 1) * torch.randint(0, 2, (len(x), 1))
        with torch.no_grad():
            shift = torch.arange(16) / math.sqrt(16)
        assert isinstance(self.scale, nn.Parameter)
        return self.layer(F.dropout(x * mask, 0.3) + torch.randn(len(x), 16) * self.scale) + shift


def trained(steps: int) -> list[Tensor]:
    """The weights after so many steps; on the way everything has to be what it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Ordinary()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(steps):
            x = torch.ones(4, 16)
            loss = model(x).square().mean()
            assert type(x) is type(loss) is Tensor
            assert model.training
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [*model.state_dict().values()]


def beside(*jobs: Callable[[], Any]) -> list[Any]:
    """What the jobs return, each in a thread of its own."""
    results: list[Any] = [None] * len(jobs)

    def run(number: int) -> None:
        try:
            results[number] = jobs[number]()
        except BaseException as error:  # the main thread tells
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def train_beside(conversions: int) -> None:
    """Training in one thread goes as it goes alone, through so many conversions in another."""
    steps = 200
    alone = trained(steps)
    done, models = threading.Event(), (network(), plain())  # building them draws random numbers

    def train() -> list[list[Tensor]]:
        ends = []
        while not done.is_set():
            ends.append(trained(steps))
        return ends

    def convert() -> None:
        try:
            for number in range(conversions):
                options: dict[str, Any] = {"attention": "se"} if number % 4 == 3 else {}
                connected = dcafy.convert(models[bool(options)], example_inputs=X, **options)
                if number % 10 == 9:  # what is built on the way draws apart, too
                    open_model("torchvision:squeezenet1_1")
                if number == 0:
                    assert {torch.ones, torch.arange}.isdisjoint(node.target for node in connected.graph.nodes)
        finally:
            done.set()

    ends, _ = beside(train, convert)
    assert ends
    for end in ends:
        assert all(map(torch.equal, end, alone))


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.norm(self.first(x)).relu())


def plain() -> nn.Module:
    """A network of residual units, without attention."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), Unit(), Unit())


def test_a_training_beside_conversions_goes_as_it_goes_alone() -> None:
    train_beside(8)


@pytest.mark.slow
def test_a_training_beside_fifty_conversions_goes_as_it_goes_alone() -> None:
    train_beside(50)


def test_two_threads_convert_what_each_converts_alone() -> None:
    def convert(model: nn.Module) -> tuple[Any, ...]:
        connected = dcafy.convert(model, example_inputs=X)
        plan = dcafy.inspect(model, example_inputs=X)
        values = {key: value.tolist() for key, value in connected.state_dict().items()}
        return plan.to_dict(), values, connected.eval()(X).tolist()

    models = [with_attention(kind) for kind in (networks.SELinear, networks.CBAM)]
    alone = [convert(model) for model in models]
    assert beside(*(functools.partial(convert, model) for model in models)) == alone


def test_one_model_is_trained_while_it_is_looked_at() -> None:
    """Its modes are its own: an inspection, and the run that compares, look at copies."""
    model = network().train()
    modes: list[bool] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: modes.append(module.training) if module is watched else None)
    watched, done = model.stem, threading.Event()

    def look() -> None:
        try:
            for _ in range(3):
                dcafy.convert(model, example_inputs=X)
        finally:
            done.set()

    def train() -> int:
        steps = 0
        while not done.is_set():
            assert all(module.training for module in model.modules())
            steps += 1
        return steps

    steps, _ = beside(train, look)
    assert steps > 0


@contextlib.contextmanager
def interrupted(seconds: float) -> Iterator[None]:
    """A Ctrl-C after so many seconds."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "inspect": lambda model: dcafy.inspect(model, example_inputs=X),
    "convert": lambda model: dcafy.convert(model, example_inputs=X),
    "insert": lambda model: dcafy.insert(model, "se", example_inputs=X),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one that falls into a __del__ is lost
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_any_time_leaves_all_as_it_was(name: str) -> None:
    model, call = plain() if name == "insert" else network(), CALLS[name]
    draws, start = torch.get_rng_state(), time.perf_counter()
    call(model)
    taken, before, chosen = time.perf_counter() - start, names(), random.Random(0)
    for _ in range(12):
        with interrupted(chosen.uniform(0.0005, taken)):
            call(model)
        assert [name for name, value in names().items() if before.get(name, value) != value] == []
        assert type(torch.zeros(2)) is Tensor
    beside(lambda: call(model))  # the lock is free
    assert torch.equal(torch.get_rng_state(), draws)


def test_a_graph_is_written_where_names_are_replaced_already() -> None:
    connected = dcafy.convert(network(), example_inputs=X)
    with ONE_AT_A_TIME:
        assert connected.graph.nodes


def test_a_process_forked_meanwhile_has_torch_as_it_is() -> None:
    real = torch.zeros
    with ONE_AT_A_TIME:
        swap = Swap([(torch, "zeros", lambda *_: "other"), (torch, "zeros", lambda *_: "third")])
        try:
            swap.put()
            assert torch.zeros(2) == "third"
            kept = torch.zeros
            assert beside(lambda: type(torch.zeros(2))) == [Tensor]
            if not (child := os.fork()):
                free = beside(lambda: ONE_AT_A_TIME.acquire(blocking=False)) == [True]
                os._exit(0 if torch.zeros is real and type(kept(2)) is Tensor and free else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert torch.zeros(2) == "third"
        finally:
            swap.put_back()
    assert torch.zeros is real
    assert type(kept(2)) is Tensor  # whoever kept the name has the real one


def among_own_draws(call: Callable[[], object]) -> None:
    with OwnDraws():
        call()


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = network(), [compiled]

    def forward(self, x: Tensor) -> Tensor:
        return self.last[0](self.body(x))


@pytest.mark.parametrize("inside", [among_own_draws, multiply_adds])
def test_modes_of_two_threads_that_overlap_leave_no_note(inside: Callable[[Callable[[], object]], object]) -> None:
    """Torch notes for all threads at once that there is a mode: the first to leave is not the last that came."""
    entered, second_is_in, left = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        inside(lambda: (entered.set(), second_is_in.wait(10)))
        left.set()

    def second() -> None:
        assert entered.wait(10)
        inside(lambda: (second_is_in.set(), left.wait(10)))

    beside(first, second)
    assert left.is_set()
    assert not is_in_torch_dispatch_mode()


def test_what_one_thread_counts_another_neither_counts_nor_hooks() -> None:
    layer, x, hooks = nn.Linear(4, 3), torch.ones(1, 4), torch_module._has_any_global_hook

    def count() -> int:
        return multiply_adds(
            lambda: [layer(x), beside(lambda: layer(x), lambda: compiled(x)), hooked.append(bool(hooks()))]
        )

    hooked: list[bool] = []
    assert beside(count, count) == [12, 12]
    assert hooked == [False, False]


def test_a_network_that_compiles_a_part_whole_is_counted() -> None:
    assert complexity(Compiled(), X) == complexity(network(), X)


def test_compiled_functions_run_as_they_do() -> None:
    model = Compiled().eval()
    connected = dcafy.convert(model, example_inputs=X)
    assert torch.equal(connected(X), model(X))
    with OwnDraws():
        assert not is_in_torch_dispatch_mode(include_infra_modes=False)
        beside(*[functools.partial(dcafy.inspect, model, example_inputs=X)] * 2)


class Seeding(nn.Module):
    """A forward that sets the seed, as some do for masks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return self.body(x + 0.1 * torch.rand_like(x))


def test_a_forward_that_sets_the_seed_sets_it_for_its_user_alone() -> None:
    model = Seeding().eval()
    before = torch.get_rng_state()
    connected = dcafy.convert(model, example_inputs=X)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(dcafy.connections(connected)) > 0
    assert torch.equal(connected(X), model(X))
    torch.set_rng_state(before)


class Drawing(nn.Module):
    """A part that is looked at in training as well, since it decides by its mode and returns a container; it draws."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return x, [x + torch.rand(3).mean() if self.training else x]


class Ending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.end = network(), Drawing()

    def forward(self, x: Tensor) -> Tensor:
        first, (second,) = self.end(self.body(x))
        return first + second


class Dropping(nn.Module):
    """A forward that decides by Python's and numpy's random numbers, as LayerDrop does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        shift = random.uniform(0, 1) + np.random.rand()
        return self.body(x + shift) if x.ndim == 4 else x


def test_python_and_numpy_draw_for_their_user_alone() -> None:
    """Both networks that are compared draw the same, too."""
    model, numbers = Dropping().eval(), (random.getstate(), np.random.get_state()[1:3])
    connected = dcafy.convert(model, example_inputs=X)
    with pytest.raises(DcafyError):
        dcafy.convert(model, example_inputs=X, schema="none")
    with pytest.raises(DcafyError):
        dcafy.insert(model, "se", where="body", example_inputs=X[:, :1])
    assert dcafy.connections(connected)
    assert random.getstate() == numbers[0]
    assert repr(np.random.get_state()[1:3]) == repr(numbers[1])
    assert random.random.__self__ is random._inst  # type: ignore[attr-defined]


def test_a_part_that_draws_in_training_draws_for_its_user_alone() -> None:
    model, before = Ending(), torch.get_rng_state()
    assert len(dcafy.inspect(model, example_inputs=X).links) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_of_ones_own_are_those_that_would_have_been_drawn() -> None:
    def draw() -> list[Tensor]:
        ones = torch.ones(2, 3, 8)
        made = [torch.rand(3), torch.randn(3), torch.randint(9, (4,)), torch.randperm(6)]
        made += (
            [torch.rand_like(ones)] if "generator" in torch.ops.aten.rand_like.overloads() else []
        )  # torch 2.8 has none
        made += [torch.bernoulli(ones / 2), torch.multinomial(ones[0], 2), torch.normal(0.0, 1.0, (3,))]
        made += [F.dropout(ones), F.rrelu(-ones, training=True), nn.LSTM(8, 8, 2, dropout=0.5)(ones)[0]]
        return [*made, torch.distributions.Gamma(2.0, 1.0).sample((3,)), *network().parameters()]

    before = torch.get_rng_state()
    with OwnDraws():
        own = draw()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, own, draw()))
    torch.set_rng_state(before)
    seeded = drawing_apart(lambda: (torch.manual_seed(3), torch.rand(4))[1])
    assert torch.equal(seeded, torch.rand(4, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(torch.get_rng_state(), before)


def test_operations_that_take_no_generator_go_on_from_draw_to_draw() -> None:
    """Also where whoever draws may set torch's seed, which is his own there."""

    def masks() -> list[Tensor]:
        return [torch.ops.aten.native_dropout(torch.ones(64), 0.5, True)[1] for _ in range(3)]

    before = torch.get_rng_state()
    first, second, third = drawing_apart(masks)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert all(map(torch.equal, drawing_apart(masks), (first, second, third)))
    assert not torch.equal(drawing_apart(masks, seed=1)[0], first)
    assert torch.equal(torch.get_rng_state(), before)
