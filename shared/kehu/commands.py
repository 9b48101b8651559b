"""The way of a command: look up its id, prepare, load, decide, append; many commands in one transaction.

API requests that arrive together, rows of an import, and the reactions of a consumer to a batch of events all take this
one way. A refusal fails only its own command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Generic, Literal, Protocol, TypeVar
from uuid import UUID

from pydantic_core import from_json, to_json

from kehu.clock import Clock
from kehu.decider import Decider, Refused
from kehu.events import Envelope, Event, Recorded
from kehu.eventstore import CarriedOut, Conflict, EventStore, Pending, StreamSlice
from kehu.eventstore.store import translated
from kehu.ids import derived, uuid7
from kehu.observability import spans
from kehu.postgres import Connection, Row, write_rows
from kehu.privacy import Keyring, needs_key, seal

C = TypeVar("C")
X = TypeVar("X")


@dataclass(frozen=True, slots=True)
class Context:
    """Who and what is behind a command. All ids, never names.

    Args:
        actor: `user:<id>`, `service:<name>` or `customer:<id>`.
        correlation_id: the same along a whole chain of commands and events.
        causation_id: id of the request or event that caused this command.
        traceparent: W3C trace context.
    """

    actor: str
    correlation_id: str
    causation_id: str
    traceparent: str | None = None

    @classmethod
    def of_event(cls, recorded: Recorded, service: str) -> Context:
        """The context of a command that an event caused."""
        return cls(f"service:{service}", recorded.correlation_id, str(recorded.id), recorded.traceparent)


@dataclass(frozen=True, slots=True)
class Request(Generic[C]):
    """A command with its surroundings.

    Args:
        command_id: carrying it out twice does nothing the second time.
        expected_version: of the first step's stream, from If-Match.
        fingerprint: of the request's body; the same id with another fingerprint is refused.
        at: business time of the events; the clock's time when None.
    """

    command: C
    command_id: UUID
    context: Context
    expected_version: int | None = None
    fingerprint: bytes | None = None
    at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One stream's part in a command.

    Args:
        new: the stream cannot exist yet (its id was just made), so it need not be loaded.
        history: False when the decider has no state, so that of a long stream only the newest event is read.
    """

    stream: str
    decider: Decider[Any, Any]
    command: Any
    customer_id: str | None = None
    new: bool = False
    history: bool = True


def caused_by(recorded: Recorded, service: str, handler: str, command: C, index: int = 0) -> Request[C]:
    """The request of a policy's reaction: the same event, handler and index give the same command id, so that a repeat does nothing.

    The events get the business time of the event that caused them.

    Args:
        handler: stable name of the policy; it is part of the command id and must not be renamed.
        index: number of the command among those that this handler makes of this event.
    """
    command_id = derived(recorded.id, handler, index)
    return Request(command, command_id, Context.of_event(recorded, service), at=recorded.time)


def _no_rows(_: Sequence[Pending]) -> Iterable[Row]:
    return ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a command does: steps that are appended together, and rows in the same transaction.

    Args:
        steps: one for each stream.
        result: the answer to the caller, JSON; stored with the command id. A function gets the new events.
        rows: written after the append; a function of the new events.
        keys: keys made in this plan for new customers, by customer id.
    """

    steps: Sequence[Step]
    result: Mapping[str, Any] | Callable[[Sequence[Pending]], Mapping[str, Any]] = field(default_factory=dict)
    rows: Callable[[Sequence[Pending]], Iterable[Row]] = _no_rows
    keys: Mapping[str, bytes] = field(default_factory=dict)


Prepare = Callable[[Connection, Sequence[Request[Any]]], Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Handles:
    """How a kind of command is handled.

    Args:
        plan: from the command (its request) and what was prepared for it, to its plan. May raise Refused.
        prepare: one look-up for a whole batch of such commands, giving one context each.
    """

    plan: Callable[[Request[Any], Any], Plan]
    prepare: Prepare | None = None


def on(
    decider: Decider[C, Any],
    stream: Callable[[C], object],
    customer: Callable[[C], object] | None = None,
    rows: Callable[[C, Sequence[Pending]], Iterable[Row]] | None = None,
) -> Handles:
    """The usual case: one command, one stream, one decider.

    Args:
        stream: gives the key of the stream, e.g. the lead id; the category is the decider's.
        customer: gives the customer id, which becomes the Kafka key of a new stream.
        rows: to be written in the same transaction.
    """

    def plan(request: Request[C], _: Any) -> Plan:
        command = request.command
        name = f"{decider.stream}-{stream(command)}"
        return Plan(
            steps=[Step(name, decider, command, str(customer(command)) if customer else None)],
            rows=(lambda new: rows(command, new)) if rows else _no_rows,
        )

    return Handles(plan)


class Progress(Protocol):
    """How far a consumer, timer or projector has come; written in the transaction of the effect."""

    def write(self, connection: Connection) -> None:
        """Raises StaleProgress when another holder has moved on, so that the transaction is rolled back."""
        ...


class StaleProgress(Exception):
    """Another process has taken over: what this one was about to write is dropped."""


@dataclass(frozen=True, slots=True)
class Done:
    """The command was carried out, now or earlier (`repeated`).

    Args:
        result: the answer, the same each time.
        versions: version of each stream that it touched.
        events: what it appended now; empty when repeated.
    """

    result: Mapping[str, Any]
    versions: Mapping[str, int]
    events: Sequence[Pending] = ()
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """Nothing was recorded.

    Args:
        kind: `refused` by a rule, `conflict` with a newer version, `reused` command id with another body.
    """

    refusal: Refused
    kind: Literal["refused", "conflict", "reused"] = "refused"


Outcome = Done | Failed


@dataclass(slots=True)
class _Stream:
    """A stream inside a batch: what is stored and what the batch has added so far."""

    slice: StreamSlice
    version: int
    partition_key: str | None
    customer_id: str | None
    added: list[Event] = field(default_factory=list)
    states: dict[int, tuple[Any, int]] = field(default_factory=dict)

    def state(self, decider: Decider[Any, Any]) -> Any:
        """Fold what is stored and added, once for each decider and event."""
        state, folded = self.states.get(id(decider), (None, -1))
        if folded < 0:
            state, folded = decider.fold(r.event for r in self.slice.events), 0
        for event in self.added[folded:]:
            state = decider.evolve(state, event)
        self.states[id(decider)] = (state, len(self.added))
        return state


class CommandHandler:
    """Carries out commands of one service.

    Args:
        handlers: the service's table of contents, by type of command.
        keyring: for sealing personal data of existing customers.
        committed: called after each commit that appended something, e.g. to wake followers.
    """

    RETRIES = 3

    def __init__(
        self,
        store: EventStore,
        handlers: Mapping[type[Any], Handles],
        clock: Clock,
        keyring: Keyring,
        committed: Callable[[], None] | None = None,
    ) -> None:
        self.store, self.handlers, self.clock, self.keyring = store, handlers, clock, keyring
        self._committed = committed

    def handle(self, requests: Sequence[Request[Any]], progress: Progress | None = None) -> list[Outcome]:
        """Carry out all of these in one transaction, with the progress of whoever asks.

        On a conflict everything is loaded and decided again, up to three times, then each command on its own.

        Raises:
            Conflict: only with `progress`, when a conflict stays: the whole batch was rolled back.
            StaleProgress: another process has taken over; the whole batch was rolled back.
            KeysUnavailable, psycopg.OperationalError: nothing was done; try again.
        """
        conflict: Conflict | None = None
        for number in range(1 + self.RETRIES):
            try:
                return self._attempt(requests, progress, first_try=number == 0)
            except Conflict as error:
                conflict = error
        if progress is not None and conflict is not None:
            raise conflict
        if len(requests) == 1:
            return [Failed(Refused("conflict", "the stream is being changed by others; try again"), "conflict")]
        return [self.handle([request])[0] for request in requests]

    def _attempt(self, requests: Sequence[Request[Any]], progress: Progress | None, first_try: bool) -> list[Outcome]:
        epoch = self.store.epoch  # read before a connection is held: nobody may wait for a second one while holding one
        with self.store.pool.connection() as connection:
            plans = self._plans(connection, requests)
            steps = [step for plan in plans if isinstance(plan, Plan) for step in plan.steps]
            whole = {step.stream for step in steps if step.history and not step.new}
            newest = {step.stream for step in steps if not step.history and not step.new} - whole
            # With nothing to load, hope that no command is a resent one: if one is, the append conflicts and we look. A
            # refusal can come of what the command itself did when it was first sent: then we look at once.
            hopeful = first_try and not whole and not newest and all(isinstance(plan, Plan) for plan in plans)
            command_ids = [] if hopeful else [r.command_id for r in requests]
            carried_out, slices = self.store.load_for_decision(connection, command_ids, list(whole))
            if newest:
                slices.update(self.store.load_newest(connection, list(newest)))
            slices.update({s.stream: StreamSlice(s.stream) for s in steps if s.new and s.stream not in slices})
            streams = {
                s: _Stream(part, part.version, part.partition_key, part.customer_id) for s, part in slices.items()
            }
            recorded_at = self.clock.now()
            outcomes: list[Outcome | None] = [None] * len(requests)
            decided: list[tuple[int, Plan, list[Pending]]] = []
            first: dict[UUID, int] = {}
            for i, (request, plan) in enumerate(zip(requests, plans, strict=True)):
                done = carried_out.get(request.command_id)
                if done is not None:
                    outcomes[i] = _answer_again(request, done)
                elif first.setdefault(request.command_id, i) != i:
                    continue  # the same command twice in one batch: answered below
                elif isinstance(plan, Refused):
                    outcomes[i] = Failed(plan)
                else:
                    try:
                        decided.append((i, plan, self._decide(request, plan, streams, recorded_at, epoch)))
                    except Refused as refusal:
                        if hopeful:
                            raise Conflict("perhaps_resent") from refusal
                        outcomes[i] = Failed(refusal)
                    except _VersionLost as lost:
                        outcomes[i] = Failed(Refused("version-conflict", str(lost)), "conflict")
            self._commit(connection, requests, decided, progress, outcomes)
        for i in range(len(requests)):
            if outcomes[i] is None:
                earlier = outcomes[first[requests[i].command_id]]
                outcomes[i] = replace(earlier, events=(), repeated=True) if isinstance(earlier, Done) else earlier
        if any(pending for _, _, pending in decided) and self._committed is not None:
            self._committed()
        return [outcome for outcome in outcomes if outcome is not None]

    def _plans(self, connection: Connection, requests: Sequence[Request[Any]]) -> list[Plan | Refused]:
        """The plan of each command; one look-up for all commands of a type."""
        by_type: dict[type[Any], list[int]] = {}
        for i, request in enumerate(requests):
            by_type.setdefault(type(request.command), []).append(i)
        plans: dict[int, Plan | Refused] = {}
        for kind, indexes in by_type.items():
            handles = self.handlers[kind]
            batch = [requests[i] for i in indexes]
            contexts = handles.prepare(connection, batch) if handles.prepare else [None] * len(batch)
            for i, request, context in zip(indexes, batch, contexts, strict=True):
                try:
                    plans[i] = handles.plan(request, context)
                except Refused as refusal:
                    plans[i] = refusal
        return [plans[i] for i in range(len(requests))]

    def _decide(
        self, request: Request[Any], plan: Plan, streams: dict[str, _Stream], recorded_at: datetime, epoch: str
    ) -> list[Pending]:
        decisions: list[tuple[_Stream, Step, Sequence[Event]]] = []
        for number, step in enumerate(plan.steps):
            stream = streams[step.stream]
            if number == 0 and request.expected_version is not None and request.expected_version != stream.version:
                raise _VersionLost(f"the version is {stream.version}, not {request.expected_version}: read it again")
            decisions.append((stream, step, step.decider.decide(step.command, stream.state(step.decider))))
        pending: list[Pending] = []
        for stream, step, events in decisions:  # only now: a refusal of a later step leaves the batch untouched
            if events and stream.partition_key is None:
                stream.customer_id = step.customer_id
                stream.partition_key = step.customer_id or step.stream
            for event in events:
                stream.version += 1
                stream.added.append(event)
                assert stream.partition_key is not None
                envelope = Envelope(
                    id=uuid7(recorded_at),
                    producer=self.store.producer,
                    stream=step.stream,
                    version=stream.version,
                    time=event.happened or request.at or recorded_at,
                    recorded=recorded_at,
                    partition_key=stream.partition_key,
                    customer_id=stream.customer_id,
                    correlation_id=request.context.correlation_id,
                    causation_id=request.context.causation_id,
                    actor=request.context.actor,
                    traceparent=request.context.traceparent,
                    store_epoch=epoch,
                )
                pending.append(Pending(envelope, event))
        return pending

    def _commit(
        self,
        connection: Connection,
        requests: Sequence[Request[Any]],
        decided: list[tuple[int, Plan, list[Pending]]],
        progress: Progress | None,
        outcomes: list[Outcome | None],
    ) -> None:
        if not decided and progress is None:
            return
        sealed = self._sealed(decided)
        commands: list[CarriedOut] = []
        rows: list[Row] = []
        for i, plan, new in decided:
            request = requests[i]
            versions = {p.envelope.stream: p.envelope.version for p in new}
            result = plan.result(new) if callable(plan.result) else plan.result
            outcomes[i] = Done(result, versions, new)
            answer = to_json({"result": result, "versions": versions}).decode()
            commands.append(CarriedOut(request.command_id, request.fingerprint, answer))
            rows.extend(plan.rows(new))
        traces = (requests[i].context.traceparent for i, _, _ in decided)
        with translated(), spans("append", traces, events=len(sealed)):
            if progress is None and not rows:
                self.store.append(connection, sealed, commands)  # one statement, one transaction, one round trip
            elif progress is None:
                # Nothing is read in here, so all statements travel together. Up to the pipeline's one sync they are one
                # transaction without a BEGIN: one round trip and one flush to disk.
                with connection.pipeline():
                    self.store.append(connection, sealed, commands)
                    write_rows(connection, rows)
            else:
                with connection.transaction():
                    self.store.append(connection, sealed, commands)
                    write_rows(connection, rows)
                    progress.write(connection)

    def _sealed(self, decided: list[tuple[int, Plan, list[Pending]]]) -> list[Pending]:
        pending = [p for _, _, new in decided for p in new]
        plain = {i: p.envelope.customer_id for i, p in enumerate(pending) if needs_key(p.event)}
        keys: dict[str | None, bytes | None] = {}
        for _, plan, _ in decided:
            keys.update(plan.keys)
        missing = {customer for customer in plain.values() if customer is not None and customer not in keys}
        if missing:
            keys.update(self.keyring.keys(missing))
        for i, customer in plain.items():
            key = keys.get(customer)
            if customer is None or key is None:
                raise Conflict("customer_erased")  # its key went between the decision and now: decide again
            pending[i] = Pending(pending[i].envelope, seal(pending[i].event, pending[i].envelope.id, customer, key))
        return pending


class _VersionLost(Exception):
    """If-Match named another version than the stream has."""


def _answer_again(request: Request[Any], done: CarriedOut) -> Outcome:
    if request.fingerprint is not None and done.fingerprint is not None and done.fingerprint != request.fingerprint:
        detail = "this idempotency key was used for another request; use a new key"
        return Failed(Refused("idempotency-key-reused", detail), "reused")
    answer = from_json(done.result)
    return Done(answer["result"], answer["versions"], repeated=True)
