"""What stands in for a node beside the private API server: it forwards ports of its pods, as a kubelet does.

The API server passes on what a client asks (`…/pods/NAME/portforward`, a WebSocket with the protocol
`v4.channel.k8s.io`) over TLS: channel 0 carries the bytes, channel 1 errors; each begins with the port's number.
"""

import base64
import contextlib
import hashlib
import socket
import ssl
import struct
import subprocess
import threading
from pathlib import Path

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # of RFC 6455
_BINARY, _CLOSE = 2, 8


class Kubelet:
    """Listens on 127.0.0.1; `forwards` says which port of this machine stands for a pod. Close it."""

    def __init__(self, folder: Path, forwards: dict[str, int]) -> None:
        key, certificate = folder / "kubelet.key", folder / "kubelet.crt"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate,
             "-days", "1", "-subj", "/CN=node"],
            check=True, capture_output=True,
        )  # fmt: skip
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._forwards = forwards
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), self._context.wrap_socket(sock, server_side=True) as client:
            stream = client.makefile("rb")
            target = stream.readline().split()[1].decode()
            headers: dict[str, str] = {}
            while (line := stream.readline().strip()) != b"":
                name, _, value = line.decode().partition(":")
                headers[name.lower()] = value.strip()
            pod = target.partition("?")[0].split("/")[3]
            accept = base64.b64encode(hashlib.sha1(headers["sec-websocket-key"].encode() + _GUID).digest())
            client.sendall(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Protocol: v4.channel.k8s.io\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
            )
            number = struct.pack("<H", 8080)
            client.sendall(_frame(_BINARY, b"\0" + number) + _frame(_BINARY, b"\1" + number))
            with socket.create_connection(("127.0.0.1", self._forwards[pod])) as service:
                threading.Thread(target=_answers, args=(service, client), daemon=True).start()
                while (message := _message(stream)) is not None:
                    if message[:1] == b"\0":
                        service.sendall(message[1:])


def _answers(service: socket.socket, client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := service.recv(60_000):
            client.sendall(_frame(_BINARY, b"\0" + data))
        client.sendall(_frame(_CLOSE, b""))


def _frame(kind: int, payload: bytes) -> bytes:
    size = len(payload)
    length = bytes([size]) if size < 126 else b"\x7e" + struct.pack(">H", size)
    return bytes([0x80 | kind]) + length + payload


def _message(stream: "socket.SocketIO | object") -> bytes | None:
    """Return the next message that a client sent, None at its end."""
    read = stream.read  # type: ignore[union-attr]
    head = read(2)
    if len(head) < 2 or head[0] & 0x0F == _CLOSE:
        return None
    size = head[1] & 0x7F
    if size == 126:
        (size,) = struct.unpack(">H", read(2))
    elif size == 127:
        (size,) = struct.unpack(">Q", read(8))
    mask = read(4)
    return bytes(byte ^ mask[at % 4] for at, byte in enumerate(read(size)))
