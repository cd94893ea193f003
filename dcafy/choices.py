"""What the options may be whose choices are the names of a table: each from the table itself."""

from __future__ import annotations

from collections.abc import Collection

from dcafy.attention.kinds import ATTENTIONS
from dcafy.emit.schemas import SCHEMAS
from dcafy.link.topology import TOPOLOGIES

CHOICES: dict[str, Collection[str]] = {"attention": ATTENTIONS, "schema": SCHEMAS, "topology": TOPOLOGIES}
"""Option -> its choices; those of other options stand with them (``dcafy.plan.options``)."""
