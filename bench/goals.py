"""What each workload must reach, and what peers reached, measured earlier on this kind of machine (2 cores)."""

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

#: A result as its JSON line has it.
Result = Mapping[str, Any]


class Measure(Enum):
    """What is compared; its value names it for people."""

    RATE = "events/s"
    SECOND_RATE = "events/s, second limit"
    P50 = "p50, ms"
    P99 = "p99, ms"
    STORE_MEMORY = "event store, MB"
    RELAY_MEMORY = "relay, MB"
    OPERATOR_MEMORY = "operator, MB"
    RESOURCES = "resources/s"
    LEAST_RESOURCES = "resources/s, at least"
    SECONDS = "seconds"
    WRITES = "writes"
    CORE = "% of a core"
    CPU = "µs on a core an event"
    MOST_MEMORY = "most memory, MB"

    @property
    def more_is_better(self) -> bool:
        """Tell whether a bound is a least value."""
        return self in (Measure.RATE, Measure.SECOND_RATE, Measure.RESOURCES, Measure.LEAST_RESOURCES)

    @property
    def unit(self) -> str:
        """The unit of a bound that isn't of the ratio to a limit; empty where it is."""
        return _UNITS.get(self, "")


_UNITS = {
    Measure.STORE_MEMORY: "MB",
    Measure.RELAY_MEMORY: "MB",
    Measure.OPERATOR_MEMORY: "MB",
    Measure.LEAST_RESOURCES: "resources/s",
    Measure.SECONDS: "s",
    Measure.WRITES: "writes",
    Measure.CORE: "% of a core",
}
#: The memory of which process, and which further figure, is measured.
_MEMORY = {Measure.STORE_MEMORY: "eventstore", Measure.RELAY_MEMORY: "relay", Measure.OPERATOR_MEMORY: "operator"}
FIGURES = {
    Measure.SECONDS: "seconds",
    Measure.WRITES: "writes",
    Measure.CORE: "core_percent",
    Measure.CPU: "cpu_us",
    Measure.MOST_MEMORY: "peak_mb",
}


class Goal(NamedTuple):
    """A bound: of the ratio to the limit, or of what is measured itself."""

    measure: Measure
    bound: float

    @property
    def text(self) -> str:
        """The bound as people write it."""
        sign = "≥" if self.measure.more_is_better else "≤"
        return f"{sign} {self.bound:g} {self.measure.unit}".rstrip()

    @property
    def of_limit(self) -> bool:
        """Tell whether the bound is of the ratio to a limit."""
        return not self.measure.unit


class Peer(NamedTuple):
    """What another system reached."""

    name: str
    events_per_s: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None


class Target(NamedTuple):
    """A workload in a few words, its goals, its peers, and whether its second limit is a peer instead of a run."""

    what: str
    goals: tuple[Goal, ...]
    peers: tuple[Peer, ...] = ()
    second_is_peer: bool = False


class Reading(NamedTuple):
    """A goal beside what was measured: Refold's median, the limit's (None where there is none), what is bounded."""

    goal: Goal
    ours: float
    limit: float | None
    value: float
    verdict: str


_DEBEZIUM_TUNED = Peer("Debezium's outbox, tuned", p50_ms=13.8, p99_ms=27)
_REBUILDS = (
    Peer("Kafka Streams, result in RocksDB, at least once", 41_000),
    Peer("Kafka Streams, result in RocksDB, exactly-once v2", 35_000),
    Peer("Emmett, hand-written set-based handler", 16_000),
    Peer("eventsourcing, hand-written set-based handler", 16_000),
    Peer("Emmett, its rebuild", 2_000),
    Peer("eventsourcing", 1_100),
)
_SAME_AS_SMALL = (Goal(Measure.RATE, 0.9), Goal(Measure.P99, 1.5))

_TARGETS = {
    "append-32": Target(
        "appends by the library, one event each, 32 at once, expected revisions checked",
        (Goal(Measure.RATE, 1.2),),
        (Peer("Emmett", 2_800), Peer("eventsourcing", 2_600), Peer("message-db", 2_000)),
    ),
    "append-1": Target(
        "appends by the library, one event each, one at a time",
        (Goal(Measure.P50, 1.35),),
        (Peer("message-db", p50_ms=0.42), Peer("eventsourcing", p50_ms=0.48), Peer("Emmett", p50_ms=0.70)),
    ),
    "append-100x8": Target(
        "appends by the library, 100 events each, 8 at once",
        (Goal(Measure.RATE, 1.0),),
        (Peer("Emmett", 31_000), Peer("eventsourcing", 23_000)),
    ),
    "http-append": Target(
        "appends over HTTP, one event each, 32 connections, one process",
        (Goal(Measure.RATE, 0.4), Goal(Measure.SECOND_RATE, 1.5)),
        second_is_peer=True,
    ),
    "http-bulk": Target("bulk appends over HTTP, a line an event", (Goal(Measure.RATE, 0.8),)),
    "growth": Target("appends and reads in a large store, beside the same in a small one", _SAME_AS_SMALL),
    "two-replicas": Target("two event-store processes, beside one", ()),
    "relay": Target(
        "from the store to the topic, all events waiting",
        (Goal(Measure.RATE, 0.3),),
        (Peer("Debezium's outbox", 24_000),),
    ),
    "relay-latency": Target(
        "200 events a second: from an append's return until a consumer has its event",
        (Goal(Measure.P50, 3), Goal(Measure.P99, 3)),
        (_DEBEZIUM_TUNED, Peer("Debezium's outbox, by default", p50_ms=440, p99_ms=960)),
    ),
    "many-streams": Target(
        "200 events a second over many streams, beside one stream: from a request until a consumer has its event",
        (
            Goal(Measure.P50, 1.5), Goal(Measure.P99, 1.5),
            Goal(Measure.STORE_MEMORY, 500), Goal(Measure.RELAY_MEMORY, 500),
        ),
    ),
    "takeover": Target(
        "a relay is killed: from its death until the next event of each of its shards is read",
        (Goal(Measure.P50, 1), Goal(Measure.P99, 1)),
    ),
    "fold": Target("folding alone, both read models, in memory, one core", (Goal(Measure.RATE, 0.4),)),
    "rebuild": Target(
        "both read models built from the event store's history", (Goal(Measure.RATE, 0.4),), _REBUILDS
    ),
    "rebuild-topic": Target("both read models built from the topic", (Goal(Measure.RATE, 0.4),), _REBUILDS),
    "rebuild-redis": Target(
        "both read models built in Redis from the event store's history", (Goal(Measure.RATE, 0.25),)
    ),
    "two-projectors": Target("two projectors, beside one, PostgreSQL included", (Goal(Measure.CPU, 1.15),)),
    "rebuild-5m": Target(
        "both read models built from millions of events, beside a tenth of them",
        # 10 % more time is a rate of 1 / 1.1
        (Goal(Measure.RATE, 0.91), Goal(Measure.MOST_MEMORY, 1.1)),
    ),
    "rebuild-live": Target("the live version while another one is built from millions of events", ()),
    "end-to-end": Target(
        "200 events a second: from an append until a query answers with the row",
        (Goal(Measure.P50, 2.5), Goal(Measure.P99, 2.5)),
        (_DEBEZIUM_TUNED._replace(name="Debezium's outbox, tuned, to the topic only"),),
    ),
    "query": Target(
        "rows by key over HTTP, 32 connections, one process",
        (Goal(Measure.RATE, 0.4), Goal(Measure.SECOND_RATE, 0.15)),
    ),
    "reconcile-500": Target(
        "EventStreams of one partition applied at once, until all are Ready",
        (Goal(Measure.RESOURCES, 0.5), Goal(Measure.LEAST_RESOURCES, 30)),
        (Peer("Strimzi's topic operator, 250 topics", 27), Peer("Strimzi's topic operator, 10,000 events", 17)),
    ),
    "reconcile-one": Target(
        "one change after the other among many EventStreams, beside ten: from the request until it is Ready",
        (Goal(Measure.P99, 2),),
    ),
    "resync": Target(
        "an operator starts and looks at many EventStreams, all of them as they should be",
        (Goal(Measure.SECONDS, 30), Goal(Measure.WRITES, 0), Goal(Measure.OPERATOR_MEMORY, 400)),
    ),
    "projections": Target(
        "Projections without processes applied at once, until all have their objects", (Goal(Measure.RESOURCES, 0.3),)
    ),
    "idle": Target("the operator while nothing happens to many EventStreams", (Goal(Measure.CORE, 5),)),
}  # fmt: skip
#: Of workloads whose parts have goals of their own: by workload and part.
_OF_PART = {
    ("two-replicas", "on one stream"): (Goal(Measure.RATE, 0.9),),
    ("two-replicas", "each on a stream of its own"): (Goal(Measure.RATE, 1.0),),
    ("rebuild-live", "from append to query"): (Goal(Measure.P99, 2),),
    ("rebuild-live", "appends"): (Goal(Measure.RATE, 0.7),),
}


def target(result: Result) -> Target:
    """Return what holds for a result's workload, or for its part of it."""
    found = _TARGETS[result["workload"]]
    return found._replace(goals=_OF_PART.get((result["workload"], part(result)), found.goals))


def part(result: Result) -> str:
    """Return which part of its workload a result is; empty where the workload has one result."""
    if result["workload"] == "two-replicas":
        return "on one stream" if result["params"]["streams"] == 1 else "each on a stream of its own"
    return str(result["params"].get("what", ""))


def readings(result: Result) -> list[Reading]:
    """Return each goal of a result beside what was measured."""
    return [_reading(goal, result) for goal in target(result).goals]


def _reading(goal: Goal, result: Result) -> Reading:
    limit: float | None
    match goal.measure:
        case Measure.RATE | Measure.RESOURCES:
            ours, limit, value = result["events_per_s"]["median"], result["limit"]["events_per_s"], result["ratio"]
        case Measure.SECOND_RATE:
            second = result["second_limit"]
            ours, limit, value = result["events_per_s"]["median"], second["events_per_s"], second["ratio"]
        case Measure.P50:
            ours, limit, value = result["p50_ms"], result["limit"]["p50_ms"], result["ratio"]
        case Measure.P99:
            ours, limit, value = result["p99_ms"], result["limit"]["p99_ms"], result["p99_ratio"]
        case Measure.LEAST_RESOURCES:
            ours = value = result["events_per_s"]["median"]
            limit = None
        case measure if measure in FIGURES:
            figure = FIGURES[measure]
            ours = value = result["figures"][figure]
            limit = None
            if goal.of_limit:
                limit, value = result["limit"]["figures"][figure], result["figure_ratios"][figure]
        case measure:
            ours = value = result["rss_mb"][_MEMORY[measure]]
            limit = None
    reached = value >= goal.bound if goal.measure.more_is_better else value <= goal.bound
    verdict = "void" if "void" in result and goal.of_limit else "reached" if reached else "missed"
    return Reading(goal, ours, limit, value, verdict)
