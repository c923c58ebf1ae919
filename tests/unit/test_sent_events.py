"""Server-sent events to callers that leave early."""

import asyncio

import uvloop
from refold.web import sent_events


def test_a_caller_that_left_before_its_answer_began_has_no_socket_to_set_up() -> None:
    async def leave() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        transport, _ = await loop.create_connection(asyncio.Protocol, "127.0.0.1", port)
        transport.abort()
        await asyncio.sleep(0.01)  # the loop closes the socket in a turn of its own
        sent_events._lose_sooner(transport)
        server.close()
        await server.wait_closed()

    uvloop.run(leave())
