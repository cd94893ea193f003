"""Attention that is not dcafy's to connect: recognised, so that nobody is told it is not there."""

from __future__ import annotations

from torch import fx, nn

from dcafy.blocks import Skipped
from dcafy.connected import OWNER
from dcafy.find import Found
from dcafy.ops import Op, op_name, op_of
from dcafy.trace.values import node_value, tensors_in

__all__ = ["REASON", "self_attention"]

REASON = "self-attention (features are weighted by features): it has no pooled context G that could be connected"

_LAYERS = frozenset({"MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer", "Transformer"})
_FUNCTIONS = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward"})


def self_attention(
    graph: fx.Graph, modules: dict[str, nn.Module], found: tuple[Found, ...], path: str = ""
) -> tuple[Skipped, ...]:
    """The modules that multiply features with features: multi-head, non-local, halo and lambda layers.

    A matrix product of two tensors that both depend on the input is one, unless it is a block's pooling
    (GC sums X with weights that it computed from X).
    """
    depends: set[fx.Node] = set()
    for node in graph.nodes:
        value = any(True for _ in tensors_in(node_value(node)))
        if value and (node.op == "placeholder" or any(source in depends for source in node.all_input_nodes)):
            depends.add(node)
    pooling = {name for block in found for name in block.block.extraction}
    owners: dict[str, None] = {}
    for node in graph.nodes:
        if node in depends and node.name not in pooling and _mixes_features(node, modules, depends):
            owner = str(node.target) if node.op == "call_module" else str(node.meta.get(OWNER, ""))
            owners[".".join(part for part in (path, owner) if part) or "root"] = None
    return tuple(Skipped(owner, REASON) for owner in owners)


def _mixes_features(node: fx.Node, modules: dict[str, nn.Module], depends: set[fx.Node]) -> bool:
    name = op_name(node, modules)
    if name in _FUNCTIONS:
        return True
    if node.op == "call_module":
        kinds = {kind.__name__ for kind in type(modules.get(str(node.target))).__mro__}
        return bool(kinds & _LAYERS)
    operands = [source for source in node.all_input_nodes if source in depends]
    return op_of(node, modules) is Op.CONTRACT and len(operands) > 1
