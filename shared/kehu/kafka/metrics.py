"""What relay and consumers tell Prometheus. Labels are names of services, topics and subscriptions, never ids of people."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

RELAY_LEADER = Gauge("kehu_relay_leader", "1 while this process publishes the topic's events", ["topic"])
RELAY_OUTBOX = Gauge("kehu_relay_outbox_events", "Events in the store that Kafka has not acknowledged yet", ["topic"])
RELAY_OLDEST = Gauge(
    "kehu_relay_oldest_unsent_seconds", "Age of the oldest event that Kafka has not acknowledged yet", ["topic"]
)
RELAY_SENT = Counter("kehu_relay_sent_events_total", "Events that Kafka acknowledged", ["topic"])
RELAY_SKIPPED = Counter(
    "kehu_relay_skipped_events_total", "Events found in Kafka after a restart and not sent again", ["topic"]
)
RELAY_RESTARTS = Counter(
    "kehu_relay_restarts_total", "Times that the producer was discarded and built anew", ["topic", "error"]
)

CONSUMER_LAG = Gauge(
    "kehu_consumer_lag_events", "Events behind the end of the partition", ["consumer", "topic", "partition"]
)
CONSUMER_OLDEST = Gauge(
    "kehu_consumer_oldest_unhandled_seconds", "Age of the oldest event fetched and not handled", ["consumer"]
)
CONSUMER_EVENTS = Counter(
    "kehu_consumer_events_total",
    "Records by what became of them: applied, passed over, repeat, parked, behind",
    ["consumer", "outcome"],
)
CONSUMER_BATCHES = Counter("kehu_consumer_batches_total", "Transactions with their progress", ["consumer"])
CONSUMER_SECONDS = Histogram(
    "kehu_consumer_batch_seconds",
    "Time of a batch from fetched to committed",
    ["consumer"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
CONSUMER_RETRIES = Counter(
    "kehu_consumer_retries_total", "Attempts that failed and are tried again", ["consumer", "error"]
)
CONSUMER_HOLES = Counter("kehu_consumer_holes_total", "Streams stopped because a version was missing", ["consumer"])
CONSUMER_PARKED = Gauge(
    "kehu_consumer_parked_events", "Parked events that wait, or wait behind one", ["consumer", "status"]
)
CONSUMER_BLOCKED = Gauge(
    "kehu_consumer_blocked", "1 while the consumer waits before it tries a batch again", ["consumer"]
)
POLICY_REFUSED = Counter("kehu_policy_refused_total", "Commands of a policy that a rule refused", ["policy", "slug"])
