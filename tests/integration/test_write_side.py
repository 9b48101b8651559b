"""The way of a command on real PostgreSQL: once, in order, whole or not at all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from kehu.clock import FixedClock
from kehu.commands import CommandHandler, Context, Done, Failed, Handles, Plan, Request, StaleProgress, Step, on
from kehu.decider import Decider, Refused
from kehu.events import Event, Personal, PersonalState
from kehu.events.lead_intake import ChannelDefined, Contact, LeadDetailsUpdated
from kehu.eventstore import AppendFirst, Conflict, Cursor, EventStore
from kehu.gate import CommandGate
from kehu.migrations import MigrationError, find, migrate
from kehu.postgres import Connection, Pool, Row, open_pool
from kehu.privacy import TamperedToken, new_key, opened
from kehu.read_models import Projector
from kehu.timers import Timer, TimerRunner, cancel, schedule

NOW = datetime(2026, 3, 1, 8, 0, tzinfo=UTC)


@dataclass(frozen=True)
class Define:
    channel: str
    title: str


def _decide(command: Define, titles: tuple[str, ...]) -> list[Event]:
    if command.title == "forbidden":
        raise Refused("forbidden-title", "this title is not allowed", "title")
    if command.title == "broken":
        raise ZeroDivisionError("a bug in a rule")
    if titles and titles[-1] == command.title:
        return []
    return [ChannelDefined(channel=command.channel, title=command.title, kind="web")]


channel: Decider[Define, tuple[str, ...]] = Decider(
    "channel",
    (),
    _decide,
    lambda titles, event: (*titles, event.title) if isinstance(event, ChannelDefined) else titles,
)


@dataclass(frozen=True)
class Note:
    """Puts personal data on a lead of a customer."""

    lead_id: UUID
    customer_id: UUID
    name: str
    key: bytes


def _note(command: Note, _: None) -> list[Event]:
    contact = Personal(Contact(name=command.name))
    return [LeadDetailsUpdated(lead_id=command.lead_id, customer_id=command.customer_id, contact=contact)]


note: Decider[Note, None] = Decider("lead", None, _note, lambda s, _: s)


def _plan_note(request: Request[Note], _: Any) -> Plan:
    c = request.command
    step = Step(f"lead-{c.lead_id}", note, c, str(c.customer_id))
    return Plan([step], {"lead_id": str(c.lead_id)}, keys={str(c.customer_id): c.key})


class Keys:
    """A keyring that the test fills."""

    def __init__(self) -> None:
        self.known: dict[str, bytes | None] = {}

    def keys(self, customer_ids: Any) -> dict[str, bytes | None]:
        return {c: self.known.get(c) for c in customer_ids}


@pytest.fixture
def pool(database: str) -> Iterator[Pool]:
    from pathlib import Path

    import kehu.migrations

    migrate(database, find("kehu", Path(kehu.migrations.__file__).parent))
    opened_pool = open_pool(database, "test", 16)
    yield opened_pool
    opened_pool.close()


@pytest.fixture
def clock() -> FixedClock:
    return FixedClock(NOW)


@pytest.fixture
def handler(pool: Pool, clock: FixedClock) -> CommandHandler:
    handlers: dict[type[Any], Handles] = {Define: on(channel, lambda c: c.channel), Note: Handles(_plan_note)}
    return CommandHandler(EventStore(pool, "lead-intake"), handlers, clock, Keys())


def ask(command: object, command_id: UUID | None = None, **more: Any) -> Request[Any]:
    return Request(
        command,
        command_id or uuid4(),
        Context("user:test", "c-1", "r-1", "00-" + "a" * 32 + "-" + "b" * 16 + "-01"),
        **more,
    )


def read_all(store: EventStore) -> list[tuple[str, int]]:
    cursor, seen = Cursor(), []
    while rows := store.read(cursor, 1000):
        seen += [(row.stream, row.version) for row in rows]
        cursor = rows[-1].cursor
    return seen


def test_append_and_load(handler: CommandHandler) -> None:
    first, second = handler.handle([ask(Define("web", "Web")), ask(Define("web", "Website"))])
    assert isinstance(first, Done) and first.versions == {"channel-web": 1}
    assert isinstance(second, Done) and second.versions == {"channel-web": 2}, (
        "later commands of a batch see earlier events"
    )
    stored = handler.store.stream("channel-web")
    assert [r.event for r in stored.events] == [
        ChannelDefined(channel="web", title="Web", kind="web"),
        ChannelDefined(channel="web", title="Website", kind="web"),
    ]
    assert stored.events[0].actor == "user:test" and stored.events[0].time == NOW
    assert stored.events[0].position < stored.events[1].position
    assert stored.partition_key == "channel-web"


def test_resent_command_answers_the_same_and_does_nothing(handler: CommandHandler) -> None:
    command_id = uuid4()
    (first,) = handler.handle([ask(Define("web", "Web"), command_id, fingerprint=b"1")])
    (again,) = handler.handle([ask(Define("web", "Web"), command_id, fingerprint=b"1")])
    (other,) = handler.handle([ask(Define("web", "Other"), command_id, fingerprint=b"2")])
    assert isinstance(first, Done) and isinstance(again, Done)
    assert (again.result, again.versions, again.repeated) == (first.result, first.versions, True)
    assert isinstance(other, Failed) and other.kind == "reused"
    assert handler.store.stream("channel-web").version == 1


def test_same_command_twice_in_one_batch(handler: CommandHandler) -> None:
    command_id = uuid4()
    first, again = handler.handle([ask(Define("web", "Web"), command_id), ask(Define("web", "Web"), command_id)])
    assert isinstance(first, Done) and not first.repeated
    assert isinstance(again, Done) and again.repeated
    assert handler.store.stream("channel-web").version == 1


def test_refusal_fails_only_its_own_command(handler: CommandHandler) -> None:
    outcomes = handler.handle([ask(Define("a", "A")), ask(Define("b", "forbidden")), ask(Define("c", "C"))])
    assert [type(o) for o in outcomes] == [Done, Failed, Done]
    assert isinstance(outcomes[1], Failed) and outcomes[1].refusal.slug == "forbidden-title"
    assert sorted(read_all(handler.store)) == [("channel-a", 1), ("channel-c", 1)]


def test_expected_version(handler: CommandHandler) -> None:
    handler.handle([ask(Define("web", "Web"))])
    lost, won = handler.handle(
        [ask(Define("web", "X"), expected_version=0), ask(Define("web", "Y"), expected_version=1)]
    )
    assert isinstance(lost, Failed) and lost.kind == "conflict"
    assert isinstance(won, Done) and won.versions == {"channel-web": 2}


def test_concurrent_writers_on_one_stream_and_a_tailing_reader(handler: CommandHandler) -> None:
    """Sixteen writers, one hot stream and many cold ones: nothing lost, versions without a hole, the reader misses nothing."""
    each, writers = 8, 16
    done: list[Done] = []
    seen: list[tuple[str, int]] = []
    finished = threading.Event()

    def write(number: int) -> None:
        for i in range(each):
            (hot,) = handler.handle([ask(Define("hot", f"{number}-{i}"))])
            while isinstance(hot, Failed):  # told to try again: so we do
                assert hot.kind == "conflict"
                (hot,) = handler.handle([ask(Define("hot", f"{number}-{i}"))])
            (cold,) = handler.handle([ask(Define(f"cold-{number}", f"{i}"))])
            assert isinstance(cold, Done)
            done.extend([hot, cold])

    def tail() -> None:
        cursor = Cursor()
        while True:
            last_round = finished.is_set()
            rows = handler.store.read(cursor, 100)
            seen.extend((row.stream, row.version) for row in rows)
            if rows:
                cursor = rows[-1].cursor
            elif last_round:
                return

    reader = threading.Thread(target=tail)
    reader.start()
    threads = [threading.Thread(target=write, args=(n,)) for n in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    finished.set()
    reader.join()
    assert len(done) == 2 * each * writers
    assert len(seen) == len(set(seen)) == 2 * each * writers
    for stream in {stream for stream, _ in seen}:
        versions = [version for s, version in seen if s == stream]
        assert versions == list(range(1, len(versions) + 1)), f"{stream} out of order"


def test_reader_waits_for_the_oldest_transaction(handler: CommandHandler, pool: Pool) -> None:
    """The control: while an older transaction is open a later commit stays unread, because the older one may still add events before it."""
    with pool.connection() as slow, slow.transaction():
        slow.execute("SELECT append_events('{channel-slow}', '{1}', '{channel.defined.v1}', '{\"{}\"}')")
        handler.handle([ask(Define("fast", "Fast"))])
        assert read_all(handler.store) == []
    assert read_all(handler.store) == [("channel-slow", 1), ("channel-fast", 1)]


def test_append_must_be_the_first_write(handler: CommandHandler, pool: Pool) -> None:
    from kehu.eventstore.store import translated

    with pool.connection() as connection, pytest.raises(AppendFirst), translated(), connection.transaction():
        connection.execute("UPDATE store SET epoch = epoch")
        connection.execute("SELECT append_events('{channel-x}', '{1}', '{channel.defined.v1}', '{\"{}\"}')")
    assert read_all(handler.store) == []


def test_progress_and_rows_live_and_die_with_the_append(handler: CommandHandler, pool: Pool) -> None:
    class Taken:
        def write(self, connection: Connection) -> None:
            raise StaleProgress("somebody else")

    with pytest.raises(StaleProgress):
        handler.handle([ask(Define("web", "Web"))], Taken())
    assert read_all(handler.store) == []
    with pool.connection() as connection:
        assert connection.execute("SELECT count(*) FROM commands").fetchone() == (0,)


@pytest.mark.parametrize("bad", [0, 1, 49])
def test_a_row_that_fails_takes_the_append_with_it(bad: int, pool: Pool, clock: FixedClock) -> None:
    """All statements of a command are one transaction, also when many rows of one text travel in a pipeline."""

    def plan(request: Request[Define], _: Any) -> Plan:
        rows: list[Row] = [("INSERT INTO numbers VALUES (%s)", (0 if n == bad else n + 1,)) for n in range(50)]
        return Plan([Step("channel-web", channel, request.command)], rows=lambda _: rows)

    with pool.connection() as connection:
        connection.execute("CREATE TABLE numbers (n integer CONSTRAINT positive CHECK (n > 0))")
    store = EventStore(pool, "lead-intake")
    handler = CommandHandler(store, {Define: Handles(plan)}, clock, Keys())
    with pytest.raises(psycopg.errors.CheckViolation):
        handler.handle([ask(Define("web", "Web"))])
    with pool.connection() as connection:
        counts = "SELECT (SELECT count(*) FROM numbers), (SELECT count(*) FROM stored_events), (SELECT count(*) FROM commands)"
        assert connection.execute(counts).fetchone() == (0, 0, 0)


def test_personal_data_is_sealed_in_the_store(handler: CommandHandler, pool: Pool) -> None:
    key, lead, customer = new_key(), uuid4(), uuid4()
    handler.handle([ask(Note(lead, customer, "王小明", key))])
    (recorded,) = handler.store.stream(f"lead-{lead}").events
    with pool.connection() as connection:
        dump = connection.execute("SELECT convert_from(state, 'UTF8') FROM stored_events").fetchone()
    assert dump is not None and "王小明" not in dump[0] and '"sealed"' in dump[0]
    event = opened(recorded, key)
    assert isinstance(event, LeadDetailsUpdated) and event.contact is not None and event.contact.plain.name == "王小明"
    erased = opened(recorded, None)
    assert (
        isinstance(erased, LeadDetailsUpdated)
        and erased.contact is not None
        and erased.contact.state is PersonalState.ERASED
    )
    with pytest.raises(TamperedToken):
        opened(recorded, new_key())


def test_gate_batches_and_isolates(handler: CommandHandler) -> None:
    async def scenario() -> list[Any]:
        gate = CommandGate(handler)
        gate.start()
        titles = ["ok"] * 30 + ["forbidden", "broken"] + ["ok"] * 30
        answers = await asyncio.gather(
            *(gate.submit(ask(Define(f"c{i}", title))) for i, title in enumerate(titles)), return_exceptions=True
        )
        await gate.stop()
        return answers

    answers = asyncio.run(scenario())
    assert sum(isinstance(a, Done) for a in answers) == 60
    assert isinstance(answers[30], Failed)
    assert isinstance(answers[31], ZeroDivisionError), "a bug in one command must not fail its neighbours"
    assert len(read_all(handler.store)) == 60


class Titles:
    """A read model for these tests."""

    name, version, types = "titles", 1, (ChannelDefined,)

    def apply(self, connection: Connection, events: Any) -> None:
        connection.execute(
            "INSERT INTO titles_v1 SELECT unnest(%s::text[]) ON CONFLICT DO NOTHING", ([e.event.title for e in events],)
        )

    def truncate(self, connection: Connection) -> None:
        connection.execute("TRUNCATE titles_v1")


def test_projector_follows_and_rebuilds(handler: CommandHandler, pool: Pool) -> None:
    with pool.connection() as connection:
        connection.execute("CREATE TABLE titles_v1 (title text PRIMARY KEY)")
    projector, rival = Projector(handler.store, Titles(), batch=3), Projector(handler.store, Titles(), batch=3)
    handler.handle([ask(Define(f"c{i}", f"t{i}")) for i in range(7)])
    assert rival.step() == 3
    projector.cursor = Cursor()  # a second projector that does not know what the first did
    with pytest.raises(StaleProgress):
        projector.step()
    while projector.step():
        pass
    with pool.connection() as connection:
        query = "SELECT array_agg(title ORDER BY title) FROM titles_v1"
        live = connection.execute(query).fetchone()
        assert live == ([f"t{i}" for i in range(7)],)
        connection.execute("DELETE FROM titles_v1 WHERE title = 't3'")
        assert projector.rebuild() == 7
        assert connection.execute(query).fetchone() == live


@dataclass(frozen=True)
class Tick:
    key: str
    again: datetime | None = None


def test_timers_fire_once_in_order_and_catch_up(pool: Pool, clock: FixedClock) -> None:
    def plan(request: Request[Tick], _: Any) -> Plan:
        tick = request.command
        rows: list[Row] = [schedule("tick", tick.key, tick.again, {})] if tick.again else []
        return Plan([Step(f"channel-{tick.key}", channel, Define(tick.key, f"{request.at}"))], rows=lambda _: rows)

    store = EventStore(pool, "lead-intake")
    handler = CommandHandler(store, {Tick: Handles(plan)}, clock, Keys())
    due = NOW + timedelta(hours=1)
    handler.handle([ask(Tick("a", due)), ask(Tick("b", due + timedelta(seconds=1))), ask(Tick("c", due))])
    with pool.connection() as connection:
        connection.execute(*cancel("tick", "c"))
    runners = [TimerRunner(handler, clock, "test", {"tick": lambda t: Tick(t.key)}) for _ in range(2)]
    assert runners[0].step() == 0, "nothing is due yet"
    clock.at = due
    assert runners[0].step() == 1, "exact to the second: b is due one second later"
    clock.advance(timedelta(days=30))
    assert sum(runner.step() for runner in runners) == 1, "catches up after downtime, and only one runner fires it"
    assert [store.stream(f"channel-{k}").version for k in "abc"] == [2, 2, 1]
    fired = store.stream("channel-b").events[-1]
    assert fired.time == due + timedelta(seconds=1), "its business time is the due time"
    with pool.connection() as connection:
        assert connection.execute("SELECT count(*) FROM timers").fetchone() == (0,)


def test_broken_timer_does_not_stop_the_others_and_gives_up(pool: Pool, clock: FixedClock) -> None:
    store = EventStore(pool, "lead-intake")
    handler = CommandHandler(store, {Define: on(channel, lambda c: c.channel)}, clock, Keys())

    def fire(timer: Timer) -> Define:
        return Define(timer.key, "broken" if timer.key == "bad" else "fine")

    with pool.connection() as connection:
        for key in ("bad", "good"):
            connection.execute(*schedule("tick", key, NOW - timedelta(minutes=1)))
    runner = TimerRunner(handler, clock, "test", {"tick": fire})
    for _ in range(TimerRunner.MOST_ATTEMPTS + 5):
        runner.step()
        with pool.connection() as connection:
            connection.execute("UPDATE timers SET claimed_until = NULL")
    assert store.stream("channel-good").version == 1
    with pool.connection() as connection:
        row = connection.execute("SELECT key, attempts, error FROM timers").fetchone()
    assert row is not None and row[:2] == ("bad", TimerRunner.MOST_ATTEMPTS) and "ZeroDivisionError" in row[2]


def test_conflict_with_progress_rolls_everything_back(
    handler: CommandHandler, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer's batch is whole or not at all, also when another writer wins every time."""

    class Nothing:
        def write(self, connection: Connection) -> None:
            connection.execute("INSERT INTO cursors (name) VALUES ('moved')")

    load = EventStore.load_for_decision

    def load_then_lose(self: EventStore, connection: Connection, ids: Any, streams: Any) -> Any:
        loaded = load(self, connection, ids, streams)
        with pool.connection() as rival, rival.transaction():
            version = load(self, rival, [], ["channel-web"])[1]["channel-web"].version + 1
            rival.execute(
                "SELECT append_events('{channel-web}', %s, '{channel.defined.v1}', (SELECT array_agg(state) FROM stored_events"
                " WHERE originator_id = %s))",
                ([version], "channel-seed"),
            )
        return loaded

    handler.handle([ask(Define("seed", "Seed"))])
    monkeypatch.setattr(EventStore, "load_for_decision", load_then_lose)
    with pytest.raises(Conflict):
        handler.handle([ask(Define("web", "Mine")), ask(Define("other", "Mine"))], Nothing())
    monkeypatch.undo()
    assert handler.store.stream("channel-other").version == 0
    with pool.connection() as connection:
        assert connection.execute("SELECT count(*) FROM cursors").fetchone() == (0,)


def test_migrations_run_once_and_refuse_changes(database: str, tmp_path: Any) -> None:
    (tmp_path / "0001_first.sql").write_text("CREATE TABLE one (n integer)")
    assert migrate(database, find("x", tmp_path)) == ["x/0001_first"]
    assert migrate(database, find("x", tmp_path)) == []
    (tmp_path / "0002_broken.sql").write_text("CREATE TABLE two (n integer); SELECT nonsense")
    with pytest.raises(MigrationError, match="0002_broken"):
        migrate(database, find("x", tmp_path))
    (tmp_path / "0002_broken.sql").write_text("CREATE TABLE two (n integer)")
    assert migrate(database, find("x", tmp_path)) == ["x/0002_broken"], "the failed one left nothing behind"
    (tmp_path / "0001_first.sql").write_text("CREATE TABLE one (n bigint)")
    with pytest.raises(MigrationError, match="changed after it ran"):
        migrate(database, find("x", tmp_path))
