"""What can go wrong with a lake, by name."""

from __future__ import annotations


class LakeError(Exception):
    """Base of everything that the lake raises on purpose."""


class LakeMissing(LakeError):
    """There is no lake in this directory."""


class LakeConflict(LakeError):
    """Another process committed what this one was about to commit. Read the offsets again and go on from there."""


class LakeGap(LakeError):
    """A batch does not start where the lake ends: records in between would be lost.

    Args:
        topic, partition: where.
        expected: the offset that the lake needs next.
        got: the offset that came.
    """

    def __init__(self, topic: str, partition: int, expected: int, got: int) -> None:
        super().__init__(f"{topic}[{partition}]: the lake needs offset {expected} next, the batch has {got}")
        self.topic, self.partition, self.expected, self.got = topic, partition, expected, got


class SnapshotGone(LakeError):
    """This version of the lake is not there: never committed, or vacuumed."""


class LakeCorrupt(LakeError):
    """The log of the lake has a hole or an entry that cannot be read."""


class QueryRefused(LakeError):
    """Only one SELECT may be asked of the lake."""
