"""`python -m bench [WORKLOAD …]`: run workloads beside their limits and print a JSON line for each."""

import argparse
import sys
from pathlib import Path

from bench import orders, result
from bench.servers import Servers
from bench.workloads import WORKLOADS


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run what it names, all workloads where it names none."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("workload", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)} (default: all)")
    parser.add_argument("--store", metavar="DSN", help="PostgreSQL of the event store, as superuser (default: an own)")
    parser.add_argument("--kafka", metavar="HOST:PORT", help="Kafka (default: an own)")
    parser.add_argument(
        "--read-store", metavar="DSN", help="PostgreSQL of the read models (default: the event store's)"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--events", type=int, help="how many events (default: each workload's own number)")
    source.add_argument("--input", type=Path, metavar="FILE.jsonl", help='lines of {"subject", "type", "data"}')
    parser.add_argument("--runs", type=int, default=5, help="pairs of a run and its limit's (default: 5)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.workload if name not in WORKLOADS]:
        parser.error(f"there is no workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    if options.runs < 1 or (options.events is not None and options.events < 1):
        parser.error("--runs and --events are at least 1")

    with Servers(store=options.store, kafka=options.kafka, read_store=options.read_store) as servers:
        for name in options.workload or WORKLOADS:
            workload = WORKLOADS[name]
            if options.input:
                events = orders.take(sys.maxsize, file=options.input)
            else:
                events = orders.take(options.events or workload.events)
            compared = workload.compare(servers, events)
            for comparison in [compared] if isinstance(compared, result.Comparison) else compared:
                result.show(comparison.line(options.runs))


if __name__ == "__main__":
    main()
