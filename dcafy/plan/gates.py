"""The gates of attention maps: one row each, with the operations that are one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GateKind:
    """What bounds an attention map T.

    ``operations``  plain names of the functions, methods and layers that do it, as :func:`dcafy.graph.ops.op_name` has
                    them
    ``bounded``     whether T is multiplied by G before it is passed on (paper 3.1: T̃ = T ⊙ G)
    ``strict``      whether it alone makes a map one of attention: activations use the others, too
    """

    name: str
    operations: str = ""
    bounded: bool = True
    strict: bool = True


GATES: dict[str, GateKind] = {
    gate.name: gate
    for gate in (
        GateKind("sigmoid", "sigmoid Sigmoid expit"),
        GateKind("hard_sigmoid", "hardsigmoid Hardsigmoid hard_sigmoid"),
        GateKind("softmax", "softmax Softmax Softmax2d softmin Softmin sparsemax"),
        GateKind("tanh", "tanh Tanh"),
        GateKind("clamp", "hardtanh Hardtanh clamp clip relu6 ReLU6 clamp_max", strict=False),
        GateKind("none", bounded=False, strict=False),
    )
}
"""Name -> the gate; ``none`` is that of a map which nothing bounds."""
