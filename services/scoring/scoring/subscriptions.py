"""What scoring consumes, and what happens when an event cannot be handled."""

from __future__ import annotations

from kehu.commands import CommandHandler
from kehu.kafka.consumer import Subscription
from kehu.kafka.effects import Policy
from scoring.policies import LEARN, REACTS_TO, learn


def scores(handler: CommandHandler) -> Subscription:
    """Leads, behaviours and merges → scores. What fails is parked with its stream, so that all other leads go on."""
    return Subscription("scores", ("lead-intake",), Policy(handler, LEARN, "scoring", learn, REACTS_TO))
