"""Identifiers: time-ordered UUIDs for new things, name-based ones where a resend must give the same id."""

from __future__ import annotations

import os
import uuid
from datetime import datetime

# Namespace of all name-based ids of the suite.
KEHU = uuid.UUID("6b656875-0000-5000-8000-6b6568750000")


# Random numbers of 80 bits, made 256 at a time: each system call gives up the interpreter's lock, and with it up to 5 ms.
_made: list[int] = []
os.register_at_fork(after_in_child=_made.clear)


def _random() -> int:
    while True:
        try:
            return _made.pop()
        except IndexError:
            fresh = os.urandom(10 * 256)
            _made.extend(int.from_bytes(fresh[i : i + 10], "big") for i in range(0, len(fresh), 10))


def uuid7(at: datetime) -> uuid.UUID:
    """A UUID version 7 (RFC 9562): 48 bits of Unix milliseconds, 74 random bits.

    Args:
        at: the instant it is ordered by; aware.
    """
    milliseconds = int(at.timestamp() * 1000) & 0xFFFF_FFFF_FFFF
    random = _random()
    value = milliseconds << 80 | 0x7 << 76 | (random >> 68 & 0xFFF) << 64 | 0b10 << 62 | random & 0x3FFF_FFFF_FFFF_FFFF
    return uuid.UUID(int=value)


def derived(*parts: object) -> uuid.UUID:
    """The same UUID (version 5) for the same parts, wherever and whenever it is computed."""
    return uuid.uuid5(KEHU, "\x1f".join(str(part) for part in parts))
