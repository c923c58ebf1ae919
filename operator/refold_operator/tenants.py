"""What operator and webhook know of an installation's tenants: environment variables that the chart sets.

Namespaces are the tenants. What one makes is named for it, in Kafka, in PostgreSQL and in Redis, and reads what is its
own; the exception is `spec.topic.name`, which anybody could choose before its owner does.
"""

from pydantic import Field
from pydantic_settings import BaseSettings

from refold_operator.spec_guard import Rules


class TenantSettings(BaseSettings):
    """What an installation allows, and to whom."""

    #: The most bytes of one event that the event store accepts (`eventstore.limits.eventBytes`); topics must take them.
    event_bytes: int = Field(default=512 * 1024, ge=1024)
    #: The namespaces that may have EventStreams and Projections; empty: all.
    namespaces: list[str] = []
    #: How the names of topics may begin, by namespace (`*`: all others), beside `<namespace>.`; None: as they like.
    topic_prefixes: dict[str, list[str]] | None = None

    @property
    def rules(self) -> Rules:
        """What a spec is checked with."""
        return Rules(self.event_bytes, self.topic_prefixes, tuple(self.namespaces))
