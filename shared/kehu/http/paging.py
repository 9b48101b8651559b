"""Pages by cursor: the next page begins after the last row of this one, however many rows came in between."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

import orjson
from fastapi import Depends, Query

from kehu.http.problems import Problem

T = TypeVar("T")
MOST = 200
Cursor = str | int | float | datetime | UUID


@dataclass(frozen=True, slots=True)
class Page:
    """Which rows a caller wants.

    Args:
        limit: the most rows of one page.
        cursor: from `next` of the page before.
    """

    limit: int
    cursor: str | None = None

    def after(self, *types: type) -> tuple[Any, ...] | None:
        """The sort key of the last row of the page before, with values of these types; None on the first page.

        Raises:
            Problem: 400 when the cursor is not one that was given for this list.
        """
        return None if self.cursor is None else decode_cursor(self.cursor, *types)

    def answer(
        self, rows: Sequence[T], key: Callable[[T], Sequence[Cursor]], show: Callable[[T], Any] = lambda row: row
    ) -> dict[str, Any]:
        """`{"items": [...], "next": cursor or null}`.

        Args:
            rows: read with a limit of `limit + 1`, so that it is known whether there is a next page.
            key: the sort key of a row, unique.
            show: what is shown of a row.
        """
        more = len(rows) > self.limit
        shown = rows[: self.limit]
        return {"items": [show(row) for row in shown], "next": encode_cursor(*key(shown[-1])) if more else None}


def paging(default: int = 50, most: int = MOST) -> Any:
    """A dependency that gives the `Page` a caller wants, from `?limit=` and `?cursor=`."""

    # As defaults, not in the annotations: those are text, in which FastAPI would not find `most`.
    limit_query: Any = Query(default, ge=1, le=most, description="The most items of the answer.")
    cursor_query: Any = Query(None, max_length=1024, description="`next` of the page before.")

    async def page(limit: int = limit_query, cursor: str | None = cursor_query) -> Page:
        return Page(limit, cursor)

    return Depends(page)


def encode_cursor(*key: Cursor) -> str:
    """The sort key of a row as an opaque text."""
    values = [
        value.isoformat() if isinstance(value, datetime) else str(value) if isinstance(value, UUID) else value
        for value in key
    ]
    return base64.urlsafe_b64encode(orjson.dumps(values)).rstrip(b"=").decode()


def decode_cursor(cursor: str, *types: type) -> tuple[Any, ...]:
    """The sort key of a cursor.

    Raises:
        Problem: 400 when it was not made by `encode_cursor` from values of these types.
    """
    try:
        values = orjson.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
        if not isinstance(values, list) or len(values) != len(types):
            raise ValueError
        return tuple(_value(value, kind) for value, kind in zip(values, types, strict=True))
    except (ValueError, TypeError, binascii.Error):
        raise Problem(400, "The cursor is not one of this list.", "bad-cursor") from None


def _value(value: Any, kind: type) -> Any:
    if kind is datetime:
        at = datetime.fromisoformat(value)
        if at.tzinfo is None:
            raise ValueError
        return at
    if kind is UUID:
        return UUID(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, str) and "\0" in value):
        raise ValueError
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError
    return value
