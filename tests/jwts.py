"""Tokens of ServiceAccounts as the API server signs them, with claims of the test's own."""

import base64
import json
import subprocess
from pathlib import Path
from typing import Any


def signed(claims: dict[str, Any], key: Path) -> str:
    """Sign `claims` with the API server's private key (PEM)."""
    parts = [base64url(json.dumps(part).encode()) for part in ({"alg": "RS256"}, claims)]
    text = ".".join(parts).encode()
    done = subprocess.run(["openssl", "dgst", "-sha256", "-sign", key], input=text, capture_output=True, check=True)
    return ".".join([*parts, base64url(done.stdout)])


def claims_of(token: str) -> dict[str, Any]:
    """Return what a token says of itself."""
    payload = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims


def base64url(raw: bytes) -> str:
    """Return base64url without padding."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
