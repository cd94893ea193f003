"""What two processes do together, as ``torchrun`` starts them: each imports this anew, so it imports little.

``torchrun ... two_processes.py FOLDER PORT...`` goes through :data:`SCENARIOS` in their order, each in a folder of its
name and with a port of its own, on which its processes meet. What came of it lies in that folder, for the tests in
``training/test_two_processes.py``.
"""

from __future__ import annotations

import contextlib
import copy
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from detection_data import trained_detector
from networks import CBAM, with_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.models.resnet import BasicBlock
from trained import images, trained, with_betas
from training_data import Stripes
from training_data import connected as connected_classifier

import dcafy
from dcafy.images.order import UnreadableImage
from dcafy.training import TrainingConfig, finetune

FACTORY = "finetune_factory:network"
FACTORY_CODE = "from training_data import network\n"
DIGITS = ["--data", "digits", "--image-size", "16", "--batch-size", "64", "--cpu", "--usage-images", "64"]


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


# --- the command ----------------------------------------------------------------------------------------


def command(*arguments: str, printed: str) -> int:
    """The exit code of ``python -m dcafy finetune`` in this process; what it prints on stdout goes to a file."""
    before = sys.argv
    sys.argv = ["dcafy", "finetune", *arguments]
    try:
        with open(f"{printed}{rank()}.txt", "w") as out, contextlib.redirect_stdout(out):
            runpy.run_module("dcafy", run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    return 0


def the_command() -> None:
    if rank() == 0:
        Path("finetune_factory.py").write_text(FACTORY_CODE)
    sys.path.insert(0, os.getcwd())
    assert command(FACTORY, *DIGITS, "--epochs", "1", "-o", "run", printed="first") == 0


def the_command_again() -> None:
    os.chdir("../the_command")
    assert command(FACTORY, "-o", "run", "--resume", printed="resumed") == 0


def the_command_further() -> None:
    os.chdir("../the_command")
    assert command(FACTORY, "-o", "run", "--resume", "--epochs", "2", "--track", "tensorboard", printed="further") == 0


def the_command_tried() -> None:
    """A trial writes nothing (the other process may be here while this one still saves)."""
    os.chdir("../the_command")
    before = sorted(Path("run").rglob("*"))
    assert command(*IN_ITS_PLACE, "--dry-run", printed="tried") == 0
    assert rank() or sorted(Path("run").rglob("*")) == before


def the_command_in_its_place() -> None:
    """A new run replaces the one that is there."""
    os.chdir("../the_command")
    assert command(*IN_ITS_PLACE, printed="replaced") == 0


IN_ITS_PLACE = (FACTORY, *DIGITS, "--epochs", "1", "--balance", "-o", "run", "--overwrite")


# --- the loop -------------------------------------------------------------------------------------------


class Holed(Stripes):
    """Stripes of which two cannot be read; in the process of rank ``failing`` reading ends for good on the way."""

    def __init__(self, failing: int | None = None) -> None:
        super().__init__()
        self.failing = failing

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index in (3, 19):
            raise UnreadableImage(f"image {index}")
        if self.failing == rank() and index % 8 == 7:
            raise RuntimeError("this process fails")
        return super().__getitem__(index)


def in_batches(*, norm: bool = False, failing: int | None = None) -> None:
    config = TrainingConfig(epochs=2, batch_size=8, seed=3, cpu=True, usage_images=0, optimizer="sgd", lr=0.05)
    model = connected_classifier(norm)
    history = finetune(model, Holed(failing), Stripes(21), config, directory=".")
    assert sorted(history.skipped) == ["image 19", "image 3"]
    torch.save((dict(model.named_parameters()), history.epochs[-1].metrics), f"rank{rank()}.pt")


def in_given_batches() -> None:
    """From DataLoaders, whose batches are split between the processes."""
    config = TrainingConfig(epochs=2, seed=3, cpu=True, usage_images=0, optimizer="sgd", lr=0.05, balance=True)
    model, order = connected_classifier(norm=False), torch.Generator().manual_seed(5)
    train = DataLoader(Stripes(noise=0.0), 8, shuffle=True, generator=order, drop_last=True)
    history = finetune(model, train, DataLoader(Stripes(21, noise=0.0), 8), config)
    torch.save((dict(model.named_parameters()), history.epochs[-1].metrics), f"rank{rank()}.pt")


def with_batch_norm() -> None:
    in_batches(norm=True)


def one_fails() -> None:
    Path(f"begun{rank()}.txt").write_text(str(time.time()))
    in_batches(failing=1)


class CutOff(Stripes):
    read = 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read += 1
        if self.read > 40:
            raise ZeroDivisionError("cut off in the second epoch")
        return super().__getitem__(index)


@contextlib.contextmanager
def sharding() -> Iterator[None]:
    """Accelerate asks for FSDP with several accelerators only; torch does it on CPUs as well."""
    import accelerate
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    class InShards(accelerate.Accelerator):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
            AcceleratorState._shared_state["fsdp_plugin"] = plugin
            for state in (AcceleratorState, PartialState):
                state._shared_state["distributed_type"] = DistributedType.FSDP

    whole = accelerate.Accelerator
    accelerate.Accelerator = InShards
    try:
        yield
    finally:
        accelerate.Accelerator = whole


def in_whole_networks(*, cut_off: bool = False) -> None:
    """With a base that is frozen at first and an average; where it is cut off, it goes on."""
    config = TrainingConfig(
        epochs=3, batch_size=8, seed=3, cpu=True, usage_images=21, lr=1e-3, connection_lr=0.01,
        clip_norm=1.0, ema=0.8, freeze_base_epochs=1, checkpoint_steps=3,
    )  # fmt: skip
    if cut_off:
        try:
            finetune(connected_classifier(), CutOff(), Stripes(21), config, directory=".")
            raise SystemExit("it was not cut off")
        except ZeroDivisionError:
            pass
    model = connected_classifier()
    history = finetune(model, Stripes(), Stripes(21), config, directory=".", resume=True)
    assert not any("DTensor" in type(p.data).__name__ for p in model.parameters())
    assert history.usage.images == 21
    torch.save((model.state_dict(), history.epochs[-1].metrics), f"rank{dist.get_rank()}.pt")


def in_shards() -> None:
    with sharding():
        in_whole_networks(cut_off=True)


def detector() -> None:
    """On the shapes that lie in the folder already."""
    history, model = trained_detector(".")
    state = {name: value.detach() for name, value in model.state_dict().items()}
    torch.save({"state": state, "metrics": dict(history.metrics)}, f"rank{rank()}.pt")


# --- without the loop -----------------------------------------------------------------------------------


def connected_network() -> torch.fx.GraphModule:
    """A small network with both kinds of attention, its connections moved away from the start."""
    model = trained(lambda: with_attention(CBAM, (16, 16, 24)), images(4, seed=1))
    return with_betas(dcafy.convert(model, example_inputs=images(4, seed=2)), 0.3)


def networks_in_parallel() -> dict[str, torch.nn.Module]:
    """It, and networks in which a state goes from unit to unit, or from block to block."""
    x, plain = images(4, 32, seed=2), trained(residual_units, images(8, 32, seed=1))
    with_hub = trained(lambda: with_attention(CBAM, (16, 16, 16)), images(4, seed=1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "connected": connected_network(),
            "hub": with_betas(dcafy.convert(with_hub, topology="hub", example_inputs=images(4, seed=2)), 0.3),
            "depth": with_betas(dcafy.convert(with_hub, topology="depth", example_inputs=images(4, seed=2)), 0.3),
            "mrla": dcafy.insert(plain, "mrla", init="paper", example_inputs=x),
            "rla": dcafy.insert(plain, "rla", init="paper", example_inputs=x),
            "dia": dcafy.insert(plain, "dia", init="paper", reduction=4, example_inputs=x),
        }


def residual_units() -> torch.nn.Module:
    return torchvision.models.ResNet(BasicBlock, [2, 1, 1, 1], num_classes=5, width_per_group=64)


def distributed_data_parallel() -> None:
    """Three steps of each process on its own images."""
    networks = networks_in_parallel()
    dist.init_process_group("gloo")
    ended = {}
    for which, model in networks.items():
        parallel = DistributedDataParallel(model.train(), find_unused_parameters=False)
        optimizer = torch.optim.Adam(parallel.parameters(), lr=0.01)
        for step in range(3):
            optimizer.zero_grad()
            parallel(images(4, seed=100 + 2 * step + rank())).square().mean().backward()
            assert all(parameter.grad is not None for parameter in parallel.parameters())
            optimizer.step()
        ended |= {f"{which}.{name}": p.detach() for name, p in parallel.module.named_parameters()}
    torch.save(ended, f"rank{rank()}.pt")


def in_whole_stages() -> None:
    """Stages sharded one by one, as the docs advise where units of a stage share layers: gradients of all processes."""
    from torch.distributed.fsdp import fully_shard

    networks = networks_in_parallel()
    dist.init_process_group("gloo")
    found = {}
    for which, model in networks.items():
        plain, x = copy.deepcopy(model.eval()), images(4, 32, seed=7 + rank())
        expected = plain(x)
        expected.square().mean().backward()
        for path in [path for path, _ in model.named_children() if path.startswith(("layer", "blocks"))]:
            fully_shard(model.get_submodule(path))
        fully_shard(model)
        output = model(x)
        assert torch.equal(output, expected), which
        output.square().mean().backward()
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        for name, parameter in plain.named_parameters():
            dist.all_reduce(parameter.grad)
            found[f"{which}.{name}"] = bool(torch.allclose(gradients[name], parameter.grad / 2, rtol=1e-3, atol=1e-5))
    torch.save(found, f"rank{rank()}.pt")


SCENARIOS: tuple[Callable[[], None], ...] = (
    the_command,
    the_command_again,
    the_command_further,
    the_command_tried,
    the_command_in_its_place,
    in_given_batches,
    in_batches,
    with_batch_norm,
    in_whole_networks,
    in_shards,
    detector,
    distributed_data_parallel,
    in_whole_stages,
    one_fails,  # the last one: nothing comes after it
)


def main(folder: str, *ports: str) -> None:
    torch.set_num_threads(1)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # it remembers the group of the scenario before
    for scenario, port in zip(SCENARIOS, ports, strict=True):
        os.environ["MASTER_PORT"] = port
        os.chdir(Path(folder) / scenario.__name__)
        scenario()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
