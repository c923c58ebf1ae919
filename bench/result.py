"""One result, one JSON line: what was measured beside its limit, in pairs that ran by turns on the same servers."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

#: A limit slower than this share of its usual rate says that the machine was busy: the row is void.
_VOID_BELOW = 0.7


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: its rate, and where measured the latency of each operation in ms and the memory of processes in MB.

    `samples` is how many operations the latencies stand for, where they are quantiles of more. `figures` are further
    ones, of which less is better.
    """

    events_per_s: float
    latencies_ms: list[float] = field(default_factory=list)
    samples: int | None = None
    rss_mb: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to measure, beside which limit, and where one is given beside a second one.

    `usual` is the limit's known rate in events/s on this kind of machine. Where `latency` is set, the ratio is that of
    the median latencies (less is better), else that of the rates (more is better).
    """

    workload: str
    params: dict[str, Any]
    measured: Callable[[], Run]
    limit: Callable[[], Run]
    limit_name: str
    usual: float | None = None
    latency: bool = False
    second: Callable[[], Run] | None = None
    second_name: str = ""

    def line(self, runs: int, told: Callable[[str], None]) -> dict[str, Any]:
        """Run both by turns, `runs` times, and return the result; the ratio is the median of the pairs' ratios.

        `told` hears of each pair.
        """
        pairs, seconds = [], []
        for number in range(1, runs + 1):
            began = time.monotonic()
            pairs.append((self.measured(), self.limit()))
            if self.second:
                seconds.append(self.second().events_per_s)
            ours, limit = pairs[-1]
            told(
                f"{self.workload}: pair {number} of {runs}: {_shown(ours)}, the limit {_shown(limit)} "
                f"({time.monotonic() - began:.0f} s)"
            )
        rates = [ours.events_per_s for ours, _ in pairs]
        limits = [limit.events_per_s for _, limit in pairs]
        latencies = sorted(value for ours, _ in pairs for value in ours.latencies_ms)
        limit_latencies = sorted(value for _, limit in pairs for value in limit.latencies_ms)
        result: dict[str, Any] = {
            "workload": self.workload,
            "params": self.params,
            "events_per_s": {
                "min": _rounded(min(rates)), "median": _rounded(statistics.median(rates)),
                "max": _rounded(max(rates)),
            },
            "p50_ms": percentile(latencies, 0.5),
            "p99_ms": percentile(latencies, 0.99),
            "samples": _samples(ours for ours, _ in pairs),
            "limit": {
                "name": self.limit_name,
                "events_per_s": _rounded(statistics.median(limits)),
                "p50_ms": percentile(limit_latencies, 0.5),
                "p99_ms": percentile(limit_latencies, 0.99),
                "samples": _samples(limit for _, limit in pairs),
            },
            "ratio": round(statistics.median(self._ratio(ours, limit) for ours, limit in pairs), 3),
            "ratio_of": "p50_ms" if self.latency else "events_per_s",
        }  # fmt: skip
        if latencies and limit_latencies:
            result["p99_ratio"] = round(statistics.median(_p99(ours) / _p99(limit) for ours, limit in pairs), 3)
        if rss := [ours.rss_mb for ours, _ in pairs if ours.rss_mb]:
            result["rss_mb"] = {process: round(max(run[process] for run in rss)) for process in rss[0]}
        if figures := [ours.figures for ours, _ in pairs if ours.figures]:
            result["figures"] = _most(figures)
        if limits_figures := [limit.figures for _, limit in pairs if limit.figures]:
            result["limit"]["figures"] = _most(limits_figures)
            result["figure_ratios"] = {
                name: round(statistics.median(ours.figures[name] / limit.figures[name] for ours, limit in pairs), 3)
                for name in limits_figures[0]
            }
        if seconds:
            result["second_limit"] = {
                "name": self.second_name,
                "events_per_s": round(statistics.median(seconds)),
                "ratio": round(
                    statistics.median(rate / second for rate, second in zip(rates, seconds, strict=True)), 3
                ),
            }
        if self.usual and statistics.median(limits) < _VOID_BELOW * self.usual:
            result["void"] = (
                f"the limit reached less than {_VOID_BELOW} of its usual {self.usual:,.0f}/s: a busy machine"
            )
        return result

    def _ratio(self, ours: Run, limit: Run) -> float:
        if self.latency:
            return statistics.median(ours.latencies_ms) / statistics.median(limit.latencies_ms)
        return ours.events_per_s / limit.events_per_s


def _most(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(max(run[name] for run in figures), 3) for name in figures[0]}


def _rounded(rate: float) -> float:
    """Return a rate whole, where it isn't small."""
    return round(rate) if rate >= 100 else round(rate, 2)


def _shown(run: Run) -> str:
    p50 = percentile(sorted(run.latencies_ms), 0.5)
    return f"{_rounded(run.events_per_s):,}/s" + (f" with p50 {p50:.2f} ms" if p50 is not None else "")


def _samples(runs: Iterable[Run]) -> int:
    """Return of how many operations the latencies are."""
    return sum(len(run.latencies_ms) if run.samples is None else run.samples for run in runs)


def _p99(run: Run) -> float:
    return percentile(sorted(run.latencies_ms), 0.99) or math.inf


def percentile(ordered: list[float], share: float) -> float | None:
    """Return the value below which `share` of the ordered values lie; None where there are none."""
    if not ordered:
        return None
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)
