"""`query`: rows by key over HTTP from one query process."""

import datetime as dt
import random
import urllib.parse
from collections.abc import Sequence

import httpx
from refold.eventstore.catalog import Stream

from bench import wrk
from bench.appending import filled_stream
from bench.limits import asgi, folding, postgres
from bench.models import ORDERS, check_rows, exact_fold, fold_all, make
from bench.orders import OrderEvent
from bench.result import Comparison, Run
from bench.servers import Servers
from bench.waiting import until
from hack.servers.callers import TOKEN

_SECONDS = 3
_SAMPLE = 100


def query(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """A row an order, asked for in random order on 32 connections."""
    stream = filled_stream(servers, events)
    expected = exact_fold(servers, stream)[ORDERS.name]
    version = make(servers, stream, ORDERS, ORDERS.name)
    fold_all(servers, stream, ORDERS.name, version, len(events)).stop()
    check_rows(servers, stream.namespace, ORDERS.name, version, ORDERS, expected)
    keys = random.Random(1).sample(sorted(expected), len(expected))
    requests = [f"/v1/rows/{urllib.parse.quote(key, safe='')}" for key in keys]
    seconds = min(_SECONDS, wrk.seconds_for(len(events)))
    return Comparison(
        workload="query",
        params={"rows": len(keys), "seconds": seconds, "connections": wrk.CONNECTIONS},
        measured=lambda: _run(servers, stream, requests, expected, seconds),
        limit=lambda: asgi.loaded(requests, method="GET", seconds=seconds),
        limit_name="a bare ASGI handler on uvicorn with httptools",
        second=lambda: postgres.select_only(servers.limit, clients=wrk.CONNECTIONS, seconds=seconds),
        second_name="pgbench -S -M prepared, 32 clients",
    )


def _run(
    servers: Servers, stream: Stream, requests: Sequence[str], expected: folding.Rows, seconds: int
) -> Run:  # fmt: skip
    process = servers.platform.query(stream.namespace, ORDERS.name)
    process.up()
    try:
        with httpx.Client(
            base_url=process.url, trust_env=False, headers={"Authorization": f"Bearer {TOKEN}"}
        ) as client:
            until(lambda: client.get("/readyz").status_code == httpx.codes.OK, "rows are served", log=process.log)
            _check_answers(client, expected)
        return wrk.load(process.url, requests, method="GET", token=TOKEN, seconds=seconds).run
    finally:
        process.stop()


def _check_answers(client: httpx.Client, expected: folding.Rows) -> None:
    for key in list(expected)[:_SAMPLE]:
        answer = folding.decode_exactly(client.get(f"/v1/rows/{urllib.parse.quote(key, safe='')}").content)
        *found, updated = (answer["data"][column] for column in ORDERS.columns)
        if [*found, dt.datetime.fromisoformat(updated)] != expected[key]:
            raise RuntimeError(f"{key} is answered with {answer}, the plain fold has {expected[key]}")
