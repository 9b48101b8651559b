"""Parts of the relay that need neither Kafka nor PostgreSQL."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kehu.events import Recorded
from kehu.events.lead_intake import ChannelDefined
from kehu.follower import Listener
from kehu.kafka.relay import Tail, key_of
from kehu.testing.kafka import envelope, message


@given(st.text(max_size=40), st.text(max_size=60))
def test_key_is_found_without_parsing(key: str, title: str) -> None:
    """Whatever the key and the data contain, also what looks like the attribute itself."""
    key = key.encode(errors="ignore").decode() or "k"
    event = ChannelDefined.model_construct(channel="web", title=f'"partitionkey":"{title}"', kind="web")
    state = envelope("s", 1, key).encode(event)
    assert key_of(state) == key.encode() == Recorded.from_bytes(state).partition_key.encode()


class Record:
    partition, offset = 3, 7

    def __init__(self, headers: list[tuple[str, bytes]], value: bytes | None) -> None:
        self.headers, self.value = headers, value


def test_tail_is_only_what_a_relay_sent() -> None:
    made = message("s", 4)
    assert made.value is not None
    found = Tail.of(Record(list(made.headers), made.value))
    assert found is not None
    assert (found.partition, found.offset, found.stream, found.version, found.cursor) == (3, 7, "s", 4, "1:4")
    assert Tail.of(Record([], made.value)) is None
    assert Tail.of(Record(list(made.headers), b"junk")) is None
    assert Tail.of(Record(list(made.headers), None)) is None


@pytest.mark.parametrize("steps", range(4))
async def test_a_ring_does_not_swallow_the_end(steps: int) -> None:
    """A cancellation that comes together with a ring still ends the one who follows."""
    listener = Listener("postgresql://127.0.0.1/nowhere", poll=30)

    async def follow() -> None:
        async for _ in listener.rings():
            pass

    following = asyncio.create_task(follow())
    for _ in range(3):
        await asyncio.sleep(0)
    listener._rung.set()
    for _ in range(steps):
        await asyncio.sleep(0)
    following.cancel()
    done, _ = await asyncio.wait([following], timeout=5)
    assert done and following.cancelled()
