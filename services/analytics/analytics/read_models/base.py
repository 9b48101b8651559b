"""What the read models of analytics have in common: their tables come in generations, so that one can be rebuilt beside another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import LiteralString
from zoneinfo import ZoneInfo

from psycopg import sql

from kehu.events import Event, Recorded
from kehu.postgres import Connection

# The day and the month of an event are those of this zone, unless the settings name another.
TIMEZONE = ZoneInfo("Asia/Shanghai")


class GenerationalModel:
    """One generation of a read model.

    Args:
        generation: which one, from 1. It names the tables (`lead_journey_v1_g1`) and the consumer (`lead_journey_g1`).
        timezone: whose days and months are counted.
    """

    name: str
    version: int
    tables: tuple[LiteralString, ...]
    types: tuple[type[Event], ...] | None
    # It looks at envelopes and raw data only: nothing is decoded, and an event that this release does not know counts too.
    envelopes_only: bool = False

    def __init__(self, generation: int, timezone: ZoneInfo = TIMEZONE) -> None:
        self.generation, self.timezone = generation, timezone

    @property
    def consumer(self) -> str:
        """The name under which its progress is kept."""
        return consumer_of(self.name, self.generation)

    def table(self, base: str) -> sql.Identifier:
        return table_of(base, self.version, self.generation)

    def sql(self, text: LiteralString) -> sql.Composed:
        """A statement with this generation's tables for `{lead_journey}` and the like."""
        return sql.SQL(text).format(**{base: self.table(base) for base in self.tables})

    def apply(self, connection: Connection, events: Sequence[Recorded]) -> None:
        """Write the rows of these events, in order, in the caller's transaction."""
        raise NotImplementedError

    def truncate(self, connection: Connection) -> None:
        """Forget everything."""
        for base in self.tables:
            connection.execute(sql.SQL("TRUNCATE {}").format(self.table(base)))


def consumer_of(name: str, generation: int) -> str:
    """The consumer that fills a generation, e.g. `lead_journey_g2`."""
    return f"{name}_g{generation}"


def table_of(base: str, version: int, generation: int) -> sql.Identifier:
    """The table of a generation, e.g. `lead_journey_v1_g2`."""
    return sql.Identifier(f"{base}_v{version}_g{generation}")
