"""Attention that is not dcafy's to connect: recognised, so that nobody is told it is not there."""

from __future__ import annotations

from torch import fx

from dcafy.find.dataflow import Dataflow
from dcafy.find.roles import Found
from dcafy.graph.nodes import OWNER
from dcafy.graph.ops import Op, op_name
from dcafy.graph.paths import joined
from dcafy.plan.blocks import Skipped

REASON = "self-attention (features are weighted by features): it has no pooled context G that could be connected"

_LAYERS = frozenset({"MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer", "Transformer"})
_FUNCTIONS = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward"})


def self_attention(flow: Dataflow, found: tuple[Found, ...], path: str = "") -> tuple[Skipped, ...]:
    """The modules that multiply features with features: multi-head, non-local, halo and lambda layers.

    A matrix product of two tensors that both depend on the input is one, unless a block has it: as its
    pooling (GC sums X with weights that it computed from X), or as a fusion written with einsum.
    """
    ours = {name for block in found for name in (*block.block.extraction, *block.block.fusion)}
    owners: dict[str, None] = {}
    for node in flow.graph.nodes:
        if node in flow.depends and node.name not in ours and _mixes_features(node, flow):
            owner = str(node.target) if node.op == "call_module" else str(node.meta.get(OWNER, ""))
            owners[joined(path, owner) or "root"] = None
    return tuple(Skipped(owner, REASON) for owner in owners)


def _mixes_features(node: fx.Node, flow: Dataflow) -> bool:
    if op_name(node, flow.modules) in _FUNCTIONS:
        return True
    if node.op == "call_module":
        kinds = {kind.__name__ for kind in type(flow.modules[str(node.target)]).__mro__}
        return bool(kinds & _LAYERS)
    operands = [source for source in node.all_input_nodes if source in flow.depends]
    return flow.ops[node] is Op.CONTRACT and len(operands) > 1
