"""The published models, compiled once in each process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from pydantic_core import to_json

from kehu.events.scoring import ScoringModel, ScoringModelPublished
from kehu.eventstore import Pending
from kehu.postgres import Connection, Row
from scoring.domain.evaluation import Rulebook
from scoring.read_models.inputs import FOREVER


class NoModel(ConnectionError):
    """No model was published yet, or none so early: the role `migrate` publishes the first. Until then consumers wait, as for a
    service that is not there.
    """


class Books:
    """Gives the model in force. Versions never change, so a compiled one is kept.

    Args:
        most: compiled versions that are kept.
    """

    def __init__(self, most: int = 32) -> None:
        self._most = most
        self._compiled: dict[int, Rulebook] = {}

    def in_force(self, connection: Connection, as_of: datetime = FOREVER) -> Rulebook:
        """The newest model that was recorded until then. Raises NoModel."""
        row = connection.execute(
            "SELECT version FROM scoring_models WHERE recorded <= %s ORDER BY version DESC LIMIT 1", (as_of,)
        ).fetchone()
        if row is None:
            raise NoModel(f"no scoring model was published by {as_of.isoformat()}")
        return self.version(connection, row[0])

    def version(self, connection: Connection, version: int) -> Rulebook:
        """One version. Raises NoModel."""
        book = self._compiled.get(version)
        if book is None:
            row = connection.execute(
                "SELECT model::text, effective FROM scoring_models WHERE version = %s", (version,)
            ).fetchone()
            if row is None:
                raise NoModel(f"there is no scoring model {version}")
            if len(self._compiled) >= self._most:
                self._compiled.clear()
            book = self._compiled[version] = Rulebook(ScoringModel.model_validate_json(row[0]), version, row[1])
        return book


def published(connection: Connection, before: int, limit: int) -> list[dict[str, Any]]:
    """Published versions below `before`, the newest first."""
    rows = connection.execute(
        "SELECT version, model, note, effective, recorded FROM scoring_models WHERE version < %s ORDER BY version DESC LIMIT %s",
        (before, limit),
    ).fetchall()
    names = ("model_version", "model", "note", "effective", "recorded")
    return [dict(zip(names, row, strict=True)) for row in rows]


def model_rows(new: Sequence[Pending]) -> Iterable[Row]:
    """The row of a model that was published now."""
    for pending in new:
        if isinstance(event := pending.event, ScoringModelPublished):
            yield (
                "INSERT INTO scoring_models (version, model, note, effective, recorded) VALUES (%s, %s::jsonb, %s, %s, %s)",
                (
                    event.model_version,
                    to_json(event.model).decode(),
                    event.note,
                    event.effective,
                    pending.envelope.recorded,
                ),
            )
