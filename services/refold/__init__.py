"""Refold's data plane: event store, relay, projections and queries."""

__version__ = "0.1.0"
