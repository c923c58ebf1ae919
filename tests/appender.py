"""A process that appends with the library and can be killed: `python -m tests.appender <dsn> <stream> <done as JSON>`.

`done` maps each worker's subject to how many of its events are known to be appended. A worker appends the next event of
its subject, always with the same id for the same number, and tells each outcome by a line of JSON on stdout: subject,
number, revision, partition, position. It also appends to one subject that all share. SIGTERM ends it.
"""

import asyncio
import contextlib
import json
import signal
import sys

import uvloop
from refold import logs
from refold.eventstore import EventStore, NewEvent
from refold.eventstore.errors import UnavailableError

SHARED = "shared"


def event(subject: str, number: int) -> NewEvent:
    """Return the event of that number; made again it is the same."""
    return NewEvent.of("Counted", {"subject": subject, "number": number}, id=f"{subject}:{number}")


async def _open(dsn: str) -> EventStore:
    while True:
        try:
            return await EventStore.open(dsn)
        except UnavailableError:
            await asyncio.sleep(0.1)


async def _main(dsn: str, stream: str, done: dict[str, int]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with await _open(dsn) as store:

        async def worker(own: str, number: int) -> None:
            while not stop.is_set():
                number += 1
                for subject, expected in ((own, number - 1), (SHARED, "any")):
                    while True:
                        with contextlib.suppress(UnavailableError):
                            result = await store.append(
                                "shop", stream, subject, [event(own, number)], expected_revision=expected
                            )
                            break
                    told = [subject, own, number, result.revision, result.partition, result.position]
                    print(json.dumps(told), flush=True)

        async with asyncio.TaskGroup() as workers:  # what one of them can't get over ends the process
            for subject, number in done.items():
                workers.create_task(worker(subject, number))


if __name__ == "__main__":
    logs.configure("appender")  # to stderr: stdout is for outcomes
    uvloop.run(_main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
