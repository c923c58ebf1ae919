"""Tokens: positions that a reader must have seen, opaque to callers.

A token names, per stream incarnation and partition, the position that an append reached. It is returned by every
append and accepted by every query. Inside it is base64url (without padding) of a JSON list of
`[incarnation, partition, position]`.
"""

import base64
import binascii
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


def encode(positions: Iterable[Position]) -> str:
    """Return the token of `positions`; of two in the same partition the later stands."""
    latest: dict[tuple[str, int], Position] = {}
    for position in positions:
        known = latest.get((position.incarnation, position.partition))
        if known is None or known.position < position.position:
            latest[position.incarnation, position.partition] = position
    text = _encoder.encode(sorted(latest.values()) if len(latest) > 1 else list(latest.values()))
    return binascii.b2a_base64(text, newline=False).translate(_URL_SAFE, b"=").decode()


def decode(token: str) -> list[Position]:
    """Return the positions of `token`.

    Raises:
        InvalidTokenError: the text was not made by `encode`.
    """
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        return _decoder.decode(raw)
    except (binascii.Error, ValueError, msgspec.DecodeError) as error:
        raise InvalidTokenError(f"not a token of Refold: {error}") from error
