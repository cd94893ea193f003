"""Findings -> one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from dcafy.amounts import fixed, operations, percent
from dcafy.analysis.listening import KINDS, Effect
from dcafy.link.topology import ways
from dcafy.plan.blocks import Contents, Contribution, hearing
from dcafy.plan.drawing import Lane, Stroke, draw
from dcafy.report.answer import answers, difference_in_words, effect_kind, headline, named, with_error, worth
from dcafy.report.downloads import Download, download
from dcafy.report.figures import SIDES
from dcafy.report.findings import Findings
from dcafy.report.looks import looks
from dcafy.report.plots import block_ids, curves, histograms, shares
from dcafy.report.room import MOST, Room, excerpt, left_out, weightiest
from dcafy.report.words import FIRST, WORDS
from dcafy.runs.evidence import LOSSES
from dcafy.wording import counted, needing, printable
from dcafy.zoos.specs import RANDOM


def page(findings: Findings) -> str:
    """The report as HTML, under 5 MB; every text in it is escaped, whoever wrote it."""
    for room in Room().smaller():
        text = _page(findings, room)
        if len(text.encode("utf-8")) <= MOST:
            break
    return text


def _page(findings: Findings, room: Room) -> str:
    """The page with as much of everything as there is ``room`` for."""
    with needing("The report", "report"):
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    parts = {name: _part(name) for name in ("page.html.j2", "page.css", "page.js", "words.svg")}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        percent=percent, drawn=Markup, printable=printable, counted=counted, fixed=fixed, named=named, whole=_whole
    )
    environment.filters.update(
        effect=with_error, difference=difference_in_words, anchor=block_ids(findings).__getitem__
    )
    made = tuple(histograms(findings, room))
    shown = weightiest(findings, room)
    blocks = len({block.name for side in findings.sides for block in side.values})
    context: dict[str, Any] = {
        "style": Markup(parts["page.css"]),
        "script": Markup(parts["page.js"]),
        "script_hash": base64.b64encode(hashlib.sha256(parts["page.js"].encode()).digest()).decode(),
        "found": findings,
        "random_weights": RANDOM,
        "answers": answers(findings),
        "pictures": _pictures(findings, {plot.id for plot in made}, excerpt(findings, room, (row for _, row in shown))),
        "chain_data": _chain_data(findings, room),
        "room": room,
        "shown": shown,
        "shown_names": {row.name for _, row in shown},
        "left_out": left_out(findings, room),
        "blocks_with_values": blocks,
        "words": WORDS,
        "first_words": FIRST,
        "words_picture": Markup(parts["words.svg"]),
        "histograms": made,
        "rows_of": _rows_of(findings, shown),
        "headline": _compared_by(findings),
        "looks": looks(findings, room),
        "shares": tuple(shares(findings, shown, room)),
        "curves": tuple(curves(findings.run, room)),
        "losses": LOSSES,
        "arm_costs": operations(*_costs_of_arms(findings)),
        "side_costs": operations(*(side.complexity.gflops for side in findings.sides)),
        "connection_data": _connection_data(findings, room),
        "usage_data": _usage_data(findings, room),
        "ways": ways(findings.plan.links) if findings.contributions else (),
        "colours": dict(zip((side.title for side in findings.sides), SIDES, strict=False)),
    }
    return environment.from_string(parts["page.html.j2"]).render(context)


def _part(name: str) -> str:
    return resources.files("dcafy.report").joinpath(name).read_text(encoding="utf-8")


def _whole(text: str) -> str:
    """A text as it can be shown, in which a number and its error stay on one line."""
    return printable(text).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


# -- the network -----------------------------------------------------------------------------------------


def _pictures(findings: Findings, drawn: set[str], part: tuple[Contents, tuple[Lane, ...]]) -> dict[str, str]:
    """The network, or this part of it, across and downwards; a click on a block leads to its histogram, where one is
    ``drawn``.
    """
    ids = block_ids(findings)
    plan, lanes = part
    to_connections = {row.name: f"#connection-{place}" for place, row in enumerate(findings.contributions, 1)}
    shape = "×".join(map(str, findings.pictures.tensor.shape[1:]))
    outputs = findings.connected.outputs
    ends = f"image {shape}", (f"{outputs} classes" if outputs else "output")
    return {
        kind: draw(
            plan,
            lanes=lanes,
            contributions=findings.contributions,
            shares=findings.shares,
            strokes=_strokes(findings),
            across=across,
            ends=ends,
            to_blocks={name: f"#{id_}" for name, id_ in ids.items() if id_ in drawn},
            to_connections=to_connections,
        ).svg
        for kind, across in (("across", True), ("down", False))
    }


def _rows_of(findings: Findings, shown: Sequence[tuple[int, Contribution]]) -> dict[str, list[int]]:
    """The address of a block -> the rows of the connections through which it hears, as far as they are ``shown``."""
    ids = block_ids(findings)
    found: dict[str, list[int]] = {}
    for place, row in shown:
        found.setdefault(ids[row.target], []).append(place)
    return found


def _compared_by(findings: Findings) -> str:
    """The metric that stands for the others in a comparison."""
    compared = findings.run.comparison
    return "" if compared is None else headline(next(iter(compared.arms.values())).metrics[0])


def _costs_of_arms(findings: Findings) -> list[float]:
    """What an image costs in each network of a comparison, in 1e9 multiply-adds."""
    compared = findings.run.comparison
    return [] if compared is None else [arm.gflops for arm in compared.arms.values()]


def _strokes(findings: Findings) -> Mapping[str, Stroke]:
    """How each connection is drawn: what cutting it does, and what of it varies; empty where that was not measured."""
    rows = () if findings.usage is None else findings.usage.connections
    told = (f"cut: the loss changes by {with_error(row.cut)}; {percent(row.varying)} varies" for row in rows)
    return {
        row.name: Stroke(effect_kind(row.cut), strength, row.varying, words)
        for row, strength, words in zip(rows, worth([row.cut for row in rows]), told, strict=True)
    }


def _chain_data(findings: Findings, room: Room) -> Download:
    lane = {name: lane.title for lane in findings.lanes for name in lane.blocks}
    heard = hearing(findings.plan.links)
    rows = [
        (b.name, lane.get(b.name, ""), b.dimension, b.channels, "x".join(map(str, b.size or ())), b.gate,
         " ".join(link.source for link in heard.get(b.name, ())))
        for b in findings.plan.blocks
    ]  # fmt: skip
    return download("chains", ("block", "stage", "dimension", "channels", "size", "gate", "hears"), rows, room.data)


# -- connections -----------------------------------------------------------------------------------------


def _connection_data(findings: Findings, room: Room) -> Download:
    rows = [
        (*dataclasses.astuple(row)[:-1], findings.shares.get(row.name, 0.0), row.parameters)
        for row in findings.contributions
    ]
    columns = ("connection", "source", "target", "dimension", "alpha", "beta", "contribution", "message share")
    return download("connections", (*columns, "parameters"), rows, room.data)


def _usage_data(findings: Findings, room: Room) -> Download | None:
    if findings.usage is None:
        return None
    measures = ("loss change", "loss error", "accuracy change", "accuracy error")
    columns = ("connection", *(f"{kind} {measure}" for kind in KINDS for measure in measures))
    rows = [(name, *(value for effect in effects for value in _cells(effect))) for name, *effects in
            findings.usage.rows("all")]  # fmt: skip
    return download("changed-connections", columns, rows, room.data)


def _cells(effect: Effect | None) -> tuple[object, ...]:
    return ("",) * 4 if effect is None else tuple("" if v is None else v for v in dataclasses.astuple(effect))
