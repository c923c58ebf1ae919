"""Kafka as every process of Refold reaches it: where it is, who we are, and why it doesn't let us in.

The credentials are files, as Kubernetes mounts a Secret (a Strimzi KafkaUser's fits as it is). They are read for each
new client. What runs keeps what it was made with, since librdkafka can't change certificates in place and a session
stays open long after its password was changed: `end_when_changed` ends the process, and what supervises it starts it
with the new ones.

librdkafka repeats a refused login quietly until the request that waits for it has timed out. So `Brokers` listens to
its log: what was wrong with the last connections is told once in plain words, and is there for whoever reports the
time-out.
"""

import hashlib
import logging
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import structlog
from pydantic import model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
Mechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]

#: The files of a credentials' folder, and so the keys of its Secret.
USERNAME, PASSWORD, CERTIFICATE, KEY, CA = "username", "password", "user.crt", "user.key", "ca.crt"
FILES = (USERNAME, PASSWORD, CERTIFICATE, KEY, CA)

#: What was said of a connection is of use for so many seconds; librdkafka may say the same only every 30.
_FRESH_SECONDS = 35.0
_SAME_SECONDS = 30.0
_LOOK_SECONDS = 2.0
#: As librdkafka tells a failed connection: broker, what happened, in which state it was.
_FAILURE = re.compile(
    r"FAIL \[.*?\] \[thrd:.*?\]: (?P<broker>\S+?)(?:/\w+)?: (?P<what>.*) \(after (?P<ms>\d+)ms in state (?P<state>\w+)"
)

log = structlog.get_logger(__name__)


class CredentialsError(Exception):
    """A file of the credentials is missing or empty."""


class Trouble(NamedTuple):
    """Why a connection to a broker failed: a CamelCase word, and a sentence that says what to look at."""

    reason: str
    message: str


class Settings(BaseSettings):
    """The settings of a process that speaks to Kafka; that process's own extend them."""

    model_config = SettingsConfigDict(env_prefix="REFOLD_")

    #: `host:port`, several with commas.
    kafka_bootstrap: str
    kafka_security_protocol: SecurityProtocol = "PLAINTEXT"
    kafka_sasl_mechanism: Mechanism = "SCRAM-SHA-512"
    #: A folder with `username` and `password` (SASL) or `user.crt` and `user.key` (mTLS).
    kafka_credentials: Path | None = None
    #: Who logs in where the folder has no `username`; a Strimzi KafkaUser's Secret has none.
    kafka_username: str = ""
    #: PEM file of who signed the brokers' certificates; else `ca.crt` of the folder, else the system's authorities.
    kafka_ca: Path | None = None

    @model_validator(mode="after")
    def _has_credentials(self) -> Self:
        if self.kafka_security_protocol.startswith("SASL") and self.kafka_credentials is None:
            raise ValueError(
                f"REFOLD_KAFKA_SECURITY_PROTOCOL={self.kafka_security_protocol} needs REFOLD_KAFKA_CREDENTIALS, "
                "a folder with the files username and password"
            )
        return self

    def brokers(self) -> "Brokers":
        """Return the Kafka that these settings tell of."""
        return Brokers(self)


class Brokers:
    """One Kafka cluster, for all clients of a process. Safe to use from several threads."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is read or connected yet."""
        self.bootstrap = settings.kafka_bootstrap
        self.protocol: SecurityProtocol = settings.kafka_security_protocol
        self.mechanism: Mechanism = settings.kafka_sasl_mechanism
        self._settings = settings
        self._trouble: tuple[float, Trouble] | None = None
        self._told: dict[str, float] = {}
        # its own, not the module's: what it hears is of this cluster
        self._logger = logging.Logger("librdkafka")
        self._logger.parent = logging.getLogger()
        self._logger.addFilter(self._hear)

    def config(self) -> dict[str, Any]:
        """Return the settings that every client needs: where, who, and that its log is heard (in its `poll`).

        Raises:
            CredentialsError: a file is missing; the message names it.
        """
        result: dict[str, Any] = {
            "bootstrap.servers": self.bootstrap,
            "security.protocol": self.protocol,
            # soon there when a broker is back; the default doubles up to 10 s
            "reconnect.backoff.max.ms": 1000,
            "logger": self._logger,
        }
        if self.protocol.endswith("SSL"):
            authority = self.authority()
            if authority is not None:
                result["ssl.ca.pem"] = authority
            certificate, key = self._read(CERTIFICATE), self._read(KEY)
            if (certificate is None) is not (key is None):
                missing = KEY if key is None else CERTIFICATE
                raise CredentialsError(
                    f"{self._settings.kafka_credentials}/{missing} is missing: a client's certificate needs "
                    f"{CERTIFICATE} and {KEY}"
                )
            if certificate is not None and key is not None:
                result |= {"ssl.certificate.pem": certificate, "ssl.key.pem": key}
        if self.protocol.startswith("SASL"):
            password = self._read(PASSWORD)
            if password is None:
                raise CredentialsError(f"{self._settings.kafka_credentials}/{PASSWORD} is missing or empty")
            result |= {
                "sasl.mechanism": self.mechanism, "sasl.username": self.username(), "sasl.password": password,
            }  # fmt: skip
        return result

    def authority(self) -> str | None:
        """Return who signed the brokers' certificates, as PEM; None: one that the system knows.

        Raises:
            CredentialsError: the file that was named is missing.
        """
        if self._settings.kafka_ca is None:
            return self._read(CA)
        found = _text(self._settings.kafka_ca)
        if found is None:
            raise CredentialsError(f"{self._settings.kafka_ca} (REFOLD_KAFKA_CA) is missing or empty")
        return found

    def username(self) -> str:
        """Return who logs in by SASL.

        Raises:
            CredentialsError: nobody was named.
        """
        found = self._read(USERNAME) or self._settings.kafka_username
        if not found:
            raise CredentialsError(
                f"{self._settings.kafka_credentials}/{USERNAME} is missing, and REFOLD_KAFKA_USERNAME isn't set"
            )
        return found

    def files(self) -> dict[str, str]:
        """Return the credentials as they would stand in a Secret, with the authority and the user's name."""
        found = {file: self._read(file) for file in FILES} | {CA: self.authority()}
        if self.protocol.startswith("SASL"):
            found[USERNAME] = self.username()
        return {file: text for file, text in found.items() if text is not None}

    def trouble(self) -> Trouble | None:
        """Return what was wrong with the last connections, where that was heard a moment ago."""
        if self._trouble is None or time.monotonic() - self._trouble[0] > _FRESH_SECONDS:
            return None
        return self._trouble[1]

    def fingerprint(self) -> str:
        """Return another text whenever another client would be made of the files."""
        digest = hashlib.sha256()
        for text in (*map(self._read, FILES), self._settings.kafka_ca and _text(self._settings.kafka_ca)):
            digest.update(repr(text).encode())
        return digest.hexdigest()

    def _read(self, file: str) -> str | None:
        return None if self._settings.kafka_credentials is None else _text(self._settings.kafka_credentials / file)

    def _hear(self, record: logging.LogRecord) -> bool:
        """Take note of a failed connection; let what is news go to the log, in plain words."""
        message = record.getMessage()
        kind = message.partition(" ")[0]
        failure = _FAILURE.match(message)
        if failure is not None:
            found = explain(self, failure["broker"], failure["what"], failure["state"], int(failure["ms"]))
            if found is None:
                return False
            self._trouble = (time.monotonic(), found)
            kind = found.reason
            record.msg, record.args = f"Kafka doesn't let us in: {found.message}", ()
            record.levelno, record.levelname = logging.WARNING, "WARNING"
        now = time.monotonic()
        if now < self._told.get(kind, 0.0):
            return False
        self._told[kind] = now + _SAME_SECONDS
        return True


def explain(brokers: Brokers, broker: str, what: str, state: str, milliseconds: int) -> Trouble | None:
    """Say in plain words why a connection failed; None where it was in use and just ended, as idle ones do.

    Args:
        brokers: whose connection it was.
        broker: which one, as librdkafka names it.
        what: librdkafka's words.
        state: the connection's state, in librdkafka's words.
        milliseconds: for how long it was in this state.
    """
    at = f"{broker}: "
    if "SASL" in what and "PLAINTEXT broker" not in what:
        return Trouble(
            "AuthenticationFailed",
            f"{at}authentication failed ({what}); look at user, password and mechanism ({brokers.mechanism})",
        )
    if "certificate verify failed" in what or "could not be verified" in what:
        return Trouble(
            "CertificateUnknown",
            f"{at}the broker's certificate isn't signed by the CA that we know (ca.crt), is for another host name or "
            f"has expired ({what})",
        )
    if "alert" in what and ("certificate" in what or "unknown ca" in what):
        return Trouble(
            "CertificateRefused",
            f"{at}the broker refuses our certificate, or asks for one ({what}); look at user.crt and user.key",
        )
    at_once = state not in ("UP", "UPDATE") or milliseconds < 100
    other_protocol = "PLAINTEXT broker" in what or "Invalid response size" in what
    if other_protocol or ("losed by peer" in what and at_once):
        return Trouble(
            "ConnectionClosed",
            f"{at}the connection ended at once ({what}); does this listener speak {brokers.protocol}?",
        )
    if state in ("UP", "UPDATE"):
        return None
    return Trouble("Unreachable", f"{at}{what}")


def end_when_changed(brokers: Brokers, *, every: float = _LOOK_SECONDS) -> None:
    """End this process by SIGTERM when its credentials have changed, so that it is started again with the new ones.

    Looks `every` so many seconds, in a thread that ends with the process. Where there are no files this does nothing.
    """
    before = brokers.fingerprint()

    def look() -> None:
        found = before
        while True:
            time.sleep(every)
            former, found = found, brokers.fingerprint()
            # twice the same: whoever writes them has finished
            if found == former != before:
                log.warning("Kafka's credentials have changed: ending, to be started again with the new ones")
                os.kill(os.getpid(), signal.SIGTERM)
                return

    if brokers.protocol != "PLAINTEXT":
        threading.Thread(target=look, name="kafka-credentials", daemon=True).start()


def _text(file: Path) -> str | None:
    """Return a file's text, None where it is missing or empty; an editor's newline at the end isn't part of it."""
    try:
        return file.read_text().rstrip("\r\n") or None
    except (FileNotFoundError, NotADirectoryError):
        return None
