"""One plot a workload: Refold beside its limits and its peers, a dashed line where it has to get.

All plots speak one language: blue is Refold, grey a limit of the same run, hatched yellow a peer that was measured
earlier (colours of Okabe and Ito, which people with any colour vision tell apart); each bar has its name above it.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.goals import FIGURES, Measure, Reading, Result, part, readings, target

_REFOLD, _LIMIT, _PEER, _MUST = "#0072B2", "#8C8C8C", "#F0C75E", "#B34700"
_INK, _FAINT = "#222222", "#DDDDDD"
#: Sizes in inches: of the page, between its edge and what is drawn, between panels, and of the parts of a panel.
_WIDTH, _EDGE, _BETWEEN = 9.0, 0.25, 0.45
_LINE, _BAR, _GAP, _TICKS, _HEADING = 0.17, 0.2, 0.13, 0.3, 0.24
#: Inches that a letter takes at most, by the letters' size in points.
_LETTER = 0.0078
_SMALL, _MIDDLE, _LARGE = 8.5, 9.5, 13.0
#: A peer's bar ends at this multiple of the longest other one: one far away would press all others to the edge.
_CUT = 2.5


#: What isn't measured in events.
_OPERATIONS = {
    "query": "rows/s",
    "growth": "operations/s",
    **dict.fromkeys(("reconcile-500", "reconcile-one", "resync", "projections", "idle"), "resources/s"),
}


@dataclass(frozen=True)
class _Bar:
    name: str
    value: float
    colour: str
    spread: tuple[float, float] | None = None


@dataclass
class _Panel:
    """Bars of one unit, with the places that Refold must reach."""

    title: str
    bars: list[_Bar]
    must: list[tuple[float, str]] = field(default_factory=list)


def draw(results: Sequence[Result], file: Path) -> None:
    """Draw the results of one workload, measured in one run, into `file` (by its name .svg or .png)."""
    style = mpl.rc_context({
        "font.family": "sans-serif", "hatch.linewidth": 0.8, "hatch.color": "white",
        # text stays text, which is smaller and can be searched; the same results give the same bytes
        "svg.fonttype": "none", "svg.hashsalt": "refold",
    })  # fmt: skip
    with style:
        figure = _drawn(results)
        figure.savefig(file, dpi=110, metadata={"Date": None} if file.suffix == ".svg" else None)


def _drawn(results: Sequence[Result]) -> Figure:
    rows = [(_heading(result), _panels(result)) for result in results]
    title = textwrap.wrap(target(results[0]).what, _letters(_WIDTH - 2 * _EDGE, _MIDDLE))
    foot = textwrap.wrap(_foot(results), _letters(_WIDTH - 2 * _EDGE, _SMALL))
    heights = [_row_height(heading, panels) for heading, panels in rows]
    head_height = 0.3 + len(title) * _LINE + 0.1
    height = 2 * _EDGE + head_height + sum(heights) + len(foot) * _LINE
    figure = Figure(figsize=(_WIDTH, height), facecolor="white")

    def write(text: str, top: float, size: float, **how: Any) -> None:
        figure.text(_EDGE / _WIDTH, 1 - top / height, text, size=size, va="top", color=_INK, **how)

    write(results[0]["workload"], _EDGE, _LARGE, weight="bold")
    write("\n".join(title), _EDGE + 0.3, _MIDDLE)
    top = _EDGE + head_height
    for (heading, panels), row_height in zip(rows, heights, strict=True):
        for number, line in enumerate(heading):
            write(line, top + number * _HEADING, _MIDDLE, weight="bold")
        width = _panel_width(len(panels))
        below = top + len(heading) * _HEADING + max(_head_height(panel, width) for panel in panels)
        for number, panel in enumerate(panels):
            panel_height = _panel_height(panel, width)
            axes = figure.add_axes((
                (_EDGE + number * (width + _BETWEEN)) / _WIDTH,
                1 - (below + panel_height) / height,
                width / _WIDTH,
                panel_height / height,
            ))  # fmt: skip
            _fill(axes, panel, width, panel_height)
        top += row_height
    write("\n".join(foot), top, _SMALL)
    return figure


def _heading(result: Result) -> list[str]:
    """Return the lines above a result's panels."""
    lines = [part(result)] if part(result) else []
    if "void" in result:
        lines += textwrap.wrap(f"Void: {result['void']}", _letters(_WIDTH - 2 * _EDGE, _MIDDLE, bold=True))
    return lines


def _panels(result: Result) -> list[_Panel]:
    panels: dict[str, _Panel] = {}
    for reading in readings(result):
        match reading.goal.measure:
            case Measure.RATE | Measure.SECOND_RATE | Measure.RESOURCES | Measure.LEAST_RESOURCES:
                panel = panels.setdefault("rate", _rate_panel(result))
            case Measure.P50:
                panel = panels.setdefault("p50", _latency_panel(result, "p50_ms", "p50 (ms)"))
            case Measure.P99:
                panel = panels.setdefault("p99", _latency_panel(result, "p99_ms", "p99 (ms)"))
            case measure if measure in FIGURES:
                panel = panels.setdefault(measure.value, _figure_panel(result, reading))
            case _:
                panel = panels.setdefault("memory", _memory_panel(result))
        place = reading.goal.bound if reading.limit is None else reading.goal.bound * reading.limit
        panel.must.append((place, _must(reading, place)))
    if not panels.keys() & {"rate", "p50", "p99"}:  # no goal is of the ratio to the limit, which is shown all the same
        panels["rate"] = _rate_panel(result)
    if "memory" in panels:  # one line for all processes
        del panels["memory"].must[1:]
    return list(panels.values())


def _must(reading: Reading, place: float) -> str:
    goal = reading.goal
    if reading.limit is None:
        return f"- - must be {goal.text}"
    which = "second limit" if goal.measure is Measure.SECOND_RATE else "limit"
    return f"- - must be {goal.text} × {which} ({_number(place)}); is {reading.value:.2f} ×: {reading.verdict}"


def _rate_panel(result: Result) -> _Panel:
    rates = result["events_per_s"]
    bars = [
        _Bar("Refold", rates["median"], _REFOLD, (rates["min"], rates["max"])),
        _Bar(f"limit: {result['limit']['name']}", result["limit"]["events_per_s"], _LIMIT),
    ]
    if second := result.get("second_limit"):
        colour = _PEER if target(result).second_is_peer else _LIMIT
        bars.append(_Bar(f"second limit: {second['name']}", second["events_per_s"], colour))
    bars += [_Bar(peer.name, peer.events_per_s, _PEER) for peer in target(result).peers if peer.events_per_s]
    return _Panel(f"rate ({_operations(result)}): more is better", bars)


def _operations(result: Result) -> str:
    return _OPERATIONS.get(result["workload"], "events/s")


def _latency_panel(result: Result, quantile: str, title: str) -> _Panel:
    bars = [
        _Bar("Refold", result[quantile], _REFOLD),
        _Bar(f"limit: {result['limit']['name']}", result["limit"][quantile], _LIMIT),
    ]
    for peer in target(result).peers:
        value = getattr(peer, quantile)
        if value is not None:
            bars.append(_Bar(peer.name, value, _PEER))
    return _Panel(f"{title}: less is better", bars)


def _memory_panel(result: Result) -> _Panel:
    names = {"eventstore": "event store", "relay": "relay", "operator": "operator"}
    bars = [_Bar(f"Refold: {names[process]}", value, _REFOLD) for process, value in result["rss_mb"].items()]
    return _Panel("memory (MB): less is better", bars)


def _figure_panel(result: Result, reading: Reading) -> _Panel:
    bars = [_Bar("Refold", reading.ours, _REFOLD)]
    if reading.limit is not None:
        bars.append(_Bar(f"limit: {result['limit']['name']}", reading.limit, _LIMIT))
    return _Panel(f"{reading.goal.measure.value}: less is better", bars)


def _foot(results: Sequence[Result]) -> str:
    taken = results[0].get("taken", {})
    parts = []
    if taken:
        parts.append(
            f"Measured {taken['at'][:10]} at commit {taken['commit']}: {taken['runs']} pairs of Refold and limit by "
            f"turns, medians, {taken['cores']} cores, Python {taken['python']}, PostgreSQL {taken['postgresql']}."
        )
    if latencies := sum(result["samples"] for result in results if result["samples"]):
        parts.append(f"Latencies are of {latencies:,} operations.")
    bars = [bar for result in results for panel in _panels(result) for bar in panel.bars]
    if any(bar.spread for bar in bars):
        parts.append("The line on Refold's bar goes from its slowest to its fastest run.")
    if any(bar.colour == _PEER for bar in bars):
        parts.append("Hatched: peers, measured earlier on this kind of machine, not in this run.")
    return " ".join(parts)


def _letters(width: float, size: float, *, bold: bool = False) -> int:
    """Return how many letters of a size in points fit into a width in inches."""
    return max(10, int(width / (_LETTER * size * (1.15 if bold else 1))))


def _panel_width(count: int) -> float:
    return (_WIDTH - 2 * _EDGE - (count - 1) * _BETWEEN) / count


def _wrapped(text: str, width: float) -> list[str]:
    return textwrap.wrap(text, _letters(width, _SMALL))


def _head_height(panel: _Panel, width: float) -> float:
    """Return the height of a panel's title and of what is said about its dashed lines."""
    return (1 + sum(len(_wrapped(text, width)) for _, text in panel.must)) * _LINE + 0.08


def _panel_height(panel: _Panel, width: float) -> float:
    return _GAP + sum(len(_wrapped(bar.name, width)) * _LINE + _BAR + _GAP for bar in panel.bars)


def _row_height(heading: Sequence[str], panels: Sequence[_Panel]) -> float:
    width = _panel_width(len(panels))
    head = max(_head_height(panel, width) for panel in panels)
    return len(heading) * _HEADING + head + max(_panel_height(panel, width) for panel in panels) + _TICKS + 0.15


def _fill(axes: Axes, panel: _Panel, width: float, height: float) -> None:
    """Draw a panel; vertical places are inches from its top."""
    shown = [bar.value for bar in panel.bars if bar.colour != _PEER] + [place for place, _ in panel.must]
    shown += [bar.spread[1] for bar in panel.bars if bar.spread]
    most = max(shown)
    cut = most * _CUT
    most = max([most, *(min(bar.value, cut) for bar in panel.bars)])
    # room for the number behind the longest bar
    longest = max(len(_label(bar, cut)) for bar in panel.bars) * _LETTER * _SMALL + 0.1
    right = most * width / max(width - longest, width / 3)
    axes.set_xlim(0, right)
    axes.set_ylim(height, 0)
    axes.set_yticks([])
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_LIMIT)
    axes.grid(visible=True, axis="x", color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=max(3, int(width / 1.1)))
    axes.xaxis.set_major_formatter(lambda value, _: _number(value))
    axes.tick_params(axis="x", labelsize=_SMALL, colors=_INK, length=0, pad=3)

    above = -0.08
    for _, must in reversed(panel.must):
        lines = _wrapped(must, width)
        axes.text(0, above, "\n".join(lines), size=_SMALL, color=_MUST, va="bottom")
        above -= len(lines) * _LINE
    axes.text(0, above, panel.title, size=_SMALL, color=_INK, weight="bold", va="bottom")
    for place, _ in panel.must:
        axes.axvline(place, color=_MUST, linewidth=1.3, linestyle=(0, (4, 2)), zorder=3)

    # nothing runs through what is to be read
    readable = {"boxstyle": "square,pad=0.1", "facecolor": "white", "linewidth": 0}
    top = _GAP
    for bar in panel.bars:
        lines = _wrapped(bar.name, width)
        weight = "bold" if bar.colour == _REFOLD else "normal"
        write: dict[str, Any] = {"size": _SMALL, "color": _INK, "weight": weight, "bbox": readable, "zorder": 4}
        axes.text(0, top, "\n".join(lines), va="top", **write)
        top += len(lines) * _LINE
        middle = top + _BAR / 2
        end = min(bar.value, cut)
        axes.barh(
            middle, end, _BAR * 0.85, color=bar.colour, hatch="////" if bar.colour == _PEER else None, linewidth=0,
            zorder=2,
        )  # fmt: skip
        if bar.spread:
            axes.errorbar(
                bar.value, middle, xerr=[[bar.value - bar.spread[0]], [bar.spread[1] - bar.value]], color=_INK,
                capsize=3, linewidth=1.2, zorder=3,
            )  # fmt: skip
            end = max(end, bar.spread[1])
        axes.annotate(_label(bar, cut), (end, middle), (5, 0), textcoords="offset points", va="center", **write)
        top += _BAR + _GAP


def _label(bar: _Bar, cut: float) -> str:
    return f"{_number(bar.value)} (bar cut)" if bar.value > cut else _number(bar.value)


def _number(value: float) -> str:
    """Write a number with three digits that count, or whole."""
    if value == 0 or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
