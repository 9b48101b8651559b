-- The read models of analytics. A read model is built in generations: `lead_journey_v1_g1` holds the rows of generation 1 of
-- version 1, and the view `lead_journey_v1`, which queries use, shows the live generation. A rebuild fills the next
-- generation beside it and turns the view over. So no table here is ever altered in place.

-- Which generation of each read model is live. Each batch of a consumer reads its row FOR SHARE; a switch locks it.
CREATE TABLE projections (
    name        text        PRIMARY KEY,
    version     integer     NOT NULL,
    generation  integer     NOT NULL CHECK (generation > 0),
    switched_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO projections (name, version, generation) VALUES ('customer_timeline', 1, 1), ('lead_journey', 1, 1), ('event_counts', 1, 1);

-- Rebuilds, so that one that was interrupted goes on where it was, and old generations are dropped when nobody uses them.
CREATE TABLE projection_builds (
    name        text        NOT NULL,
    version     integer     NOT NULL,
    generation  integer     NOT NULL CHECK (generation > 0),
    state       text        NOT NULL CHECK (state IN ('building', 'live', 'retired')),
    started_at  timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    PRIMARY KEY (name, generation)
);
INSERT INTO projection_builds (name, version, generation, state, finished_at)
SELECT name, version, generation, 'live', now() FROM projections;

-- Everything that happened to a customer. No personal data: fields of a person are left out, not even in sealed form.
CREATE TABLE customer_timeline_v1_g1 (
    customer_id uuid        NOT NULL,
    time        timestamptz NOT NULL,
    recorded    timestamptz NOT NULL,
    type        text        NOT NULL,
    stream      text        NOT NULL,
    version     bigint      NOT NULL,
    service     text        NOT NULL,
    event_id    uuid        NOT NULL,
    summary     json        NOT NULL, -- only shown, never searched
    PRIMARY KEY (customer_id, time, event_id)
);
CREATE VIEW customer_timeline_v1 AS SELECT * FROM customer_timeline_v1_g1;

-- One row for each lead. Times are business time, the month is that of the capture in the suite's time zone.
CREATE TABLE lead_journey_v1_g1 (
    lead_id             uuid PRIMARY KEY,
    customer_id         uuid NOT NULL,
    channel             text,
    campaign            text,
    source              text,
    captured_at         timestamptz, -- NULL while only the score of the lead has arrived: topics have no order between them
    month               date,
    qualified_at        timestamptz,
    score               double precision,
    scored_version      bigint,
    converted_at        timestamptz,
    score_at_conversion double precision,
    merged_into         uuid,
    merged_at           timestamptz,
    rejected_at         timestamptz
);
CREATE INDEX ON lead_journey_v1_g1 (customer_id);
CREATE INDEX ON lead_journey_v1_g1 (month, channel);
CREATE VIEW lead_journey_v1 AS SELECT * FROM lead_journey_v1_g1;

-- What lead_journey is derived from: every score, because a conversion can arrive before the score that preceded it.
CREATE TABLE lead_journey_scores_v1_g1 (
    lead_id uuid             NOT NULL,
    version bigint           NOT NULL,
    time    timestamptz      NOT NULL,
    score   double precision NOT NULL,
    PRIMARY KEY (lead_id, version)
);
CREATE VIEW lead_journey_scores_v1 AS SELECT * FROM lead_journey_scores_v1_g1;

-- … and every conversion, because a merge moves it to the lead that survives.
CREATE TABLE lead_journey_conversions_v1_g1 (
    behaviour_id uuid        PRIMARY KEY,
    customer_id  uuid        NOT NULL,
    lead_id      uuid,
    time         timestamptz NOT NULL
);
CREATE INDEX ON lead_journey_conversions_v1_g1 (customer_id);
CREATE VIEW lead_journey_conversions_v1 AS SELECT * FROM lead_journey_conversions_v1_g1;

-- How many events of each type happened on each day (of the suite's time zone).
CREATE TABLE event_counts_v1_g1 (
    service text   NOT NULL,
    type    text   NOT NULL,
    day     date   NOT NULL,
    events  bigint NOT NULL,
    PRIMARY KEY (service, type, day)
);
CREATE VIEW event_counts_v1 AS SELECT * FROM event_counts_v1_g1;

-- Live counters, written by the stream worker. Minutes are kept for some days only; days are kept.
CREATE TABLE live_counters (
    span    text        NOT NULL CHECK (span IN ('minute', 'day')),
    bucket  timestamptz NOT NULL, -- start of the minute, or of the day in the suite's time zone
    service text        NOT NULL,
    type    text        NOT NULL,
    channel text        NOT NULL, -- '' where an event has none
    events  bigint      NOT NULL,
    PRIMARY KEY (span, bucket, service, type, channel)
);
