"""Bringing the certificates about: in the webhook's Secret, in the webhook's configuration, and in this process.

All replicas do the same. Whoever is first writes, by the version of the object that it read; the others read what was
written. The chart makes Secret and configuration, so that no right to make any is needed: with one to make Secrets,
whoever took this process over could get a token of every ServiceAccount of the namespace.
"""

import asyncio
import base64
import datetime as dt
import ssl
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from refold_operator.cluster import Cluster, RefusedError
from refold_operator.errors import UnreachableError
from refold_operator.webhook import certificates
from refold_operator.webhook.certificates import Certificates, Pair
from refold_operator.webhook.metrics import EXPIRES
from refold_operator.webhook.settings import Settings

_log = structlog.get_logger(__name__)

_CONFIGURATION = "ValidatingWebhookConfiguration"
_CONFLICT = 409
#: Seconds until the next look after one that failed, at first; it doubles until it is the usual pause.
_SOON = 0.5


class Keeper:
    """Keeps the certificates of one replica.

    Args:
        settings: which Secret and configuration, and how often to look at them.
        cluster: where they are.
        context: the TLS context of the server, which gets the serving certificate, for new connections.
    """

    def __init__(self, settings: Settings, cluster: Cluster, context: ssl.SSLContext) -> None:
        self._settings = settings
        self._cluster = cluster
        self._context = context
        self._served: Pair | None = None
        self._announced = False

    def lacking(self) -> str | None:
        """Return why the API server can't call this replica yet or any more; None where it can. Any thread may ask."""
        if self._served is None:
            return "there is no certificate yet; see the log"
        if not self._announced:
            return "the API server doesn't know the certificate's authority yet; see the log"
        if dt.datetime.now(dt.UTC) >= self._served.ends:
            return "the certificate has expired and couldn't be renewed; see the log"
        return None

    async def keep(self) -> None:
        """Look at once, and then again and again."""
        pause = _SOON
        told = ""
        while True:
            try:
                await self.look()
            except (UnreachableError, RefusedError, LookupError) as error:
                quicker = isinstance(error, RefusedError) and error.status == _CONFLICT
                if not quicker and str(error) != told:
                    told = str(error)
                    _log.warning("the certificates couldn't be looked after; trying again", why=told)
                await asyncio.sleep(pause)
                pause = min(2 * pause, self._settings.look_seconds)
            else:
                pause, told = _SOON, ""
                await asyncio.sleep(self._settings.look_seconds)

    async def look(self) -> None:
        """Renew what is due, tell the API server whom to trust, and serve with what there is.

        Raises:
            LookupError: Secret or configuration isn't there.
            UnreachableError, RefusedError: the API server is away or refuses, or another replica was quicker.
        """
        # The configuration first: where it was written after this, it isn't overwritten with an older Secret's bundle.
        configuration = await self._get(_CONFIGURATION, None)
        secret = await self._get("Secret", self._settings.namespace)
        found = certificates.decode(secret.get("data") or {})
        wanted = certificates.renewed(
            found,
            host=self._settings.host,
            now=dt.datetime.now(dt.UTC),
            lifetimes=self._settings.lifetimes,
            trusted=_trusted(configuration),
        )
        if wanted != found:
            await self._patch("Secret", secret, {"data": certificates.encode(wanted)})
            _log.info("certificates renewed", **_described(wanted))
        bundle = base64.b64encode(certificates.bundle(wanted).encode()).decode()
        webhooks = configuration.get("webhooks", [])
        if any(webhook["clientConfig"].get("caBundle") != bundle for webhook in webhooks):
            told = [
                {**webhook, "clientConfig": {**webhook["clientConfig"], "caBundle": bundle}} for webhook in webhooks
            ]
            await self._patch(_CONFIGURATION, configuration, {"webhooks": told})
            _log.info("the API server was told whom to trust", authorities=len(wanted.authorities))
        self._announced = True
        self._serve(wanted)

    def _serve(self, wanted: Certificates) -> None:
        serving = wanted.serving
        assert serving is not None, "whatever is renewed has one"
        if self._served is not None and serving.certificate == self._served.certificate:
            return
        # OpenSSL takes them from files only; the key's is this process's alone, and is gone at once.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pair.pem"
            path.touch(0o600)
            path.write_text(serving.key_pem + serving.pem)
            self._context.load_cert_chain(path)
        self._served = serving
        EXPIRES.set(serving.ends.timestamp())
        _log.info("serving with a new certificate", until=serving.ends.isoformat())

    async def _get(self, kind: str, namespace: str | None) -> Mapping[str, Any]:
        found = await self._cluster.get(kind, namespace, self._settings.webhook)
        if found is None:
            raise LookupError(
                f"the {kind} {self._settings.webhook} isn't there: `helm upgrade` makes it again (webhook.enabled)"
            )
        return found

    async def _patch(self, kind: str, found: Mapping[str, Any], patch: Mapping[str, Any]) -> None:
        """Change an object, unless somebody has changed it since it was found."""
        metadata = found["metadata"]
        await self._cluster.patch(
            kind, metadata.get("namespace"), metadata["name"],
            {"metadata": {"resourceVersion": metadata["resourceVersion"]}, **patch},
        )  # fmt: skip


def _trusted(configuration: Mapping[str, Any]) -> str:
    """Return whom the API server trusts at present, as PEM; nobody where its webhooks differ in it."""
    bundles = {webhook["clientConfig"].get("caBundle") or "" for webhook in configuration.get("webhooks", [])}
    return base64.b64decode(bundles.pop()).decode(errors="replace") if len(bundles) == 1 else ""


def _described(wanted: Certificates) -> dict[str, Any]:
    return {
        "authorities": [authority.ends.isoformat() for authority in wanted.authorities],
        "serving": wanted.serving.ends.isoformat() if wanted.serving else None,
    }
