"""Made-up but lawful histories of leads: what the topics of lead-intake and scoring would hold."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

from kehu.events import Envelope, Event, Personal, Recorded
from kehu.events.envelope import with_position
from kehu.events.lead_intake import BehaviourRecorded, CustomerRegistered, LeadCaptured, LeadMerged, LeadRejected
from kehu.events.scoring import LeadQualified, LeadScoreChanged, Part
from kehu.kafka.topics import PARTITIONS, ensure_topics
from kehu.testing.kafka import Message, publish

CHANNELS = ("baidu", "trade-fair", "referral", "wechat")
KINDS = ("page_viewed", "content_downloaded", "email_opened", "demo_attended")
START = datetime(2026, 1, 1, tzinfo=UTC)
SEALED = "c2VhbGVk-not-a-name"


@dataclass
class History:
    """Values by topic, each in its order; keys beside them."""

    lead_intake: list[tuple[str, bytes]] = field(default_factory=list)
    scoring: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def topics(self) -> dict[str, list[tuple[str, bytes]]]:
        return {"crm.lead-intake.events": self.lead_intake, "crm.scoring.events": self.scoring}

    async def publish(self, bootstrap: str, prefix: str) -> tuple[str, ...]:
        """Make the two topics with a prefix to their names, put the history on them, and give the names."""
        names = tuple(f"{prefix}.{topic}" for topic in self.topics)
        await ensure_topics(bootstrap, names)
        for name, values in zip(names, self.topics.values(), strict=True):
            await publish(bootstrap, name, [Message(key.encode(), value) for key, value in values], PARTITIONS)
        return names

    def recorded(self) -> dict[str, list[Recorded]]:
        return {topic: [Recorded.from_bytes(value) for _, value in values] for topic, values in self.topics.items()}

    def __len__(self) -> int:
        return len(self.lead_intake) + len(self.scoring)


class _Writer:
    def __init__(self, producer: str, out: list[tuple[str, bytes]], rng: random.Random) -> None:
        self.producer, self.out, self.rng = producer, out, rng
        self.versions: dict[str, int] = {}

    def write(self, stream: str, event: Event, customer: UUID, time: datetime) -> UUID:
        version = self.versions[stream] = self.versions.get(stream, 0) + 1
        event_id = UUID(int=self.rng.getrandbits(128), version=4)
        envelope = Envelope(
            id=event_id,
            producer=self.producer,
            stream=stream,
            version=version,
            time=time,
            recorded=time + timedelta(seconds=1),
            partition_key=str(customer),
            customer_id=str(customer),
            correlation_id=str(event_id),
            causation_id=str(event_id),
            actor="service:test",
            traceparent=None,
            store_epoch="test",
        )
        self.out.append((str(customer), with_position(envelope.encode(event), len(self.out) + 1)))
        return event_id


def history(seed: int, customers: int, behaviours: int = 8, days: int = 120) -> History:
    """A history of some `customers * (4 + 2 * behaviours)` events.

    A customer has one to three leads: later ones are merged into the first open one, or follow a rejected one. About a
    third accepts an offer, naming the lead, a merged lead, or none.
    """
    rng = random.Random(seed)
    made = History()
    intake, scoring = _Writer("lead-intake", made.lead_intake, rng), _Writer("scoring", made.scoring, rng)
    lives = [
        _life(rng, intake, scoring, behaviours, START + timedelta(seconds=rng.uniform(0, days * 86400)))
        for _ in range(customers)
    ]
    while lives:  # customers take turns, so that their events lie mixed in the topics
        life = rng.choice(lives[:50])
        if next(life, None) is None:
            lives.remove(life)
    return made


def _life(rng: random.Random, intake: _Writer, scoring: _Writer, behaviours: int, at: datetime) -> Iterator[bool]:
    customer = UUID(int=rng.getrandbits(128), version=4)
    leads: list[UUID] = []
    open_lead: UUID | None = None
    score = 0.0
    qualified: set[UUID] = set()
    intake.write(
        f"customer-{customer}",
        CustomerRegistered(customer_id=customer, number=f"CRM2026{rng.randrange(10**6):06d}", kind="company"),
        customer,
        at,
    )
    yield True
    for turn in range(rng.choice((1, 1, 1, 2, 3))):
        at += timedelta(seconds=rng.uniform(1, 86400))
        lead = UUID(int=rng.getrandbits(128), version=4)
        leads.append(lead)
        intake.write(
            f"lead-{lead}",
            LeadCaptured(
                lead_id=lead,
                customer_id=customer,
                source="api",
                channel=rng.choice(CHANNELS),
                campaign="spring" if rng.random() < 0.5 else None,
                contact=Personal.sealed(SEALED),
                company="深圳远航科技有限公司",
                rating="warm",
                facts={"employees": rng.randrange(1000)},
            ),
            customer,
            at,
        )
        yield True
        if open_lead is not None:
            intake.write(
                f"lead-{lead}",
                LeadMerged(
                    lead_id=lead, customer_id=customer, survivor_lead_id=open_lead, confidence=1.0, rule="exact_phone"
                ),
                customer,
                at,
            )
            yield True
        else:
            open_lead, score = lead, 0.0
        for _ in range(rng.randrange(behaviours + 1)):
            at += timedelta(seconds=rng.uniform(1, 86400))
            named = rng.choice((None, lead, open_lead))
            cause = intake.write(
                f"activity-{customer}-{at:%Y%m}",
                BehaviourRecorded(
                    behaviour_id=UUID(int=rng.getrandbits(128), version=4),
                    customer_id=customer,
                    lead_id=named,
                    kind=rng.choice(KINDS),
                    channel=rng.choice((None, *CHANNELS)),
                    object="/pricing",
                ),
                customer,
                at,
            )
            yield True
            gained = rng.choice((5.0, 10.0, 25.0))
            before, score = score, min(100.0, score + gained)
            scoring.write(
                f"lead_score-{open_lead}",
                LeadScoreChanged(
                    lead_id=open_lead,
                    customer_id=customer,
                    score=score,
                    previous=before,
                    band="hot" if score >= 80 else "warm" if score >= 40 else "cold",
                    qualified=score >= 80,
                    parts=(Part(rule="behaviour", dimension="depth", points=score, count=1, events=(cause,)),),
                    cause="behaviour",
                    cause_events=(cause,),
                    model_version=1,
                    at=at,
                ),
                customer,
                at,
            )
            if score >= 80 and open_lead not in qualified:
                qualified.add(open_lead)
                scoring.write(
                    f"lead_score-{open_lead}",
                    LeadQualified(
                        lead_id=open_lead,
                        customer_id=customer,
                        score=score,
                        band="hot",
                        threshold=80.0,
                        model_version=1,
                        at=at,
                    ),
                    customer,
                    at,
                )
            yield True
        if rng.random() < 0.35:
            at += timedelta(seconds=rng.uniform(1, 86400))
            intake.write(
                f"activity-{customer}-{at:%Y%m}",
                BehaviourRecorded(
                    behaviour_id=UUID(int=rng.getrandbits(128), version=4),
                    customer_id=customer,
                    lead_id=rng.choice((None, lead, open_lead)),
                    kind="offer_accepted",
                ),
                customer,
                at,
            )
            yield True
        if turn == 0 and rng.random() < 0.15:
            at += timedelta(seconds=rng.uniform(1, 3600))
            intake.write(
                f"lead-{open_lead}",
                LeadRejected(lead_id=open_lead, customer_id=customer, reason="no_budget"),
                customer,
                at,
            )
            open_lead = None
            yield True
