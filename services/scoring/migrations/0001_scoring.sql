-- What scoring knows of leads and customers; written in the transaction of the scores that follow from it, so it is never
-- behind them. `recorded` is when scoring came to know something: a question 'as of' then gets what was known then.

CREATE TABLE leads (
    lead_id       uuid        PRIMARY KEY,
    customer_id   uuid        NOT NULL,
    recorded      timestamptz NOT NULL,
    place         integer     NOT NULL, -- which lead of its customer, in the order in which they became known
    closed_at     timestamptz,
    closing       text        CHECK (closing IN ('merged', 'rejected', 'erased')),
    survivor      uuid,
    model_version integer     NOT NULL,
    CHECK ((closed_at IS NULL) = (closing IS NULL)),
    CHECK ((closing = 'merged') = (survivor IS NOT NULL))
);
CREATE INDEX leads_customer ON leads (customer_id);
CREATE INDEX leads_survivor ON leads (survivor) WHERE survivor IS NOT NULL;
-- Leads whose last score is of an older model: what is left of a rescoring. Version 0 has no score yet.
CREATE INDEX leads_model ON leads (model_version, lead_id) WHERE closed_at IS NULL AND model_version > 0;

CREATE TABLE profile_inputs (
    event_id    uuid        PRIMARY KEY,
    customer_id uuid        NOT NULL,
    time        timestamptz NOT NULL,
    recorded    timestamptz NOT NULL,
    attributes  jsonb       NOT NULL
);
CREATE INDEX profile_inputs_newest ON profile_inputs (customer_id, time DESC, event_id DESC);

CREATE TABLE behaviour_inputs (
    event_id    uuid        PRIMARY KEY,
    customer_id uuid        NOT NULL,
    kind        text        NOT NULL,
    time        timestamptz NOT NULL,
    recorded    timestamptz NOT NULL,
    attributes  jsonb       NOT NULL
);
CREATE INDEX behaviour_inputs_newest ON behaviour_inputs (customer_id, time DESC, event_id DESC);

-- Every published model, for decisions and for explanations as of any time.
CREATE TABLE scoring_models (
    version   integer     PRIMARY KEY,
    model     jsonb       NOT NULL,
    note      text,
    effective timestamptz NOT NULL,
    recorded  timestamptz NOT NULL
);

-- Read model scores_v1: lists of leads by score.
CREATE TABLE scores_v1 (
    lead_id       uuid          PRIMARY KEY,
    customer_id   uuid          NOT NULL,
    score         numeric(5, 2) NOT NULL,
    band          text          NOT NULL CHECK (band IN ('hot', 'warm', 'cold')),
    qualified_at  timestamptz,
    model_version integer       NOT NULL,
    at            timestamptz   NOT NULL,
    version       bigint        NOT NULL
);
CREATE INDEX scores_v1_highest ON scores_v1 (score DESC, lead_id);
CREATE INDEX scores_v1_band ON scores_v1 (band, score DESC, lead_id);
