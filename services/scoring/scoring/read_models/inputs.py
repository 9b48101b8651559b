"""What scores leads, in tables: read for a batch of decisions at once, or as of a past time, and written with the decisions."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

from pydantic_core import to_json

from kehu.postgres import Connection, Row, Unnest
from scoring.domain.evaluation import MOST_BEHAVIOURS, BehaviourInput, ProfileInput
from scoring.domain.knowledge import BehaviourSeen, Fact, Knowledge, Lead, LeadOpened, ProfileTold

# Profile facts of a customer that are read, the newest: a person fills in a form a few times, a script a million times.
MOST_PROFILE = 200
# Later than every time: no limit.
FOREVER = datetime.max.replace(tzinfo=UTC)

# The leads asked for, all leads of their customers, and those on both sides of their merges.
_LEADS = """
WITH RECURSIVE asked AS (
    SELECT customer_id FROM unnest(%(customers)b::uuid[]) AS c (customer_id)
    UNION SELECT customer_id FROM leads WHERE lead_id = ANY(%(leads)b::uuid[])
), related AS (
    SELECT l.* FROM leads l JOIN asked USING (customer_id)
    UNION
    SELECT other.* FROM related r CROSS JOIN LATERAL (
        SELECT * FROM leads WHERE lead_id = r.survivor UNION ALL SELECT * FROM leads WHERE survivor = r.lead_id
    ) AS other
)
SELECT lead_id, customer_id, recorded, place, closed_at, closing, survivor, model_version FROM related
WHERE recorded <= %(as_of)b
"""
_INPUTS = """
SELECT c.customer_id, i.* FROM unnest(%(customers)b::uuid[]) AS c (customer_id) CROSS JOIN LATERAL (
    SELECT event_id, NULL AS kind, time, attributes FROM profile_inputs p
    WHERE p.customer_id = c.customer_id AND recorded <= %(as_of)b AND time <= %(until)b
    ORDER BY time DESC, event_id DESC LIMIT %(most_profile)b
) AS i
UNION ALL
SELECT c.customer_id, i.* FROM unnest(%(customers)b::uuid[]) AS c (customer_id) CROSS JOIN LATERAL (
    SELECT event_id, kind, time, attributes FROM behaviour_inputs b
    WHERE b.customer_id = c.customer_id AND recorded <= %(as_of)b AND time <= %(until)b
    ORDER BY time DESC, event_id DESC LIMIT %(most_behaviours)b
) AS i
"""
# The last state of a lead in the batch wins. Only the consumer that knows the lead's customer writes these rows.
_LEAD = Unnest(
    "INSERT INTO leads AS l (lead_id, customer_id, recorded, place, closed_at, closing, survivor, model_version)"
    " SELECT DISTINCT ON (lead_id) lead_id, customer_id, recorded, place, closed_at, closing, survivor, model_version"
    " FROM unnest(%s::uuid[], %s::uuid[], %s::timestamptz[], %s::int[], %s::timestamptz[], %s::text[], %s::uuid[],"
    " %s::int[])"
    " WITH ORDINALITY AS new (lead_id, customer_id, recorded, place, closed_at, closing, survivor, model_version, n)"
    " ORDER BY lead_id, n DESC"
    " ON CONFLICT (lead_id) DO UPDATE SET closed_at = EXCLUDED.closed_at, closing = EXCLUDED.closing,"
    " survivor = EXCLUDED.survivor, model_version = EXCLUDED.model_version"
)
_SCORED = Unnest(
    "UPDATE leads l SET model_version = new.model_version FROM unnest(%s::uuid[], %s::int[]) AS new (lead_id, model_version)"
    " WHERE l.lead_id = new.lead_id"
)
_PROFILE = Unnest(
    "INSERT INTO profile_inputs (event_id, customer_id, time, recorded, attributes)"
    " SELECT e, c, t, r, a::jsonb FROM"
    " unnest(%b::uuid[], %b::uuid[], %b::timestamptz[], %b::timestamptz[], %b::text[]) AS new (e, c, t, r, a)"
    " ORDER BY e ON CONFLICT DO NOTHING"
)
_BEHAVIOUR = Unnest(
    "INSERT INTO behaviour_inputs (event_id, customer_id, kind, time, recorded, attributes) SELECT e, c, k, t, r, a::jsonb"
    " FROM unnest(%b::uuid[], %b::uuid[], %b::text[], %b::timestamptz[], %b::timestamptz[], %b::text[]) AS new (e, c, k, t, r, a)"
    " ORDER BY e ON CONFLICT DO NOTHING"
)


def load(
    connection: Connection,
    customers: Collection[UUID],
    leads: Collection[UUID] = (),
    as_of: datetime = FOREVER,
    until: datetime = FOREVER,
) -> Knowledge:
    """All that is known of these customers, of the customers of these leads, and of those whose leads they were merged with.

    Args:
        as_of: recorded time; what scoring came to know later is left out.
        until: business time; what happened later is left out.
    """
    knowledge = Knowledge()
    rows = connection.execute(
        _LEADS, {"customers": list(customers), "leads": list(leads), "as_of": as_of}, binary=True
    ).fetchall()
    for lead_id, customer_id, recorded, place, closed_at, closing, survivor, model_version in rows:
        lead = Lead(lead_id, customer_id, recorded, place, model_version=model_version)
        if closed_at is not None and closed_at <= as_of:
            lead = replace(lead, closed_at=closed_at, closing=closing, survivor=survivor)
        knowledge.put(lead)
    known = {*customers, *(lead.customer_id for lead in knowledge.leads.values())}
    limits = {"most_profile": MOST_PROFILE, "most_behaviours": MOST_BEHAVIOURS}
    rows = connection.execute(
        _INPUTS, {"customers": list(known), "as_of": as_of, "until": until, **limits}, binary=True
    ).fetchall()
    for customer_id, event_id, kind, time, attributes in rows:
        if kind is None:
            knowledge.tell(customer_id, ProfileInput(event_id, time, attributes))
        else:
            knowledge.see(customer_id, BehaviourInput(event_id, time, kind, attributes))
    return knowledge


def fact_rows(fact: Fact, recorded: datetime) -> Iterable[Row]:
    """The rows that keep a fact, when it is an input."""
    match fact:
        case LeadOpened(_, customer_id, profile) | ProfileTold(customer_id, profile):
            attributes = to_json(profile.attributes).decode()
            yield _PROFILE, (profile.event_id, customer_id, profile.time, recorded, attributes)
        case BehaviourSeen(customer_id, behaviour):
            attributes = to_json(behaviour.attributes).decode()
            yield _BEHAVIOUR, (behaviour.event_id, customer_id, behaviour.kind, behaviour.time, recorded, attributes)


def lead_row(lead: Lead) -> Row:
    """The row that keeps a lead."""
    return (
        _LEAD,
        (
            lead.lead_id,
            lead.customer_id,
            lead.since,
            lead.place,
            lead.closed_at,
            lead.closing,
            lead.survivor,
            lead.model_version,
        ),
    )


def scored_row(lead_id: UUID, model_version: int) -> Row:
    """Notes by which model a lead was scored last, and nothing else of it."""
    return _SCORED, (lead_id, model_version)


def behind(connection: Connection, model_version: int, most: int) -> list[UUID]:
    """Open leads whose last score is of an older model, at most `most`."""
    rows = connection.execute(
        "SELECT lead_id FROM leads WHERE closed_at IS NULL AND model_version > 0 AND model_version < %s"
        " ORDER BY model_version, lead_id LIMIT %s",
        (model_version, most),
    ).fetchall()
    return [lead_id for (lead_id,) in rows]


def count_behind(connection: Connection, model_version: int) -> int:
    """How many open leads still have a score of an older model."""
    row = connection.execute(
        "SELECT count(*) FROM leads WHERE closed_at IS NULL AND model_version > 0 AND model_version < %s",
        (model_version,),
    ).fetchone()
    assert row is not None
    return int(row[0])
