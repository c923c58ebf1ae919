"""`python -m bench [WORKLOAD …]`: run workloads beside their limits and print a JSON line for each result."""

import argparse
import gc
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import orders, report, result
from bench.servers import Servers
from bench.workloads import WORKLOADS, Workload

_UNASKED = [name for name, workload in WORKLOADS.items() if workload.unasked]


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run what it names; where it names none, all workloads that run unasked."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "workload", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)} (default: {', '.join(_UNASKED)})"
    )
    parser.add_argument("--store", metavar="DSN", help="PostgreSQL of the event store, as superuser (default: an own)")
    parser.add_argument("--kafka", metavar="HOST:PORT", help="Kafka (default: an own)")
    parser.add_argument(
        "--read-store", metavar="DSN", help="PostgreSQL of the read models (default: the event store's)"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--events", type=int, help="how many events (default: each workload's own number)")
    source.add_argument("--input", type=Path, metavar="FILE.jsonl", help='lines of {"subject", "type", "data"}')
    parser.add_argument("--runs", type=int, default=5, help="pairs of a run and its limit's (default: 5)")
    parser.add_argument(
        "--into", type=Path, metavar="FOLDER",
        help=f"keep the results in FOLDER/{report.RESULTS}, in place of earlier ones of the same workloads, "
        "and draw plots there",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.workload if name not in WORKLOADS]:
        parser.error(f"there is no workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    if options.runs < 1 or (options.events is not None and options.events < 1):
        parser.error("--runs and --events are at least 1")

    chosen = {name: WORKLOADS[name] for name in options.workload or _UNASKED}
    counts = {name: options.events or workload.events_a_run(options.runs) for name, workload in chosen.items()}
    # who ends this process ends its servers too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))
    began = time.monotonic()
    most = sys.maxsize if options.input else max(counts.values())
    events = orders.take(most, file=options.input)
    gc.collect()
    gc.freeze()  # the collector shall not look at these again and again while something is measured
    with Servers(store=options.store, kafka=options.kafka, read_store=options.read_store) as servers:
        for name, workload in chosen.items():
            taken = report.taken(servers.postgres.dsn(), options.runs) if options.into else {}
            results = _run(
                servers, name, workload, events if options.input else events[: counts[name]], runs=options.runs
            )
            if options.into:
                report.keep(options.into, [{**line, "taken": taken} for line in results])
    if options.into:
        report.draw(options.into)
    _tell(f"done in {time.monotonic() - began:.0f} s")


def _run(
    servers: Servers, name: str, workload: Workload, events: Sequence[orders.OrderEvent], *, runs: int
) -> list[dict[str, Any]]:
    """Run a workload in a store of its own, so that no other one's events are relayed or vacuumed beside it."""
    began = time.monotonic()
    _tell(f"{name}: preparing")
    lines = []
    with servers.beside() as own:
        compared = workload.compare(own, events)
        for comparison in [compared] if isinstance(compared, result.Comparison) else compared:
            lines.append(comparison.line(runs, _tell))
            print(json.dumps(lines[-1]), flush=True)
    _tell(f"{name}: took {time.monotonic() - began:.0f} s")
    return lines


def _tell(progress: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {progress}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
