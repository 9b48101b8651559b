-- What lead-intake looks up while it decides; written in the transaction of the events, so it is never behind them.

-- One key for each customer, wrapped by the master key. Erasing a customer empties it for ever.
CREATE TABLE customer_keys (
    customer_id  text        PRIMARY KEY,
    wrapped      bytea,
    destroyed_at timestamptz,
    CHECK ((wrapped IS NULL) = (destroyed_at IS NOT NULL))
);

-- Every customer, with the lead that is being worked on, if there is one: later captures of the customer are merged into it.
CREATE TABLE customers (
    customer_id text NOT NULL CONSTRAINT customers_once PRIMARY KEY,
    number      text NOT NULL CONSTRAINT customer_number_once UNIQUE,
    open_lead   uuid
);

-- Who is behind a phone number or an email address: keyed hashes, so that the table tells nothing to who reads it.
CREATE TABLE contact_index (
    hash        bytea NOT NULL CONSTRAINT contact_once PRIMARY KEY,
    customer_id text  NOT NULL
);
CREATE INDEX contact_index_customer ON contact_index (customer_id);

-- The last customer number of each month that was given to a process. Processes take blocks: numbers have holes, never twins.
CREATE TABLE customer_numbers (
    month text    PRIMARY KEY,
    last  integer NOT NULL
);

-- The channel catalogue.
CREATE TABLE channels (
    channel text    PRIMARY KEY,
    title   text    NOT NULL,
    kind    text    NOT NULL,
    active  boolean NOT NULL,
    version bigint  NOT NULL
);

-- A capture of a known customer was decided on what was read a moment ago. This makes sure that it still holds when it is
-- written: the customer was not erased, and (with a lead) that lead is still the open one. Else it looks like any other
-- conflict, and the capture is decided again.
CREATE FUNCTION hold_customer(customer text, lead uuid) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM customers c JOIN customer_keys k USING (customer_id)
    WHERE c.customer_id = customer AND k.wrapped IS NOT NULL AND (lead IS NULL OR c.open_lead = lead)
    FOR SHARE;
    IF NOT FOUND THEN
        RAISE unique_violation USING MESSAGE = 'the customer changed', CONSTRAINT = 'customer_held';
    END IF;
END
$$;

-- The lead becomes the open one of a known customer who has none.
CREATE FUNCTION open_lead(customer text, lead uuid) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM hold_customer(customer, NULL);
    UPDATE customers SET open_lead = lead WHERE customer_id = customer AND open_lead IS NULL;
    IF NOT FOUND THEN
        RAISE unique_violation USING MESSAGE = 'the customer has an open lead', CONSTRAINT = 'open_lead_once';
    END IF;
END
$$;

-- Read model leads_v1: lists of leads. No personal data; names are read from the events, page by page.
CREATE TABLE leads_v1 (
    lead_id       uuid        PRIMARY KEY,
    customer_id   text        NOT NULL,
    status        text        NOT NULL CHECK (status IN ('open', 'merged', 'rejected')),
    survivor      uuid,
    rating        text        NOT NULL,
    source        text        NOT NULL,
    channel       text        NOT NULL,
    captured_at   timestamptz NOT NULL,
    changed_at    timestamptz NOT NULL,
    version       bigint      NOT NULL
);
CREATE INDEX leads_v1_newest ON leads_v1 (captured_at DESC, lead_id DESC);
CREATE INDEX leads_v1_channel ON leads_v1 (channel, captured_at DESC, lead_id DESC);
CREATE INDEX leads_v1_customer ON leads_v1 (customer_id, captured_at, lead_id);
