"""Given events, when a command, then events, a refusal, or nothing: the shape of every decider's spec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kehu.decider import Decider, Refused
from kehu.events import Event


@dataclass
class Spec:
    """One spec of a decider::

    Spec(lead).given(captured).when(RejectLead(...)).then(LeadRejected(...))
    """

    decider: Decider[Any, Any]
    _given: list[Event] = field(default_factory=list)
    _events: Sequence[Event] | None = None
    _refused: Refused | None = None

    def given(self, *events: Event) -> Spec:
        """What happened before."""
        self._given.extend(events)
        return self

    def when(self, command: object) -> Spec:
        """Decide the command on the state of what happened before; what it gives counts as having happened for a next `when`."""
        self._events = self._refused = None
        try:
            self._events = list(self.decider.decide(command, self.decider.fold(self._given)))
            self._given.extend(self._events)
        except Refused as refused:
            self._refused = refused
        return self

    def then(self, *expected: Event) -> Spec:
        """Exactly these events."""
        assert self._refused is None, f"refused: {self._refused}"
        assert list(self._events or ()) == list(expected)
        return self

    def then_nothing(self) -> Spec:
        """Neither an event nor a refusal: there is nothing to do."""
        return self.then()

    def then_refused(self, slug: str) -> Spec:
        """A refusal with this slug."""
        assert self._refused is not None, f"not refused: {self._events}"
        assert self._refused.slug == slug, f"refused for another reason: {self._refused}"
        return self

    @property
    def events(self) -> Sequence[Event]:
        """What the last command gave, for assertions on parts of an event."""
        assert self._events is not None, f"refused: {self._refused}"
        return self._events
