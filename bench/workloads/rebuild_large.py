"""`rebuild-5m`, `rebuild-live`: read models built from millions of events; and what readers of the live one notice."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence

import uvloop
from psycopg import sql
from refold import names
from refold.eventstore import EventStore
from refold.eventstore.catalog import Stream
from refold.projection.readstore.postgres import rows_table

from bench import filling, orders
from bench.appending import append_all, by_subject, check_history
from bench.models import ORDERS, Model, applied, check_rows, exact_fold, fold_all, make
from bench.orders import OrderEvent
from bench.relaying import relay_all, running_relay
from bench.result import Comparison, Run
from bench.servers import PARTITIONS, Servers
from bench.waiting import until
from bench.workloads.end_to_end import append_and_ask
from bench.workloads.rebuild import build_both
from hack.servers.platform import Service

#: For each event that is given: how many stand in the large history, and in the small one.
_LARGE, _SMALL = 500, 50
#: For each event that is given: how many are appended by 32 callers at once.
_APPENDED = 5
_AT_ONCE = 32
#: One of so many of the events that are given is appended where nothing is rebuilt; 200 a second.
_SHARE = 5


def rebuild_5m(servers: Servers, events: Sequence[OrderEvent]) -> Comparison:
    """From the event store's history. Five hundred times `events` are in one stream, a tenth of them in another."""
    large, small = (_filled(servers, events, times * len(events)) for times in (_LARGE, _SMALL))
    expected = {stream.name: exact_fold(servers, stream) for stream, _ in (large, small)}

    def build(filled: tuple[Stream, int]) -> Run:
        stream, count = filled
        return build_both(servers, stream, expected[stream.name], count)

    return Comparison(
        workload="rebuild-5m",
        params={"events": large[1], "partitions": PARTITIONS, "models": "one after the other, a process each"},
        measured=lambda: build(large),
        limit=lambda: build(small),
        limit_name=f"the same of {small[1]:,} events",
    )


def _filled(servers: Servers, events: Sequence[OrderEvent], count: int) -> tuple[Stream, int]:
    """Make a stream with at least `count` events, like `events`; return it and how many there are."""
    stream = servers.stream()
    filling.fill(servers, stream, count, long="", long_count=0, like=events)
    return stream, check_history(servers, stream, count, count + filling.LIFE * stream.partitions)


def rebuild_live(servers: Servers, events: Sequence[OrderEvent]) -> list[Comparison]:
    """A version is built anew from five hundred times `events` while the live one folds what is appended."""
    live = _Live(servers, events)
    params = {"events": live.history, "partitions": PARTITIONS}
    limit = "without the rebuild"
    return [
        Comparison(
            workload="rebuild-live", params={"what": "from append to query", **params, "events_a_second": 200},
            measured=live.ask_during_rebuild, limit=live.ask, limit_name=limit, latency=True,
        ),
        Comparison(
            workload="rebuild-live", params={"what": "appends", **params, "at_once": _AT_ONCE},
            measured=live.append_during_rebuild, limit=live.append, limit_name=limit,
        ),
    ]  # fmt: skip


class _Live:
    """A stream with its history in the topic too, a live version that has folded it, and all processes at work."""

    def __init__(self, servers: Servers, events: Sequence[OrderEvent]) -> None:
        self._servers, self._events = servers, events
        self._numbers = itertools.count(1)
        self._name = "live"
        self._stream, self.history = _filled(servers, events, _LARGE * len(events))
        relay_all(servers, self._stream, self.history)
        namespace = self._stream.namespace
        self._version = make(servers, self._stream, ORDERS, self._name)
        running = contextlib.ExitStack()
        servers.entered(running)
        running.enter_context(running_relay(servers))
        projector = fold_all(servers, self._stream, self._name, self._version, self.history)
        running.callback(projector.stop)
        expected = exact_fold(servers, self._stream)[ORDERS.name]
        check_rows(servers, namespace, self._name, self._version, ORDERS, expected)
        if not servers.platform.swap(namespace, self._name, self._version):
            raise RuntimeError(f"the first version of {self._name} didn't go live")
        self._query = servers.platform.query(namespace, self._name)
        running.callback(self._query.stop)
        self._query.up()

    def ask(self) -> Run:
        """Append a part of the events, 200 a second; each caller asks for its row."""
        return self._ask(orders.take(-(-len(self._events) // _SHARE), seed=self._seed()))

    def ask_during_rebuild(self) -> Run:
        """Do the same from the rebuild's start until it has caught up with the history that it found."""
        with self._rebuilding() as (process, version):
            run = self._ask(self._until_built(version), process)
            self._compare(version, process)
        return run

    def append(self) -> Run:
        """Append by 32 callers at once, as fast as it goes; then wait for the live version, which isn't measured."""
        lanes = by_subject(orders.take(_APPENDED * len(self._events), seed=self._seed()), _AT_ONCE)

        async def run() -> Run:
            async with await EventStore.open(self._servers.platform.store_dsn()) as store:
                seconds, latencies = await append_all(store, self._stream, lanes)
            return Run(events_per_s=len(latencies) / seconds, latencies_ms=latencies)

        result = uvloop.run(run())
        self._until_applied(self._version)
        return result

    def append_during_rebuild(self) -> Run:
        """Do the same while the history is read, which takes longer."""
        with self._rebuilding() as (process, version), self._servers.rows() as conn:
            process.up()
            until(
                lambda: applied(conn, self._stream.namespace, self._name, version) > 0,
                "the rebuild is under way",
                log=process.log,
            )
            return self.append()

    def _seed(self) -> int:
        """Return a seed that gives other subjects than all before."""
        return 1000 + next(self._numbers)

    def _ask(self, events: Iterator[OrderEvent] | Sequence[OrderEvent], begun: Service | None = None) -> Run:
        async def begin() -> None:
            if begun is not None:
                await asyncio.to_thread(begun.up)

        dsn = self._servers.platform.store_dsn()
        first = f"first {next(self._numbers)}"
        return uvloop.run(append_and_ask(dsn, self._query.url, self._stream, events, first=first, begun=begin))

    @contextlib.contextmanager
    def _rebuilding(self) -> Iterator[tuple[Service, str]]:
        """Yield the process of another version of the same rows, to be started, and its name; then drop it."""
        # an event type that there isn't makes it another version
        nothing = {"type": f"Nothing{next(self._numbers)}", "set": {"status": "'nothing'"}}
        model = Model(ORDERS.name, {**ORDERS.spec, "fold": [*ORDERS.spec["fold"], nothing]}, ORDERS.columns)
        version = make(self._servers, self._stream, model, self._name)
        process = self._servers.platform.projector(self._stream.namespace, self._name, version)
        try:
            yield process, version
        finally:
            process.stop()
            self._servers.platform.drop_version(self._stream.namespace, self._name, version)

    def _until_built(self, version: str) -> Iterator[OrderEvent]:
        """Yield events until the version has applied the history, as seen every half a second."""
        least = -(-len(self._events) // _SHARE)
        looked = time.monotonic()
        built = False
        with self._servers.rows() as conn:
            for number, event in enumerate(orders.events(seed=self._seed())):
                if number >= least and built:
                    return
                if time.monotonic() - looked > 0.5:
                    looked = time.monotonic()
                    built = applied(conn, self._stream.namespace, self._name, version) >= self.history
                yield event

    def _until_applied(self, version: str) -> None:
        with self._servers.events() as store, self._servers.rows() as conn:
            row = store.execute(
                "select sum(head)::bigint from refold.heads where stream = %s", [self._stream.stream]
            ).fetchone()
            assert row is not None
            until(
                lambda: applied(conn, self._stream.namespace, self._name, version) >= row[0],
                f"the version {version} has applied all",
            )

    def _compare(self, version: str, process: Service) -> None:
        """Raise RuntimeError where the version's rows aren't the live one's once both have applied all."""
        for one in (self._version, version):
            self._until_applied(one)
        schema = names.read_schema(self._stream.namespace, self._name)
        columns = sql.SQL(", ").join(map(sql.Identifier, ("key", *ORDERS.columns)))
        live, built = (
            sql.SQL("select {} from {}").format(columns, sql.Identifier(schema, rows_table(one)))
            for one in (self._version, version)
        )
        query = sql.SQL("select count(*) from (({0} except {1}) union all ({1} except {0})) d").format(live, built)
        with self._servers.rows() as conn:
            wrong = conn.execute(query).fetchone()
        if wrong != (0,):
            raise RuntimeError(f"rows of the version that was built aren't the live one's: {wrong}; {process.log}")
