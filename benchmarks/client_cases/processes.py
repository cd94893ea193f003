"""Two processes on the CPU (gloo): DDP and FSDP2."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from client_cases.case import Side, all_receive_gradients, called, case, check, close, equal
from client_cases.networks import labels, pictures, timm_network


@contextlib.contextmanager
def group() -> Iterator[int]:
    """The rank of this process in a group of those that were started with it."""
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def network(side: Side) -> nn.Module:
    """With norms that use their statistics, so that a batch in two halves gives the gradients of the whole.

    In double precision: the last bits of a single one decide on which side of zero some activation lies.
    """
    torch.manual_seed(0)  # of which the matching layers are made, in each process the same
    return side.under_way(timm_network(), pictures()).double()


def half(rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """What the process of this rank is given."""
    return whole(seed)[4 * rank : 4 * rank + 4], labels(8)[4 * rank : 4 * rank + 4]


def whole(seed: int) -> Tensor:
    return pictures(8, seed=seed).double()


@case("torch", processes=2)
def ddp(side: Side) -> str:
    """DistributedDataParallel without find_unused_parameters, 3 steps: one process's parameters on the whole batches"""
    with group() as rank:
        d, alone = network(side), network(side)
        parallel = nn.parallel.DistributedDataParallel(d, find_unused_parameters=False)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (d, alone)]
        for seed in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            images, target = half(rank, seed)
            cross_entropy(parallel(images), target).backward()
            cross_entropy(alone(whole(seed)), labels(8)).backward()
            all_receive_gradients(side, d)
            for optimizer in optimizers:
                optimizer.step()
        detail = close(list(d.parameters()), list(alone.parameters()), "parameters", 1e-9)
        for parameter in d.parameters():
            both = [torch.zeros_like(parameter) for _ in range(2)]
            dist.all_gather(both, parameter.detach())
            equal(both[0], both[1], "the two processes' parameters")
        return detail


@case("torch", processes=2)
def ddp_static_graph(side: Side) -> str:
    """DistributedDataParallel with static_graph, bucket views and activation checkpointing: gradients of one process"""
    with group() as rank:
        d, alone = network(side), network(side)
        d.set_grad_checkpointing()
        parallel = nn.parallel.DistributedDataParallel(d, static_graph=True, gradient_as_bucket_view=True)
        for seed in range(2):
            d.zero_grad(), alone.zero_grad()
            images, target = half(rank, seed)
            cross_entropy(parallel(images), target).backward()
            cross_entropy(alone(whole(seed)), labels(8)).backward()
        return close([p.grad for p in d.parameters()], [p.grad for p in alone.parameters()], "gradients", 1e-9)


@case("torch", processes=2)
def fsdp2_by_blocks(side: Side) -> str:
    """fully_shard on each block and the whole: outputs, gradients and a step of the unsharded model"""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    with group() as rank:
        d, alone = network(side), network(side)
        mesh = init_device_mesh("cpu", (2,))
        for stage in (d.layer1, d.layer2, d.layer3, d.layer4):
            for block in stage:
                fully_shard(block, mesh=mesh)
        fully_shard(d, mesh=mesh)
        check(all(isinstance(p, DTensor) for p in d.parameters()), "a parameter was not sharded")
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (d, alone)]
        images, target = half(rank, 1)
        equal(called(d, images), called(alone, images))
        cross_entropy(d(images), target).backward()
        cross_entropy(alone(whole(1)), labels(8)).backward()
        full = [p.grad.full_tensor() for p in d.parameters()]
        detail = close(full, [p.grad for p in alone.parameters()], "gradients", 1e-9)
        for optimizer in optimizers:
            optimizer.step()
        close([p.full_tensor() for p in d.parameters()], list(alone.parameters()), "parameters", 1e-9)
        close(called(d, images), called(alone, images), "after a step", 1e-9)
        return detail


@case("torch", processes=2)
def fsdp2_with_checkpointing(side: Side) -> str:
    """fully_shard around checkpointed blocks, state dict gathered: gradients, and the state loads into a plain model"""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with group() as rank:
        d, alone = network(side), network(side)
        blocks = [block for stage in (d.layer1, d.layer2, d.layer3, d.layer4) for block in stage]
        kinds = {id(block) for block in blocks}
        apply_activation_checkpointing(d, check_fn=lambda module: id(module) in kinds)
        mesh = init_device_mesh("cpu", (2,))
        for stage in (d.layer1, d.layer2, d.layer3, d.layer4):
            for block in stage:
                fully_shard(block, mesh=mesh)
        fully_shard(d, mesh=mesh)
        images, target = half(rank, 1)
        cross_entropy(d(images), target).backward()
        cross_entropy(alone(whole(1)), labels(8)).backward()
        full = [p.grad.full_tensor() for p in d.parameters()]
        detail = close(full, [p.grad for p in alone.parameters()], "gradients", 1e-9)
        state = get_model_state_dict(d, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            plain = copy.deepcopy(alone)
            plain.load_state_dict({key.replace("_checkpoint_wrapped_module.", ""): v for key, v in state.items()})
            equal(called(plain, images), called(alone, images), "the state dict")
        return detail
