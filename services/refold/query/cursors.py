"""Cursors: where a page ended, opaque to callers.

A cursor holds the last key that was given out. The next page begins beyond it, whatever was written, deleted or swapped
in the meantime.
"""

import base64
import binascii

import msgspec

from refold.query import problems


class _End(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    key: str


_decoder = msgspec.json.Decoder(_End)


def encode(key: str) -> str:
    """Return the cursor that stands after the row of `key`."""
    return base64.urlsafe_b64encode(msgspec.json.encode(_End(key))).rstrip(b"=").decode()


def decode(cursor: str) -> str:
    """Return the key that `cursor` stands after.

    Raises:
        Problem: 400 where it wasn't made by `encode`.
    """
    try:
        key = _decoder.decode(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)).key
    except (binascii.Error, ValueError, msgspec.DecodeError) as error:
        raise problems.invalid_query("the cursor isn't one that this service gave out", "cursor") from error
    if "\0" in key:
        raise problems.invalid_query("the cursor isn't one that this service gave out", "cursor")
    return key
