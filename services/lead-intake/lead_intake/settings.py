"""Settings of lead-intake."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import Field

from kehu.settings import ServiceSettings


class LeadIntakeSettings(ServiceSettings):
    """What lead-intake reads from the environment."""

    SERVICE: ClassVar[str] = "lead-intake"

    bulk_at_once: int = Field(
        2,
        ge=1,
        le=16,
        description="Batches of imports and lists that are written at once; single captures have a lane of their own.",
    )
    imports_at_once: int = Field(
        4, ge=1, le=100, description="Files that one process takes at once; the next is answered 503."
    )

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """This service keeps the keys of customers: it cannot do without its own two."""
        yield from super().contradictions(given)
        for name in ("master_key", "hash_key"):
            if given.get(name) is None:
                yield name, "is missing"
