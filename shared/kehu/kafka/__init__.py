"""From the store to Kafka and out again: relay, consumers and their effects, parked events, topics."""
