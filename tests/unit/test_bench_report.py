"""Kept results of benchmarks: goals, plots, and the table of docs/bench."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from bench import goals, plots, report
from bench.workloads import WORKLOADS

DOCS = Path(__file__).parents[2] / "docs" / "bench"
LATENCIES = {"append-1", "relay-latency", "end-to-end", "many-streams", "takeover", "reconcile-one"}
FIGURES = {"seconds": 20.0, "writes": 1, "core_percent": 2.5, "cpu_us": 30.0, "peak_mb": 200.0}
TAKEN = {"at": "2026-01-31T12:00:00+00:00", "commit": "abc1234", "runs": 5, "cores": 2, "python": "3.11.7",
         "postgresql": "15.8"}  # fmt: skip


def result(workload: str, *, ratio: float = 1.0, params: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "workload": workload,
        "params": params or {"events": 10},
        "events_per_s": {"min": 900, "median": 1000, "max": 1200},
        "p50_ms": 2.0,
        "p99_ms": 4.0,
        "samples": 10_000,
        "limit": {
            "name": f"{workload}, bare", "events_per_s": 1000, "p50_ms": 2.0, "p99_ms": 4.0, "samples": 10_000,
            "figures": FIGURES,
        },
        "ratio": ratio,
        "ratio_of": "p50_ms" if workload in LATENCIES else "events_per_s",
        "p99_ratio": 1.0,
        "second_limit": {"name": "second", "events_per_s": 500, "ratio": 2.0},
        "rss_mb": {"eventstore": 100, "relay": 600, "operator": 300},
        "figures": FIGURES,
        "figure_ratios": {"cpu_us": 1.16, "peak_mb": 1.05},
        "taken": TAKEN,
        **more,
    }  # fmt: skip


def results_of(workload: str) -> list[dict[str, Any]]:
    if workload == "two-replicas":
        return [result(workload, params={"streams": streams}) for streams in (1, 2)]
    if workload == "rebuild-live":
        return [result(workload, params={"what": what}) for what in ("from append to query", "appends")]
    return [result(workload)]


def texts(svg: Path) -> list[str]:
    return ["".join(element.itertext()) for element in ET.parse(svg).iter() if element.tag.endswith("}text")]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_workload_has_a_plot_with_the_limit_the_peers_and_what_must_be_reached(
    workload: str, tmp_path: Path
) -> None:
    results = results_of(workload)
    file = tmp_path / "plot.svg"

    plots.draw(results, file)

    shown = texts(file)
    joined = " ".join(shown)
    assert workload in shown
    assert "Refold" in joined
    for line in results:
        assert f"{workload}, bare" in joined
        assert goals.readings(line)
        for reading in goals.readings(line):
            assert f"must be {reading.goal.text}" in joined
        for peer in goals.target(line).peers:
            assert peer.name in shown
    assert file.stat().st_size < 100_000


def test_the_same_results_give_the_same_plot(tmp_path: Path) -> None:
    files = [tmp_path / "one.svg", tmp_path / "two.svg"]

    for file in files:
        plots.draw(results_of("relay"), file)

    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("workload", "ratio", "verdict"),
    [
        ("append-32", 1.2, "reached"),
        ("append-32", 1.19, "missed"),
        ("append-1", 1.35, "reached"),
        ("append-1", 1.36, "missed"),
    ],
)
def test_more_is_better_for_rates_and_less_for_latencies(workload: str, ratio: float, verdict: str) -> None:
    assert [reading.verdict for reading in goals.readings(result(workload, ratio=ratio))] == [verdict]


def test_a_void_row_reaches_nothing_and_its_plot_says_why(tmp_path: Path) -> None:
    void = result("relay", ratio=5.0, void="a busy machine")

    plots.draw([void], tmp_path / "plot.svg")

    assert [reading.verdict for reading in goals.readings(void)] == ["void"]
    assert "Void: a busy machine" in texts(tmp_path / "plot.svg")


def test_memory_is_held_against_its_bound_and_not_against_a_limit() -> None:
    verdicts = {reading.goal.measure: reading.verdict for reading in goals.readings(result("many-streams"))}

    assert verdicts[goals.Measure.STORE_MEMORY] == "reached"
    assert verdicts[goals.Measure.RELAY_MEMORY] == "missed"


def test_a_figure_that_the_limit_has_too_is_held_against_it() -> None:
    [cpu] = goals.readings(result("two-projectors"))
    _, memory = goals.readings(result("rebuild-5m"))

    assert (cpu.ours, cpu.limit, cpu.value, cpu.verdict) == (30.0, 30.0, 1.16, "missed")
    assert (memory.ours, memory.limit, memory.value, memory.verdict) == (200.0, 200.0, 1.05, "reached")


def test_a_part_of_a_workload_has_goals_of_its_own() -> None:
    found = [[reading.goal for reading in goals.readings(one)] for one in results_of("rebuild-live")]

    assert found == [[goals.Goal(goals.Measure.P99, 2)], [goals.Goal(goals.Measure.RATE, 0.7)]]


def test_a_peer_that_is_far_away_is_cut_and_its_value_written(tmp_path: Path) -> None:
    plots.draw([result("relay-latency")], tmp_path / "plot.svg")

    assert "440 (bar cut)" in texts(tmp_path / "plot.svg")


def test_new_results_take_the_place_of_those_of_their_workloads_only(tmp_path: Path) -> None:
    report.keep(tmp_path, [result("relay", ratio=1.0)])
    report.keep(tmp_path, results_of("two-replicas"))
    report.keep(tmp_path, [result("append-32", ratio=1.0)])

    report.keep(tmp_path, [result("relay", ratio=2.0)])

    kept = [(line["workload"], line["ratio"]) for line in report.read(tmp_path)]
    assert kept == [("append-32", 1.0), ("two-replicas", 1.0), ("two-replicas", 1.0), ("relay", 2.0)]


def test_the_table_goes_between_its_marks_and_nothing_else_changes(tmp_path: Path) -> None:
    readme = (DOCS / "README.md").read_text()
    before, after = readme.split(report.BEGIN)[0], readme.split(report.END)[1]
    report.keep(tmp_path, [result("append-32", ratio=1.1)])
    (tmp_path / "README.md").write_text(readme)

    report.draw(tmp_path)

    text = (tmp_path / "README.md").read_text()
    assert text.startswith(before)
    assert text.endswith(after)
    row = next(line for line in text.splitlines() if line.startswith("| `append-32` | events/s"))
    assert "| 1,000 (900 to 1,200) | 1,000 | 1.1 | ≥ 1.2 | missed |" in row
    assert "![append-32](append-32.svg)" in text


def test_a_readme_without_the_marks_is_not_touched() -> None:
    with pytest.raises(ValueError, match="no place for the table"):
        report.with_table("# Benchmarks\n", [result("relay")])


def test_the_documented_table_and_plots_are_those_of_the_kept_results() -> None:
    results = report.read(DOCS)
    text = (DOCS / "README.md").read_text()

    assert report.with_table(text, results) == text
    workloads = {line["workload"] for line in results}
    assert {file.stem for file in DOCS.glob("*.svg")} == workloads


def test_what_is_kept_is_a_result_a_line() -> None:
    for line in (DOCS / report.RESULTS).read_text().splitlines():
        assert {"workload", "params", "events_per_s", "p50_ms", "p99_ms", "limit", "ratio", "taken"} <= set(
            json.loads(line)
        )
