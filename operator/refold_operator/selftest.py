"""What `helm test` runs: an event goes in at one end of the installation, and its row must come out at the other.

The EventStream and the Projection are the chart's, made for the test. So what answers has been through the API server's
admission, the operator, PostgreSQL, the relay, Kafka, a projector, the read store and a query service, and the caller's
token and rights were looked at twice.
"""

import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import httpx
import structlog
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict
from refold import logs

_log = structlog.get_logger(__name__)

#: Seconds between two tries, and for one of them.
_PAUSE_SECONDS = 1.0
_TRY_SECONDS = 10.0


class Settings(BaseSettings):
    """Where the two ends are."""

    model_config = SettingsConfigDict(env_prefix="REFOLD_")

    #: URLs of event store and query service.
    eventstore_url: str
    query_url: str
    #: The EventStream, `<namespace>/<name>`.
    stream: str
    #: Holds a token for the audience `refold` of who may append to the stream, and read it and the rows.
    token_file: Path
    #: How long all of it may take, in seconds; the stream and the projection may have to be made first.
    within_seconds: float = Field(default=180.0, gt=0)


class FailedError(Exception):
    """The installation didn't do what it should in time."""


class Caller:
    """Asks until the answer is the wanted one, or the time is over."""

    def __init__(self, settings: Settings) -> None:
        # Each try over a connection of its own: one that was made while the Service was new, with the address of a
        # former one, may lead to another pod for as long as it is open.
        self._client = httpx.Client(timeout=_TRY_SECONDS, limits=httpx.Limits(max_keepalive_connections=0))
        self._token_file = settings.token_file
        self._deadline = time.monotonic() + settings.within_seconds

    def ask(
        self,
        what: str,
        method: str,
        url: str,
        *,
        status: int,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Return the first answer with `status`.

        Raises:
            FailedError: there was none in time; it says what the last answer was.
        """
        while True:
            try:
                # read each time: the kubelet renews it
                sent = {"authorization": f"Bearer {self._token_file.read_text().strip()}", **(headers or {})}
                response = self._client.request(method, url, json=body, headers=sent)
            except httpx.TransportError as error:
                last = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == status:
                    return response
                last = f"{response.status_code} {response.text[:500]}"
            if time.monotonic() > self._deadline:
                raise FailedError(f"{what}: {method} {url} didn't answer {status} in time, but at last: {last}")
            _log.info("not yet", what=what, answer=last)
            time.sleep(_PAUSE_SECONDS)


def run(settings: Settings) -> None:
    """Append an event, read it back, and read its row.

    Raises:
        FailedError: what was read isn't what was written, or something didn't answer in time.
    """
    caller = Caller(settings)
    subject = f"test-{secrets.token_hex(8)}"
    events = f"{settings.eventstore_url}/v1/streams/{settings.stream}/subjects/{subject}/events"
    data = {"number": secrets.randbelow(1_000_000)}
    # The same append again is answered as the first time, so a lost answer costs nothing.
    append = {"expectedRevision": "none", "events": [{"id": "1", "type": "Tested", "data": data}]}
    token = caller.ask("append an event", "POST", events, status=201, body=append).json()["token"]
    read = caller.ask("read the event", "GET", events, status=200).json()["events"]
    if [(event["type"], event["data"]) for event in read] != [("Tested", data)]:
        raise FailedError(f"the event store has other events of {subject} than the one that was appended: {read}")
    row = caller.ask(
        "read the event's row", "GET", f"{settings.query_url}/v1/rows/{subject}", status=200,
        headers={"refold-token": token, "prefer": "wait=5"},
    ).json()  # fmt: skip
    if row["data"] != data:
        raise FailedError(f"the row of {subject} is {row}, but its data should be {data}")
    _log.info("the event's row is there", stream=settings.stream, subject=subject, row=row)


def main() -> NoReturn:
    """Exit with 0 if the installation works; settings come from the environment."""
    logs.configure("selftest")
    try:
        run(Settings())  # type: ignore[call-arg]  # required settings come from the environment
    except FailedError as error:
        _log.error("the installation doesn't work", why=str(error))
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
