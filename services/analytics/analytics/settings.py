"""Settings of analytics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from kehu.settings import ServiceSettings


def _zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise PydanticCustomError("timezone", "is not a time zone, e.g. Asia/Shanghai") from None
    return name


class Settings(ServiceSettings):
    """What analytics reads from the environment."""

    SERVICE: ClassVar[str] = "analytics"

    timezone: Annotated[str, AfterValidator(_zone)] = Field(
        "Asia/Shanghai", description="Whose days and months are counted. Rebuild the read models after a change."
    )
    consumer_batch: int = Field(
        500, ge=1, le=10_000, description="The most events that a read model takes in one transaction."
    )
    rebuild_batch: int = Field(2_000, ge=1, le=10_000, description="The same, while a read model is rebuilt.")
    projection: str | None = Field(
        None,
        description="Read model that the role `rebuild` builds anew; `kehu replay` sets it.",
        examples=["lead_journey"],
    )
    rebuild_fresh: bool = Field(False, description="Begin a rebuild anew even if an interrupted one could go on.")
    stream_batch: int = Field(
        500, ge=1, le=10_000, description="The most events of one transaction of the live counters."
    )
    stream_within: float = Field(
        0.2, ge=0.01, le=10, description="Seconds that the live counters wait for a batch to fill."
    )
    stall_seconds: float = Field(
        60.0,
        ge=5,
        le=3600,
        description="A stream worker that has events to read and commits nothing for this long ends itself.",
    )
    lake_flush_seconds: float = Field(
        60.0, ge=0.1, le=3600, description="The longest that an event waits before it is in the lake."
    )
    lake_flush_events: int = Field(
        50_000, ge=1, le=200_000, description="The most events of one file of the lake's tail."
    )
    lake_compact_events: int = Field(
        1_000_000, ge=1, description="The tail is sorted into the lake when it has this many events, or when it is old."
    )
    lake_compact_seconds: float = Field(
        3600.0, ge=1, description="The tail is sorted into the lake at the latest after this time."
    )
    lake_keep_versions: int = Field(
        1_000, ge=1, description="Older versions of the lake are forgotten after a compaction."
    )
    funnels_at_once: int = Field(
        2, ge=1, le=32, description="Funnels that one API process computes at once; others wait."
    )

    @property
    def zone(self) -> ZoneInfo:
        """The time zone of days and months."""
        return ZoneInfo(self.timezone)

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """This service keeps the lake."""
        yield from super().contradictions(given)
        if given.get("lake_path") is None:
            yield "lake_path", "is missing"
