"""Which pods may ask the Kubernetes API who calls and what they may do (TokenReview, SubjectAccessReview).

Both questions are about the whole cluster, so the right to ask them is given by a ClusterRoleBinding. The chart makes
one, `refold-query`, of the ClusterRole `system:auth-delegator` and with nobody in it; here the ServiceAccounts of query
services are put in and taken out. So the operator needs no right on any other binding, `helm uninstall` takes all of
these rights away at once, and Helm, whose manifest says nothing of the subjects, leaves them as they are.

An operator of named namespaces has no right on anything beyond them: there the chart gives the right to these
namespaces' ServiceAccounts, and nothing is done here.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import structlog
from refold import names

from refold_operator.cluster import Cluster, RefusedError

BINDING = "refold-query"
#: Seconds after which the binding is read again, as somebody else may have changed it.
READ_SECONDS = 300.0
_TRIES = 5
_CONFLICT = 409

_log = structlog.get_logger(__name__)


class Account(NamedTuple):
    """A ServiceAccount."""

    namespace: str
    name: str


class Delegation:
    """The ServiceAccounts in the binding."""

    def __init__(self, cluster: Cluster, *, given: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        """Change the binding in `cluster`; where the right is `given` by the chart, do nothing."""
        self._cluster = cluster
        self._given = given
        self._clock = clock
        self._lock = asyncio.Lock()
        self._accounts: frozenset[Account] = frozenset()
        self._gone: frozenset[Account] = frozenset()
        self._version = ""
        self._read_at = float("-inf")

    async def give(self, account: Account) -> None:
        """Let the pods of `account` ask.

        Raises:
            RefusedError: the binding isn't there, or may not be changed.
            UnreachableError: the API server is away.
        """
        async with self._lock:
            await self._change(lambda accounts: accounts | {account})
            self._gone -= {account}

    async def take(self, account: Account) -> None:
        """Take that right away; an account that doesn't have it is no error.

        Raises:
            RefusedError: the binding may not be changed.
            UnreachableError: the API server is away.
        """
        async with self._lock:
            await self._change(lambda accounts: accounts - {account})

    async def _change(self, change: Callable[[frozenset[Account]], frozenset[Account]]) -> None:
        if self._given:
            return
        for _ in range(_TRIES):
            if self._clock() - self._read_at > READ_SECONDS:
                await self._read()
            wanted = change(self._accounts - self._gone)
            if wanted == self._accounts:
                return
            patch = {
                # Somebody else may have changed the list, which is patched as a whole.
                "metadata": {"resourceVersion": self._version},
                "subjects": [
                    {"kind": "ServiceAccount", "namespace": account.namespace, "name": account.name}
                    for account in sorted(wanted)
                ],
            }
            try:
                self._take_in(await self._cluster.patch("ClusterRoleBinding", None, BINDING, patch))
            except RefusedError as error:
                if error.status != _CONFLICT:
                    raise
                self._read_at = float("-inf")
                continue
            _log.info("who may ask the Kubernetes API about callers was changed", accounts=len(self._accounts))
            return
        raise RefusedError(_CONFLICT, f"change the ClusterRoleBinding {BINDING}", "others change it all the time")

    async def _read(self) -> None:
        binding = await self._cluster.get("ClusterRoleBinding", None, BINDING)
        if binding is None:
            raise RefusedError(404, f"get the ClusterRoleBinding {BINDING}", "it doesn't exist; the chart makes it")
        self._take_in(binding)
        # Of Projections that went without the operator (their finalizer was taken off).
        there = {
            Account(item["metadata"]["namespace"], names.query_name(item["metadata"]["name"]))
            for item in await self._cluster.list("Projection")
        }
        self._gone = self._accounts - there
        self._read_at = self._clock()

    def _take_in(self, binding: dict[str, Any]) -> None:
        self._version = binding["metadata"]["resourceVersion"]
        self._accounts = frozenset(
            Account(subject["namespace"], subject["name"])
            for subject in binding.get("subjects") or []
            if subject["kind"] == "ServiceAccount"
        )
        self._gone = frozenset()
