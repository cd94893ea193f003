"""Connection: what takes the place of G in a block that hears an earlier one (paper 3.2 and 3.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dcafy.emit.matching import MATCHES, known
from dcafy.emit.schemas import SCHEMAS, Term
from dcafy.plan.options import Dimension


class Connection(nn.Module):
    """``f(αG, β·match(T̃))``, in the shape and dtype of G; at α = 1, β = 0 exactly G (but see the schemas).

    ``T̃`` is ``T ⊙ G_prev`` where ``bounded``, else ``T`` (paper 3.1). ``match`` is a chain of plain layers or
    ``nn.Identity``; it works on ``[N, C]`` for channel attention, on ``[N, k, *size]`` for spatial attention.

    ``target_axis``, ``source_axis``, ``map_axis``: where this block's G, the earlier one's and its T have their
    channels (1, -1, or ``None`` for ``[N, H, W]``); channel attention ignores them: any layout of a vector will do.
    ``averages``: whether the earlier map's channels are averaged into one; ``grows``: whether it is the smaller one.
    ``centre``: what takes from ``match(T̃)`` what is the same for every image, if anything does. ``norm``: what f ends
    with, where its schema says so.

    >>> from dcafy.emit.matching import channel_match
    >>> connection = Connection("channel", match=channel_match("fc2", 64, 128))
    >>> g = torch.rand(2, 128, 1, 1)
    >>> torch.equal(connection(g, torch.rand(2, 64), torch.rand(2, 64)), g)
    True
    """

    is_connection = True
    is_weighed = False
    """Whether its message is weighed against others: to leave it out is more than to hear zeros."""

    is_read = False
    """Whether a cell reads its message: what goes into f is the state of that."""

    def __init__(
        self,
        dimension: Dimension,
        match: nn.Module | None = None,
        *,
        schema: str = "direct",
        bounded: bool = True,
        source_axis: int | None = 1,
        map_axis: int | None = 1,
        target_axis: int | None = 1,
        averages: bool = False,
        grows: bool = False,
        centre: nn.Module | None = None,
        norm: nn.Module | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dimension = dimension
        self.schema = schema
        self.bounded = bounded
        self.source_axis = source_axis
        self.map_axis = map_axis
        self.target_axis = target_axis
        self.averages = averages
        self.grows = grows
        known(SCHEMAS, schema, "schema")
        # One element and not a scalar: FSDP refuses to shard tensors without a dimension.
        self.alpha = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
        self.match = nn.Identity() if match is None else match
        self.centre = centre
        self.norm = norm

    def forward(self, G: Tensor, T_prev: Tensor | None = None, G_prev: Tensor | None = None) -> Tensor:
        """G connected to the earlier block's T; αG where there is none.

        ``G_prev`` is the earlier block's G, needed where T is bounded.
        """
        terms = () if T_prev is None else ((self.beta, self.heard(G, self.matched(G, T_prev, G_prev))),)
        return joined(self, G, terms)

    def matched(self, G: Tensor, T_prev: Tensor, G_prev: Tensor | None = None) -> Tensor:
        """``match(T̃)`` in the shape and dtype of G."""
        return MATCHES[self.dimension].matched(self, G, T_prev, G_prev)

    def heard(self, G: Tensor, message: Tensor) -> Tensor:
        """What of ``match(T̃)`` goes into f beside G: all of it. Who measures that stands in its place."""
        return message

    def contribution(self) -> float:
        """``|β| / (|α| + |β|)``: the contribution ratio of paper 4.5 (absolute: both may turn negative)."""
        alpha, beta = abs(float(self.alpha.detach())), abs(float(self.beta.detach()))
        return beta / (alpha + beta) if alpha + beta else 0.0

    def extra_repr(self) -> str:
        return f"{self.dimension}, schema={self.schema}, bounded={self.bounded}"


def joined(connection: Any, G: Tensor, terms: tuple[Term, ...]) -> Tensor:
    """f of G and what is heard, with the α, schema and norm of one connection."""
    joined = SCHEMAS[connection.schema].of(G, connection.alpha, terms)
    return joined if connection.norm is None else MATCHES[connection.dimension].normalised(connection, joined)


class OwnContext(Connection):
    """What is left of a connection that hears nobody any more: f of αG alone, which is αG but for inexact schemas.

    >>> own = OwnContext("channel")
    >>> [name for name, _ in own.named_parameters()]
    ['alpha']
    """

    hears_nobody = True

    def __init__(self, dimension: Dimension, **options: Any) -> None:
        super().__init__(dimension, **options)
        del self.beta

    def forward(self, G: Tensor, *messages: Tensor | None) -> Tensor:
        """What f makes of αG where nothing is heard."""
        nothing = () if SCHEMAS[self.schema].exact else ((self.alpha, torch.zeros_like(G)),)
        return joined(self, G, nothing)


class JoinedConnection(nn.Module):
    """``f(αG, Σ βᵢ·matchᵢ(T̃ᵢ))``: a block that hears several earlier ones (paper section 5).

    ``parts`` holds one :class:`Connection` per earlier block, each with its own β; they share α, and those of one
    earlier width share their matching layers. The first one has what f ends with.
    """

    is_connection = True

    def __init__(self, parts: list[Connection]) -> None:
        super().__init__()
        first, *others = parts
        for part in others:
            part.alpha = first.alpha
        self.parts = nn.ModuleList(parts)
        self.schema = first.schema

    @property
    def alpha(self) -> nn.Parameter:
        """The one α of all parts."""
        return self.parts[0].alpha  # type: ignore[return-value]

    def forward(self, G: Tensor, *messages: Tensor | None) -> Tensor:
        """G connected to every earlier block; ``messages``: T and G (or ``None``) of each, one after the other."""
        terms = tuple(
            (part.beta, part.heard(G, part.matched(G, T_prev, G_prev)))  # type: ignore[operator]
            for part, T_prev, G_prev in zip(self.parts, messages[::2], messages[1::2], strict=True)
            if T_prev is not None
        )
        return joined(self.parts[0], G, terms)  # type: ignore[arg-type]
