-- What a person asked for a parked event. The consumer that owns the partition carries it out, in order and with the
-- same effect, so that nobody else ever touches its streams.
ALTER TABLE parked_events
    ADD COLUMN request      text CHECK (request IN ('replay', 'accept_hole', 'drop')),
    ADD COLUMN requested_by text,
    ADD COLUMN requested_at timestamptz;
CREATE INDEX parked_events_requests ON parked_events (consumer, id) WHERE request IS NOT NULL;
