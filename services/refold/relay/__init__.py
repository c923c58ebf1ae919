"""The relay: event store → Kafka."""
