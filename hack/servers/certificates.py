"""A certificate authority for tests, made anew each time with the `openssl` program (3.0 or later)."""

import subprocess
from pathlib import Path

_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]


class Authority:
    """Signs certificates; its own is the file `ca.crt` of `folder`."""

    def __init__(self, folder: Path) -> None:
        """Make key and certificate of the authority in `folder`."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.certificate = folder / "ca.crt"
        _openssl("req", "-x509", *_KEY, "-subj", "/CN=refold-test-ca", "-keyout", self._key, "-out", self.certificate)

    @property
    def _key(self) -> Path:
        return self._folder / "ca.key"

    def issue(self, name: str, folder: Path) -> None:
        """Write `user.crt` and `user.key` (PKCS #8) of the subject CN=`name`, valid for 127.0.0.1, into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        _openssl(
            "req", "-x509", "-CA", self.certificate, "-CAkey", self._key, *_KEY, "-subj", f"/CN={name}",
            "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:false",
            "-keyout", folder / "user.key", "-out", folder / "user.crt",
        )  # fmt: skip


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
