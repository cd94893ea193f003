"""The options of a conversion, and how a link's own settings beat them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dcafy.emit.connection import CHANNEL_MATCHES, SCHEMAS, SPATIAL_MATCHES
from dcafy.errors import PlanError, UsageError
from dcafy.plan.blocks import Link

__all__ = ["Settings"]

_CHOICES: dict[str, Any] = {"schema": SCHEMAS, "channel_match": CHANNEL_MATCHES, "spatial_match": SPATIAL_MATCHES}


@dataclass(frozen=True)
class Settings:
    """The options of a conversion that a link may override."""

    schema: str = "direct"
    channel_match: str = "fc2"
    reduction: int = 16
    min_hidden: int = 8
    spatial_match: str = "avg"

    def check(self) -> None:
        """Nothing; ``UsageError`` where a setting is not one that there is."""
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UsageError(
                    f"{name}={getattr(self, name)!r} is not known. Use one of: {', '.join(sorted(known))}."
                )
        for name in ("reduction", "min_hidden"):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise UsageError(f"{name} must be a whole number of at least 1, not {number!r}.")

    def complete(self, link: Link) -> Link:
        """The link with every setting that it leaves open filled in; ``PlanError`` where one is not known."""
        own = {f.name: getattr(link, f.name) for f in dataclasses.fields(self)}
        merged = Settings(**{name: getattr(self, name) if value is None else value for name, value in own.items()})
        try:
            merged.check()
        except UsageError as error:
            raise PlanError(f"The plan's link from {link.source!r} to {link.target!r}: {error}") from error
        return dataclasses.replace(link, **dataclasses.asdict(merged))
