"""The entry point `refold projector`."""

import signal
import sys

import structlog

from refold import kafka, logs
from refold.projection.projector import Projector
from refold.projection.settings import Settings
from refold.web.probes import Probes

log = structlog.get_logger(__name__)


def main() -> None:
    """Fold until SIGTERM or SIGINT; exit code 0."""
    logs.configure("projector")
    settings = Settings()  # type: ignore[call-arg]  # from the environment
    structlog.contextvars.bind_contextvars(projection=settings.projection, version=settings.version)
    projector = Projector(settings)
    kafka.end_when_changed(settings.brokers())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: projector.stop())
    with Probes(settings.port, healthy=projector.healthy, ready=projector.ready):
        projector.run()
    log.info("Stopped")
    sys.exit(0)
