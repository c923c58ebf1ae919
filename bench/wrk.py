"""Load by wrk: two threads, by default 32 connections, each with one request under way."""

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.result import Run

CONNECTIONS = 32
#: wrk runs for a time, not for a number of requests; it is given as many seconds as this many events take each.
EVENTS_PER_SECOND = 5_000
_SCRIPT = Path(__file__).with_name("wrk.lua")


class Answers(msgspec.Struct, frozen=True):
    """What wrk counted; the quantiles, of 1,000 equal shares of the answers, are in order."""

    answered: int
    refused: int
    broken: int
    seconds: float
    quantiles_ms: list[float]

    @property
    def run(self) -> Run:
        """The result; the quantiles stand for all latencies."""
        return Run(events_per_s=self.answered / self.seconds, latencies_ms=self.quantiles_ms, samples=self.answered)


def load(
    url: str, requests: Sequence[str], *, method: str, token: str, seconds: int, connections: int = CONNECTIONS
) -> Answers:
    """Send `requests` (see wrk.lua) by turns for `seconds`.

    Raises:
        RuntimeError: a request was refused or a connection broke.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requests"
        file.write_text("".join(f"{line}\n" for line in requests))
        command = [
            "wrk", "-t", "2", "-c", str(connections), "-d", str(seconds), "-s", str(_SCRIPT), url, "--", str(file),
            method, token,
        ]  # fmt: skip
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"wrk ended with {done.returncode}: {done.stderr or done.stdout}")
    answers = msgspec.json.decode(done.stdout.splitlines()[-1], type=Answers)
    if answers.refused or answers.broken or not answers.answered:
        raise RuntimeError(f"wrk on {url}: {answers.answered} answers, {answers.refused} of them refusals, "
                           f"{answers.broken} broken connections")  # fmt: skip
    return answers


def seconds_for(events: int) -> int:
    """Return how long to load for `events` events."""
    return max(1, events // EVENTS_PER_SECOND)
