"""The kept results, and what is made of them: `python -m bench.report docs/bench` draws plots and table again.

A folder of results holds `results.jsonl` (a result a line, with when and on what it was taken), a plot a workload, and
where there is one a README.md with a table of the results between two marks.
"""

import datetime as dt
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psycopg

from bench import plots
from bench.goals import Measure, Result, part, readings
from bench.workloads import WORKLOADS

RESULTS = "results.jsonl"
BEGIN, END = "<!-- begin: made by bench/report.py -->", "<!-- end -->"
_ROOT = Path(__file__).parents[1]


def taken(dsn: str, runs: int) -> dict[str, Any]:
    """Return when and on what results are taken; `dsn` is of their PostgreSQL."""
    with psycopg.connect(dsn) as conn:
        version = conn.info.parameter_status("server_version") or "?"
    changed = _git("status", "--porcelain", "--", "services", "operator", "bench", "hack", "uv.lock")
    return {
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD") + (" with changes" if changed else ""),
        "runs": runs,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "postgresql": version.split()[0],
    }


def _git(*arguments: str) -> str:
    """Return git's answer, empty outside of a clone."""
    return subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False).stdout.strip()


def keep(folder: Path, results: Sequence[Result]) -> None:
    """Write results into the folder's file, in place of earlier ones of the same workloads."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / RESULTS
    new = {result["workload"] for result in results}
    earlier = [result for result in read(folder) if result["workload"] not in new] if file.exists() else []
    order = list(WORKLOADS)
    ordered = sorted([*earlier, *results], key=lambda result: order.index(result["workload"]))
    # written whole and moved: a run that is broken off leaves what was there
    written = file.with_suffix(".new")
    written.write_text("".join(f"{json.dumps(result)}\n" for result in ordered))
    written.replace(file)


def read(folder: Path) -> list[Result]:
    """Return the folder's results in the order of the workloads."""
    return [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]


def draw(folder: Path) -> None:
    """Draw a plot for each workload of the folder's results, and write its README.md's table."""
    results = read(folder)
    for name, of_workload in _by_workload(results).items():
        plots.draw(of_workload, folder / f"{name}.svg")
    readme = folder / "README.md"
    if readme.exists():
        readme.write_text(with_table(readme.read_text(), results))


def with_table(text: str, results: Sequence[Result]) -> str:
    """Return a README's text with the results' table and plots between its marks."""
    marked = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not marked.search(text):
        raise ValueError(f"README.md has no place for the table: a line {BEGIN} and a line {END}")
    # a function: what stands in the table is no pattern
    return marked.sub(lambda _: f"{BEGIN}\n{_table(results)}\n{END}", text)


def _by_workload(results: Sequence[Result]) -> Mapping[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result["workload"], []).append(result)
    return found


def _table(results: Sequence[Result]) -> str:
    if not results:
        return "No results are kept here yet."
    lines = [
        "| workload | measure | Refold | limit | ratio | must be | | taken |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        name = " ".join(filter(None, [f"`{result['workload']}`", part(result)]))
        for goal, ours, limit, value, verdict in readings(result):
            spread = ""
            if goal.measure in (Measure.RATE, Measure.SECOND_RATE, Measure.RESOURCES, Measure.LEAST_RESOURCES):
                spread = f" ({result['events_per_s']['min']:,} to {result['events_per_s']['max']:,})"
            cells = [
                name,
                goal.measure.value,
                f"{ours:,}{spread}",
                "" if limit is None else f"{limit:,}",
                "" if limit is None else f"{value:g}",
                goal.text,
                verdict,
                f"{result['taken']['at'][:16].replace('T', ' ')}, {result['taken']['commit']}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    images = [f"![{name}]({name}.svg)" for name in _by_workload(results)]
    return "\n".join([*lines, "", *images])


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
