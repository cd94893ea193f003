"""One look at a network: its attention, what is connected to what and how strongly, what it costs, what it learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import nn

from dcafy.amounts import fixed, metric, operations, percent
from dcafy.analysis.complexity import gflops_of
from dcafy.analysis.contributions import contributions
from dcafy.attention.inserted import HandedOn, handed_on
from dcafy.display import Shown
from dcafy.emit.dca import is_connected, own_parameters, recipes
from dcafy.emit.wiring import costs
from dcafy.errors import InputError
from dcafy.graph.rewritten import original_class
from dcafy.images.about import About, known
from dcafy.link.topology import ways
from dcafy.plan.blocks import Contribution, hearing
from dcafy.plan.options import Conversion
from dcafy.plan.plan import Plan
from dcafy.plan.tables import numbered, plan_sheets
from dcafy.survey import survey
from dcafy.tables import Cell, Column, Sheet
from dcafy.trace.accepted import require_module
from dcafy.trace.inputs import from_data, in_dtype_of
from dcafy.wording import counted, few, printable, reason_of
from dcafy.zoos.specs import has_random_weights


@dataclass(frozen=True, repr=False)
class Summary(Shown):
    """What a user sees of a network, connected or not.

    ``model``           its class
    ``plan``            its attention blocks, and who hears whom, or would
    ``contributions``   α and β of each connection; empty where it is not connected
    ``parameters``      of the whole network, and ``own``: of the connections among them
    ``input``           the shape of one input, and ``gflops``: 1e9 multiply-adds for it; ``uncounted`` says why it is
                        ``None``
    ``about``           its classes, and what dcafy trained it on, where that is known
    ``random``          whether nothing was loaded into its weights
    ``handed_on``       attention in it that hands a state on from unit to unit (``rla``, ``dia``)
    """

    model: str
    plan: Plan
    contributions: tuple[Contribution, ...]
    parameters: int
    own: int
    input: tuple[int, ...]
    gflops: float | None
    uncounted: str = ""
    about: About | None = None
    random: bool = False
    handed_on: tuple[HandedOn, ...] = ()

    @property
    def connected(self) -> bool:
        """Whether it has connections."""
        return bool(self.contributions)

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON-ready data."""
        plain = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        about = None if self.about is None else dataclasses.asdict(self.about)
        rows = [dataclasses.asdict(row) for row in self.contributions]
        handed = [dataclasses.asdict(one) for one in self.handed_on]
        told = {"contributions": rows, "input": list(self.input), "about": about, "handed_on": handed}
        return {**plain, "plan": self.plan.to_dict(), **told}

    def _headline(self) -> str:
        state = f"connected, with {counted(len(self.contributions), 'connection')}" if self.connected else "unconnected"
        blocks = counted(len(self.plan.blocks), "attention block")
        handed = "".join(f", {one.kind} in {counted(len(one.hears), 'module')}" for one in self.handed_on)
        return f"{self.model}: {blocks}, {state}{handed}, {self.parameters:,} parameters"

    def _parts(self) -> Iterator[RenderableType]:
        yield Text(f"{printable(self._headline())}\n", "bold")
        yield from self._body()

    def _body(self) -> Iterator[RenderableType]:
        if self.connected:
            yield self._connected()
        else:
            yield from plan_sheets(self.plan)
        yield Text("\n".join(printable(line) for line in self._lines()))

    def _picture(self) -> str:
        return self.plan._picture()

    def _connected(self) -> Sheet:
        """Every block, whom it hears, and with which α and β."""
        heard = hearing(self.plan.links)
        rows: list[tuple[Cell, ...]] = []
        for block in self.plan.blocks:
            mine = [row for row in self.contributions if row.target == block.name]
            several = len(mine) > len(heard.get(block.name, ()))  # one for each branch
            rows.append(
                (
                    block.name,
                    block.dimension,
                    str(block.channels),
                    tuple(f"{row.source} {_branch(row)}" if several else row.source for row in mine),
                    tuple(fixed(row.alpha) for row in mine),
                    tuple(fixed(row.beta, sign=True) for row in mine),
                    tuple(percent(row.ratio) for row in mine),
                )
            )
        return Sheet(_COLUMNS, tuple(rows), "attention blocks", numbered(self.plan))

    def _records(self) -> list[dict[str, Any]]:
        by_target = {row.target: row for row in reversed(self.contributions)}
        rows = self.plan._records()
        for row in rows:
            made = by_target.get(row["block"])
            row |= {name: None if made is None else getattr(made, name) for name in ("alpha", "beta", "ratio")}
        return rows

    def _lines(self) -> Iterator[str]:
        own = f", {self.own:,} ({percent(self.own / max(self.parameters, 1))}) of them in connections"
        yield f"{self.parameters:,} parameters{own if self.connected else ''}"
        shape = "x".join(map(str, self.input))
        unit, (cost,) = operations(self.gflops or 0.0)
        told = f"not counted: {self.uncounted}" if self.gflops is None else f"{cost} for one {shape} input"
        yield f"{unit} (multiply-adds of convolutions and matrix products): {told}"
        if self.connected:
            yield from ways(self.plan.links)
        for one in self.handed_on:
            yield str(one)
            yield one.what
        if self.random:
            yield "its weights are random: nothing was loaded into them"
        if not self.connected and self.plan.links:
            yield f"dcafy.convert(model) would make {counted(len(self.plan.links), 'connection')}"
        if self.about is not None and self.about.trained is not None:
            trained = self.about.trained
            told = ", ".join(
                f"{name} {metric(name, value)}" for name, value in trained.metrics.items() if name != "images"
            )
            yield f"trained for {counted(trained.epochs, 'epoch')} on {trained.data}: {told}"
        if self.about is not None and self.about.classes:
            yield f"{len(self.about.classes)} classes: {few(list(self.about.classes), 8)}"


_COLUMNS = (
    Column("block", "name"),
    Column("dimension"),
    Column("channels", "number"),
    Column("hears", "row"),
    *(Column(title, "number") for title in ("α", "β", "contribution")),
)


def _branch(row: Contribution) -> str:
    return row.name[len(row.target) :].partition("<-")[0]


def summary(model: nn.Module, *, example_inputs: Any = None) -> Summary:
    """What there is to see of ``model``: its attention blocks, who hears whom with which α and β, parameters, cost.

    ``print`` the result, or look at it in a notebook. ``model``: connected or not; it is run once on one blank input to
    count what it costs, and is as it was. ``example_inputs``: as for :func:`dcafy.inspect`; guessed where absent.

    Raises what :func:`dcafy.inspect` raises.

    >>> import dcafy, torchvision
    >>> found = dcafy.summary(torchvision.models.mobilenet_v3_small())
    >>> found.connected, len(found.plan.blocks), round(found.gflops, 3)
    (False, 9, 0.057)
    """
    require_module(model)
    made: tuple[Contribution, ...] = ()
    plan = Plan((), ())
    inside = list(recipes(model))
    if is_connected(model) and inside:
        if len(inside) > 1:
            raise InputError(
                f"{type(model).__name__} has {len(inside)} connected networks inside. Look at each: "
                f"{', '.join(f'dcafy.summary(model.{path})' for path, _ in inside[:3])}."
            )
        plan, made = inside[0][1].plan, contributions(model)
    noted = inside[0][1].inputs if made and not inside[0][0] else None
    if made and noted is not None and example_inputs is None:
        inputs = in_dtype_of(model, from_data(noted))
    else:
        seen = survey(model, example_inputs)
        inputs = seen.inputs
        if not made:
            priced = costs(seen.plan, seen.network, Conversion()) if seen.plan.blocks else ()
            plan = dataclasses.replace(seen.plan, costs=priced)
    cost, why = None, ""
    try:
        cost = gflops_of(model, inputs)
    except Exception as error:  # a forward may refuse a blank input in any way, and the rest can be seen all the same
        why = reason_of(error)
    shape = next((tuple(value.shape[1:]) for value in inputs if isinstance(value, torch.Tensor)), ())
    own = own_parameters(model) if made else set()
    return Summary(
        original_class(model).__name__,
        plan,
        made,
        sum(parameter.numel() for parameter in model.parameters()),
        sum(parameter.numel() for parameter in model.parameters() if id(parameter) in own),
        shape,
        cost,
        why,
        known(model),
        has_random_weights(model),
        handed_on(model),
    )
