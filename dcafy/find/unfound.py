"""Gates that pool and are no block: said, so that silence means that there is none."""

from __future__ import annotations

from torch import Tensor, fx

from dcafy.find.dataflow import REARRANGES, Dataflow, positions
from dcafy.find.roles import Found
from dcafy.graph.nodes import OWNER, node_value
from dcafy.graph.ops import Op, gate_of
from dcafy.graph.paths import joined
from dcafy.plan.blocks import Skipped

REASON = "a gate that hears the map at a smaller size, in a way that yields no context G that could be connected"

_GATES = ("sigmoid", "hard_sigmoid")
_STEPS = 200


def unfound_gates(flow: Dataflow, found: tuple[Found, ...], path: str = "") -> tuple[Skipped, ...]:
    """The modules that multiply a map with a gate which hears something smaller that X does not."""
    ours = {node for block in found for node in (*block.fusions, *block.between)}
    owners: dict[str, None] = {}
    for node in flow.graph.nodes:
        if flow.ops[node] is not Op.MULTIPLY or node in ours or node not in flow.depends:
            continue
        operands = flow.inputs(node)
        for small, large in (operands, operands[::-1]) if len(operands) == 2 else ():
            gate = _gate(small, flow)
            if gate is not None and gate not in ours and _is_map(large) and _hears_less(gate, large, flow):
                owners[joined(path, str(node.meta.get(OWNER, ""))) or "root"] = None
    return tuple(Skipped(owner, REASON) for owner in owners)


def _is_map(node: fx.Node) -> bool:
    value = node_value(node)
    return isinstance(value, Tensor) and value.ndim > 3 and positions(node) > 1


def _gate(node: fx.Node, flow: Dataflow) -> fx.Node | None:
    """The gate that ``node`` is, before it was rearranged or added to a number."""
    while gate_of(node, flow.modules) not in _GATES:
        sources = flow.inputs(node)
        if flow.ops[node] not in (*REARRANGES, Op.ADD, Op.MULTIPLY, Op.ELEMENTWISE) or len(sources) != 1:
            return None
        (node,) = sources
    return node


def _hears_less(gate: fx.Node, large: fx.Node, flow: Dataflow) -> bool:
    """Whether a gate is computed of something in a quarter of X's places or fewer, and X is not."""
    above, pending = {large}, [large]
    first = flow.order[large]
    own, mine = {gate}, [gate]
    small: set[fx.Node] = set()
    while mine and len(own) < _STEPS:
        for source in flow.inputs(mine.pop()):
            if source in own or source is large or source.op == "placeholder":
                continue
            own.add(source)
            mine.append(source)
            first = min(first, flow.order[source])
            if _is_map(gate) and positions(source) * 4 <= positions(large) and isinstance(node_value(source), Tensor):
                small.add(source)
    while pending:
        for source in flow.inputs(pending.pop()):
            if source not in above and flow.order[source] >= first:
                above.add(source)
                pending.append(source)
    layers = any(flow.ops[node] is Op.PARAMETRIC for node in own - above)
    own_layers = any(flow.ops[node] is Op.PARAMETRIC for node in small - above)
    return bool(small - above) and own_layers is layers
