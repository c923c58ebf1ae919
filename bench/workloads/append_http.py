"""`http-append`, `http-bulk`: appends over HTTP to one event-store process."""

import http.client
import time
import urllib.parse
import uuid
from collections.abc import Sequence

import httpx
import msgspec
from refold.eventstore.catalog import Stream

from bench import wrk
from bench.appending import check_history
from bench.limits import asgi, postgres
from bench.orders import OrderEvent
from bench.result import Comparison, Run
from bench.servers import PARTITIONS, Servers
from bench.waiting import until
from hack.servers.callers import TOKEN, get
from hack.servers.platform import Service

#: Appends a second of Emmett (@event-driven-io/emmett-postgresql), 32 at once, one event each.
EMMETT = 2_800
#: Lines of one bulk request.
_LINES = 25_000


def http_append(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """One event an append, 32 connections."""
    seconds = wrk.seconds_for(len(events))
    return Comparison(
        workload="http-append",
        params={"events": len(events), "seconds": seconds, "connections": wrk.CONNECTIONS, "partitions": PARTITIONS},
        measured=lambda: _append(servers, events, seconds),
        limit=lambda: asgi.loaded(append_requests("limit", "limit", events), method="POST", seconds=seconds),
        limit_name="a bare ASGI handler on uvicorn with httptools",
        # measured once on a machine of this kind: its process has no HTTP, and Node is no part of the tests
        second=lambda: Run(events_per_s=EMMETT),
        second_name="Emmett in its caller's process",
    )


def http_bulk(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """One event a line, each with its expected revision, on one connection."""
    return Comparison(
        workload="http-bulk",
        params={"events": len(events), "lines_a_request": _LINES, "partitions": PARTITIONS},
        measured=lambda: _bulk(servers, events),
        limit=lambda: postgres.executemany(servers.limit, events, batch=100, connections=8),
        limit_name="psycopg, pipelined executemany, 100 rows a commit, 8 connections",
        usual=41_000,
    )


def append_requests(namespace: str, name: str, events: Sequence[OrderEvent], *, id_prefix: str = "") -> list[str]:
    """Return the appends as wrk.lua takes them, expecting any revision, since a subject's events may go at once.

    Two loads of one stream need an `id_prefix` each.
    """
    return [
        f"/v1/streams/{namespace}/{name}/subjects/{urllib.parse.quote(event.subject, safe='')}/events"
        f'\t{{"expectedRevision":"any","events":[{{"id":"{id_prefix}\t","type":"{event.type}","data":{event.data.decode()}}}]}}'
        for event in events
    ]


def _append(servers: Servers, events: Sequence[OrderEvent], seconds: int) -> Run:
    stream = servers.stream()
    requests = append_requests(stream.namespace, stream.name, events)
    process = started(servers)
    try:
        answers = wrk.load(process.url, requests, method="POST", token=TOKEN, seconds=seconds)
    finally:
        process.stop()
    # what was under way at the end was appended without being counted
    check_history(servers, stream, answers.answered, answers.answered + wrk.CONNECTIONS)
    servers.platform.drop_stream(stream)
    return answers.run


def _bulk(servers: Servers, events: Sequence[OrderEvent]) -> Run:
    stream = servers.stream()
    bodies = [_body(events[start : start + _LINES]) for start in range(0, len(events), _LINES)]
    process = started(servers)
    try:
        connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=120)
        began = time.perf_counter()
        answers = [_send(connection, stream, body) for body in bodies]
        seconds = time.perf_counter() - began
        connection.close()
    finally:
        process.stop()
    lines = [line for answer in answers for line in answer.splitlines()]
    refused = [line for line in lines if "token" not in msgspec.json.decode(line)]
    if refused or len(lines) != len(events):
        raise RuntimeError(f"of {len(events)} lines {len(lines)} were answered, {len(refused)} with refusals like "
                           f"{refused[:1]}")  # fmt: skip
    check_history(servers, stream, len(events))
    servers.platform.drop_stream(stream)
    return Run(events_per_s=len(events) / seconds)


def _body(events: Sequence[OrderEvent]) -> bytes:
    return b"".join(
        b'{"subject":"%b","expectedRevision":%d,"events":[{"id":"%b","type":"%b","data":%b}]}\n'
        % (event.subject.encode(), event.revision - 1, str(uuid.uuid4()).encode(), event.type.encode(), event.data)
        for event in events
    )


def _send(connection: http.client.HTTPConnection, stream: Stream, body: bytes) -> bytes:
    connection.request(
        "POST", f"/v1/streams/{stream.namespace}/{stream.name}/events", body,
        {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/x-ndjson"},
    )  # fmt: skip
    response = connection.getresponse()
    answer = response.read()
    if response.status != httpx.codes.OK:
        raise RuntimeError(f"the bulk was answered with {response.status}: {answer[:500]!r}")
    return answer


def started(servers: Servers) -> Service:
    """Return an event-store process that is ready."""
    process = servers.platform.eventstore()
    process.up()
    until(
        lambda: get(f"{process.url}/readyz").status_code == httpx.codes.OK,
        "the event store is ready",
        log=process.log,
    )
    return process
