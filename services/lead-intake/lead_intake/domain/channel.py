"""The catalogue of ways by which leads come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kehu.decider import Decider
from kehu.events import Event
from kehu.events.lead_intake import ChannelDefined


@dataclass(frozen=True, slots=True)
class DefineChannel:
    """Add a channel, or say something new of it.

    Args:
        kind: its tag, e.g. `search_ads`, `trade_fair`, `referral`, `partner`, `list`; it weighs in the first rating.
        active: whether it takes new leads.
    """

    channel: str
    title: str
    kind: str
    active: bool = True


@dataclass(frozen=True, slots=True)
class Channel:
    title: str
    kind: str
    active: bool


def decide(command: DefineChannel, channel: Channel | None) -> Sequence[Event]:
    """Defining it again as it is does nothing."""
    if channel == Channel(command.title, command.kind, command.active):
        return ()
    return (ChannelDefined(channel=command.channel, title=command.title, kind=command.kind, active=command.active),)


def evolve(channel: Channel | None, event: Event) -> Channel | None:
    """Fold one event."""
    if isinstance(event, ChannelDefined):
        return Channel(event.title, event.kind, event.active)
    return channel


CHANNEL: Decider[DefineChannel, Channel | None] = Decider("channel", None, decide, evolve)
