"""The channel catalogue as captures need it: asked for at every lead, changed a few times a year."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from kehu.decider import Refused
from kehu.events.lead_intake import ChannelDefined
from kehu.postgres import Connection, Row


@dataclass(frozen=True, slots=True)
class KnownChannel:
    """What a capture must know of a channel."""

    kind: str
    active: bool


class Channels:
    """Remembers known channels for a few seconds. An unknown one is always asked for, so that a new channel works at once.

    Args:
        seconds: how long a channel that was closed may still take leads.
    """

    MOST = 10_000

    def __init__(self, seconds: float = 5.0) -> None:
        self._seconds = seconds
        self._known: dict[str, tuple[float, KnownChannel]] = {}

    def look_up(self, connection: Connection, codes: Iterable[str]) -> dict[str, KnownChannel]:
        """Those of the channels that exist, closed ones too."""
        now = time.monotonic()
        found: dict[str, KnownChannel] = {}
        missing: list[str] = []
        for code in codes:
            until, channel = self._known.get(code, (0.0, None))
            if channel is not None and until > now:
                found[code] = channel
            else:
                missing.append(code)
        if missing:
            rows = connection.execute("SELECT channel, kind, active FROM channels WHERE channel = ANY(%s)", (missing,))
            if len(self._known) > self.MOST:
                self._known.clear()
            for code, kind, active in rows:
                found[code] = KnownChannel(kind, active)
                self._known[code] = (now + self._seconds, found[code])
        return found


def refusal(code: str, channel: KnownChannel | None) -> Refused | None:
    """Why a channel takes no lead; None when it does."""
    if channel is None:
        return Refused("unknown-channel", f"there is no channel {code}: define it with PUT /channels/{code}", "channel")
    if not channel.active:
        return Refused("channel-closed", f"the channel {code} takes no leads any more", "channel")
    return None


def defined(event: ChannelDefined, version: int) -> Row:
    """The channel's row."""
    return (
        "INSERT INTO channels (channel, title, kind, active, version) VALUES (%s, %s, %s, %s, %s)"
        " ON CONFLICT (channel) DO UPDATE SET title = excluded.title, kind = excluded.kind,"
        " active = excluded.active, version = excluded.version",
        (event.channel, event.title, event.kind, event.active, version),
    )


class ChannelRow(NamedTuple):
    """A line of the catalogue."""

    channel: str
    title: str
    kind: str
    active: bool
    version: int


def catalogue(connection: Connection, limit: int, after: str | None = None) -> list[ChannelRow]:
    """The channels in order of their codes.

    Args:
        after: the code of the last row of the page before.
    """
    rows = connection.execute(
        "SELECT channel, title, kind, active, version FROM channels WHERE channel > %s ORDER BY channel LIMIT %s",
        (after or "", limit),
    ).fetchall()
    return [ChannelRow(*row) for row in rows]
