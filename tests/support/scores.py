"""The oracle of scores: what scoring must have recorded, as a pure fold of lead-intake's log by the rules of the domain.

Facts are taken in the order of the log, each customer by itself. Time alone changes scores as well: when its events were
recorded before or after a fact is a matter of when the timer ran, so those are followed in the order in which they were
recorded, and each must be of exactly the second that the rules foresee.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from uuid import UUID

from kehu.events import Event, Recorded
from kehu.events.scoring import LeadScoreChanged, ScoringModelPublished
from scoring.domain.evaluation import Rulebook
from scoring.domain.knowledge import BehaviourSeen, CustomerLeft, Fact, Knowledge, Lead, LeadClosed
from scoring.domain.lead_score import LEAD_SCORE, Assessment, Cause, LeadScore, Rescore, assess
from scoring.policies import learn
from support.suite import Suite


def judge_scores(suite: Suite, intake: Sequence[Recorded], scoring: Sequence[Recorded]) -> Iterator[str]:
    """Yields where the recorded scores, or the timers that stand, are not what the fold gives.

    Args:
        intake, scoring: all events of the two services, in the order of their logs.
    """
    now = suite.clock.now()
    books = {
        event.model_version: Rulebook(event.model, event.model_version, event.effective)
        for recorded in scoring
        if recorded.is_a(ScoringModelPublished) and isinstance(event := recorded.event, ScoringModelPublished)
    }
    made: dict[UUID, list[Recorded]] = {}
    for recorded in scoring:
        if recorded.stream.startswith("lead_score-"):
            made.setdefault(UUID(recorded.stream.removeprefix("lead_score-")), []).append(recorded)
    timers = {
        UUID(lead): due for lead, due in suite.rows("scoring", "SELECT key, due_at FROM timers WHERE process = 'decay'")
    }
    customers: dict[str, list[Recorded]] = {}
    for recorded in intake:
        if recorded.customer_id is not None:
            customers.setdefault(recorded.customer_id, []).append(recorded)
    for customer, facts in customers.items():
        oracle = _Oracle(books, made, facts)
        yield from oracle.fold()
        yield from oracle.rest(now, timers, customer)
    yield from (f"lead_score-{lead} was recorded of a lead that nobody captured" for lead in made)


@dataclass
class _Scored:
    """The score of a lead, as far as the fold has come.

    Args:
        left: recorded decisions that are still to be explained, the events of each together.
    """

    left: deque[list[Recorded]]
    state: LeadScore = field(default_factory=LeadScore)
    last: Assessment | None = None


class _Oracle:
    """Folds the facts of one customer.

    Args:
        made: recorded scores by lead; those of the customer's leads are taken out.
        facts: the customer's events, in order.
    """

    def __init__(
        self, books: Mapping[int, Rulebook], made: dict[UUID, list[Recorded]], facts: Sequence[Recorded]
    ) -> None:
        self.books, self.made = books, made
        self.facts = facts
        self.ids = {str(fact.id) for fact in facts}
        self.known = Knowledge()
        self.leads: dict[UUID, _Scored] = {}

    def fold(self) -> Iterator[str]:
        """Take the facts in and compare every decision with what was recorded."""
        for recorded in self.facts:
            for command in learn(recorded):
                yield from self._before(recorded)
                self.known.learn(command.fact, recorded.recorded)
                lead = self.known.scored(command.fact.customer_id)
                if lead is None or isinstance(command.fact, CustomerLeft):
                    continue
                scored = self._of(lead.lead_id)
                rescore = self._rescore(lead, scored, recorded.time, _cause(command.fact), (recorded.id,))
                yield from self._compare(lead, scored, rescore, str(recorded.id))

    def _before(self, fact: Recorded) -> Iterator[str]:
        """Decisions that came before the fact's own: recorded before it, or of a time before it when it decided nothing."""
        for lead in list(self.known.leads.values()):
            scored = self._of(lead.lead_id)
            decided = any(group[0].causation_id == str(fact.id) for group in scored.left)
            while scored.left and scored.left[0][0].causation_id != str(fact.id):
                if not decided and scored.left[0][0].time > fact.time:
                    break
                if scored.left[0][0].causation_id in self.ids:
                    break  # of a later fact
                yield from self._by_itself(lead, scored)

    def _by_itself(self, lead: Lead, scored: _Scored) -> Iterator[str]:
        """The next recorded decision, which no fact caused."""
        group = scored.left[0]
        event = group[0].event
        at = getattr(event, "at", group[0].time)
        cause: Cause = event.cause if isinstance(event, LeadScoreChanged) else "decay"
        if cause not in ("decay", "model"):
            scored.left.popleft()
            yield f"{group[0]} was caused by {group[0].causation_id}, which is no fact of this lead"
            return
        if cause == "decay":
            due = self._due(lead, scored, at)
            if due != at:
                yield f"{group[0]} faded at {at}, and the rules foresee {due}"
        rescore = self._rescore(lead, scored, at, cause, ())
        yield from self._compare(lead, scored, rescore, group[0].causation_id)

    def _due(self, lead: Lead, scored: _Scored, until: datetime) -> datetime | None:
        """When time alone changes something next, looking again at early answers up to `until`."""
        due = scored.last.next_change if scored.last else None
        while due is not None and due < until:
            looked = assess(self._rescore(lead, scored, due, "decay", ()), scored.state)
            if looked.events:
                return due
            due = looked.next_change
        return due

    def _compare(self, lead: Lead, scored: _Scored, rescore: Rescore, causation: str) -> Iterator[str]:
        """Decide, and compare with the next recorded decision of the same cause."""
        assessment = assess(rescore, scored.state)
        group = scored.left.popleft() if scored.left and scored.left[0][0].causation_id == causation else []
        recorded: list[Event] = [each.event for each in group]
        if list(assessment.events) != recorded:
            yield (
                f"lead_score-{lead.lead_id}: {rescore.cause} at {rescore.at} ({causation}) gives {_short(assessment.events)},"
                f" recorded is {_short(recorded)}"
            )
        scored.state, scored.last = LEAD_SCORE.fold(recorded, scored.state), assessment

    def rest(self, now: datetime, timers: dict[UUID, datetime], customer: str) -> Iterator[str]:
        """What time alone did after the last fact, what it should have done by now, and the timer that must stand."""
        for lead_id, scored in self.leads.items():
            lead = self.known.leads[lead_id]
            while scored.left:
                yield from self._by_itself(lead, scored)
            if lead.closed_at is not None or scored.last is None:
                continue
            due = self._due(lead, scored, now)
            if due is not None and due <= now:
                yield f"lead_score-{lead_id} should have changed at {due}, and it is {now}"
            if due is not None and timers.get(lead_id) != due:
                yield f"lead {lead_id} of {customer}: the timer stands at {timers.get(lead_id)}, not at {due}"

    def _of(self, lead_id: UUID) -> _Scored:
        if lead_id not in self.leads:
            events = self.made.pop(lead_id, [])
            groups = [list(group) for _, group in groupby(events, key=lambda event: event.causation_id)]
            self.leads[lead_id] = _Scored(deque(groups))
        return self.leads[lead_id]

    def _rescore(self, lead: Lead, scored: _Scored, at: datetime, cause: Cause, events: tuple[UUID, ...]) -> Rescore:
        """By the model of the next recorded decision, else by the last one that decided."""
        version = getattr(scored.left[0][0].event, "model_version", 0) if scored.left else 0
        book = self.books.get(version) or (scored.last.evaluation.book if scored.last else self.books[max(self.books)])
        return Rescore(lead.lead_id, lead.customer_id, at, cause, events, book, self.known.inputs(lead.lead_id))


def _cause(fact: Fact) -> Cause:
    return "behaviour" if isinstance(fact, BehaviourSeen) else "merge" if isinstance(fact, LeadClosed) else "profile"


def _short(events: Sequence[Event]) -> str:
    return "; ".join(f"{e.TYPE} {e.model_dump(include={'score', 'band', 'at', 'cause'})}" for e in events) or "nothing"
