"""Read models in Redis: in one of the user's own, or in the installation's.

The URL of the user's own stands in a Secret beside the Projection; its user is the projectors' and query services' too,
so nobody gets more than the Secret gives to its namespace. In the installation's, which all namespaces share, each
Projection has ACL users of its own that reach its keys alone.
"""

import asyncio
import base64
import binascii
from typing import Any

from redis.exceptions import ResponseError
from refold import names
from refold.projection.readstore import NotFoundError, ProjectionStatus, UnavailableError, redis_logins, stores
from refold.projection.readstore.redis import RedisStore, prefix

from refold_operator import credentials, dsn
from refold_operator.administrators import Login
from refold_operator.calls import measured
from refold_operator.cluster import Cluster
from refold_operator.dsn import check_redis
from refold_operator.errors import ReconcileError
from refold_operator.guard import Guard, unguarded
from refold_operator.readstore import Logins
from refold_operator.resources import Projection

#: The key of the Secret that holds the URL.
URL_KEY = "url"
#: The reason where a Projection is to stand in the installation's Redis, and there is none.
NO_REDIS = "ReadStoreMissing"


class RedisReadStore(RedisStore):
    """The read models in one Redis, as `readstore.ReadStore` has those in PostgreSQL."""

    def __init__(self, url: str, *, guard: Guard = unguarded) -> None:
        """Use the Redis at `url`; nothing is asked of it yet. `guard` is called before each request."""
        super().__init__(url)
        self._url, self._guard = url, guard

    async def logins(self, key: bytes, *, namespace: str, name: str) -> Logins:  # noqa: ARG002 (as of PostgreSQL)
        """Return how projectors and query services reach it: as the Secret says."""
        return Logins(projector=self._url, query=self._url)

    @measured("redis", unavailable=UnavailableError)
    async def _call(self, text: str, key: str, *arguments: str | bytes | dict[str, Any]) -> Any:
        self._guard()
        return await super()._call(text, key, *arguments)

    @measured("redis", unavailable=UnavailableError)
    async def _command(self, *command: str | bytes | int) -> Any:
        self._guard()
        return await super()._command(*command)

    async def status(self, *, namespace: str, name: str) -> ProjectionStatus:
        """Return how far the versions are; without any where the projection isn't claimed."""
        try:
            return await super().status(namespace=namespace, name=name)
        except NotFoundError:
            return ProjectionStatus(live=None, versions={})


class SharedRedisReadStore(RedisReadStore):
    """The installation's Redis, whose URL is the administrator's.

    ACL users are kept in the server's ACL file, so that they outlive its restarts; what somebody changed about them is
    put right when the Projection is looked at. Redis tells rights in its own words, so what is right is what it
    answered after they were given, and each process of the operator gives them once.
    """

    def __init__(self, url: str, *, guard: Guard = unguarded) -> None:
        """Use the Redis at `url`; nothing is asked of it yet. `guard` is called before each request."""
        super().__init__(url, guard=guard)
        self._known: dict[str, tuple[list[str], object]] = {}
        # A file is written by one at a time, and what one call has changed isn't kept by the end of another's.
        self._changing = asyncio.Lock()

    async def install(self) -> None:
        """See whether the Redis can keep read models, also over a restart."""
        await super().install()
        answer = await self._command("ACL", "GETUSER", "default")
        rights = dict(zip(answer[::2], answer[1::2], strict=True))
        if not rights[b"commands"].startswith(b"+@all") or b"~*" not in rights[b"keys"].split():
            raise UnavailableError(
                "this Redis can't keep read models: its user default lacks rights, and with that one's it reads the "
                "append-only file, so it would lose most of it in a restart: set 'ACL SETUSER default off allkeys "
                "allcommands' (off: nobody can log in as it)"
            )

    async def logins(self, key: bytes, *, namespace: str, name: str) -> Logins:
        """Make the ACL users of projectors and query services, and return their URLs."""
        rules = {"projector": redis_logins.projector, "query": redis_logins.query}
        urls = {}
        for part, rules_of in rules.items():
            user = names.redis_user(namespace, name, part)
            password = credentials.password(key, f"redis:{user}")
            await self._ensure_user(user, redis_logins.whole(rules_of(namespace, name), password))
            urls[part] = dsn.redis_login(self._url, user, password)
        return Logins(**urls)

    async def release(self, *, namespace: str, name: str, uid: str) -> bool:
        """Give up the claim of `uid` with its ACL users, and leave all data; return whether there was such a claim."""
        claim = await self._command("HGET", f"{prefix(namespace, name)}claim", "uid")
        if claim == uid.encode():  # before the claim goes, so that a release which breaks off is done again
            await self._drop_users(namespace, name)
        return await super().release(namespace=namespace, name=name, uid=uid)

    async def drop(self, *, namespace: str, name: str, uid: str) -> bool:
        """Drop all that the projection has, then its ACL users; return whether it was there."""
        dropped = await super().drop(namespace=namespace, name=name, uid=uid)
        await self._drop_users(namespace, name)
        return dropped

    async def _ensure_user(self, user: str, wanted: list[str]) -> None:
        async with self._changing:
            known = self._known.pop(user, None)
            if known is None or known != (wanted, await self._command("ACL", "GETUSER", user)):
                await self._command("ACL", "SETUSER", user, *wanted)
                await self._save_users()
                known = wanted, await self._command("ACL", "GETUSER", user)
            self._known[user] = known

    async def _drop_users(self, namespace: str, name: str) -> None:
        users = [names.redis_user(namespace, name, part) for part in ("projector", "query")]
        async with self._changing:
            for user in users:
                self._known.pop(user, None)
            await self._command("ACL", "DELUSER", *users)
            await self._save_users()

    async def _save_users(self) -> None:
        try:
            await self._command("ACL", "SAVE")
        except UnavailableError as error:
            if isinstance(error.__cause__, ResponseError):
                raise UnavailableError(
                    f"{error} (the installation's Redis has to keep its users in a file that it may write: aclfile)"
                ) from error
            raise


class RedisReadStores:
    """The Redis of each Projection that has one; a Redis keeps its connections between reconciles."""

    def __init__(self, cluster: Cluster, *, admin: Login | None, guard: Guard = unguarded) -> None:
        """Nothing is asked yet.

        Args:
            cluster: holds the Secrets.
            admin: the login at the installation's Redis, where it has one.
            guard: called before each request to a Redis.
        """
        self._cluster, self._guard = cluster, guard
        self._admin = admin
        self._shared: dict[str, SharedRedisReadStore] = {}
        self._known: dict[str, RedisReadStore] = {}

    async def of(self, projection: Projection) -> RedisReadStore:
        """Return the Redis of the Projection, which has been looked at.

        Raises:
            ReconcileError: the installation has none, or the Secret is missing or holds no URL of a Redis.
            refold.projection.readstore.UnavailableError: the Redis is away, or can't keep read models.
        """
        reference = projection.spec.read_store.connection_ref
        store: RedisReadStore | None
        if reference is None:
            if self._admin is None:
                raise ReconcileError(
                    "Ready",
                    NO_REDIS,
                    "spec.readStore: this installation has no Redis of its own: make the Projection anew with "
                    "connectionRef, which names a Secret with the URL of a Redis, or give the installation one "
                    "(the chart's redis.adminSecret, or embedded.enabled to try it out)",
                )
            store = self._of_the_installation(self._admin)
        else:
            url = await self._url(projection.metadata.namespace, reference.name)
            store = self._known.get(url)
            if store is None:
                store = self._known[url] = RedisReadStore(url, guard=self._guard)
        await store.install()
        return store

    async def close(self) -> None:
        """Close all connections."""
        for store in (*self._known.values(), *self._shared.values()):
            await store.close()

    def _of_the_installation(self, admin: Login) -> SharedRedisReadStore:
        """Return the installation's Redis; another one, with connections of its own, when the login has changed."""
        try:
            url = admin()
            check_redis(url)
        except (OSError, ValueError) as error:
            raise UnavailableError(f"the administrator's URL of Redis can't be used: {error}") from None
        if url not in self._shared:
            self._shared[url] = SharedRedisReadStore(url, guard=self._guard)
        return self._shared[url]

    async def _url(self, namespace: str, name: str) -> str:
        secret = await self._cluster.get("Secret", namespace, name)
        what = f"spec.readStore.connectionRef: the Secret {namespace}/{name}"
        if secret is None:
            raise ReconcileError("Ready", "SecretMissing", f"{what} doesn't exist: make it, with the key {URL_KEY}")
        try:
            url = base64.b64decode(secret.get("data", {})[URL_KEY]).decode().strip()
        except (KeyError, binascii.Error, UnicodeDecodeError):
            raise ReconcileError("Ready", "SecretInvalid", f"{what} has no key {URL_KEY}") from None
        if not url.startswith(stores.REDIS):
            message = f"{what} has no URL of a Redis under {URL_KEY}: redis://user:password@host:port/database"
            raise ReconcileError("Ready", "SecretInvalid", message)
        return url
