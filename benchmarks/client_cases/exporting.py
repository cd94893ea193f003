"""Compilers and exports: torch.compile, torch.export, ONNX, TorchScript."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from networks import CBAM, with_attention
from torch import nn
from trained import trained

import dcafy
from client_cases.case import Side, all_receive_gradients, called, case, check, close, equal, gradients, same_state
from client_cases.networks import pictures, step, timm_network, torchvision_network


@case("torch")
def compile_fullgraph(side: Side) -> str:
    """torch.compile(fullgraph=True), by inductor in eval and by aot_eager in a training step: outputs, gradients"""
    x = pictures(3)
    small = side.under_way(trained(lambda: with_attention(CBAM, (16, 16, 24)), pictures(8)), x)
    detail = close(called(torch.compile(small, fullgraph=True), x), called(small, x))
    torch._dynamo.reset()
    d = side.under_way(timm_network("legacy_seresnet18"), x)
    plain, twin = copy.deepcopy(d).train(), copy.deepcopy(d).train()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    losses = step(plain), step(compiled)
    check(abs(losses[0] - losses[1]) < 1e-5, f"losses {losses}")
    expected = gradients(plain)
    check(set(gradients(twin)) == set(expected), "parameters without a gradient")
    close([gradients(twin)[name] for name in expected], list(expected.values()), "gradients", 1e-3)
    all_receive_gradients(side, twin)
    return detail


@case("torch")
def compile_by_blocks(side: Side) -> str:
    """Every other block compiled on its own, the rest eager, in eval and training: outputs and gradients"""
    x = pictures(3)
    d = side.under_way(timm_network(), x)
    plain, mixed = copy.deepcopy(d), copy.deepcopy(d)
    for number, stage in enumerate((mixed.layer1, mixed.layer2, mixed.layer3, mixed.layer4)):
        stage[number % 2].compile(backend="aot_eager")
    detail = close(called(mixed, x), called(plain, x))
    plain.train(), mixed.train()
    step(plain), step(mixed)
    close(list(gradients(mixed).values()), list(gradients(plain).values()), "gradients", 1e-3)
    all_receive_gradients(side, mixed)
    other = copy.deepcopy(d)
    for stage in (other.layer1, other.layer2, other.layer3, other.layer4):
        for index, block in enumerate(stage):
            stage[index] = torch.compile(block, backend="aot_eager")
    close(called(other, x), called(d, x), "every block compiled")
    return detail


@case("torch")
def export_dynamic(side: Side) -> str:
    """torch.export, strict and not, with the batch and the sides of the picture left open: outputs at other sizes"""
    detail = ""
    for network in (timm_network("legacy_seresnet18"), torchvision_network()):
        x = pictures(3, 96)
        d = side.under_way(network, x)
        shapes = {0: torch.export.Dim("batch"), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
        for strict in (False, True):
            program = torch.export.export(d, (x,), dynamic_shapes=(shapes,), strict=strict)
            for batch, size in ((3, 96), (2, 64), (5, 128)):
                other = pictures(batch, size)
                detail = close(called(program.module(), other), called(d, other), f"strict={strict} {batch} {size}")
    return detail


@case("torch")
def export_saved(side: Side) -> None:
    """An exported program saved and loaded: its output, and all keys of the state dict"""
    x = pictures(2)
    d = side.under_way(timm_network("legacy_seresnet18"), x)
    program = torch.export.export(d, (x,))
    with tempfile.TemporaryDirectory() as folder:
        torch.export.save(program, Path(folder) / "program.pt2")
        again = torch.export.load(Path(folder) / "program.pt2")
    equal(called(again.module(), x), called(d, x))
    state = {key: value for key, value in d.state_dict().items() if key in again.state_dict}
    check(len(state) == len(again.state_dict), "keys that the model does not have")
    same_state(dict(again.state_dict), state, "exported")


@case("onnxruntime", "onnx", "onnxscript")
def onnx(side: Side) -> str:
    """torch.onnx.export (dynamo) with an open batch, in onnxruntime at two batch sizes: the model's outputs"""
    import onnxruntime

    x = pictures(3)
    details = []
    for network in (timm_network("legacy_seresnet18"), torchvision_network()):
        d = side.under_way(network, x)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            shapes = ({0: torch.export.Dim("batch")},)
            torch.onnx.export(d, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for batch in (2, 5):
            (found,) = session.run(None, {session.get_inputs()[0].name: pictures(batch).numpy()})
            details.append(close(torch.from_numpy(found), called(d, pictures(batch)), tolerance=1e-3))
    return details[-1]


@case("onnxruntime", "onnx")
def onnx_by_trace(side: Side) -> str:
    """torch.onnx.export by TorchScript (dynamo=False), in onnxruntime: the model's outputs at two batch sizes"""
    import onnxruntime

    d = side.under_way(timm_network("legacy_seresnet18"), pictures(3))
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        axes = {"x": {0: "batch"}}
        # Without names of both, torch takes the graph of any fx.GraphModule for one of TorchScript's.
        names = {"input_names": ["x"], "output_names": ["y"]}
        torch.onnx.export(d, (pictures(3),), path, dynamo=False, dynamic_axes=axes, **names)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (2, 5):
        (found,) = session.run(None, {"x": pictures(batch).numpy()})
        detail = close(torch.from_numpy(found), called(d, pictures(batch)), tolerance=1e-3)
    return detail


@case("torch")
def jit_trace(side: Side) -> str:
    """torch.jit.trace with gradients on, checked by torch itself, saved and loaded: outputs"""
    x = pictures(2)
    d = side.under_way(timm_network("legacy_seresnet18"), x)
    traced = torch.jit.trace(d, x)
    with tempfile.TemporaryDirectory() as folder:
        traced.save(str(Path(folder) / "model.pt"))
        again = torch.jit.load(str(Path(folder) / "model.pt"))
    return close(called(again, pictures(2, seed=9)), called(d, pictures(2, seed=9)))


@case("torch")
def jit_script(side: Side) -> str:
    """torch.jit.script (of dcafy.flat(d) for a connected model), saved and loaded: outputs at two batch sizes"""
    import timm

    with timm.layers.set_scriptable(True):
        model = timm_network("legacy_seresnet18")
    x = pictures(2)
    d = side.under_way(model, x)
    flat: Any = getattr(dcafy, "flat", None)
    check(side is Side.ORIGINAL or flat is not None, "there is no dcafy.flat")
    plain: nn.Module = flat(d) if side is Side.CONVERTED else d
    if side is Side.CONVERTED:
        check(isinstance(plain, torch.fx.GraphModule), "flat gives no GraphModule")
        equal(called(plain, x), called(d, x), "flat")
    scripted = torch.jit.script(plain)
    with tempfile.TemporaryDirectory() as folder:
        scripted.save(str(Path(folder) / "model.pt"))
        again = torch.jit.load(str(Path(folder) / "model.pt"))
    close(called(again, pictures(5)), called(d, pictures(5)), "5 pictures")
    return close(called(again, x), called(d, x))
