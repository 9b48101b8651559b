"""Finds events that Kafka carries twice: a relay that crashed may send an event again, under a new offset.

Within a topic-partition the store positions mostly rise. A record above every position seen there is new. Only one at or
below is looked up by its id, first among the recent ones kept here, and in the lake's files when it may be older.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kehu.lake.log import Place

RECENT = 50_000  # events remembered for each topic-partition


class _Recent:
    def __init__(self, high: int | None) -> None:
        self.high = high  # highest position seen
        self.floor = high  # an event above this position that is not in `ids` was never seen
        self.ids: set[str] = set()
        self._order: deque[tuple[str, int | None]] = deque()

    def add(self, event_id: str, position: int | None) -> None:
        self.ids.add(event_id)
        self._order.append((event_id, position))
        if position is not None:
            self.high = position if self.high is None else max(self.high, position)
        if len(self._order) > RECENT:
            old_id, old_position = self._order.popleft()
            self.ids.discard(old_id)
            if old_position is not None:
                self.floor = old_position if self.floor is None else max(self.floor, old_position)


class Repeats:
    """Remembers what was appended.

    Args:
        positions: highest store position by topic-partition, from the snapshot.
        lookup: the ids among those given that are in the lake.
    """

    def __init__(self, positions: Mapping[Place, int], lookup: Callable[[set[str]], set[str]]) -> None:
        self._places = {place: _Recent(high) for place, high in positions.items()}
        self._lookup = lookup

    def without(self, rows: Iterable[dict[str, Any]], known: set[Place]) -> tuple[list[dict[str, Any]], int]:
        """The rows that are new, in their order, and the number of those that are not.

        Args:
            rows: in the order of their offsets within each topic-partition.
            known: the topic-partitions of which the lake has something already.
        """
        rows = list(rows)
        suspects: set[str] = set()
        high = {place: recent.high for place, recent in self._places.items()}
        for row in rows:
            place, position = (row["topic"], row["partition"]), row["position"]
            before = high.get(place)
            if position is None or (before is not None and position <= before):
                recent = self._places.get(place)
                seen_here = recent is not None and row["id"] in recent.ids
                older = position is None or (
                    recent is not None and recent.floor is not None and position <= recent.floor
                )
                if not seen_here and older and place in known:
                    suspects.add(row["id"])
            if position is not None:
                high[place] = position if before is None else max(before, position)
        in_lake = self._lookup(suspects) if suspects else set()
        fresh = []
        batch: set[tuple[Place, str]] = set()
        for row in rows:
            place = (row["topic"], row["partition"])
            recent = self._places.setdefault(place, _Recent(None))
            if row["id"] in recent.ids or row["id"] in in_lake or (place, row["id"]) in batch:
                continue
            batch.add((place, row["id"]))
            recent.add(row["id"], row["position"])
            fresh.append(row)
        return fresh, len(rows) - len(fresh)

    def positions(self) -> dict[Place, int]:
        """Highest store position by topic-partition."""
        return {place: recent.high for place, recent in self._places.items() if recent.high is not None}
