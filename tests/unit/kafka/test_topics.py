"""Names of topics, and the partition of a key: the same that every Kafka client computes."""

import pytest
from aiokafka.partitioner import DefaultPartitioner, murmur2
from hypothesis import given
from hypothesis import strategies as st

from kehu.kafka.topics import PARTITIONS, Topic, group_of, partition_of, topic_of


@given(st.binary(max_size=80), st.integers(1, 200))
def test_partition_is_that_of_other_clients(key: bytes, partitions: int) -> None:
    assert partition_of(key, partitions) == DefaultPartitioner()(key, list(range(partitions)), [])
    assert partition_of(key, partitions) == (murmur2(key) & 0x7FFFFFFF) % partitions


def test_known_hashes_of_the_java_client() -> None:
    """From org.apache.kafka.common.utils.UtilsTest.testMurmur2."""
    known = {
        b"21": -973932308,
        b"foobar": -790332482,
        b"a-little-bit-long-string": -985981536,
        b"a-little-bit-longer-string": -1486304829,
        b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
        b"abc": 479470107,
    }
    for key, java in known.items():
        assert partition_of(key, 2**31 - 1) == (java & 0x7FFFFFFF) % (2**31 - 1)


def test_names() -> None:
    assert topic_of("lead-intake") == "crm.lead-intake.events"
    assert group_of("scoring", "scores") == "crm.scoring.scores"


@pytest.mark.parametrize(("replication", "insync"), [(1, "1"), (2, "1"), (3, "2")])
def test_events_are_kept_for_ever_on_more_than_one_broker(replication: int, insync: str) -> None:
    settings = Topic("t").settings(replication)
    assert Topic("t").partitions == PARTITIONS == 12
    assert settings["retention.ms"] == settings["retention.bytes"] == "-1"
    assert settings["cleanup.policy"] == "delete"
    assert settings["min.insync.replicas"] == insync
    assert Topic("t", compacted=True, configs={"segment.ms": "1"}).settings(1)["cleanup.policy"] == "compact"
