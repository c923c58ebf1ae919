"""`make demo`: from a running installation to a table of rows that are checked against the file.

Loads January's flights (`DEMO_MONTHS=12`: the year), shows rows through the query services, scales `carrier-delays` to
three projectors while the next month loads, and compares every row with what `data` computes from the file alone.
"""

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.flights import data
from hack.client import ReadModel, Stream, eventually, kubectl, resource, wait_ready

NAMESPACE = "flights"
RESOURCES = Path(__file__).with_name("resources.yaml")
FLIGHT_STATUS, CARRIER_DELAYS = "http://127.0.0.1:30081", "http://127.0.0.1:30082"
_LINES_A_REQUEST = 4000


def appends(events: Sequence[data.FlightEvent]) -> list[dict[str, Any]]:
    """Return one append for each event; each expects the revision before it, and its id makes a retry harmless."""
    return [
        {
            "subject": event.subject,
            "expectedRevision": event.revision - 1 or "none",
            "events": [{"id": event.type, "type": event.type, "data": event.data}],
        }
        for event in events
    ]


def load(stream: Stream, events: Sequence[data.FlightEvent], progress: Progress, title: str) -> None:
    """Append all events in their order."""
    task = progress.add_task(title, total=len(events))
    lines = appends(events)
    for start in range(0, len(lines), _LINES_A_REQUEST):
        progress.advance(task, stream.bulk(lines[start : start + _LINES_A_REQUEST]))


def differences(rows: Sequence[dict[str, str]], flight_status: ReadModel, carrier_delays: ReadModel) -> list[str]:
    """Compare every row of both read models with the file's own fold; return what differs, in words."""
    result: list[str] = []
    flights = {key: _comparable(row) for key, row in flight_status.rows()}
    carriers = {key: data.CarrierDelays(**row) for key, row in carrier_delays.rows()}
    for what, found, expected in (
        ("flight-status", flights, data.expected_flight_status(rows)),
        ("carrier-delays", carriers, data.expected_carrier_delays(rows)),
    ):
        result += [
            f"{what} {key}: {found.get(key)} instead of {expected.get(key)}"
            for key in sorted(found.keys() | expected.keys())
            if found.get(key) != expected.get(key)
        ]
    return result


def _comparable(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of flight-status with its times in the form of the file's fold (whole seconds, Z)."""
    return {
        name: value[:19] + "Z" if name in ("scheduled", "departed") and value else value for name, value in row.items()
    }


def _show(console: Console, flight_status: ReadModel, carrier_delays: ReadModel) -> None:
    carriers = Table("carrier", "flights", "cancelled", "delayed", "minutes of delay", title="carrier-delays")
    for key, row in carrier_delays.rows():
        carriers.add_row(key, *(f"{row[name]:,}" for name in ("flights", "cancelled", "delayed", "minutes")))
    flights = Table("flight", "status", "from", "to", "departed", title="flight-status?where=status:eq:diverted")
    for key, row in list(flight_status.rows(where="status:eq:diverted"))[:8]:
        flights.add_row(key, row["status"], row["origin"], row["dest"], row["departed"][:16])
    console.print(carriers, flights)


def _with_three_projectors(console: Console) -> threading.Event:
    """Scale carrier-delays to three projectors in the background; the event is set when all three run."""
    done = threading.Event()

    def scale() -> None:
        kubectl("-n", NAMESPACE, "scale", "projections.refold.dev/carrier-delays", "--replicas=3")
        eventually(
            lambda: resource("projections.refold.dev", "carrier-delays", NAMESPACE)["status"].get("replicas") == 3,
            "three projectors of carrier-delays",
        )
        console.print("carrier-delays runs with [bold]three projectors[/bold] (kubectl scale projection)")
        done.set()

    threading.Thread(target=scale, daemon=True).start()
    return done


def main() -> int:
    """Run the demo; return 1 when a row is wrong."""
    console = Console()
    months = int(os.environ.get("DEMO_MONTHS", "1"))
    began = time.monotonic()
    console.rule("Refold: flights that left New York in 2013")
    with console.status("removing what a former demo left (its stream says deletionPolicy: Delete)"):
        kubectl("delete", "-f", str(RESOURCES), "--ignore-not-found", "--timeout=180s")
    kubectl("apply", "-f", str(RESOURCES))
    with console.status("waiting for the EventStream and both Projections to be Ready"):
        wait_ready(NAMESPACE)
    console.print(kubectl("-n", NAMESPACE, "get", "eventstreams.refold.dev,projections.refold.dev"))
    with console.status("reading the file"):
        rows = data.flights()
        first = [row for row in rows if int(row["month"]) <= months]
        second = [row for row in rows if int(row["month"]) == months + 1]
    stream = Stream(NAMESPACE, "flights")
    flight_status, carrier_delays = ReadModel(FLIGHT_STATUS), ReadModel(CARRIER_DELAYS)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        load(stream, data.events(first), progress, "appending January" if months == 1 else f"appending {months} months")
        for model in (flight_status, carrier_delays):
            model.wait_applied(stream.positions)
    _show(console, flight_status, carrier_delays)
    if second:
        scaled = _with_three_projectors(console)
        with Progress(*columns, console=console) as progress:
            load(stream, data.events(second), progress, "appending the next month while carrier-delays scales to three")
        if not scaled.wait(120):
            console.print("[red]carrier-delays was not scaled to three projectors within 120 s[/red]")
            return 1
    with console.status("waiting until every event is in both read models"):
        for model in (flight_status, carrier_delays):
            model.wait_applied(stream.positions)
    with console.status("comparing every row with a fold of the file"):
        wrong = differences([*first, *second], flight_status, carrier_delays)
    for difference in wrong[:20]:
        console.print(f"[red]{difference}[/red]")
    total = sum(stream.positions.values())
    if wrong:
        console.print(f"[red]{len(wrong)} rows are wrong[/red] after {total:,} events")
        return 1
    console.print(
        f"[green]all rows of both read models are right[/green]: {total:,} events, "
        f"{time.monotonic() - began:.0f} s since `kubectl apply`"
    )
    console.rule("try next")
    console.print(
        "kubectl --context kind-refold -n flights get evs,proj\n"
        "kubectl explain projection.spec.fold\n"
        "TOKEN=$(kubectl --context kind-refold -n default create token refold-local --audience refold)\n"
        'curl -H "Authorization: Bearer $TOKEN" 127.0.0.1:30082/v1/rows/UA\n'
        'curl -H "Authorization: Bearer $TOKEN" "127.0.0.1:30081/v1/rows?where=status:eq:cancelled&limit=3"\n'
        'curl -H "Authorization: Bearer $TOKEN" '
        "127.0.0.1:30080/v1/streams/flights/flights/subjects/UA1545-EWR-2013-01-01/events\n"
        "make down",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
