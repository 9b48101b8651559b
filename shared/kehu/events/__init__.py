"""Every domain event of the suite, declared once, in its producer's module.

This package imports only the standard library and pydantic, so that a subscriber can use it alone.
"""

from kehu.events.base import Event, UnknownEvent, event_class, event_types, registered, upcaster
from kehu.events.envelope import Actor, Envelope, MalformedEnvelope, Recorded
from kehu.events.values import Money, Personal, PersonalState, PlaintextLeak

__all__ = [
    "Actor",
    "Envelope",
    "Event",
    "MalformedEnvelope",
    "Money",
    "Personal",
    "PersonalState",
    "PlaintextLeak",
    "Recorded",
    "UnknownEvent",
    "event_class",
    "event_types",
    "registered",
    "upcaster",
]
