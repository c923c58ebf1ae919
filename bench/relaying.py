"""A relay process for the time that a stream needs, and consumers of many streams."""

import contextlib
import re
import time
from collections.abc import Iterator

import httpx
from refold.eventstore.catalog import Stream

from bench.appending import reveal
from bench.servers import Servers
from bench.waiting import until
from hack.servers.callers import get
from hack.servers.platform import Service

#: Seconds after which a relay counts as stuck, or the rate below which it does, whichever leaves it more time.
_MOST_SECONDS, _LEAST_RATE = 300, 4_000


@contextlib.contextmanager
def running_relay(servers: Servers) -> Iterator[Service]:
    """Run a relay that is ready."""
    process = servers.platform.relay()
    process.up()
    try:
        until(
            lambda: get(f"{process.url}/readyz").status_code == httpx.codes.OK,
            "the relay is ready",
            log=process.log,
        )
        yield process
    finally:
        process.stop()


def relay_all(servers: Servers, stream: Stream, count: int) -> float:
    """Reveal `stream` to a relay that is ready; return the seconds until its `count` events are committed."""
    with running_relay(servers) as process, httpx.Client(base_url=process.url, trust_env=False) as client:
        began = time.perf_counter()
        reveal(servers, stream)
        while (relayed := _relayed(client, stream)) < count:
            passed = time.perf_counter() - began
            if passed > max(_MOST_SECONDS, count / _LEAST_RATE):
                raise TimeoutError(f"{relayed} of {count} events were relayed in {passed:.0f} s: {process.log}")
            # to ask takes the relay's own time: ask when a quarter of what is left may have passed
            left = passed * (count - relayed) / relayed if relayed else 0.0
            time.sleep(max(0.02, left / 4))
        return time.perf_counter() - began


def _relayed(client: httpx.Client, stream: Stream) -> float:
    name = re.escape(f'refold_relay_events_total{{stream="{stream.namespace}/{stream.name}"}}')
    found = re.search(rf"^{name} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0
