"""What analytics consumes, and what happens when an event cannot be handled."""

from __future__ import annotations

from analytics.read_models import GenerationalModel
from analytics.read_models.generations import SERVICE
from kehu.events.base import PRODUCERS
from kehu.kafka.consumer import Subscription
from kehu.kafka.effects import Effect
from kehu.kafka.envelopes import EnvelopeReader
from kehu.kafka.topics import group_of, topic_of

# Everybody's events: analytics writes none of its own.
SERVICES: tuple[str, ...] = PRODUCERS
TOPICS: tuple[str, ...] = tuple(map(topic_of, SERVICES))
# The Faust worker's application, Kafka group and consumer in the database.
LIVE_COUNTERS = group_of(SERVICE, "live_counters")


def projection(model: GenerationalModel, effect: Effect, batch: int) -> Subscription:
    """A read model's generation: from the first event on; what fails is parked with the later events of its stream."""
    reader = EnvelopeReader() if model.envelopes_only else None
    return Subscription(model.consumer, SERVICES, effect, batch=batch, reader=reader)
