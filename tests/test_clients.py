"""What other libraries do with a connected model, for those that the ``dev`` extra holds.

``benchmarks/clients.py`` runs the same cases beside the original, and those of libraries that are not in the extra:
``benchmarks/results/clients.md``. Here are also what a library's own folder needs to be read back, and frozen adapters.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from networks import SELinear, with_attention
from torch import Tensor, nn
from trained import evaluate, images, moved, trained

import dcafy

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from client_cases import CASES, Case, Side  # noqa: E402

INSTALLED = ("captum", "onnxruntime", "timm", "torch", "torchvision")
ELSEWHERE = ("torch/compile-by-blocks", "torch/compile-fullgraph", "torch/export-dynamic")
"""What ``test_survival.py`` and ``emit/test_threads_and_traces.py`` show of more networks."""

QUICK = ("torchvision/intermediate-layer-getter", "torch/symbolic-trace")


def _cases() -> list[Any]:
    here = (c for c in CASES.values() if {c.client, *c.needs} <= {*INSTALLED, "onnxscript"} and c.processes == 1)
    found = [c for c in here if c.name not in ELSEWHERE]
    return [pytest.param(c, id=c.name, marks=() if c.name in QUICK else pytest.mark.zoo) for c in found]


@pytest.mark.parametrize("case", _cases())
@pytest.mark.filterwarnings("ignore")  # what clients say of their own code
def test_a_client_takes_the_connected_model(case: Case) -> None:
    case.run(Side.CONVERTED)


def test_the_named_cases_are_there() -> None:
    assert {*QUICK, *ELSEWHERE} <= set(CASES)


# Folders of other libraries -------------------------------------------------------------------------------


class Hosted(nn.Module, PyTorchModelHubMixin):
    """A network with ``save_pretrained`` and ``from_pretrained``, as transformers' and smp's have them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.network = with_attention(SELinear)
        self.head = nn.Linear(10, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.network(x))
        return out


def recipe() -> str:
    """The page's Python that reads such a folder back."""
    page = (ROOT / "docs" / "in_place.md").read_text()
    (found,) = re.findall(r"^```python\n(.*?)^```$", page.partition("## Folders of other libraries")[2], re.M | re.S)
    return found


@pytest.mark.filterwarnings("ignore::UserWarning:huggingface_hub")
def test_the_recipe_for_reading_a_folder_back(tmp_path: Path) -> None:
    x = images(2, 32)
    model = moved(dcafy.convert(trained(Hosted, x), example_inputs=x).eval())
    expected = evaluate(model, x)
    scope: dict[str, Any] = {"model": model, "folder": tmp_path, "x": x, "Network": Hosted}
    exec(compile(recipe(), "docs/in_place.md", "exec"), scope)
    assert torch.equal(evaluate(scope["again"], x), expected)
    assert isinstance(scope["again"], Hosted)


# Adapters that freeze what they do not know ---------------------------------------------------------------


def adapted() -> tuple[nn.Module, Tensor]:
    """A connected model of which a wrapper trains the last layer alone."""
    model, x = trained(lambda: with_attention(SELinear), images(4, 32)), images(2, 32)
    d = dcafy.convert(model, example_inputs=x).train()
    d.requires_grad_(False)
    next(m for m in reversed(list(d.modules())) if isinstance(m, nn.Linear)).requires_grad_(True)
    return d, x


def test_frozen_connections_are_told_once() -> None:
    d, x = adapted()
    with pytest.warns(UserWarning, match="modules_to_save"):
        d(x)
    d(x)  # warnings are errors here


@pytest.mark.parametrize("use", ["evaluated", "without gradients", "all frozen", "connections train"])
def test_connections_that_nobody_froze_by_accident(use: str) -> None:
    d, x = adapted()
    if use == "evaluated":
        d.eval()
    if use == "all frozen":
        d.requires_grad_(False)
    if use == "connections train":
        next(iter(dcafy.connections(d).values())).beta.requires_grad_(True)
    with warnings.catch_warnings(), torch.set_grad_enabled(use != "without gradients"):
        warnings.simplefilter("error")
        d(x)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_peft_without_modules_to_save() -> None:
    from peft import LoraConfig, get_peft_model

    x = images(2, 32)
    d = dcafy.convert(trained(lambda: with_attention(SELinear), images(4, 32)), example_inputs=x)
    with pytest.warns(UserWarning, match="modules_to_save"):
        get_peft_model(d, LoraConfig(r=4, target_modules="all-linear")).train()(x)
