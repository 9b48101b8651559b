"""The event store of a service: `eventsourcing` behind our own recorder. The only importer of that library."""

from kehu.eventstore.recorder import CarriedOut, Pending, Recorder
from kehu.eventstore.store import AppendFirst, Conflict, Cursor, EventStore, LogRow, StreamSlice

__all__ = [
    "AppendFirst",
    "CarriedOut",
    "Conflict",
    "Cursor",
    "EventStore",
    "LogRow",
    "Pending",
    "Recorder",
    "StreamSlice",
]
