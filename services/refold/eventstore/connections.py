"""Connections to the store's database, lent one statement at a time.

The connection used last is lent first, since it holds the plans of the functions that it called; an idle one beyond
what the load needs stays cold and is closed when it is old. Whoever wants the one that knows its stream waits a moment
for it before another learns the stream, too. Broken connections are dropped when they are given back.
"""

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec
import psycopg
from psycopg import AsyncConnection
from psycopg.abc import PQGen
from psycopg.adapt import Buffer, Loader
from psycopg.pq import ExecStatus, Format, PipelineStatus
from psycopg.pq.abc import PGresult

from refold.eventstore.errors import UnavailableError

_T = TypeVar("_T")

#: Seconds that connecting may take.
CONNECT_TIMEOUT = 5
#: Seconds after which a connection is replaced, so that plans of streams that aren't used any more don't pile up.
MAX_AGE = 900.0
#: Seconds that a loan waits for the connection that it wants, while others are idle: about what new plans would take.
_PLANS_SECONDS = 0.005
#: Seconds after which a call that has no answer looks itself whether one has come.
_LOOK_SECONDS = 0.5
_SESSION = (
    "set timezone = 'UTC'; set default_transaction_isolation = 'read committed'; set statement_timeout = '30s'; "
    # Plans that avoid a scan at any price look expensive enough to be compiled, and aren't.
    "set jit = off; "
    # An acknowledged append must be on disk, whatever the database's default is.
    "select set_config('synchronous_commit', 'on', false) where current_setting('synchronous_commit') = 'off'"
)


class _RawJsonbLoader(Loader):
    """Loads jsonb as JSON text, never decomposed."""

    format = Format.BINARY

    def load(self, data: Buffer) -> msgspec.Raw:
        return msgspec.Raw(bytes(data)[1:])  # after the format's version


#: What a call came to: its result, or why there is none.
Answer = PGresult | psycopg.Error


class _Call:
    """A call that was sent: who is told what it came to, what it has still to prepare, and what has come of it."""

    __slots__ = ("answered", "error", "prepares", "result")

    def __init__(self, answered: Callable[[Answer], None], prepares: bytes | None) -> None:
        self.answered = answered
        self.prepares = prepares
        self.result: PGresult | None = None
        self.error: psycopg.Error | None = None

    def note(self, result: PGresult) -> None:
        """Note one result; the first error is the reason of those that follow."""
        if result.status == ExecStatus.TUPLES_OK:
            self.result = result
        elif result.status == ExecStatus.COMMAND_OK:
            self.prepares = None  # it has, whatever comes of the call
        elif self.error is None:
            self.error = psycopg.errors.error_from_result(result)


class StoreConnection(AsyncConnection[Any]):
    """A connection that can also call queries with parameters that are in the binary format already.

    Calls are pipelined: each is a transaction of its own, and PostgreSQL begins with one when that before it has ended,
    without waiting for this process. While one is under way the connection does nothing else.
    """

    def __init__(self, pgconn: psycopg.pq.abc.PGconn) -> None:
        super().__init__(pgconn)
        self._prepared_calls: set[bytes] = set()
        self._calls: collections.deque[_Call] = collections.deque()
        self._listening: tuple[asyncio.AbstractEventLoop, int] | None = None  # which tells `_arrived`, of which socket
        self._looking: asyncio.TimerHandle | None = None  # when it looks itself
        self._writing = False  # whether the event loop tells of room in the socket

    async def call(self, name: bytes, query: bytes, parameters: Sequence[bytes | None]) -> PGresult:
        """Run `query`, prepared as `name` on first use, and return its result in the binary format.

        A cursor converts parameters and results in Python, one by one; for an append that is a good part of its time.

        Raises:
            psycopg.Error: what PostgreSQL answered.
        """
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.send(name, query, parameters, lambda came: None if answer.done() else answer.set_result(came))
        came = await answer
        if isinstance(came, psycopg.Error):
            raise came
        return came

    def send(
        self, name: bytes, query: bytes, parameters: Sequence[bytes | None], answered: Callable[[Answer], None]
    ) -> None:
        """Call as `call` does, after the calls that were sent before; `answered` is told what it came to.

        Raises:
            psycopg.Error: it can't be sent; the connection can't be used any more.
        """
        pgconn = self.pgconn
        loop = asyncio.get_running_loop()
        self._listen(loop)
        if pgconn.pipeline_status == PipelineStatus.OFF:
            pgconn.enter_pipeline_mode()
        prepares = None
        if name not in self._prepared_calls:
            pgconn.send_prepare(name, query)
            prepares = name
        pgconn.send_query_prepared(name, parameters, [Format.BINARY] * len(parameters), result_format=Format.BINARY)
        pgconn.pipeline_sync()
        if prepares:  # which is taken back where it fails
            self._prepared_calls.add(prepares)
        self._calls.append(_Call(answered, prepares))
        if self._looking is None:
            self._looking = loop.call_later(_LOOK_SECONDS, self._look, loop)
        self._flush()

    def _flush(self) -> None:
        """Send what libpq holds; where the socket takes no more, go on when it does."""
        if self._listening is None:
            return
        loop, socket = self._listening
        try:
            more = bool(self.pgconn.flush())
        except psycopg.Error as error:
            self._break(error)
            return
        if more != self._writing:
            self._writing = more
            if more:
                loop.add_writer(socket, self._flush)
            else:
                loop.remove_writer(socket)

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let the event loop tell of what comes.

        psycopg registers the socket for each wait; between two calls this one stays registered.
        """
        if self._listening is None:
            self._listening = loop, self.pgconn.socket
            loop.add_reader(self.pgconn.socket, self._arrived)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look at the socket without having been told, and listen anew.

        After a server was killed it was seen that the event loop no longer told of the socket of the next connection.
        """
        self._looking = None
        if not self._calls:
            return
        self._stop_listening()
        self._arrived()
        if self._calls:
            self._listen(loop)
            self._flush()
            self._looking = loop.call_later(_LOOK_SECONDS, self._look, loop)

    def _arrived(self) -> None:
        """Take what has come; also where nobody waits for it, such as the server's last words."""
        try:
            self.pgconn.consume_input()
        except psycopg.Error as error:
            self._break(error)
        else:
            self._deliver()

    def _deliver(self) -> None:
        """Answer the calls whose results are whole."""
        pgconn = self.pgconn
        ended = False  # one query's results have; the next one's, or the mark of the call's end, follow
        while self._calls and not pgconn.is_busy():
            result = pgconn.get_result()
            if result is None:
                if ended:
                    self._break(psycopg.OperationalError("the connection has ended amid a call"))
                    return
                ended = True
                continue
            ended = False
            if result.status != ExecStatus.PIPELINE_SYNC:
                self._calls[0].note(result)
                continue
            call = self._calls.popleft()
            if call.error is None and call.result is None:
                call.error = psycopg.OperationalError("there is no result")
            if call.prepares is not None:
                self._prepared_calls.discard(call.prepares)
            call.answered(call.result if call.error is None else call.error)  # type: ignore[arg-type]

    def _break(self, error: psycopg.Error) -> None:
        """Answer all calls: nothing comes any more."""
        self._stop_listening()
        calls, self._calls = self._calls, collections.deque()
        for call in calls:
            call.answered(call.error or error)  # its own error, where that is why the connection has ended

    def _stop_listening(self) -> None:
        if self._listening is not None:
            loop, socket = self._listening  # libpq may have closed it, and doesn't know its number any more
            loop.remove_reader(socket)
            if self._writing:
                loop.remove_writer(socket)
                self._writing = False
            self._listening = None

    async def wait(self, gen: PQGen[_T], *arguments: Any, **options: Any) -> _T:
        """Wait as psycopg does, which registers the socket itself, and sends otherwise than calls are sent."""
        self._stop_listening()
        if self.pgconn.pipeline_status == PipelineStatus.ON and not self._calls:
            self.pgconn.exit_pipeline_mode()
        return await super().wait(gen, *arguments, **options)

    def end(self) -> None:
        """Close the connection at once; calls that were sent end with an error."""
        self._break(psycopg.OperationalError("the connection was closed"))
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        self._closed = True
        self.pgconn.finish()

    async def close(self) -> None:
        """Close the connection."""
        self.end()


async def connect(dsn: str, application: str) -> StoreConnection:
    """Return a connection (autocommit) set up for the event store.

    Raises:
        psycopg.OperationalError: PostgreSQL can't be reached in `CONNECT_TIMEOUT` seconds, or refuses.
    """
    conn = await StoreConnection.connect(
        dsn,
        autocommit=True,
        connect_timeout=CONNECT_TIMEOUT,
        application_name=application,
        # A server that is gone without a word is noticed in seconds, not in the hours of TCP's defaults.
        keepalives_idle=5,
        keepalives_interval=2,
        keepalives_count=3,
        tcp_user_timeout=10_000,
    )
    conn.adapters.register_loader("jsonb", _RawJsonbLoader)
    conn.prepare_threshold = 2
    conn.prepared_max = 4096
    await conn.execute(_SESSION, prepare=False)
    return conn


class Connections:
    """At most `size` connections to `dsn`, opened when they are needed."""

    def __init__(self, dsn: str, *, size: int, application: str) -> None:
        self._dsn = dsn
        self._size = size
        self._application = application
        self._idle: list[Held] = []
        self._open = 0
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()
        # Of each that is lent: those who want it and no other as yet. It is handed over to them; None: take any.
        self._wanted: dict[StoreConnection, collections.deque[asyncio.Future[Held | None]]] = {}
        self._closed = False

    def lend(self, like: StoreConnection | None = None) -> "_Lent":
        """Lend a connection for the time of an `async with`; waits while all are lent.

        Args:
            like: the one that is wanted, where it is idle soon: plans of a stream take PostgreSQL about a megabyte in
                each connection that it was used on, and some milliseconds of CPU to make.

        Raises:
            psycopg.OperationalError: a new one was needed and PostgreSQL can't be reached or refuses.
        """
        return _Lent(self, like)

    @property
    def wanted(self) -> bool:
        """Whether somebody waits, whom any connection would help."""
        return bool(self._waiting)

    def take_now(self, like: StoreConnection | None = None) -> "Held | None":
        """Return `like`, or another that is idle where `like` isn't lent; None where one would have to be waited for.

        It is to be given back by `give_back`.
        """
        if not self._idle or self._waiting or like in self._wanted:
            return None
        return self._take_idle(like)

    def _take_idle(self, like: StoreConnection | None) -> "Held":
        at = -1  # nearly always the one that is wanted
        if self._idle[at].conn is not like:
            at = next((at for at, (conn, _) in enumerate(self._idle) if conn is like), -1)
        held = self._idle.pop(at)
        self._wanted[held.conn] = collections.deque()
        return held

    async def _take(self, like: StoreConnection | None) -> "Held":
        if like in self._wanted and (handed := await self._hand_over(like)):
            return handed
        while not self._idle and self._open >= self._size:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._wake()
                raise
        if self._idle:
            return self._take_idle(like)
        self._open += 1
        try:
            held = Held(await connect(self._dsn, self._application), time.monotonic())
        except BaseException:
            self._open -= 1
            self._wake()
            raise
        self._wanted[held.conn] = collections.deque()
        return held

    async def _hand_over(self, like: StoreConnection) -> "Held | None":
        """Wait a moment for a connection that is lent; return it, or None where any other will do."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[Held | None] = loop.create_future()
        self._wanted[like].append(turn)
        patience = loop.call_later(_PLANS_SECONDS, _say, turn, None)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and (handed := turn.result()):
                self.give_back(handed)
            raise
        finally:
            patience.cancel()

    def give_back(self, held: "Held") -> None:
        """Take back a connection that was lent: it is lent again, or closed where it is broken, busy or old."""
        conn, born = held
        wanted = self._wanted[conn]
        usable = not self._closed and not conn.closed and time.monotonic() - born < MAX_AGE
        if usable and conn.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE:
            # Who waits for any connection has waited longer than those who want this one.
            while wanted and not self._waiting:
                if _say(wanted.popleft(), held):
                    return
            del self._wanted[conn]
            self._idle.append(held)
        else:
            del self._wanted[conn]
            self._open -= 1
            stale = [conn]
            if conn.broken:
                # What broke this one broke most likely all: the next caller gets a new one.
                stale += [other for other, _ in self._idle]
                self._open -= len(self._idle)
                self._idle.clear()
            for one in stale:
                one.end()
        self._wake()
        for turn in wanted:  # after the one who waits for any, so that they don't come before him
            _say(turn, None)

    async def ask(self, read: Callable[[AsyncConnection[Any]], Awaitable[_T]], *, seconds: float) -> _T:
        """Return what `read` reads, asked once more where a connection had broken while it was idle.

        Raises:
            UnavailableError: PostgreSQL can't be reached, or doesn't answer in `seconds`.
        """
        try:
            async with asyncio.timeout(seconds):
                try:
                    async with self.lend() as conn:
                        return await read(conn)
                except psycopg.OperationalError:
                    async with self.lend() as conn:
                        return await read(conn)
        except (psycopg.OperationalError, TimeoutError, OSError) as error:
            raise UnavailableError(
                f"the event store's PostgreSQL can't be asked: {str(error) or f'no answer in {seconds:g} s'}"
            ) from error

    def _wake(self) -> None:
        while self._waiting:
            if _say(self._waiting.popleft(), None):
                return

    async def close(self) -> None:
        """Close the idle connections now, and each other when it is given back."""
        self._closed = True
        while self._idle:
            conn, _ = self._idle.pop()
            self._open -= 1
            conn.end()


class Held(NamedTuple):
    """A connection, and when it was made."""

    conn: StoreConnection
    born: float


def _say(turn: "asyncio.Future[_T]", answer: _T) -> bool:
    """Answer one that waits; tell whether it still did."""
    if turn.done():
        return False
    turn.set_result(answer)
    return True


class _Lent:
    """One loan: gives the connection back at the end."""

    __slots__ = ("_connections", "_held", "_like")

    def __init__(self, connections: Connections, like: StoreConnection | None) -> None:
        self._connections, self._like = connections, like

    async def __aenter__(self) -> StoreConnection:
        self._held = await self._connections._take(self._like)
        return self._held.conn

    async def __aexit__(self, *_: object) -> None:
        self._connections.give_back(self._held)
