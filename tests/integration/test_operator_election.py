"""Two replicas of the operator: one works, the other takes over, and one that was frozen does no harm."""

import asyncio
import concurrent.futures
import contextlib
import logging
import signal
import time
import types
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, NoReturn

import psycopg
import pytest
from kubernetes.aio import client, config
from refold_operator import handlers
from refold_operator.cluster import Cluster
from refold_operator.database import Database
from refold_operator.election import Election
from refold_operator.errors import UnreachableError
from refold_operator.settings import Settings

from hack.servers import Kafka, Postgres, kubernetes_api
from hack.servers.kubernetes_api import ApiServer
from tests.operating import Operator, api_server, becomes, event_stream, projection, until

NAMESPACE, LEASE = "refold-system", ("lease", "refold-operator", "-n", "refold-system")
DEFAULT_SECONDS = Settings.model_fields["lease_seconds"].default
#: Not too short for a busy machine: a leader that can't renew it for two thirds of that ends, and here nobody starts it
#: again.
SHORT = {"REFOLD_LEASE_SECONDS": "5"}
pytestmark = pytest.mark.skipif(
    kubernetes_api.programs() is None, reason="no kube-apiserver and etcd in the cache: see hack/kind"
)


@pytest.fixture(scope="module")
def api() -> Iterator[ApiServer]:
    server = api_server("shop")
    yield server
    server.remove()


# --- the Lease ---


class Ended(BaseException):
    """A candidate's process would have ended."""


class Clock:
    """Monotonic seconds that a test can put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


Candidates = Callable[..., Election]


@pytest.fixture
async def candidates(api: ApiServer) -> AsyncIterator[Candidates]:
    """Make candidates for a Lease of one second that nobody has held yet."""
    api.kubectl("delete", *LEASE, "--ignore-not-found")
    configuration = client.Configuration()
    await config.load_kube_config(str(api.kubeconfig), client_configuration=configuration)
    connection = Cluster(client.ApiClient(configuration))

    def end(why: str) -> NoReturn:
        raise Ended(why)

    def make(*, seconds: int = 1, clock: Callable[[], float] = time.monotonic) -> Election:
        return Election(connection, namespace=NAMESPACE, seconds=seconds, lost=end, clock=clock)

    yield make
    await connection.close()


async def record(api: ApiServer) -> dict[str, Any]:
    """Return what the Lease says; renewals go on meanwhile."""
    spec: dict[str, Any] = (await asyncio.to_thread(api.get, *LEASE))["spec"]
    return spec


async def write(api: ApiServer, **spec: Any) -> None:
    metadata = {"name": "refold-operator", "namespace": NAMESPACE}
    manifest = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
    await asyncio.to_thread(api.apply, manifest)


async def soon(look: Callable[[], bool]) -> None:
    """Wait until `look` answers true; it may take its time."""
    async with asyncio.timeout(10):
        while not await asyncio.to_thread(look):  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.05)


async def test_of_many_candidates_one_gets_the_lease_and_the_next_when_it_is_given_back(
    api: ApiServer, candidates: Candidates
) -> None:
    worked: list[str] = []
    working = 0

    async def work(candidate: Election) -> None:
        nonlocal working
        async with candidate.held():
            working += 1
            assert working == 1
            worked.append(candidate.identity)
            for _ in range(3):
                await asyncio.sleep(0.1)
                candidate.check()
            working -= 1

    # so long that nobody could wait for its end
    everyone = [candidates(seconds=20) for _ in range(3)]
    async with asyncio.timeout(19):
        await asyncio.gather(*map(work, everyone))
    assert sorted(worked) == sorted(one.identity for one in everyone)
    left = await record(api)
    assert "holderIdentity" not in left
    assert left["leaseTransitions"] == 2


@pytest.mark.parametrize("says", ["1999-01-01T00:00:00.000000Z", "2099-01-01T00:00:00.000000Z"])
async def test_a_candidate_waits_for_as_long_as_it_saw_the_lease_unchanged_whatever_the_times_in_it_say(
    api: ApiServer, candidates: Candidates, says: str
) -> None:
    await write(
        api, holderIdentity="gone", leaseDurationSeconds=2, renewTime=says, acquireTime=says, leaseTransitions=7
    )
    candidate = candidates()
    began = time.monotonic()
    async with asyncio.timeout(10), candidate.held():
        assert time.monotonic() - began >= 2
        found = await record(api)
        assert (found["holderIdentity"], found["leaseTransitions"]) == (candidate.identity, 8)


async def test_a_candidate_waits_while_the_holder_renews(api: ApiServer, candidates: Candidates) -> None:
    holder, other = candidates(seconds=3), candidates(seconds=3)
    async with holder.held():
        waiting = asyncio.create_task(other.held().__aenter__())
        await asyncio.sleep(4)
        holder.check()
        assert not waiting.done()
        waiting.cancel()
        first = await record(api)
        assert first["holderIdentity"] == holder.identity
        assert first["acquireTime"] < first["renewTime"]


async def test_a_holder_whose_time_is_over_ends_at_its_next_effect_and_does_not_renew(
    api: ApiServer, candidates: Candidates
) -> None:
    clock = Clock()
    holder = candidates(clock=clock)
    async with holder.held():
        holder.check()
        clock.ahead = 1.0
        await asyncio.sleep(0.3)  # what was under way
        before = await record(api)
        with pytest.raises(Ended, match="its time is over"):
            holder.check()
        await asyncio.sleep(0.5)
        assert await record(api) == before
    assert await record(api) == before, "nothing was given back that another one may hold"


async def test_a_holder_that_finds_another_one_in_the_lease_ends(api: ApiServer, candidates: Candidates) -> None:
    ended: list[str] = []

    def end(why: str) -> NoReturn:
        ended.append(why)
        raise asyncio.CancelledError

    holder = candidates(seconds=20)
    holder._lost = end
    async with holder.held():
        await write(api, holderIdentity="other", leaseDurationSeconds=20)
        await soon(lambda: bool(ended))
        assert not holder.holds
    assert ended == ["other holds it"]
    assert (await record(api))["holderIdentity"] == "other"


async def test_a_lease_that_somebody_deletes_stays_with_its_holder(api: ApiServer, candidates: Candidates) -> None:
    holder, other = candidates(seconds=4), candidates(seconds=4)
    async with holder.held():
        waiting = asyncio.create_task(other.held().__aenter__())
        await asyncio.sleep(1)
        await asyncio.to_thread(api.kubectl, "delete", *LEASE)
        await soon(lambda: "NotFound" not in api.kubectl("get", *LEASE, check=False))
        assert (await record(api))["holderIdentity"] == holder.identity
        holder.check()
        assert not waiting.done()
        waiting.cancel()


# --- what a former holder still does ---


async def test_what_a_former_holder_has_under_way_in_a_database_is_rolled_back_when_the_next_one_begins(
    database: str,
) -> None:
    former, other = (Database(database, "event store", process=process) for process in ("former", "other"))
    await former.open()
    await other.open()

    async def drop() -> None:
        async with former.connection() as connection, connection.transaction():
            await connection.execute("drop table made")
            # it is frozen, the next one takes over, and it goes on
            async with other.connection() as next_one:
                await next_one.execute("insert into made values (1)")

    try:
        async with former.connection() as connection:
            await connection.execute("create table made (n int)")
        with pytest.raises(UnreachableError, match="terminating connection"):
            await drop()
        async with other.connection() as one, other.connection() as two:
            await one.execute("insert into made values (2)")
            cursor = await two.execute("select n from made order by n")
            assert await cursor.fetchall() == [(1,), (2,)]
    finally:
        await former.close()
        await other.close()


async def test_a_database_is_not_used_by_a_process_that_may_not_act(database: str) -> None:
    def guard() -> None:
        raise Ended

    refused = Database(database, "event store", guard=guard)
    await refused.open()
    try:
        with pytest.raises(Ended):
            async with refused.connection():
                pass
    finally:
        await refused.close()


async def test_kopfs_own_requests_pass_the_guard_if_they_change_something(
    api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guard() -> None:
        if not holds:
            raise Ended

    holds = True
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(api.kubeconfig))
    found = await handlers.log_in(
        memo=types.SimpleNamespace(guard=guard), logger=logging.getLogger(), settings=handlers.settings()
    )
    url, kind = f"{found.server}/api/v1/namespaces/shop", {"content-type": "application/merge-patch+json"}
    async with found.aiohttp_session as session:
        for label in ("a", "b"):
            change = session.patch(url, json={"metadata": {"labels": {"label": label}}}, headers=kind)
            if holds:
                assert (await change).status == 200
            else:
                with pytest.raises(Ended):
                    await change
            holds = False
        labels = (await (await session.get(url)).json())["metadata"]["labels"]
    assert labels["label"] == "a"


# --- two processes ---


@pytest.fixture(scope="module")
def installation(api: ApiServer, postgres: Postgres, kafka: Kafka) -> Operator:
    """Databases and settings; its own process isn't started."""
    api.kubectl("delete", *LEASE, "--ignore-not-found")
    return Operator(api, postgres, kafka, ("elected_store", "elected_reads"))


@contextlib.contextmanager
def running(*replicas: Operator, later: Sequence[Operator] = ()) -> Iterator[None]:
    """Start replicas at the same time; kill what is left of them, and of those that are started later."""
    try:
        with concurrent.futures.ThreadPoolExecutor() as threads:
            list(threads.map(Operator.start, replicas))
        yield
    finally:
        for replica in (*replicas, *later):
            replica.crash()


def roles(*replicas: Operator) -> tuple[Operator, Operator]:
    """Return who leads and who stands by, once one leads and has installed what is needed."""
    leader = until(lambda: [one for one in replicas if one.leads and one.answers("/readyz")][0])  # noqa: RUF015
    (other,) = (one for one in replicas if one is not leader)
    assert not other.leads
    return leader, other


def active(api: ApiServer, name: str) -> None:
    api.apply(event_stream("shop", name, partitions=1, deletionPolicy="Delete"))
    becomes(api, "eventstream", "shop", name, "True", "Active")


def test_an_operator_that_knows_no_lease_is_waited_for(api: ApiServer, installation: Operator) -> None:
    labels = {"app.kubernetes.io/name": "refold", "app.kubernetes.io/component": "operator"}
    metadata = {"name": "of-0.1.0", "namespace": NAMESPACE, "labels": labels}
    pod = {"containers": [{"name": "operator", "image": "refold/refold:0.1.0"}]}
    api.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod})
    upgraded = installation.replica()
    with running(upgraded):
        until(lambda: "waiting for operators of an earlier Refold to end" in upgraded.log)
        assert upgraded.answers("/readyz"), "else a rollout wouldn't take the former one away"
        assert upgraded.metric("refold_installed") == 0
        api.kubectl("delete", "pod", "of-0.1.0", "-n", NAMESPACE, "--grace-period=0", "--force")
        until(lambda: upgraded.metric("refold_installed") == 1)
        upgraded.stop()


def test_killed_or_stopped_the_other_one_works_soon(api: ApiServer, installation: Operator) -> None:
    settings = {"REFOLD_LEASE_SECONDS": str(DEFAULT_SECONDS)}
    replicas = [installation.replica(**settings) for _ in range(3)]
    with running(*replicas[:2], later=replicas[2:]):
        leader, other = roles(*replicas[:2])
        until(lambda: other.answers("/readyz"))
        active(api, "first")
        assert "installation is complete" not in other.log

        began = time.monotonic()
        leader.crash()
        active(api, "after-kill")
        killed = time.monotonic() - began
        assert other.leads

        replicas[2].start()
        until(lambda: replicas[2].answers("/readyz"))
        began = time.monotonic()
        other.stop()
        ended = time.monotonic()
        active(api, "after-stop")
        stopped = time.monotonic() - ended
        assert replicas[2].leads
        print(
            f"with a Lease of {DEFAULT_SECONDS} s: works {killed:.1f} s after the leader was killed; "
            f"{stopped:.1f} s after it had stopped, which took {ended - began:.1f} s"
        )
        assert killed < 15
        assert stopped < DEFAULT_SECONDS / 2, "it was given back"
        for one in replicas:
            assert "Traceback" not in one.log


def test_without_the_api_server_the_leader_ends_and_afterwards_the_other_one_works(
    api: ApiServer, installation: Operator
) -> None:
    replicas = [installation.replica(**SHORT) for _ in range(2)]
    with running(*replicas):
        leader, other = roles(*replicas)
        api.stop_server()
        try:
            until(lambda: not leader.running)
            assert other.answers("/healthz")
        finally:
            api.start_server()
        active(api, "after-outage")
        assert other.leads
        other.send(signal.SIGTERM)
        until(lambda: not other.running)


def state(api: ApiServer, installation: Operator) -> dict[str, Any]:
    """Return all that a former leader could have changed."""
    kinds = "eventstreams,projections,deployments,services,secrets,serviceaccounts,events"
    found: dict[str, Any] = {
        f"{item['kind']} {item['metadata']['name']}": item["metadata"]["resourceVersion"]
        for item in api.get(kinds, "-n", "shop")["items"]
    }
    with psycopg.connect(installation.admin[installation.store], autocommit=True) as connection:
        for query in (
            "select name, uid, incarnation, topic_id, state from refold.streams order by 1",
            "select nspname from pg_namespace order by 1",
            "select rolname from pg_roles order by 1",
        ):
            found[query] = connection.execute(query).fetchall()
    return found


def quiet(api: ApiServer, installation: Operator) -> dict[str, Any]:
    """Return the state once it doesn't change any more."""

    def unchanged() -> dict[str, Any] | None:
        before = state(api, installation)
        time.sleep(1)
        return before if state(api, installation) == before else None

    found = until(unchanged)
    assert found is not None
    return found


def test_a_leader_frozen_in_its_work_does_nothing_any_more_when_it_goes_on(
    api: ApiServer, installation: Operator
) -> None:
    replicas = [installation.replica(**SHORT) for _ in range(3)]
    names = [f"frozen-{number}" for number in range(5)]
    streams = [event_stream("shop", name, partitions=1, deletionPolicy="Delete") for name in names]
    readers = [projection("shop", f"of-{name}", streams=[name]) for name in names[:2]]
    kinds = [f"eventstream/{name}" for name in names] + [f"projection/of-{name}" for name in names[:2]]
    with running(*replicas[:2], later=replicas[2:]):
        pair = replicas[:2]
        for number, (deleting, pause) in enumerate([(False, 0.15), (True, 0.2)]):
            frozen, other = roles(*pair)
            if deleting:
                api.kubectl("delete", *kinds, "-n", "shop", "--wait=false")
            else:
                api.apply(*streams, *readers)
            time.sleep(pause)
            frozen.send(signal.SIGSTOP)
            until(lambda other=other: other.leads)
            if deleting:
                # what the frozen one was about to drop is made again under the same names
                try:
                    api.kubectl("wait", "--for=delete", *kinds, "-n", "shop", "--timeout=180s")
                except RuntimeError as error:
                    raise AssertionError(other.log[-10_000:]) from error
                api.apply(*streams, *readers)
            for name in names:
                becomes(api, "eventstream", "shop", name, "True", "Active")
            for name in names[:2]:
                becomes(api, "projection", "shop", f"of-{name}", "False", "QueryStarting")
            before = quiet(api, installation)
            frozen.send(signal.SIGCONT)
            until(lambda frozen=frozen: not frozen.running, seconds=10)
            assert "it doesn't hold the Lease any more" in frozen.log
            assert quiet(api, installation) == before
            assert other.leads
            if number == 0:
                pair = [other, replicas[2]]
                replicas[2].start()
