"""How the commands for people reach the services: through the Kubernetes API, or at a URL.

Through the Kubernetes API a connection is forwarded to a pod of the service, as `kubectl port-forward` does, but in
this process: no port is opened on this machine, and all the way to the node is TLS. The token is one that the API makes
for a ServiceAccount (`--service-account`), for the audience `refold` alone and for ten minutes; or one that is given.
"""

import http.client
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from refold import names
from refold.web.auth.access import AUDIENCE

#: Port of every pod of Refold's services.
_POD_PORT = 8080
#: Seconds for an answer; a projector has ten to do what is asked of a parked event.
_ANSWER_SECONDS = 30
#: Seconds that a token which is made for a command is good; the API makes none for less.
_TOKEN_SECONDS = 600
_EVENT_STORE = "refold-eventstore"
_PROJECTIONS = ("refold.dev", "v1alpha1")

#: Numbers stay as they were sent.
decode = msgspec.json.Decoder(float_hook=Decimal).decode


class UnreachableError(Exception):
    """A service, or the way to it, doesn't work as asked; the message says what to do."""


class RefusedError(Exception):
    """A service has refused; the message is its own, `kind` the end of the problem's type."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class Way:
    """What the caller said of the way to a service; each may be None.

    Args:
        url: of the service; without it the way is through the Kubernetes API.
        token: to be sent.
        token_file: a file that holds it.
        context: of the kubeconfig.
        namespace: of the resource; without it that of the kubeconfig's context.
        service_account: in that namespace, whose token is sent.
        system_namespace: where Refold is installed.
    """

    url: str | None
    token: str | None
    token_file: Path | None
    context: str | None
    namespace: str | None
    service_account: str | None
    system_namespace: str

    def in_namespace(self) -> str:
        """Return the namespace of the resource."""
        if self.namespace is not None:
            return self.namespace
        if self.url is not None:
            return "default"
        return cluster(self).namespace

    def to_query(self, projection: str) -> "Client":
        """Return a client of a Projection's query service.

        Raises:
            UnreachableError: there is no way to it.
        """
        return self._client(self.in_namespace(), names.query_name(projection))

    def to_event_store(self) -> "Client":
        """Return a client of the event store.

        Raises:
            UnreachableError: there is no way to it.
        """
        return self._client(self.system_namespace, _EVENT_STORE)

    def _client(self, namespace: str, service: str) -> "Client":
        token = self.token
        if self.token_file is not None:
            try:
                token = self.token_file.read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UnreachableError(f"the token's file can't be read: {error}") from error
        if self.url is not None:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise UnreachableError(f"--url is like https://host:port, not {self.url!r}")
            if token is None:
                raise UnreachableError("with --url a token is needed: --token-file FILE, or the variable REFOLD_TOKEN")
            return Client(f"{service} at {self.url}", self._direct, parts.path.rstrip("/"), token)
        api = cluster(self)
        if token is None:
            if self.service_account is None:
                raise UnreachableError(
                    "say as whom: --service-account NAME (of the namespace, with a Role as docs/authorisation.md "
                    "shows; you need the right to create serviceaccounts/token), or a token by --token-file FILE or "
                    "the variable REFOLD_TOKEN"
                )
            token = api.token(self.in_namespace(), self.service_account)
        return Client(f"the Service {namespace}/{service}", lambda: api.connection(namespace, service), "", token)

    def _direct(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url or "")
        assert parts.hostname is not None, "looked at before"
        if parts.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(parts.hostname, parts.port, timeout=_ANSWER_SECONDS, context=context)
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=_ANSWER_SECONDS)


class Client:
    """A service that is asked with a token.

    Args:
        what: what messages call it.
        connect: makes a connection, one a request.
        prefix: what all paths begin with.
        token: is sent.
    """

    def __init__(self, what: str, connect: Any, prefix: str, token: str) -> None:
        self._what = what
        self._connect = connect
        self._prefix = prefix
        self._headers = {"authorization": f"Bearer {token}", "accept": "application/json"}

    def ask(self, method: str, *segments: str, query: Mapping[str, object] | None = None) -> Any:
        """Return what the service answers at the path of `segments`, decoded.

        What is None in `query` is left out.

        Raises:
            UnreachableError: it doesn't answer, or not as it should.
            RefusedError: it refuses.
        """
        given = {name: value for name, value in (query or {}).items() if value is not None}
        path = self._prefix + "".join("/" + quote(segment, safe=":") for segment in segments)
        target = f"{path}?{urlencode(given)}" if given else path
        try:
            connection = self._connect()
            try:
                connection.request(method, target, headers=self._headers)
                response = connection.getresponse()
                body = response.read()
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, UnicodeEncodeError) as error:
            raise UnreachableError(f"{self._what} doesn't answer: {error or type(error).__name__}") from error
        try:
            answer = decode(body)
        except msgspec.DecodeError as error:
            raise UnreachableError(f"{self._what} answered {response.status} with something else than JSON") from error
        if response.status < 400:
            return answer
        if not isinstance(answer, dict) or "type" not in answer:
            raise UnreachableError(f"{self._what} answered {response.status}: {body[:200]!r}")
        kind = str(answer["type"]).rsplit("/", 1)[-1]
        raise RefusedError(kind, str(answer.get("detail") or answer.get("title")))


class _Cluster:
    """The Kubernetes API of a kubeconfig's context, or of the cluster that this process runs in."""

    def __init__(self, context: str | None) -> None:
        from kubernetes import client, config

        self.namespace = "default"
        settings = client.Configuration()
        try:
            config.load_kube_config(context=context, client_configuration=settings)
            active = config.list_kube_config_contexts()[1] if context is None else {}
            if context is not None:
                active = next(one for one in config.list_kube_config_contexts()[0] if one["name"] == context)
            self.namespace = active.get("context", {}).get("namespace") or "default"
        except config.ConfigException as error:
            if context is not None:
                raise UnreachableError(f"the kubeconfig: {error}") from error
            try:
                config.load_incluster_config(client_configuration=settings)
            except config.ConfigException:
                raise UnreachableError(
                    f"there is no kubeconfig ({error}); give --url and a token to go without Kubernetes"
                ) from error
        settings.retries = 1
        self._api = client.CoreV1Api(client.ApiClient(settings))
        self._custom = client.CustomObjectsApi(client.ApiClient(settings))

    def token(self, namespace: str, account: str) -> str:
        """Return a token of a ServiceAccount for the audience of Refold."""
        from kubernetes import client

        spec = client.V1TokenRequestSpec(audiences=[AUDIENCE], expiration_seconds=_TOKEN_SECONDS)
        made = self._call(
            f"make a token of the ServiceAccount {namespace}/{account}",
            lambda: self._api.create_namespaced_service_account_token(
                account, namespace, client.AuthenticationV1TokenRequest(spec=spec), _request_timeout=_ANSWER_SECONDS
            ),
        )
        return str(made.status.token)

    def connection(self, namespace: str, service: str) -> http.client.HTTPConnection:
        """Return a connection to a ready pod of a Service."""
        from kubernetes import client
        from kubernetes.stream import portforward

        found = self._call(
            f"find the Service {namespace}/{service}",
            lambda: self._api.read_namespaced_service(service, namespace, _request_timeout=_ANSWER_SECONDS),
        )
        selector = ",".join(f"{name}={value}" for name, value in sorted((found.spec.selector or {}).items()))
        pods = self._call(
            f"list the pods of the Service {namespace}/{service}",
            lambda: self._api.list_namespaced_pod(namespace, label_selector=selector, _request_timeout=_ANSWER_SECONDS),
        )
        ready = [
            pod.metadata.name
            for pod in pods.items
            if any(one.type == "Ready" and one.status == "True" for one in pod.status.conditions or ())
        ]
        if not ready:
            raise UnreachableError(f"the Service {namespace}/{service} has no pod that is ready, of {len(pods.items)}")
        # Of its own: the client's `stream` functions replace how their client sends requests.
        api = client.CoreV1Api(client.ApiClient(self._api.api_client.configuration))
        forward = self._call(
            f"forward to the pod {namespace}/{ready[0]} (the right to create pods/portforward)",
            lambda: portforward(api.connect_get_namespaced_pod_portforward, ready[0], namespace, ports=str(_POD_PORT)),
        )
        sock = forward.socket(_POD_PORT)
        sock.settimeout(_ANSWER_SECONDS)
        connection = http.client.HTTPConnection(service, timeout=_ANSWER_SECONDS)
        connection.sock = sock
        return connection

    def projection(self, namespace: str, name: str) -> dict[str, Any]:
        """Return a Projection."""
        found: dict[str, Any] = self._call(
            f"find the Projection {namespace}/{name}",
            lambda: self._custom.get_namespaced_custom_object(
                *_PROJECTIONS, namespace, "projections", name, _request_timeout=_ANSWER_SECONDS
            ),
        )
        return found

    def annotate_projection(self, namespace: str, name: str, annotations: Mapping[str, str]) -> None:
        """Set annotations of a Projection."""
        self._call(
            f"annotate the Projection {namespace}/{name}",
            lambda: self._custom.patch_namespaced_custom_object(
                *_PROJECTIONS, namespace, "projections", name, {"metadata": {"annotations": dict(annotations)}},
                _request_timeout=_ANSWER_SECONDS,
            ),
        )  # fmt: skip

    def _call(self, what: str, call: Any) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return call()
        except ApiException as error:
            try:
                why = decode(error.body or "")["message"]
            except (msgspec.DecodeError, TypeError, KeyError):
                why = str(error.reason).strip() or f"status {error.status}"
            raise UnreachableError(f"the Kubernetes API didn't {what}: {why}") from error
        except (HTTPError, OSError) as error:
            raise UnreachableError(f"the Kubernetes API doesn't answer ({what}): {error}") from error


_clusters: dict[str | None, _Cluster] = {}


def cluster(way: Way) -> _Cluster:
    """Return the Kubernetes API on `way`.

    Raises:
        UnreachableError: there is no way to it.
    """
    if way.context not in _clusters:
        _clusters[way.context] = _Cluster(way.context)
    return _clusters[way.context]
