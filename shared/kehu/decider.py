"""The shape of all business rules: decide(command, state) → events, evolve(state, event) → state. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from kehu.events import Event

C = TypeVar("C")
S = TypeVar("S")


class Refused(Exception):
    """A rule says no. Nothing was recorded; the caller gets the reason.

    Args:
        slug: stable code a program can act on, e.g. `lead-already-rejected`.
        detail: what a person should know, without personal data.
        field: the input that caused it, if one did.
    """

    def __init__(self, slug: str, detail: str, field: str | None = None) -> None:
        super().__init__(f"{slug}: {detail}")
        self.slug, self.detail, self.field = slug, detail, field


@dataclass(frozen=True, slots=True)
class Decider(Generic[C, S]):
    """One aggregate's rules.

    Args:
        stream: category of its streams, e.g. `lead` for `lead-<uuid>`.
        initial: the state before the first event.
        decide: gives the events of a command, none when there is nothing to do (that makes a resend safe); raises Refused.
        evolve: folds one event into the state; never refuses and never fails on a recorded fact.
    """

    stream: str
    initial: S
    decide: Callable[[C, S], Sequence[Event]]
    evolve: Callable[[S, Event], S]

    def fold(self, events: Iterable[Event], state: S | None = None) -> S:
        """The state after these events."""
        current = self.initial if state is None else state
        for event in events:
            current = self.evolve(current, event)
        return current
