"""What a benchmark makes of its runs."""

from collections.abc import Callable
from typing import Any

from bench.result import Comparison, Run
from bench.workloads import WORKLOADS


def comparison(measured: Callable[[], Run], limit: Callable[[], Run], **more: Any) -> Comparison:
    return Comparison(workload="w", params={}, measured=measured, limit=limit, limit_name="bare", **more)


def line(compared: Comparison, runs: int) -> dict[str, Any]:
    return compared.line(runs, lambda _: None)


def rates(*values: float) -> Callable[[], Run]:
    left = iter(values)
    return lambda: Run(events_per_s=next(left))


def test_measured_thing_and_limits_run_by_turns_and_each_pair_is_told() -> None:
    ran: list[str] = []
    told: list[str] = []

    def run(name: str) -> Callable[[], Run]:
        return lambda: ran.append(name) or Run(events_per_s=1)  # type: ignore[func-returns-value]

    comparison(run("refold"), run("limit"), second=run("second")).line(2, told.append)

    assert ran == ["refold", "limit", "second"] * 2
    assert len(told) == 2


def test_the_ratio_is_the_median_of_the_pairs_ratios_and_not_that_of_the_medians() -> None:
    found = line(comparison(rates(10, 20, 90), rates(10, 40, 30)), 3)

    assert found["ratio"] == 1.0  # of 1.0, 0.5 and 3.0; the medians would give 20 / 30
    assert found["events_per_s"] == {"min": 10, "median": 20, "max": 90}
    assert found["limit"]["events_per_s"] == 30


def test_a_ratio_of_latencies_is_that_of_the_medians_of_each_pair() -> None:
    ours = Run(events_per_s=1, latencies_ms=[3.0, 3.0, 9.0])
    limit = Run(events_per_s=1, latencies_ms=[2.0, 2.0, 3.0])

    found = line(comparison(lambda: ours, lambda: limit, latency=True), 2)

    assert (found["ratio"], found["ratio_of"], found["p99_ratio"]) == (1.5, "p50_ms", 3.0)
    assert (found["samples"], found["limit"]["samples"]) == (6, 6)


def test_figures_of_both_are_the_most_of_all_runs_and_their_ratio_is_the_median_of_the_pairs() -> None:
    def runs(*values: float) -> Callable[[], Run]:
        left = iter(values)
        return lambda: Run(events_per_s=1, figures={"cpu_us": next(left)})

    found = line(comparison(runs(10, 30, 20), runs(10, 10, 40)), 3)

    assert (found["figures"], found["limit"]["figures"]) == ({"cpu_us": 30}, {"cpu_us": 40})
    assert found["figure_ratios"] == {"cpu_us": 1.0}  # of 1.0, 3.0 and 0.5


def test_quantiles_stand_for_as_many_operations_as_were_counted() -> None:
    found = line(comparison(lambda: Run(events_per_s=1, latencies_ms=[1.0], samples=500), rates(1, 1)), 2)

    assert (found["samples"], found["limit"]["samples"]) == (1000, 0)


def test_a_row_is_void_where_the_limit_is_below_its_usual_rate() -> None:
    slow = line(comparison(rates(100), rates(69), usual=100), 1)
    usual = line(comparison(rates(100), rates(70), usual=100), 1)

    assert "less than 0.7 of its usual 100/s" in slow["void"]
    assert "void" not in usual


def test_the_second_limit_has_its_own_rate_and_ratio() -> None:
    found = line(comparison(rates(10, 20), rates(1, 1), second=rates(5, 20), second_name="other"), 2)

    assert found["second_limit"] == {"name": "other", "events_per_s": 12, "ratio": 1.5}


def test_latencies_come_from_ten_thousand_operations_however_many_runs_there_are() -> None:
    for runs in (1, 3, 5):
        assert WORKLOADS["append-1"].events_a_run(runs) * runs >= 10_000
        assert WORKLOADS["append-100x8"].events_a_run(runs) * runs >= 100 * 10_000
        for name in ("relay-latency", "end-to-end", "many-streams"):
            assert WORKLOADS[name].events_a_run(runs) * runs >= 10_000
