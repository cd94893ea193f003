"""What runs again in a backward hears what it heard the first time, whatever else has run since."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from restated import (
    NETWORKS,
    PROGRAMS,
    A,
    B,
    Blocks,
    Forward,
    Program,
    Residual,
    RestatedChain,
    Route,
    again,
    assert_equal,
    assert_same,
    chain,
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
    two_backwards,
    two_forwards,
)
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import dcafy


def every_other_block(blocks: Blocks, x: Tensor) -> Tensor:
    for number, block in enumerate(blocks):
        x = again(block, x) if number % 2 else block(x)
    return x


def in_sequence(blocks: Blocks, x: Tensor) -> Tensor:
    return checkpoint_sequential(blocks, 2, x, use_reentrant=False)


def told_outside_of_both(blocks: Blocks, x: Tensor) -> Tensor:
    x = again(lambda h: blocks[2](again(blocks[1], h)), blocks[0](x))
    return blocks[3:](x)


def told_in_the_outer(blocks: Blocks, x: Tensor) -> Tensor:
    return blocks[3:](again(lambda h: again(blocks[1:3], blocks[0](h)), x))


def told_in_the_inner(blocks: Blocks, x: Tensor) -> Tensor:
    return blocks[3:](again(lambda h: blocks[2](again(blocks[:2], h)), x))


def three_deep(blocks: Blocks, x: Tensor) -> Tensor:
    return again(lambda h: again(lambda h: blocks[4](again(blocks[2:4], h)), h), blocks[:2](x))


def keep_convolutions(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation is torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def selective(blocks: Blocks, x: Tensor) -> Tensor:
    contexts = functools.partial(create_selective_checkpoint_contexts, keep_convolutions)
    return per_block(blocks, x, context_fn=contexts)


def to_its_end(blocks: Blocks, x: Tensor) -> Tensor:
    with set_checkpoint_early_stop(False):
        return per_block(blocks, x)


def unchecked(blocks: Blocks, x: Tensor) -> Tensor:
    return per_block(blocks, x, determinism_check="none")


def saved_elsewhere(blocks: Blocks, x: Tensor) -> Tensor:
    with save_on_cpu():
        return per_block(blocks, x)


def under_hooks_of_a_part(blocks: Blocks, x: Tensor) -> Tensor:
    """The user's own saved-tensor hooks, in the middle of what is run again."""

    def inside(h: Tensor) -> Tensor:
        h = blocks[0](h)
        with saved_tensors_hooks(torch.clone, lambda saved: saved):
            h = blocks[1](h)
        return blocks[2](h)

    return blocks[3:](again(inside, x))


ROUTES = (
    in_order,
    per_block,
    per_stretch,
    every_other_block,
    in_sequence,
    told_outside_of_both,
    told_in_the_outer,
    told_in_the_inner,
    three_deep,
    selective,
    to_its_end,
    unchecked,
    saved_elsewhere,
    under_hooks_of_a_part,
)


def routed(route: Route) -> Callable[[Any], Forward]:
    def arrange(d: Any) -> Forward:
        d.route = route
        return d

    return arrange


def the_whole(d: Any) -> Forward:
    return functools.partial(again, d)


def by_a_wrapper(d: Any) -> Forward:
    apply_activation_checkpointing(d, check_fn=lambda module: isinstance(module, Residual))
    return d


def by_a_patch(d: Any) -> Forward:
    """As notebooks do it: on the module that holds attention itself."""
    for block in d.blocks:
        block.se.forward = functools.partial(again, block.se.forward)
    return d


WAYS: dict[str, Callable[[Any], Forward]] = {
    **{route.__name__: routed(route) for route in ROUTES},
    "the_whole": the_whole,
    "by_a_wrapper": by_a_wrapper,
    "by_a_patch": by_a_patch,
}


@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_changes_nothing(way: str) -> None:
    """Two forwards before one backward: each reader has again what it heard in its own run."""
    d, restated = chain()
    calls = []
    for block in d.blocks:
        block.se.transform.register_forward_hook(lambda *_: calls.append(1))
    parameters = dict(d.named_parameters())
    actual = outcome(parameters, two_forwards, WAYS[way](d))
    assert (len(calls) > 2 * len(d.blocks)) == (way != "in_order")  # the test is one of recomputation
    assert_equal(actual, outcome(parameters, two_forwards, restated))


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("way", ["in_order", "per_block", "told_outside_of_both", "the_whole"])
def test_what_happens_before_the_backward_changes_nothing(way: str, program: str) -> None:
    d, restated = chain()
    assert_same(d, PROGRAMS[program], WAYS[way](d), restated)


@pytest.mark.parametrize("network", ["dense", "fork", "shared"])
@pytest.mark.parametrize("program", [two_forwards, two_backwards, one_without_gradients])
@pytest.mark.parametrize("checkpointed", ["nothing", "each_block", "the_whole"])
def test_checkpointing_with_other_links(network: str, program: Program, checkpointed: str) -> None:
    """Several readers of a message, several messages of a reader, several calls of a module."""
    d, restated = NETWORKS[network]()
    if checkpointed == "each_block":
        d.route = per_block  # of the dense chain; the others' own Python goes by ``call``
        (d.body if network == "shared" else d).call = again
    assert_same(d, program, functools.partial(again, d) if checkpointed == "the_whole" else d, restated)


def front_frozen(d: Any) -> None:
    for module in (d.stem, d.blocks[0], d.blocks[1]):
        module.requires_grad_(False)


@pytest.mark.parametrize("freeze", [front_frozen, dcafy.freeze_base])
@pytest.mark.parametrize("program", [two_forwards, two_backwards])
def test_checkpointing_where_not_all_is_trained(freeze: Callable[[Any], Any], program: Program) -> None:
    """What was heard is kept with or without a gradient, as it came."""
    d, restated = chain()
    freeze(d)
    d.route = per_block
    trained = {name: parameter for name, parameter in d.named_parameters() if parameter.requires_grad}
    assert 0 < len(trained) < len(dict(d.named_parameters()))
    assert_equal(outcome(trained, program, d), outcome(trained, program, restated))


def test_a_backward_that_is_tried_again() -> None:
    """After a second run that failed half-way."""
    d, restated = chain()
    d.route = per_block
    wanted = outcome(dict(d.named_parameters()), two_forwards, restated)
    both = loss(d(A)) + loss(d(B))
    for number in (4, 1):
        with failing(d.blocks[number].se.transform, ValueError):
            both.backward(retain_graph=True)
    d.zero_grad()
    both.backward()
    for name, parameter in d.named_parameters():
        assert torch.equal(parameter.grad, wanted[name]), name


@pytest.mark.parametrize("way", ["in_order", "per_block", "the_whole"])
def test_a_gradient_inside_a_forward(way: str) -> None:
    """What runs again meanwhile tells nothing to the blocks that are still to come."""

    def looking(route: Route) -> Route:
        def through(blocks: Blocks, x: Tensor) -> Tensor:
            x = route(blocks[:2], x)
            torch.autograd.grad(x.sum(), list(blocks[:2].parameters()), retain_graph=True, allow_unused=True)
            return route(blocks[2:], x)

        return through

    d, restated = chain()
    d.route = looking(in_order if way == "in_order" else per_block)
    forward = d if way != "the_whole" else functools.partial(again, d)
    assert_same(d, two_forwards, forward, restated)


@pytest.mark.parametrize("route", [in_order, per_block])
def test_blocks_that_a_root_goes_through_twice(route: Route) -> None:
    """The second time begins anew: the first block hears nobody."""
    d, restated = chain()
    every = range(len(d.blocks))
    d.route = lambda blocks, x: route(blocks, route(blocks, x))

    def twice(x: Tensor) -> Tensor:
        x = restated.part(every, restated.part(every, d.stem(x)))
        return d.head(x.mean((2, 3)))

    assert_same(d, two_forwards, d, twice)


# Running again where nobody can know what was heard ----------------------------------------------------


def reentrant(function: Any, x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=True)


def reentrant_per_block(blocks: Blocks, x: Tensor) -> Tensor:
    for block in blocks:
        x = reentrant(block, x)
    return x


def reentrant_per_stretch(blocks: Blocks, x: Tensor) -> Tensor:
    return reentrant(blocks[2:], reentrant(blocks[:2], x))


def nothing(d: Any) -> None:
    pass


def all_but_the_last(d: Any) -> None:
    d.blocks[:4](d.stem(A))


@pytest.mark.parametrize("route", [reentrant_per_block, reentrant_per_stretch])
@pytest.mark.parametrize("before", [nothing, half_of, all_but_the_last])
def test_a_reentrant_checkpoint_fails_before_a_gradient_is_wrong(route: Route, before: Any) -> None:
    """And warns before: its readers run again and nobody knows what they heard, whatever ran outside of a run."""
    d, _ = chain()
    d.route = route
    with pytest.warns(UserWarning, match="use_reentrant=False"):
        output = d(A)
    before(d)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss(output).backward()
    assert all(parameter.grad is None for parameter in d.blocks.parameters())
    d.route = per_block
    assert_same(d, two_forwards, d, RestatedChain(d))


def test_a_reentrant_checkpoint_around_all_readers_is_right() -> None:
    """Whoever is heard runs again as well."""
    d, restated = chain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for forward in (lambda x: reentrant(d, x), in_parts_of_one(d)):
            for program in (one_forward, two_forwards):
                assert_same(d, with_gradients_of_the_images(program), forward, restated)


def in_parts_of_one(d: Any) -> Forward:
    return lambda x: d.head(reentrant(d.blocks, d.stem(x)).mean((2, 3)))


def with_gradients_of_the_images(program: Program) -> Program:
    """Reentrant checkpoints want an input that requires a gradient."""
    return lambda forward: program(lambda x: forward(x.clone().requires_grad_()))


def test_a_reader_that_runs_inside_a_backward() -> None:
    """By itself, it fails; in a run that was opened there, it hears what that run tells, or nothing."""
    d, restated = chain()
    x = restated.part((0, 1), d.stem(B)).detach()
    output = d(A)
    output.register_hook(lambda _: d.blocks[2:](x))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss(output).backward()

    seen: list[Tensor] = []

    def look(_: Tensor) -> None:
        with dcafy.run(d):
            seen.append(d.blocks[2:](x))
        with dcafy.run(d):
            seen.append(in_parts(d)(B))

    output = d(A)
    output.register_hook(look)
    loss(output).backward()
    assert torch.equal(seen[0], restated.part((2, 3, 4), x))
    assert torch.equal(seen[1], restated(B))
