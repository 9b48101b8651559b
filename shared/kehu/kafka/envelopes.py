"""A reader for effects that look at envelopes only."""

from __future__ import annotations

from collections.abc import Sequence

from kehu.kafka.guard import Item, Place, Reader


class EnvelopeReader(Reader):
    """Decodes no event, and wants all of them: for counts and copies. One of a type that this release does not know counts too."""

    def __init__(self) -> None:
        super().__init__(())

    def item(
        self, place: Place, offset: int, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]
    ) -> Item:
        item = super().item(place, offset, key, value, headers)
        item.wanted = True
        return item
