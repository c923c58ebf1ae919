"""A Kubernetes API server with Refold's kinds, and a client that makes, changes and follows many objects at once.

The server is kube-apiserver with etcd and no controllers: all that is measured is the operator's. `kubectl apply` of
one file sends its objects one after the other; `create` sends them concurrently, so that the time is the operator's.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kubernetes.aio import config
from kubernetes.aio.client import ApiClient

from bench.limits.operator import PATHS, REQUESTS, path_of, request
from bench.servers import SYSTEM, Servers
from bench.waiting import until
from hack.servers.callers import get
from hack.servers.kubernetes_api import ApiServer
from hack.servers.platform import Service

_WAIT_SECONDS = 600.0

Object = dict[str, Any]


@contextlib.asynccontextmanager
async def client(server: ApiServer) -> AsyncIterator[ApiClient]:
    """Yield a client of the API server."""
    api = await config.new_client_from_config(config_file=str(server.kubeconfig))
    try:
        yield api
    finally:
        await api.close()


@contextlib.contextmanager
def running_operator(servers: Servers, server: ApiServer, **settings: str) -> Iterator[Service]:
    """Run an operator that has installed its stores; its resources stand in the namespace `servers.name`."""
    server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": servers.name}})
    process = servers.platform.operator(server.kubeconfig, namespace=SYSTEM, **settings)
    process.up()
    try:
        until(lambda: metric(process, "refold_installed ") == 1, "the operator works", log=process.log)
        yield process
    finally:
        process.stop()


@contextlib.contextmanager
def emptied(servers: Servers, server: ApiServer) -> Iterator[None]:
    """Take all that is in the namespace `servers.name` out of the API server in the end; no operator runs then."""
    try:
        yield
    finally:
        asyncio.run(_empty(server, servers.name))


async def _empty(server: ApiServer, namespace: str) -> None:
    async with client(server) as api:
        for kind in PATHS:
            left = iter((await request(api, "GET", path_of(kind, namespace)))["items"])
            async with asyncio.TaskGroup() as group:
                for _ in range(REQUESTS):
                    group.create_task(_delete(api, kind, left))


async def _delete(api: ApiClient, kind: str, objects: Iterator[Object]) -> None:
    for one in objects:
        path = f"{path_of(kind, one['metadata']['namespace'])}/{one['metadata']['name']}"
        if one["metadata"].get("finalizers"):
            patch = {"metadata": {"finalizers": None}}
            await request(api, "PATCH", path, patch, kind="application/merge-patch+json")
        await request(api, "DELETE", path)


class Following:
    """The objects of some kinds in a namespace, as watches bring them: by (kind, name)."""

    def __init__(self, api: ApiClient, kinds: Iterable[str], namespace: str, log: Path) -> None:
        """Follow in `api`; `log` is the operator's, shown where what is waited for doesn't come."""
        self.objects: dict[tuple[str, str], Object] = {}
        self._api, self._kinds, self._namespace, self._log = api, list(kinds), namespace, log
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Following":
        for kind in self._kinds:
            self._tasks.append(asyncio.create_task(self._follow(kind, await self._list(kind))))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, kind: str, version: str) -> None:
        """Watch, and list again where the API server ends a watch, as it does with one that reads too slowly."""
        while True:
            await self._watch(kind, version)
            version = await self._list(kind)
            self._changed.set()

    async def _list(self, kind: str) -> str:
        """Note all objects of a kind as they are; return the version from which to watch."""
        listed = await request(self._api, "GET", path_of(kind, self._namespace))
        others = {at: item for at, item in self.objects.items() if at[0] != kind}
        self.objects = others | {(kind, item["metadata"]["name"]): item for item in listed["items"]}
        version: str = listed["metadata"]["resourceVersion"]
        return version

    async def _watch(self, kind: str, version: str) -> None:
        path = f"{path_of(kind, self._namespace)}?watch=1&resourceVersion={version}"
        asked = await self._api.param_serialize("GET", path, auth_settings=["BearerToken"])
        answer = await self._api.call_api(*asked, _request_timeout=3600)
        try:
            async for line in _lines(answer.response.content.iter_any()):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    return
                name = event["object"]["metadata"]["name"]
                if event["type"] == "DELETED":
                    self.objects.pop((kind, name), None)
                else:
                    self.objects[kind, name] = event["object"]
                self._changed.set()
        finally:
            answer.response.close()

    async def until(self, reached: Callable[[], bool], what: str) -> None:
        """Return when `reached` answers true, asked whenever something has changed.

        Raises:
            TimeoutError: it didn't within 10 minutes.
            RuntimeError: the API server refused a list or a watch.
        """
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                while not reached():
                    self._changed.clear()
                    news = asyncio.create_task(self._changed.wait())
                    done, _ = await asyncio.wait([news, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
                    news.cancel()
                    for ended in done - {news}:
                        ended.result()
        except TimeoutError:
            end = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
            raise TimeoutError(f"waited {_WAIT_SECONDS:g} s in vain until {what}\n{end}") from None


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line


def is_ready(item: Mapping[str, Any]) -> bool:
    """Tell whether an object is Ready, in its present generation."""
    return any(
        condition["type"] == "Ready"
        and condition["status"] == "True"
        and condition["observedGeneration"] == item["metadata"]["generation"]
        for condition in item.get("status", {}).get("conditions", [])
    )


def metric(process: Service, name: str) -> float:
    """Return the sum of an operator's metric over its labels; `name` is what its lines begin with."""
    lines = get(f"{process.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def event_stream(namespace: str, name: str, **spec: Any) -> Object:
    """Return an EventStream of one partition."""
    return {
        "apiVersion": "refold.dev/v1alpha1",
        "kind": "EventStream",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"partitions": 1, **spec},
    }
