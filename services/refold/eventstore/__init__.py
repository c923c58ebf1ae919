"""The `refold.eventstore` package: append and read events in PostgreSQL."""
