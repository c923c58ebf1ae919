"""A network that can fail: a TCP proxy on 127.0.0.1 that is cut, hangs and heals, between a process and its server.

::

    with Cut(postgres.port) as network:   # the process connects to network.port
        network.cut()                     # all connections are reset, new ones are refused
        network.heal()
        network.hang()                    # connections stay open and new ones are accepted, but nothing comes through
        network.heal()                    # what was sent meanwhile arrives

For Kafka, whose clients follow the addresses that a broker tells, `kafka_behind` starts one that tells the proxies'.
The proxy's kernel goes on acknowledging what is sent to a hanging connection, so that a process isn't helped by TCP's
own timeouts (keepalives, TCP_USER_TIMEOUT): a hang is the worse of the two.
"""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from types import TracebackType
from typing import Any, Self

from hack.servers import Kafka
from hack.servers.process import free_port

_CHUNK = 1 << 16


class Cut:
    """A proxy to `target`, a port on 127.0.0.1, that listens on `port`; it passes all on until told otherwise."""

    def __init__(self, target: int, port: int | None = None) -> None:
        """Begin to listen with entering the context; `port` is a free one unless given."""
        self.target, self.port = target, port or free_port()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"network-{self.port}", daemon=True)
        self._server: asyncio.Server | None = None
        self._flowing = asyncio.Event()
        self._connections: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        self.heal()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def cut(self) -> None:
        """Reset all connections and refuse new ones."""
        self._do(self._cut())

    def hang(self) -> None:
        """Pass nothing on any more, in either direction; connections stay open and new ones are accepted."""
        self._do(self._hang())

    def heal(self) -> None:
        """Pass everything on again, first of all what hung."""
        self._do(self._heal())

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task, writers in list(self._connections.items()):
            for writer in writers:
                writer.transport.abort()
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _hang(self) -> None:
        self._flowing.clear()

    async def _heal(self) -> None:
        self._flowing.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        ends = self._connections[task] = [writer]
        try:
            await self._flowing.wait()
            with contextlib.suppress(OSError):
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
                ends.append(far_writer)
                await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))
        except asyncio.CancelledError:
            pass  # cut
        finally:
            for end in ends:
                end.transport.abort()
            del self._connections[task]

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK):
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()
        await self._flowing.wait()
        raise ConnectionResetError  # one end has closed: so does the other, at once


@contextlib.contextmanager
def kafka_behind(ways: int = 1, *, settings: dict[str, str] | None = None) -> Iterator[tuple[Kafka, list[Cut]]]:
    """Run a broker with `ways` more listeners, each of which leads its clients through a proxy of its own.

    Clients of `127.0.0.1:<a proxy's port>` are told this address for all that follows; clients of `Kafka.bootstrap`
    reach the broker directly.
    """
    controller, plain = free_port(), free_port()
    networks = [Cut(free_port()) for _ in range(ways)]
    named = [(f"CUT{number}", network) for number, network in enumerate(networks)]
    listeners = [f"PLAINTEXT://127.0.0.1:{plain}", *(f"{name}://127.0.0.1:{cut.target}" for name, cut in named)]
    advertised = [f"PLAINTEXT://127.0.0.1:{plain}", *(f"{name}://127.0.0.1:{cut.port}" for name, cut in named)]
    broker = Kafka(
        settings={
            "listeners": ",".join([*listeners, f"CONTROLLER://127.0.0.1:{controller}"]),
            "advertised.listeners": ",".join(advertised),
            "listener.security.protocol.map": ",".join(
                f"{name}:PLAINTEXT" for name in ("PLAINTEXT", "CONTROLLER", *(name for name, _ in named))
            ),
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            **(settings or {}),
        }
    )
    broker.port = plain
    with contextlib.ExitStack() as stack:
        for network in networks:
            stack.enter_context(network)
        stack.callback(broker.remove)
        broker.start()
        yield broker, networks
