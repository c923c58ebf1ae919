"""Who may call throw-away services on 127.0.0.1, and how they are asked cheaply."""

import hashlib
import json
import ssl
import tempfile
from pathlib import Path

import httpx

TOKEN = "local"  # allows everything

#: `verify` of httpx clients that speak HTTP only: no TLS server is trusted. By default each new client loads the
#: machine's certificates, which takes 100 ms of a core: too much for whoever asks again and again.
NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def get(url: str, *, timeout: float = 5) -> httpx.Response:
    """GET `url` on a connection of its own, past any proxy; raises httpx.TransportError where nobody answers."""
    return httpx.get(url, timeout=timeout, trust_env=False, verify=NO_CERTIFICATES)


def tokens_file(token: str, folder: Path | None = None) -> str:
    """Write a file of tokens whose one token allows everything; return the value of `REFOLD_AUTH` that names it."""
    file = (folder or Path(tempfile.mkdtemp(prefix="refold-tokens-"))) / "tokens.yaml"
    everything = {"resources": ["*"], "verbs": ["*"], "namespaces": ["*"], "names": ["*"]}
    digest = hashlib.sha256(token.encode()).hexdigest()
    entry = {"name": "test", "sha256": digest, "metrics": True, "allow": [everything]}
    file.write_text(json.dumps({"tokens": [entry]}))  # JSON is YAML
    return f"tokens:{file}"
