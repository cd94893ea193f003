"""torch's own ways with a model that are no export: checkpoints, averages, functional calls, replicas, hooks."""

from __future__ import annotations

import copy
import functools
import importlib
import io
import threading
from unittest import mock

import torch
from torch import Tensor, fx, nn

from client_cases.case import (
    Side,
    all_receive_gradients,
    called,
    case,
    check,
    close,
    equal,
    gradients,
    same_state,
)
from client_cases.networks import labels, pictures, recomputing, step, timm_network


@case("torch")
def symbolic_trace(side: Side) -> None:
    """fx.symbolic_trace of the result: its output, and gradients for every connection"""
    x = pictures(3)
    d = side.under_way(timm_network("legacy_seresnet18"), x)
    graph = fx.symbolic_trace(d)
    equal(called(graph, x), called(d, x))
    graph(x).square().mean().backward()
    all_receive_gradients(side, d)


@case("torch")
def own_graph(side: Side) -> None:
    """The graph and code of the result are there, and its Interpreter gives its output"""
    x = pictures(3)
    d = side.under_way(timm_network("legacy_seresnet18"), x)
    module = d if side is Side.CONVERTED else fx.symbolic_trace(d)
    check("def forward" in module.code, "no code")
    equal(called(fx.Interpreter(module).run, x), called(d, x))


@case("torch")
def without_the_last_child(side: Side) -> None:
    """nn.Sequential(*list(d.children())[:-1]), as for features of any classifier: what the head is given"""
    x = pictures(3)
    d = side.under_way(timm_network(), x)
    seen: list[Tensor] = []
    handle = d.fc.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    called(d, x)
    handle.remove()
    equal(called(nn.Sequential(*list(d.children())[:-1]), x), seen)


@case("torch")
def activation_checkpointing(side: Side) -> str:
    """apply_activation_checkpointing around each block: gradients to the bit, each block runs twice"""
    from timm.models.resnet import BasicBlock
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointImpl,
        apply_activation_checkpointing,
        checkpoint_wrapper,
    )

    plain = side.under_way(timm_network(), pictures()).train()
    twice = copy.deepcopy(plain)
    wrap = functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    blocks = [m for m in twice.modules() if isinstance(m, BasicBlock)]
    check(len(blocks) == 8, f"{len(blocks)} of 8 blocks are BasicBlocks")
    runs = recomputing(twice, "layer3.0")
    apply_activation_checkpointing(twice, wrap, check_fn=lambda module: isinstance(module, BasicBlock))
    check(step(plain) == step(twice), "another loss")
    check(len(runs) == 2, f"a block ran {len(runs)} times")
    expected = gradients(plain)
    found = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in gradients(twice).items()}
    same_state(found, expected, "gradients")
    return "to the bit"


@case("torch")
def patched_block(side: Side) -> None:
    """A patched block.forward, a wrapper in a block's place and a block put there anew: each is what runs"""
    x = pictures(3)
    model = timm_network()

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, maps: Tensor) -> Tensor:
            return 2 * self.inner(maps)

    def patch(network: nn.Module) -> None:
        block = network.layer3[1]
        own = block.forward
        block.forward = lambda maps: 2 * own(maps)

    def wrap(network: nn.Module) -> None:
        network.layer3[1] = Doubled(network.layer3[1])

    def drop(network: nn.Module) -> None:
        network.layer4[1] = nn.Identity()

    for change in (patch, wrap, drop):
        expected, found = copy.deepcopy(model), side.at_start(model, x)
        change(expected)
        change(found)
        equal(called(found, x), called(expected, x), change.__name__)
        check(not torch.equal(called(found, x), called(model, x)), f"{change.__name__} is not seen")


@case("torch")
def spliced_stage(side: Side) -> None:
    """Sequential.append, del and slices of stages after connecting: the original's output at the start"""
    x = pictures(3)
    model = timm_network()

    def append(network: nn.Module) -> None:
        network.layer4.append(nn.ReLU6())

    def shorten(network: nn.Module) -> None:
        del network.layer2[1]

    def slice_it(network: nn.Module) -> None:
        network.layer3 = network.layer3[:1]

    for change in (append, shorten, slice_it):
        expected, found = copy.deepcopy(model), side.at_start(model, x)
        change(expected)
        change(found)
        equal(called(found, x), called(expected, x), change.__name__)


@case("torch")
def hooks_on_blocks(side: Side) -> None:
    """Forward, forward-pre and full backward hooks on stages, blocks and attention: fired as on the original"""
    x = pictures(3)
    model = timm_network()
    fired: dict[str, list[str]] = {"original": [], "other": []}
    paths = ["layer2", "layer2.1", "layer2.1.se", "layer2.1.se.fc1", "layer4.0.conv1", "fc"]
    for name, network in (("original", copy.deepcopy(model)), ("other", side.at_start(model, x))):
        log = fired[name]
        for path in paths:
            module = network.get_submodule(path)
            module.register_forward_pre_hook(lambda _m, _x, path=path, log=log: log.append(f"before {path}"))
            module.register_forward_hook(lambda _m, _x, _y, path=path, log=log: log.append(f"after {path}"))
            if path in ("layer2", "layer2.1", "fc"):  # where nothing changes the output in place
                module.register_full_backward_hook(lambda _m, _x, _y, path=path, log=log: log.append(f"back {path}"))
        network(x).sum().backward()
    check(fired["other"] == fired["original"], f"fired {len(fired['other'])} of {len(fired['original'])} times")


@case("torch")
def averaged_model(side: Side) -> None:
    """AveragedModel with update_bn, and a pickle of it: outputs of the averaged network"""
    from torch.optim.swa_utils import AveragedModel, update_bn

    x = pictures()
    d = side.under_way(timm_network(), x)
    average = AveragedModel(d)
    average.update_parameters(d)
    equal(called(average.eval(), x), called(d, x))
    update_bn([pictures(4, seed=5)], average)
    expected = copy.deepcopy(d)
    expected.load_state_dict(average.module.state_dict())
    equal(called(average.eval(), x), called(expected.eval(), x))
    buffer = io.BytesIO()
    torch.save(average, buffer)
    buffer.seek(0)
    equal(called(torch.load(buffer, weights_only=False), x), called(average, x), "pickled")


@case("torch")
def functional_call(side: Side) -> str:
    """torch.func: functional_call, per-sample gradients by vmap of grad, summed: the batch's gradients"""
    from torch.func import functional_call as call
    from torch.func import grad, vmap
    from torch.nn.functional import cross_entropy

    x, target = pictures(3), labels(3)
    d = side.under_way(timm_network(), x)
    parameters = {name: p.detach() for name, p in d.named_parameters()}
    buffers = dict(d.named_buffers())
    equal(call(d, (parameters, buffers), (x,)).detach(), called(d, x))

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(call(d, (parameters, buffers), (image[None],)), label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")(parameters, x, target)
    cross_entropy(d(x), target, reduction="sum").backward()
    return close([each[name].sum(0) for name in each], [p.grad for p in d.parameters()], "gradients", 1e-3)


@case("torch")
def data_parallel_replicas(side: Side) -> str:
    """torch.nn.parallel.replicate (its broadcast to devices replaced by clones), replicas in threads: the outputs"""
    replicate = importlib.import_module("torch.nn.parallel.replicate")  # torch.nn.parallel has a function of that name

    def clones(given: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[t.detach().clone() if detach else t.clone() for t in given] for _ in devices]

    d = side.under_way(timm_network(), pictures()).eval()
    batches = [pictures(2, seed=seed) for seed in (11, 12, 13)]
    expected = [called(d, batch) for batch in batches]
    with mock.patch.object(replicate, "_broadcast_coalesced_reshape", clones):
        replicas = replicate.replicate(d, [0, 1, 2])
    outputs: dict[int, Tensor] = {}

    def run(number: int) -> None:
        for _ in range(5):
            outputs[number] = replicas[number](batches[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(len(outputs) == 3, "a replica failed in its thread")
    check(all(isinstance(replica, type(d)) for replica in replicas), "a replica is of another class")
    equal([outputs[n].detach() for n in range(3)], expected)
    sum(output.square().mean() for output in outputs.values()).backward()
    all_receive_gradients(side, d)
    return "3 replicas, 5 rounds"


@case("torch")
def four_threads(side: Side) -> None:
    """One model in four threads at once, each with its own batch: the outputs of one after the other"""
    d = side.under_way(timm_network(), pictures())
    batches = [pictures(1 + number, seed=number) for number in range(4)]
    expected = [called(d, batch) for batch in batches]
    wrong: list[int] = []

    def run(number: int) -> None:
        outputs = [called(d, batches[number]) for _ in range(10)]
        wrong.extend(number for output in outputs if not torch.equal(output, expected[number]))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(not wrong, f"{len(wrong)} of 40 outputs are wrong")


@case("torch")
def parametrized(side: Side) -> None:
    """weight_norm and pruning masks put on modules of the result, and removed: the original's output at the start"""
    from torch.nn.utils import parametrizations, prune

    x = pictures(3)
    model = timm_network()

    def change(network: nn.Module) -> Tensor:
        parametrizations.weight_norm(network.layer2[1].se.fc1)
        prune.l1_unstructured(network.layer3[0].conv1, "weight", 0.5)
        masked = called(network, x)
        prune.remove(network.layer3[0].conv1, "weight")
        return torch.cat([masked, called(network, x)])

    equal(change(side.at_start(model, x)), change(copy.deepcopy(model)))


@case("torch")
def flops(side: Side) -> str:
    """FlopCounterMode by module: every module that the original has in it, the same counts at least"""
    from torch.utils.flop_counter import FlopCounterMode

    x = pictures()
    counts = []
    for network in (timm_network(), side.at_start(timm_network(), x)):
        with FlopCounterMode(display=False) as counter:
            called(network, x)
        counts.append({path: sum(ops.values()) for path, ops in counter.get_flop_counts().items()})
    less = [path for path in counts[0] if counts[1].get(path, 0) < counts[0][path]]
    check(not less, f"{len(less)} modules have fewer, {less[:2]}")
    return f"{sum(counts[1].values()) / sum(counts[0].values()):.3f} of the original's"
