"""What a prompt, a notebook, pandas and matplotlib show of results: short, escaped, plain, and of every kind."""

from __future__ import annotations

import base64
import copy
import dataclasses
import html.parser
import io
import itertools
import json
import pickle
import re
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from networks import SELinear, with_attention
from PIL import Image
from torch import nn
from trained import seeded

import dcafy
from dcafy import analysis
from dcafy.analysis.complexity import gflops_of
from dcafy.analysis.listening import ConnectionUsage, Effect, Usage
from dcafy.display import Shown, brief, natural_size
from dcafy.images.about import About, Trained, put_about
from dcafy.plan.blocks import AttentionBlock, Chain, Contribution, Link, Skipped
from dcafy.runs.evaluating import ClassScore, Evaluation
from dcafy.runs.predicting import Prediction
from dcafy.training import Epoch, History
from dcafy.training.history import ConnectionState

HOSTILE = "<script>alert(1)</script>\"' onload=x \x1b[31m\u202e$a_b$ "
NAMES = [f"{HOSTILE}.layer{n}" + n % 7 * "x" for n in range(100)]
EFFECT = Effect(-1e-9, 0.01, -0.02, 0.01, 100)


def plan_of(names: list[str]) -> dcafy.Plan:
    nodes = tuple(f"{HOSTILE}_{n}" for n in range(30))
    blocks = [AttentionBlock(name, "channel", 64, None, "sigmoid", "mul", nodes, nodes, nodes) for name in names]
    links = [Link(one, other) for one, other in itertools.pairwise(names)]
    skipped = tuple(Skipped(name, HOSTILE) for name in names)
    return dcafy.Plan(tuple(blocks), (Chain("channel", tuple(names), tuple(links)),), skipped, model=HOSTILE)


def usage_of(names: list[str]) -> Usage:
    rows = [ConnectionUsage(n, "channel", 1.0, -1e-9, 0.1, 0.2, 0.3, None, EFFECT, None, EFFECT) for n in names]
    return Usage(64, 1.0, 0.5, tuple(rows), EFFECT, None, EFFECT, unheard=tuple(names), without=EFFECT, unread=HOSTILE)


def history_of(names: list[str]) -> History:
    states = {name: ConnectionState(1.0, 0.1, 0.1) for name in names}
    epochs = [
        Epoch(n, n * 10, 0.1, 1.0 / n, 0.5, {"loss": 1.0, "top1": 0.5, "images": 9.0}, states, 1.0)
        for n in range(1, 301)
    ]
    return History(tuple(epochs), usage_of(names), tuple(names), {"index": torch.zeros(10_000)})


@cache
def measured() -> dict[str, Any]:
    """What is measured on a small network that is connected and listens a little."""
    with seeded(0):
        model = dcafy.convert(with_attention(SELinear), example_inputs=torch.rand(2, 3, 32, 32), verify=False)
        images = torch.rand(3, 3, 32, 32)
    for one in dcafy.connections(model).values():
        nn.init.constant_(one.beta, 0.5)
    return {
        "connections": dcafy.connections(model),
        "usage": dcafy.usage(model, [(images, torch.tensor([0, 1, 2]))]),
        "contributions": analysis.contributions(model),
        "values": analysis.attention_values(model, images),
        "block": analysis.attention_values(model, images)[0],
        "cams": analysis.grad_cam(model, images),
        "stage": analysis.grad_cam(model, images).stages[0],
        "summary": dcafy.summary(model),
        "plan": dcafy.inspect(with_attention(SELinear), example_inputs=torch.rand(2, 3, 32, 32)),
        "history": history_of(["blocks.1", "blocks.2"]),
    }


def large() -> dict[str, Any]:
    """Results that are as large as they get, with names as bad as they get."""
    plan, values = plan_of(NAMES), torch.rand(16, 60, 1, 1)
    blocks = [analysis.AttentionValues(name, "channel", True, values) for name in NAMES]
    of = type(measured()["values"])
    contributions = [Contribution(name, name, name, "channel", 1.0, 0.5, 0.3, 9) for name in NAMES]
    confusion = tuple(tuple(range(1000)) for _ in range(1000))
    about = About("classification", tuple(NAMES * 10), None, Trained(HOSTILE, 3, dict.fromkeys(NAMES, 0.5)))
    return {
        "plan": plan,
        "chain": plan.chains[0],
        "link": plan.links[0],
        "one block": plan.blocks[0],
        "skipped": plan.skipped[0],
        "drawing": analysis.draw(plan),
        "usage": usage_of(NAMES),
        "connection": usage_of(NAMES).connections[0],
        "history": history_of(NAMES),
        "epoch": history_of(NAMES).epochs[0],
        "values": of(blocks),
        "block": blocks[0],
        "histogram": blocks[0].histogram(bins=500),
        "contributions": type(measured()["contributions"])(contributions),
        "cams": analysis.GradCam(
            torch.zeros(64), tuple(analysis.StageMaps(n, torch.rand(64, 7, 7)) for n in NAMES[:5])
        ),
        "evaluation": Evaluation({"loss": 1.0}, tuple(ClassScore(n) for n in NAMES * 10), confusion),
        "prediction": Prediction(HOSTILE, tuple(NAMES), (0.5,) * 100),
        "about": about,
        "summary": dataclasses.replace(measured()["summary"], plan=plan, model=HOSTILE, about=about),
    }


def test_at_a_prompt_every_result_is_short_and_on_one_line():
    for name, result in (*large().items(), *measured().items()):
        shown = repr(result)
        assert len(shown) < 2000, name
        assert shown.isprintable(), name


class Tags(html.parser.HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found |= {(tag, name) for name, _ in attributes} | {(tag, "")}


def test_in_a_notebook_every_name_is_escaped():
    seen = 0
    for name, result in (*large().items(), *measured().items()):
        if not hasattr(result, "_repr_html_"):
            continue
        seen += 1
        page = result._repr_html_()
        tags = Tags()
        tags.feed(page)
        assert not {tag for tag, _ in tags.found} & {"script", "iframe", "object", "form", "a"}, name
        assert not [attribute for _, attribute in tags.found if attribute.startswith("on")], name
        assert "\x1b" not in page, name
        assert "\u202e" not in page, name
        assert len(page) < 600_000, name
    assert seen >= 15


def test_a_plan_is_drawn_in_its_natural_size_beside_its_table():
    page = measured()["plan"]._repr_html_()
    svg = page[page.index("<svg") : page.index(">", page.index("<svg"))]
    assert 'width="440"' in svg
    assert "max-width" not in svg
    assert "<table>" in page
    assert natural_size("<svg>") == "<svg>"


@pytest.mark.parametrize("name", ["connections", "usage", "contributions", "values", "block", "cams",
                                                    "stage", "summary", "plan", "history"])  # fmt: skip
def test_as_plain_data_and_as_a_data_frame(name, monkeypatch):
    result = measured()[name]
    data = result.to_dict()
    assert data
    json.dumps(data)
    assert result._records()
    assert len({tuple(row) for row in result._records()}) == 1  # every row has the same columns
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(dcafy.UsageError, match=r"pip install 'dcafy\[notebook\]'"):
        result.to_pandas()


def test_pandas_where_it_is_installed():
    pandas = pytest.importorskip("pandas")
    for result in measured().values():
        assert isinstance(result.to_pandas(), pandas.DataFrame)
    frame = measured()["connections"].to_pandas()
    assert list(frame["hears"]) == list(measured()["connections"].hears.values())


@pytest.mark.parametrize("name", ["usage", "contributions", "connections", "values", "block", "cams", "history"])
def test_plots_are_axes_with_something_on_them(name, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    result = measured()[name]
    made = result.plot()
    for ax in made if isinstance(made, list) else [made]:
        assert ax.has_data()
    if not isinstance(made, list):
        assert result.plot(made) is made
    made = made if isinstance(made, list) else [made]
    made[0].figure.canvas.draw()
    pyplot.close("all")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(dcafy.UsageError, match=r"pip install 'dcafy\[notebook\]'"):
        result.plot()


def test_plots_show_hostile_names_as_they_are():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    usage_of(NAMES[:3]).plot().figure.canvas.draw()
    large()["block"].plot().figure.canvas.draw()
    images = torch.rand(3, 1, 32, 32)
    assert len(measured()["cams"].plot(images)) == 3 * len(measured()["cams"].stages)
    pyplot.close("all")


def test_connections_are_the_dictionary_that_they_were():
    found = measured()["connections"]
    assert isinstance(found, dict)
    assert found == dict(found.items())
    assert list(found) == list(found.hears)
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert (list(twin), twin.hears, repr(twin)) == (list(found), found.hears, repr(found))
    # α and β are those of the moment, not of when it was made.
    first = next(iter(found.values()))
    with torch.no_grad():
        first.beta.fill_(-0.25)
        assert found.to_dict()[next(iter(found))]["beta"] == -0.25
        assert "-0.2500" in str(found)
        first.beta.fill_(0.5)


def test_what_is_as_usual_is_left_out_and_much_is_counted():
    assert brief(Link("a", "b", schema="softmax")) == "Link(source='a', target='b', schema='softmax')"
    assert repr(Link("a", "b")) == "Link(source='a', target='b')"
    assert brief(list(range(9))) == "[0, 1, 2, ... 6 more]"
    assert brief((1,)) == "(1,)"
    assert brief(torch.zeros(2, 3)) == "Tensor[2, 3]"


# --- dcafy.summary ------------------------------------------------------------------------------------


def test_a_summary_of_an_unconnected_network_says_what_there_would_be():
    with seeded(1):
        model = with_attention(SELinear).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, state = torch.rand(2, 3, 32, 32), torch.get_rng_state()
    found = dcafy.summary(model, example_inputs=images)
    assert not found.connected
    assert found.plan.links
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.gflops == pytest.approx(gflops_of(model, (images,)))
    assert f"dcafy.convert(model) would make {len(found.plan.links)} connection" in str(found)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_summary_of_a_connected_network_has_alpha_beta_and_what_it_was_trained_on():
    with seeded(1):
        model = dcafy.convert(with_attention(SELinear), example_inputs=torch.rand(2, 3, 32, 32))
    put_about(
        model, About(classes=("a", "b"), trained=Trained("digits", 3, {"loss": 0.25, "top1": 0.5, "images": 9.0}))
    )
    nn.init.constant_(next(iter(dcafy.connections(model).values())).beta, 0.5)
    found = dcafy.summary(model)
    assert found.connected
    assert found.own == sum(row.parameters for row in found.contributions)
    assert found.input == (3, 32, 32)
    text = str(found)
    assert "trained for 3 epochs on digits: loss 0.2500, top1 50.0%" in text
    assert "+0.5000" in text
    assert "33.3%" in text
    rows = {row["block"]: row for row in found._records()}
    assert [rows[row.target]["beta"] for row in found.contributions] == [row.beta for row in found.contributions]


def test_what_cannot_be_counted_is_said():
    class Picky(type(with_attention(SELinear))):
        def forward(self, x):
            if len(x) == 1:
                raise ValueError("one image is too few")
            return super().forward(x)

    with seeded(1):
        model = with_attention(SELinear)
    model.__class__ = Picky
    found = dcafy.summary(model, example_inputs=torch.rand(2, 3, 32, 32))
    assert found.gflops is None
    assert "not counted: ValueError: one image is too few" in str(found)


def test_every_result_that_shows_itself_can_be_told_from_the_others():
    kinds = [kind for kind in {type(one) for one in measured().values()} if issubclass(kind, Shown)]
    assert len({repr(one).split(":")[0] for one in measured().values() if isinstance(one, Shown)}) == len(kinds)


def test_nothing_that_draws_is_imported_before_something_is_drawn():
    code = "import sys, dcafy.analysis, dcafy.training; assert not {'matplotlib', 'pandas'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_heat_is_shown_from_nothing_to_its_most():
    """A map of one value, or of equal ones, is all there is of it, not nothing; a map that never is 0 has no black."""
    maps = torch.tensor([[[0.7, 0.7]], [[0.5, 1.0]], [[0.0, 0.0]]])
    found = analysis.GradCam(torch.zeros(3, dtype=torch.long), (analysis.StageMaps("last", maps),))
    shown = [
        Image.open(io.BytesIO(base64.b64decode(data))).resize((2, 1), Image.Resampling.NEAREST).tobytes()
        for data in re.findall(r"base64,([^\"]+)", found._repr_html_())
    ]
    assert list(shown[0]) == [255, 255]
    assert 127 <= shown[1][0] < 200 < shown[1][1]
    assert list(shown[2]) == [0, 0]
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    assert [ax.images[0].get_clim()[0] for ax in found.plot()] == [0, 0, 0]
