"""Passwords of the logins that the operator makes.

Each is derived from one random key of the installation (the Secret `refold-operator-key` in the operator's namespace)
and the login's name. So a Secret that was deleted is made again with the same content, running processes keep their
connections, nothing has to be read back, and a new key changes all passwords at once.
"""

import base64
import hashlib
import hmac
import secrets

KEY_BYTES = 32


def new_key() -> bytes:
    """Return a random key."""
    return secrets.token_bytes(KEY_BYTES)


def password(key: bytes, login: str) -> str:
    """Return the password of `login`: 256 bits as URL-safe text."""
    digest = hmac.new(key, b"refold-login:" + login.encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
