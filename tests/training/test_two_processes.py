"""What two processes do together is what one does; ``torchrun`` starts them once, for everything here."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
from detection_data import trained_detector

from dcafy.detection import write_shapes

pytest.importorskip("accelerate")
pytest.importorskip("pycocotools")
pytest.importorskip("torchmetrics")

TESTS = Path(two_processes.__file__).parent

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("two processes")]


@dataclass(frozen=True)
class Ended:
    """The run of all scenarios: its folder, how it ended and when."""

    folder: Path
    code: int
    err: str
    at: float

    def of(self, scenario: str) -> list[Any]:
        """What each process left of a scenario."""
        files = [self.folder / scenario / f"rank{rank}.pt" for rank in range(2)]
        assert all(file.exists() for file in files), self.err
        return [torch.load(file, weights_only=True) for file in files]


def free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as held:
        found = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in found]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("two_processes")
    for scenario in two_processes.SCENARIOS:
        (folder / scenario.__name__).mkdir()
    shapes(folder / "detector")
    first, *ports = free_ports(len(two_processes.SCENARIOS) + 1)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", first]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, *launch, two_processes.__file__, str(folder), *ports],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return Ended(folder, run.returncode, run.stderr, time.time())


def shapes(folder: Path) -> None:
    write_shapes(folder, 12, side=48, most=2, sizes=(0.3, 0.7), seed=3)


def test_they_do_what_one_does_with_the_same_batches(
    ended: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    two_processes.in_given_batches()
    alone, alone_metrics = torch.load("rank0.pt", weights_only=True)
    (first, metrics), _ = ended.of("in_given_batches")
    assert metrics["images"] == alone_metrics["images"] == 21
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
    two_processes.in_batches()
    alone, alone_metrics = torch.load("rank0.pt", weights_only=True)
    (first, metrics), (second, _) = ended.of("in_batches")
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
    assert metrics["images"] == alone_metrics["images"] == 21
    assert metrics["loss"] == pytest.approx(alone_metrics["loss"], rel=1e-3)


def test_with_batch_norm_they_end_alike(ended: Ended) -> None:
    (first, _), (second, _) = ended.of("with_batch_norm")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_shards_do_what_whole_networks_do(ended: Ended) -> None:
    """Under FSDP, with a base that is frozen at first, an average, and cut off on the way."""
    (whole, metrics), _ = ended.of("in_whole_networks")
    (shards, metrics_of_shards), (other, _) = ended.of("in_shards")
    for key, value in whole.items():
        assert torch.equal(shards[key], other[key]), key
        torch.testing.assert_close(shards[key], value, rtol=1e-4, atol=1e-5)
    assert metrics_of_shards["loss"] == pytest.approx(metrics["loss"], rel=1e-3)


def test_when_one_fails_the_other_does_not_wait(ended: Ended) -> None:
    assert ended.code != 0
    assert "this process fails" in ended.err
    begun = [float((ended.folder / f"one_fails/begun{rank}.txt").read_text()) for rank in range(2)]
    assert ended.at - min(begun) < 120


def test_the_command(ended: Ended) -> None:
    folder = ended.folder / "the_command"
    printed = [(folder / f"first{rank}.txt").read_text() for rank in range(2)]
    assert "".join(printed).count("validation after 1 epoch:") == 1
    assert (folder / "run/dcafy.json").exists()
    assert "".join((folder / f"further{rank}.txt").read_text() for rank in range(2)).count("after 2 epochs") == 1
    tried = [(folder / f"tried{rank}.txt").read_text() for rank in range(2)]
    assert "".join(tried).count("one batch went through training") == 1
    request = json.loads((folder / "run/finetune.json").read_text())["training"]
    assert (request["epochs"], request["balance"]) == (1, True)
    assert not list((folder / "run").glob(".replaced*"))
    # A scenario begins once the one before has ended well: here, the same run that went on.
    assert all((folder / f"resumed{rank}.txt").exists() for rank in range(2))
    assert (ended.folder / "in_batches/rank0.pt").exists(), ended.err


def test_a_detector(ended: Ended, tmp_path: Path) -> None:
    """Without batch norm two processes do what one does, and both measure all images."""
    first, second = ended.of("detector")
    assert first["metrics"] == second["metrics"]
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key])
    assert "WORLD_SIZE" not in os.environ
    shapes(tmp_path)
    history, _ = trained_detector(str(tmp_path))
    assert history.metrics["images"] == first["metrics"]["images"]


def test_distributed_data_parallel(ended: Ended) -> None:
    """Two gloo processes, ``find_unused_parameters=False``: it trains, and both end with the same weights."""
    first, second = ended.of("distributed_data_parallel")
    networks = two_processes.networks_in_parallel()
    start = {f"{which}.{name}": p for which, model in networks.items() for name, p in model.named_parameters()}
    assert list(first) == list(start)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    moved_names = [name for name, value in first.items() if not torch.equal(value, start[name])]
    own = {"dca", "rla", "dia", "mrla"}
    assert {name for name in start if own & set(name.split(".")[1:])} <= set(moved_names)


def test_whole_stages_in_shards(ended: Ended) -> None:
    """FSDP2, stage by stage: the outputs and the gradients of one process with all images, also of what is shared."""
    for found in ended.of("in_whole_stages"):
        assert {name.split(".")[0] for name in found} == set(two_processes.networks_in_parallel())
        assert all(found.values()), [name for name, alike in found.items() if not alike]
