"""The ``dcafy`` command: what it prints where, and the exit code of every way it can end."""

from __future__ import annotations

import functools
import io
import json
import os
import resource
import signal
import subprocess
import sys
from typing import get_args

import pytest
import torch
import torchvision
from torch import nn

import dcafy
import dcafy.conversion  # the module, which the tests replace a function of
from dcafy import Plan, errors
from dcafy.cli.app import exit_code
from dcafy.cli.options import example_input, settings_given
from dcafy.plan.blocks import Dimension, FusionKind
from dcafy.plan.gates import GATES
from dcafy.zoos import fitting

SMALL = "torchvision:mobilenet_v3_small"

FACTORIES = """
import torch
from torch import nn
from torchvision.ops import SqueezeExcitation

print("imported")

def noisy(width=8, depth=2):
    print("built")
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Conv2d(3, 3, 1), SqueezeExcitation(3, width))])

class Untraceable(nn.Module):
    def forward(self, x):
        raise RuntimeError("not today")

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, x):
        return self.conv(x)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with a module of factories and files of several kinds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cli_factories.py").write_text(FACTORIES)
    yield tmp_path
    sys.modules.pop("cli_factories", None)


@pytest.fixture
def command(dcafy_command):
    return dcafy_command


def process(*arguments, **options):
    """The command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dcafy", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **{**options, "env": {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **options.get("env", {})}},
    )


# --- what it says -----------------------------------------------------------------------------------


def test_tables(command, golden):
    code, out, err = command("inspect", SMALL)
    assert (code, err) == (0, "")
    golden("inspect_mobilenet_v3_small.txt", out)


def test_nodes(command):
    code, out, _ = command("inspect", SMALL, "--nodes")
    plan = dcafy.inspect(torchvision.models.mobilenet_v3_small())
    rows = [tuple(line.split()) for line in out.splitlines()]
    assert code == 0
    for block in plan.blocks:
        for role in ("extraction", "transformation", "fusion"):
            assert getattr(block, role)
            for node in getattr(block, role):
                assert (block.name, role, node) in rows


def check_document(document):
    """The document has the very schema that is promised; other keys may stand beside ``islands``."""
    assert set(document) >= {"schema_version", "model", "blocks", "chains", "skipped"}
    assert document["schema_version"] == 1
    assert isinstance(document["model"], str)
    for block in document["blocks"]:
        assert set(block) == {
            "name", "dimension", "channels", "size", "gate", "fusion_kind", "extraction", "transformation", "fusion"
        }  # fmt: skip
        assert isinstance(block["name"], str)
        assert block["dimension"] in get_args(Dimension)
        assert isinstance(block["channels"], int)
        assert block["size"] is None or all(isinstance(n, int) for n in block["size"])
        assert block["gate"] in GATES
        assert block["fusion_kind"] in get_args(FusionKind)
        for role in ("extraction", "transformation", "fusion"):
            assert block[role]
            assert all(isinstance(node, str) for node in block[role])
    names = [block["name"] for block in document["blocks"]]
    for chain in document["chains"]:
        assert set(chain) == {"dimension", "blocks", "links"}
        assert set(chain["blocks"]) <= set(names)
        for link in chain["links"]:
            assert set(link) == {"source", "target", "channel_match", "spatial_match"}
            assert {link["source"], link["target"]} <= set(chain["blocks"])
            assert link["channel_match"] in ("fc1", "fc2", None)
            assert link["spatial_match"] in ("avg", "max", "conv", None)
    assert sorted(name for chain in document["chains"] for name in chain["blocks"]) == sorted(names)
    for skipped in document["skipped"]:
        assert set(skipped) == {"name", "reason"}


def test_json(command):
    code, out, err = command("inspect", SMALL, "--json")
    document = json.loads(out)
    check_document(document)
    assert (code, err) == (0, "")
    assert list(document)[:5] == ["schema_version", "model", "blocks", "chains", "skipped"]
    assert document["model"] == SMALL
    assert [block["channels"] for block in document["blocks"]] == [16, 96, 240, 240, 120, 144, 288, 576, 576]
    assert [link["channel_match"] for link in document["chains"][0]["links"]] == [
        "fc2", "fc2", None, "fc2", "fc2", "fc2", "fc2", None
    ]  # fmt: skip
    assert {link["spatial_match"] for link in document["chains"][0]["links"]} == {None}


@pytest.mark.slow
def test_the_document_is_a_plan_that_converts():
    with process("inspect", SMALL, "--json") as running:
        plan = Plan.from_dict(json.loads(running.communicate()[0]))
    model = torchvision.models.mobilenet_v3_small()
    assert plan.blocks == dcafy.inspect(model).blocks
    assert list(dcafy.connections(dcafy.convert(model, plan=plan))) == [link.target for link in plan.links]


def test_what_a_factory_prints_is_not_in_the_document(command, here):
    code, out, err = command(
        "inspect", "cli_factories:noisy", "--json", "--set", "width=4", "--set", "depth=3", "--input-size", "3x16x16"
    )
    document = json.loads(out)
    assert code == 0
    assert len(document["blocks"]) == 3
    assert "importing cli_factories and calling noisy(width=4, depth=3): this runs its code" in err
    assert {"imported", "built"} <= set(err.split())


def test_no_attention(command, here):
    code, out, err = command("inspect", "cli_factories:Plain")
    assert code == 3
    assert out.startswith("cli_factories:Plain: 0 attention blocks")
    assert "has no attention blocks" in err
    assert "torchvision.ops.SqueezeExcitation" in err
    code, out, _ = command("inspect", "cli_factories:Plain", "--json")
    check_document(json.loads(out))
    assert (code, json.loads(out)["blocks"]) == (3, [])


def test_the_advice_where_there_is_no_attention_works(command, here):
    _, _, err = command("inspect", "cli_factories:Plain")
    assert "dcafy.convert(model, attention='se')" in err
    assert dcafy.connections(dcafy.convert(torchvision.models.resnet18(), attention="se", verify=False))


def test_one_block_has_nothing_to_connect_and_is_fine(command, here):
    code, out, _ = command("inspect", "cli_factories:noisy", "--set", "depth=1")
    assert code == 0
    assert "on their own: no connection leads to or from these blocks" in out


def test_files(command, here, monkeypatch):
    model = torchvision.models.mobilenet_v3_small(num_classes=5)
    torch.save(model.state_dict(), "weights.pt")
    torch.save(model, "whole.pt")
    assert command("inspect", "weights.pt", "--arch", SMALL)[0] == 0
    assert command("inspect", "whole.pt")[0] == 0
    monkeypatch.setattr(fitting, "_comparable", lambda prefix: {"torchvision": ["mobilenet_v3_small"]}.get(prefix, []))
    code, out, err = command("inspect", "weights.pt", "--json")
    assert (code, out) == (4, "")
    assert f"--arch {SMALL}" in err


def test_the_command_that_accepts_the_risk_works(command, here):
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model.note = io.BytesIO
    torch.save(model, "my model.pt")
    code, out, err = command("inspect", "my model.pt")
    assert (code, out) == (4, "")
    assert "wants _io.BytesIO" in err
    assert err.endswith("accept the risk: dcafy inspect 'my model.pt' --trust-pickle\n")
    code, out, err = command("inspect", "my model.pt", "--trust-pickle")
    assert code == 3
    assert "this runs code that the file chooses" in err


# --- how it ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--bogus",), 2, "--bogus"),
        (("frobnicate",), 2, "frobnicate"),
        (("inspect",), 2, "MODEL"),
        (("inspect", SMALL, "more"), 2, "more"),
        (("inspect", SMALL, "--bogus"), 2, "--bogus"),
        (("inspect", SMALL, "--input-size"), 2, "--input-size"),
        (("inspect", SMALL, "--input-size", "224"), 2, "such as 3x224x224"),
        (("inspect", SMALL, "--input-size", "3x0x224"), 2, "such as 3x224x224"),
        (("inspect", SMALL, "--input-size", 4400 * "9" + "x1x1"), 2, "such as 3x224x224"),
        (("inspect", SMALL, "--input-size", "3x9999999x9999999"), 2, "--input-size"),
        (("inspect", SMALL, "--set", "num_classes=" + 100 * "[" + 100 * "]"), 2, "lists in lists without end"),
        (("inspect", SMALL, "--set", "num_classes=" + 5000 * "["), 2, "without end"),
        (("inspect", SMALL, "--set", "num_classes=" + 5000 * "9"), 2, "cannot be built with"),
        (("inspect", 5000 * "x" + ".pt"), 4, "no file or folder"),
        (("inspect", 2000 * "x/" + "y"), 4, "no file or folder"),
        (("inspect", "a\nb.pt"), 4, "no file or folder"),
        (("inspect", SMALL, "--prefix", "model"), 2, "--prefix is about a file's weights"),
        (("convert", SMALL, "--ignore-head", "-o", "out"), 2, "--ignore-head is about a file's weights"),
        (("finetune", 2000 * "x/" + "y", "--resume"), 2, "no run in"),
        (("inspect", SMALL, "--set", "num_classes"), 2, "key=value"),
        (("inspect", SMALL, "--set", "a=1", "--set", "a=2"), 2, "twice"),
        (("inspect", "torchvision:resnet18", "--set", "bogus=1"), 2, "cannot be built with bogus=1"),
        (("inspect", SMALL, "--arch", SMALL), 2, "Leave --arch out"),
        (("inspect", "torchvision:mobilenet_v3_smal"), 2, f"Did you mean {SMALL}"),
        (("inspect", "mobilenet_v3_small"), 2, f"Did you mean {SMALL}"),
        (("inspect", "cli_factories:nosy"), 2, "Did you mean noisy"),
        (("inspect", "parallel.pt"), 2, "DataParallel"),
        (("inspect", "torchvision:squeezenet1_1"), 3, "has no attention blocks"),
        (("inspect", "missing.pt"), 4, "no file or folder"),
        (("inspect", "empty.pt"), 4, "is an empty file"),
        (("inspect", "text.pt"), 4, "is not a model file"),
        (("inspect", "."), 4, "folder without a dcafy.json"),
        (("inspect", "broken"), 4, "dcafy.json"),
        (("inspect", "cli_factories:Untraceable"), 5, "not today"),
        (
            ("inspect", "torchvision:squeezenet1_1", "--input-size", "5x64x64"),
            5,
            "On the command line that is --input-size",
        ),
    ],
)
def test_exit_codes(arguments, code, says, command, here):
    (here / "empty.pt").touch()
    (here / "text.pt").write_text("hello")
    (here / "broken").mkdir()
    (here / "broken" / "dcafy.json").write_text("{")
    torch.save(nn.DataParallel(nn.Linear(1, 1)), "parallel.pt")
    ended, out, err = command(*arguments)
    assert (ended, says in (err or out)) == (code, True), err
    assert "Traceback" not in err
    if code != 3:
        assert out == ""


def test_alone_it_shows_its_help(command):
    code, out, err = command()
    assert code in (0, 2)  # click has changed its mind about this between 8.1 and 8.2
    assert "Usage: dcafy" in out + err
    assert "inspect" in out + err


@pytest.mark.parametrize("as_json", [False, True])
def test_a_bug_is_told_with_its_traceback(as_json, command, monkeypatch):
    def broken(model, *, example_inputs=None, inserting=None):
        raise KeyError("surprise")

    monkeypatch.setattr(dcafy.conversion, "appraise", broken)
    code, out, err = command("inspect", SMALL, *(["--json"] if as_json else []))
    assert (code, out) == (1, "")
    assert "KeyError: 'surprise'" in err
    assert "this is a bug in dcafy" in err


def test_a_process_that_lost_another_leaves_the_explaining_to_it(command, monkeypatch):
    def lost(model, *, example_inputs=None, inserting=None):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9876")

    monkeypatch.setattr(dcafy.conversion, "appraise", lost)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = command("inspect", SMALL)
    assert code == 1
    assert err.splitlines()[-1] == ("dcafy: error: another process of this run has ended. What it says tells why.")
    assert "bug" not in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.DcafyError, 1),
        (errors.VerificationError, 1),
        (ZeroDivisionError, 1),
        (errors.UsageError, 2),
        (errors.InputError, 2),
        (errors.PlanError, 2),
        (errors.NoAttentionError, 3),
        (errors.SourceError, 4),
        (errors.CheckpointError, 4),
        (errors.TracingError, 5),
        (errors.TrainingError, 6),
        (functools.partial(errors.Interrupted, signal=signal.SIGTERM), 143),
        (functools.partial(errors.Interrupted, signal=signal.SIGINT), 130),
        (KeyboardInterrupt, 130),
        (BrokenPipeError, 141),
    ],
)
def test_the_table_of_exit_codes(error, code):
    assert exit_code(error("x")) == code


def test_every_error_has_an_exit_code():
    rows = [row for mark in test_the_table_of_exit_codes.pytestmark for row in mark.args[1]]
    tested = {getattr(error, "func", error) for error, _ in rows}
    assert {getattr(errors, name) for name in errors.__all__} <= tested


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupted(tmp_path):
    (tmp_path / "sleeper.py").write_text(
        "import sys, time\nprint('ready', file=sys.stderr, flush=True)\ntime.sleep(600)\n"
    )
    # A test run in the background of a shell ignores Ctrl-C, and what it starts would inherit that.
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with process("inspect", "sleeper:build", cwd=tmp_path, preexec_fn=heeds) as running:
        while "ready" not in (line := running.stderr.readline()):
            assert line, "it ended before it was interrupted"
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
@pytest.mark.parametrize("options", [["--json"], ["--nodes"]])
def test_nobody_reads_the_output(options, here):
    with process("inspect", "cli_factories:noisy", "--set", "depth=3", *options) as running:
        running.stdout.close()
        err = running.stderr.read()
        running.wait(timeout=60)
    assert running.returncode == 141
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


@pytest.mark.slow
def test_a_process_exits_with_the_code(here):
    for arguments, code in ((["inspect", "missing.pt"], 4), (["inspect", "cli_factories:Plain", "--json"], 3)):
        with process(*arguments) as running:
            out, err = running.communicate(timeout=120)
        assert running.returncode == code
        assert (out == "") is (code == 4)
        assert "Traceback" not in err


@pytest.mark.slow
def test_a_terminal_that_knows_ascii_only(here):
    with process("inspect", "cli_factories:noisy", env={"PYTHONIOENCODING": "ascii"}) as running:
        out, err = running.communicate(timeout=120)
    assert (running.returncode, "Traceback" in err) == (0, False)
    assert out.isascii()
    assert "2 attention blocks" in out


# --- what it costs ----------------------------------------------------------------------------------


def test_help_does_not_import_torch():
    program = (
        "import sys, dcafy.cli\n"
        "sys.argv = ['dcafy', 'inspect', '--help']\n"
        "try: dcafy.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'torchvision', 'timm', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--trust-pickle" in done.stdout


def test_help_is_quick():
    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with process("--help") as running:
            assert "inspect" in running.communicate()[0]
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Time on the processor, so that a busy machine does not count.
    assert min(seconds() for _ in range(3)) < 1


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_of_a_command(option, command):
    code, out, err = command("inspect", option)
    assert (code, err) == (0, "")
    for text in ("--nodes", "--json", "--input-size", "--arch", "--set", "--trust-pickle", "pixels", "@WEIGHTS"):
        assert text in out


def test_version(command):
    assert command("--version") == (0, f"dcafy {dcafy.__version__}\n", "")


# --- options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        (None, {}),
        (["a=1", "b=2.5", "c=true", "d=null"], {"a": 1, "b": 2.5, "c": True, "d": None}),
        (["a=relu", 'b="1"', "c=[1, 2]", 'd={"e": 1}'], {"a": "relu", "b": "1", "c": [1, 2], "d": {"e": 1}}),
        (["a=", "b=x=y", "c=True"], {"a": "", "b": "x=y", "c": "True"}),
    ],
)
def test_settings(given, settings):
    assert settings_given(given) == settings


@pytest.mark.parametrize("given", ["a", "=1", "1a=2", "a b=3", ""])
def test_bad_settings(given):
    with pytest.raises(errors.UsageError, match="key=value"):
        settings_given([given])


@pytest.mark.parametrize(("given", "shape"), [("3x224x128", (2, 3, 224, 128)), ("1X8x8X8", (2, 1, 8, 8, 8))])
def test_input_size(given, shape):
    assert example_input(given).shape == shape


def test_the_input_size_is_looked_with(command, monkeypatch):
    seen = []

    def look(model, *, example_inputs=None, inserting=None):
        seen.append(example_inputs)
        return Plan((), ())

    monkeypatch.setattr(dcafy.conversion, "appraise", look)
    command("inspect", SMALL, "--input-size", "3x96x64")
    command("inspect", SMALL)
    assert [None if example is None else tuple(example.shape) for example in seen] == [(2, 3, 96, 64), None]


def test_on_meta_first_and_for_real_where_that_does_not_do(command, monkeypatch):
    seen = []

    def look(model, *, example_inputs=None, inserting=None):
        seen.append(next(model.parameters()).is_meta)
        if seen[-1]:
            raise errors.TracingError("values are needed")
        return Plan((), ())

    monkeypatch.setattr(dcafy.conversion, "appraise", look)
    assert command("inspect", SMALL)[0] == 3
    assert seen == [True, False]
