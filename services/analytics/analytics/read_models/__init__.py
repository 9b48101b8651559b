"""The read models of analytics, one query family a file."""

from analytics.read_models.base import TIMEZONE, GenerationalModel, consumer_of, table_of
from analytics.read_models.customer_timeline import CustomerTimeline
from analytics.read_models.event_counts import EventCounts
from analytics.read_models.lead_journey import LeadJourney

READ_MODELS: dict[str, type[GenerationalModel]] = {
    model.name: model for model in (CustomerTimeline, LeadJourney, EventCounts)
}

__all__ = [
    "READ_MODELS",
    "TIMEZONE",
    "CustomerTimeline",
    "EventCounts",
    "GenerationalModel",
    "LeadJourney",
    "consumer_of",
    "table_of",
]
