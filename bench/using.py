"""What processes on this machine use: time on a core, and memory. Needs Linux's /proc."""

import os
from pathlib import Path
from typing import Any

import psycopg

from hack.servers.platform import Service

_TICKS = os.sysconf("SC_CLK_TCK")
#: Fields of /proc/<pid>/stat after the command's name: the parent; own time (user, system); that of ended children.
_PARENT, _OWN, _ENDED = 1, slice(11, 13), slice(13, 15)


def seconds(process: Service) -> float:
    """Return the seconds on a core that a process has used."""
    return _sum(_stat(process.pid)[_OWN])


def postgres_seconds(conn: "psycopg.Connection[Any]", *, without: str) -> float:
    """Return the seconds on a core that all processes of a PostgreSQL have used, those that have ended included.

    Args:
        conn: a superuser's connection to it, whose own backend is left out.
        without: sessions whose application_name begins so are left out too; they mustn't end between two calls.

    Raises:
        RuntimeError: its processes aren't on this machine.
    """
    found = conn.execute(
        "select pid, pid = pg_backend_pid() or starts_with(coalesce(application_name, ''), %s) from pg_stat_activity",
        [without],
    ).fetchall()
    try:
        # all are children of one, who counts what children used that have ended
        postmaster = _stat(int(_stat(conn.info.backend_pid)[_PARENT]))
        own = [_stat(pid)[_OWN] for pid, left_out in found if not left_out and Path(f"/proc/{pid}").exists()]
    except FileNotFoundError as error:
        raise RuntimeError(
            f"the time that PostgreSQL uses is read in /proc, and {error.filename} isn't there: it needs a --store and "
            "a --read-store on this machine, or none"
        ) from error
    return _sum(postmaster[_OWN]) + _sum(postmaster[_ENDED]) + sum(map(_sum, own))


def peak_mb(process: Service) -> float:
    """Return the most memory that a process has had, in MB."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/{process.pid}/status tells no VmHWM")


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _sum(ticks: list[str]) -> float:
    return sum(map(int, ticks)) / _TICKS
