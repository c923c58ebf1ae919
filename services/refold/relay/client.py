"""What all of the relay's Kafka clients have in common."""

import logging
from typing import Any


def _not_about_connections(record: logging.LogRecord) -> bool:
    # librdkafka tells every attempt to connect; a shard tells each of its own failures
    return not record.getMessage().startswith("FAIL ")


_logger = logging.getLogger("kafka.relay")
_logger.addFilter(_not_about_connections)


def config(bootstrap: str) -> dict[str, Any]:
    """Return the settings of a producer or consumer: where to connect, and what librdkafka says goes to our log."""
    return {
        "bootstrap.servers": bootstrap,
        # soon there when a broker is back; the default doubles up to 10 s
        "reconnect.backoff.max.ms": 1000,
        "logger": _logger,
    }
