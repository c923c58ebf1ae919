"""Ports for the servers that tests start."""

import os
import subprocess
import sys
from pathlib import Path

from hack.servers.process import free_port

ROOT = Path(__file__).parents[2]


def test_a_port_is_given_once_also_where_another_process_chooses_at_the_same_time() -> None:
    mine = [free_port() for _ in range(3)]
    # the other process begins to look where this one did
    script = (
        f"import os; os.getpid = lambda: {os.getpid()}\n"
        "from hack.servers.process import free_port\n"
        "print(*(free_port() for _ in range(3)))"
    )

    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    others = [int(port) for port in done.stdout.split()]

    assert len({*mine, *others}) == 6
