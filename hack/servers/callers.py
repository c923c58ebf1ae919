"""Who may call throw-away services on 127.0.0.1."""

import hashlib
import json
import tempfile
from pathlib import Path

TOKEN = "local"  # allows everything


def tokens_file(token: str, folder: Path | None = None) -> str:
    """Write a file of tokens whose one token allows everything; return the value of `REFOLD_AUTH` that names it."""
    file = (folder or Path(tempfile.mkdtemp(prefix="refold-tokens-"))) / "tokens.yaml"
    everything = {"resources": ["*"], "verbs": ["*"], "namespaces": ["*"], "names": ["*"]}
    digest = hashlib.sha256(token.encode()).hexdigest()
    entry = {"name": "test", "sha256": digest, "metrics": True, "allow": [everything]}
    file.write_text(json.dumps({"tokens": [entry]}))  # JSON is YAML
    return f"tokens:{file}"
