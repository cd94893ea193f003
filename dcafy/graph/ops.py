"""What a node does: one table, whether it is a module, a function, a method or an ATen overload."""

from __future__ import annotations

import enum
import operator
from typing import Any

from torch import fx, nn

from dcafy.plan.gates import GATES


class Op(enum.Enum):
    """The kinds of operation that finding attention tells apart."""

    MULTIPLY = "multiply"
    ADD = "add"
    GATE = "gate"  # bounds its input: sigmoid, softmax, ...
    REDUCE = "reduce"  # a statistic over axes: mean, sum, max, norm, ...
    POOL = "pool"  # a statistic over windows, down to one window per map
    CONTRACT = "contract"  # a sum of products: matmul, einsum, ...
    LAYOUT = "layout"  # the same elements in another arrangement
    EXPAND = "expand"  # the same elements, repeated or interpolated
    SLICE = "slice"  # some of the elements
    JOIN = "join"  # several tensors in one
    PARAMETRIC = "parametric"  # a layer with weights of its own
    ELEMENTWISE = "elementwise"
    QUERY = "query"  # shapes, dtypes, devices
    FRESH = "fresh"  # a tensor of its own, which takes no more than its shape from another
    OTHER = "other"


_NAMES: dict[Op, str] = {
    Op.MULTIPLY: "mul imul multiply addcmul",
    Op.ADD: "add iadd",
    Op.GATE: " ".join(gate.operations for gate in GATES.values()),
    Op.REDUCE: "mean sum amax amin max min std var std_mean var_mean norm logsumexp nanmean median prod "
    "vector_norm linalg_norm linalg_vector_norm nansum aminmax reduce Reduce",
    Op.POOL: "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d lp_pool1d lp_pool2d "
    "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d "
    "AvgPool1d AvgPool2d AvgPool3d MaxPool1d MaxPool2d MaxPool3d LPPool1d LPPool2d",
    Op.CONTRACT: "matmul bmm einsum tensordot baddbmm mm mv dot",
    Op.LAYOUT: "view reshape flatten unflatten squeeze unsqueeze permute transpose swapaxes swapdims movedim moveaxis "
    "contiguous view_as reshape_as t numpy_T ravel Flatten Unflatten PixelShuffle PixelUnshuffle channel_shuffle "
    "ChannelShuffle rearrange Rearrange clone detach alias to type type_as float half bfloat16 double Identity "
    "identity passed_through dropout Dropout dropout1d dropout2d Dropout1d Dropout2d Dropout3d AlphaDropout _to_copy",
    Op.EXPAND: "expand expand_as repeat repeat_interleave tile broadcast_to interpolate upsample upsample_nearest "
    "upsample_bilinear Upsample UpsamplingNearest2d UpsamplingBilinear2d broadcast_tensors pad ZeroPad2d "
    "ReflectionPad2d ReplicationPad2d ConstantPad2d",
    Op.SLICE: "getitem chunk split tensor_split select narrow unbind index_select slice unsafe_chunk unsafe_split roll",
    Op.JOIN: "cat concat concatenate stack hstack vstack dstack",
    Op.PARAMETRIC: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear bilinear batch_norm "
    "layer_norm group_norm instance_norm addmm convolution",
    Op.ELEMENTWISE: "relu ReLU leaky_relu LeakyReLU gelu GELU silu SiLU swish mish Mish elu ELU celu CELU selu SELU "
    "hardswish Hardswish softplus Softplus softsign Softsign prelu PReLU rrelu exp log log1p expm1 sqrt rsqrt pow "
    "ipow abs neg square reciprocal div truediv itruediv true_divide sub isub rsub floordiv threshold Threshold "
    "normalize clamp_min sign erf logsigmoid LogSigmoid maximum minimum where masked_fill lerp Hardshrink "
    "Softshrink Tanhshrink nan_to_num LocalResponseNorm AvgPoolSame",
    Op.QUERY: "size dim numel getattr shape stride __len__ is_floating_point device dtype ndimension nelement "
    "_assert check_default check_decision",
    Op.FRESH: "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full "
    "zeros ones empty rand randn arange linspace eye",
}

_ATTRIBUTES: dict[str, Op] = {
    **dict.fromkeys(("values", "indices", "min", "max"), Op.SLICE),
    **dict.fromkeys(("T", "mT", "H", "mH"), Op.LAYOUT),
}
"""What is read off a tensor, or off several (``x.max(1).values`` is ``x.max(1)[0]``), and is a tensor itself."""

_TABLE: dict[str, Op] = {name: op for op, names in _NAMES.items() for name in names.split()}

_GATE_OF = {name: gate.name for gate in GATES.values() for name in gate.operations.split()}


def op_name(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """The operation's plain name: ``sigmoid`` for ``torch.sigmoid``, ``x.sigmoid_()`` and ``aten.sigmoid.default``."""
    if node.op == "call_module":
        return _module_name(modules.get(str(node.target)))
    if node.op == "call_method":
        return _plain(str(node.target))
    if node.op == "call_function":
        target: Any = node.target
        overloaded = getattr(target, "overloadpacket", None) or target
        return _plain(getattr(overloaded, "__name__", type(target).__name__))
    return node.op


def _plain(name: str) -> str:
    return name.rstrip("_") if name.endswith("_") and not name.endswith("__") else name


def _module_name(module: nn.Module | None) -> str:
    """The name under which the module's class, or the ``torch.nn`` layer it derives from, is in the table."""
    if module is None:
        return "unknown"
    for kind in type(module).__mro__:
        if kind.__name__ in _TABLE:
            return kind.__name__
    return type(module).__name__


def has_parameters(module: nn.Module | None) -> bool:
    """Whether the module holds weights (and is more than a parametrised activation)."""
    if module is None or isinstance(module, nn.PReLU):
        return False
    return next(module.parameters(), None) is not None or isinstance(module, nn.modules.batchnorm._NormBase)


def op_of(node: fx.Node, modules: dict[str, nn.Module]) -> Op:
    """What ``node`` does."""
    if node.op == "call_module" and has_parameters(modules.get(str(node.target))):
        return Op.PARAMETRIC
    known = _TABLE.get(op_name(node, modules), Op.OTHER)
    if known is Op.REDUCE and _is_pairwise(node):
        return Op.ELEMENTWISE
    return _ATTRIBUTES.get(str(node.args[1]), known) if node.target is getattr else known


def _is_pairwise(node: fx.Node) -> bool:
    """``torch.max(a, b)`` of two tensors is elementwise; ``torch.max(a, dim)`` reduces."""
    name = op_name(node, {})
    return name in ("max", "min") and len(node.args) > 1 and isinstance(node.args[1], fx.Node)


def gate_of(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """The name of the gate that ``node`` is, if it is one."""
    name = op_name(node, modules)
    gate = _GATE_OF.get(name)
    if name in ("clamp", "clip") and not _bounded_both_ways(node):
        return None
    return gate


def _bounded_both_ways(node: fx.Node) -> bool:
    given = [a for a in (*node.args[1:], *node.kwargs.values()) if a is not None]
    return len(given) >= 2


IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
"""The functions of ``operator`` that stand for ``x += y`` and its like."""

_IN_PLACE = frozenset(getattr(operator, name) for name in (*IN_PLACE, "setitem"))


def alters_argument(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether ``node`` changes its first argument in place."""
    if node.op == "call_module":
        return bool(getattr(modules.get(str(node.target)), "inplace", False))
    if node.kwargs.get("inplace") is True:
        return True
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        positional = node.target in _POSITIONAL_INPLACE and True in node.args[1:]
        return node.target in _IN_PLACE or positional or (name.endswith("_") and not name.endswith("__"))
    return False


_POSITIONAL_INPLACE = frozenset(
    getattr(nn.functional, name) for name in ("relu", "relu6", "hardsigmoid", "hardswish", "silu")
)
"""What takes ``inplace`` by position, too."""
