-- The backbone of every service's database: the event log, idempotency, progress, parked events and timers.

-- Which life of the store this is. A restore from a backup writes a new one, so that a fork is noticed by relay and readers.
CREATE TABLE store (epoch text NOT NULL);
INSERT INTO store (epoch) VALUES (replace(gen_random_uuid()::text, '-', ''));

-- The event log. Column names are those of the `eventsourcing` library, whose recorder interface we implement.
CREATE TABLE stored_events (
    originator_id      text   NOT NULL,
    originator_version bigint NOT NULL CHECK (originator_version > 0),
    topic              text   NOT NULL,
    state              bytea  NOT NULL,
    notification_id    bigint GENERATED ALWAYS AS IDENTITY,
    txid               xid8   NOT NULL DEFAULT pg_current_xact_id(),
    CONSTRAINT stored_events_version PRIMARY KEY (originator_id, originator_version)
) WITH (autovacuum_analyze_scale_factor = 0.02, autovacuum_vacuum_insert_scale_factor = 0.2);
-- Readers follow (txid, notification_id): see read_events.
CREATE UNIQUE INDEX stored_events_log ON stored_events (txid, notification_id);

-- Commands that were carried out, with their answers: a resent one gets the same answer and does nothing.
CREATE TABLE commands (
    command_id  uuid        NOT NULL,
    fingerprint bytea,
    result      jsonb       NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT commands_once PRIMARY KEY (command_id)
);

-- The only way to append: events, and the commands that caused them, in one statement. No table lock and no NOTIFY: both would serialise all commits.
-- It must be the first write of its transaction: then a later version of a stream always has a later txid, and the
-- order (txid, notification_id) is the order of every stream.
CREATE FUNCTION append_events(
    streams text[], versions bigint[], topics text[], states bytea[],
    command_ids uuid[] DEFAULT '{}', fingerprints bytea[] DEFAULT '{}', results text[] DEFAULT '{}'
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF pg_current_xact_id_if_assigned() IS NOT NULL THEN
        RAISE EXCEPTION 'an append must be the first write of its transaction' USING ERRCODE = 'KH001';
    END IF;
    INSERT INTO stored_events (originator_id, originator_version, topic, state)
    SELECT s, v, t, d FROM unnest(streams, versions, topics, states) WITH ORDINALITY AS new (s, v, t, d, n) ORDER BY n;
    INSERT INTO commands (command_id, fingerprint, result)
    SELECT c, f, r::jsonb FROM unnest(command_ids, fingerprints, results) AS done (c, f, r);
END
$$;

-- Everything after a cursor that can no longer be overtaken: below the oldest running transaction. Reading by position
-- alone would skip an event whose transaction commits late.
CREATE FUNCTION read_events(after_txid xid8, after_position bigint, most integer)
RETURNS TABLE (txid xid8, notification_id bigint, originator_id text, originator_version bigint, topic text, state bytea)
LANGUAGE sql STABLE AS $$
    SELECT e.txid, e.notification_id, e.originator_id, e.originator_version, e.topic, e.state
    FROM stored_events e
    WHERE (e.txid, e.notification_id) > (after_txid, after_position)
      AND e.txid < pg_snapshot_xmin(pg_current_snapshot())
    ORDER BY e.txid, e.notification_id
    LIMIT most
$$;

-- All that a batch of commands needs to be decided, in one round trip: which of them were carried out already (version 0,
-- the answer as payload), and the events of their streams in order.
CREATE FUNCTION load_for_decision(command_ids uuid[], streams text[])
RETURNS TABLE (key text, version bigint, notification_id bigint, payload bytea, fingerprint bytea)
LANGUAGE sql STABLE AS $$
    SELECT c.command_id::text, 0::bigint, 0::bigint, convert_to(c.result::text, 'UTF8'), c.fingerprint
    FROM commands c WHERE c.command_id = ANY(command_ids)
    UNION ALL
    (SELECT e.originator_id, e.originator_version, e.notification_id, e.state, NULL
     FROM stored_events e WHERE e.originator_id = ANY(streams)
     ORDER BY e.originator_id, e.originator_version)
$$;

-- How far each follower of this store's own log has come (projectors, relay).
CREATE TABLE cursors (
    name     text   PRIMARY KEY,
    txid     xid8   NOT NULL DEFAULT '0',
    position bigint NOT NULL DEFAULT 0,
    moved_at timestamptz NOT NULL DEFAULT now()
);

-- One active holder for each role that must be alone. All times are the database's clock.
CREATE TABLE leases (
    name        text        PRIMARY KEY,
    holder      text        NOT NULL,
    epoch       bigint      NOT NULL,
    expires_at  timestamptz NOT NULL,
    backend_pid integer     NOT NULL
);

-- How far each consumer has come on each partition, written in the transaction of the effect.
CREATE TABLE consumer_offsets (
    consumer    text    NOT NULL,
    topic       text    NOT NULL,
    partition   integer NOT NULL,
    next_offset bigint  NOT NULL,
    moved_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, topic, partition)
);

-- The last version of each stream that a consumer applied: a lower one is a repeat, a hole stops the stream.
CREATE TABLE consumer_streams (
    consumer text   NOT NULL,
    stream   text   NOT NULL,
    version  bigint NOT NULL,
    PRIMARY KEY (consumer, stream)
);

-- Records that a consumer could not handle, and the later ones of the same stream that wait behind them.
CREATE TABLE parked_events (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    consumer        text        NOT NULL,
    stream          text        NOT NULL,
    version         bigint,
    topic           text        NOT NULL,
    partition       integer     NOT NULL,
    "offset"        bigint      NOT NULL,
    key             bytea,
    value           bytea,
    headers         jsonb       NOT NULL DEFAULT '[]',
    status          text        NOT NULL CHECK (status IN ('waiting', 'behind', 'resolved', 'dropped')),
    error           text        NOT NULL,
    attempts        integer     NOT NULL DEFAULT 1,
    first_failed_at timestamptz NOT NULL DEFAULT now(),
    parked_at       timestamptz NOT NULL DEFAULT now(),
    resolved_at     timestamptz,
    UNIQUE (consumer, topic, partition, "offset")
);
CREATE INDEX parked_events_open ON parked_events (consumer, stream, version) WHERE status IN ('waiting', 'behind');

-- Durable timers. claimed_until is the database's clock; due_at is the domain's.
CREATE TABLE timers (
    process       text        NOT NULL,
    key           text        NOT NULL,
    due_at        timestamptz NOT NULL,
    payload       jsonb       NOT NULL DEFAULT '{}',
    claimed_until timestamptz,
    attempts      integer     NOT NULL DEFAULT 0,
    error         text,
    PRIMARY KEY (process, key)
);
CREATE INDEX timers_due ON timers (due_at);
