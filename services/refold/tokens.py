"""Tokens: positions that a reader must have seen, opaque to callers.

A token names, per stream incarnation and partition, the position that an append reached. It is returned by every
append, is the id of every event that is watched, and is accepted by every query. Inside it is base64url (without
padding) of a JSON list of `[incarnation, partition, position]`; one that names all partitions of one stream is
`<incarnation>.<position in partition 0>.<position in partition 1>…`, a quarter as long.
"""

import base64
import binascii
import re
from collections.abc import Iterable

import msgspec


class InvalidTokenError(ValueError):
    """The text is not a token."""


class Position(msgspec.Struct, array_like=True, frozen=True, order=True):
    """The 1-based number of an event within one partition of one incarnation of a stream."""

    incarnation: str
    partition: int
    position: int


_encoder = msgspec.json.Encoder()
_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_decoder = msgspec.json.Decoder(list[Position])
_ALL = re.compile(r"[0-9a-f]{16}(\.(0|[1-9][0-9]{0,18}))+", re.ASCII)


def encode(positions: Iterable[Position]) -> str:
    """Return the token of `positions`; of two in the same partition the later stands."""
    found = list(positions)
    if len(found) > 1:
        found = _latest(found)
    return binascii.b2a_base64(_encoder.encode(found), newline=False).translate(_URL_SAFE, b"=").decode()


def _latest(positions: list[Position]) -> list[Position]:
    latest: dict[tuple[str, int], Position] = {}
    for position in positions:
        known = latest.get((position.incarnation, position.partition))
        if known is None or known.position < position.position:
            latest[position.incarnation, position.partition] = position
    return sorted(latest.values())


def encode_all(incarnation: str, positions: Iterable[int]) -> str:
    """Return the token of a position in each partition of one stream, from partition 0 on."""
    return ".".join((incarnation, *map(str, positions)))


def decode(token: str) -> list[Position]:
    """Return the positions of `token`.

    Raises:
        InvalidTokenError: the text was not made by `encode` or `encode_all`.
    """
    if _ALL.fullmatch(token):
        incarnation, *positions = token.split(".")
        return [Position(incarnation, partition, int(position)) for partition, position in enumerate(positions)]
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        return _decoder.decode(raw)
    except (binascii.Error, ValueError, msgspec.DecodeError) as error:
        raise InvalidTokenError(f"not a token of Refold: {error}") from error
