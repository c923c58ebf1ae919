"""Who may call: the file of tokens, no check at all, and what is remembered of the Kubernetes API's answers."""

import asyncio
import base64
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import structlog
from refold.setup import SetupError
from refold.web.auth import everyone, kubernetes, tokens
from refold.web.auth.access import EVENTS, METRICS, ROWS, Access, PathAccess, ResourceAccess, Verb
from refold.web.auth.choice import authority
from refold.web.auth.everyone import Everyone
from refold.web.auth.expiring import Expiring, Fresh
from refold.web.auth.kubernetes import Kubernetes
from refold.web.auth.reviews import Reviews, UnavailableError, User
from refold.web.auth.tokens import TokensFile
from refold.web.problems import Problem
from starlette.types import Scope

ORDERS = ("shop", "orders")


def request(token: str, path: str = "/v1/rows") -> Scope:
    return {"type": "http", "path": path, "headers": [(b"host", b"x"), (b"authorization", f"Bearer {token}".encode())]}


def access(verb: Verb = "get", kind: str = EVENTS, namespace: str = "shop", name: str = "orders") -> ResourceAccess:
    return ResourceAccess(verb, kind, namespace, name)


async def refusal(asked: Any) -> Problem:
    with pytest.raises(Problem) as refused:
        await asked
    return refused.value


# --- answers that are kept ---


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Source:
    """Answers with the number of the question; held back until `go` is set."""

    def __init__(self, seconds: float = 10.0, *, good: bool = True) -> None:
        self.asked = 0
        self.go = asyncio.Event()
        self.go.set()
        self.fails = False
        self._seconds, self._good = seconds, good

    async def __call__(self) -> Fresh[int]:
        self.asked += 1
        number = self.asked
        await self.go.wait()
        if self.fails:
            raise UnavailableError("away")
        return Fresh(number, self._seconds, self._good)


async def test_an_answer_is_kept_for_its_time_and_then_asked_for_again() -> None:
    clock, source = Clock(), Source(seconds=10)
    kept: Expiring[str, int] = Expiring(5, 100, clock=clock)
    assert [await kept.get("a", source) for _ in range(3)] == [1, 1, 1]
    clock.now += 9.9
    assert await kept.get("a", source) == 1
    clock.now += 0.2
    assert await kept.get("a", source) == 2


async def test_an_answer_is_as_old_as_its_question() -> None:
    clock, source = Clock(), Source(seconds=10)
    source.go.clear()
    kept: Expiring[str, int] = Expiring(5, 100, clock=clock)
    waiting = asyncio.ensure_future(kept.get("a", source))
    await asyncio.sleep(0)
    clock.now += 11  # a slow answer
    source.go.set()
    assert await waiting == 1
    assert await kept.get("a", source) == 2


async def test_an_answer_without_time_serves_those_who_wait_for_it_only() -> None:
    source = Source(seconds=0)
    kept: Expiring[str, int] = Expiring(5, 100)
    assert [await kept.get("a", source) for _ in range(2)] == [1, 2]
    assert len(kept) == 0


async def test_a_herd_asks_once_and_one_that_gives_up_takes_the_answer_from_nobody() -> None:
    source = Source()
    source.go.clear()
    kept: Expiring[str, int] = Expiring(5, 100)
    herd = [asyncio.ensure_future(kept.get("a", source)) for _ in range(100)]
    await asyncio.sleep(0)
    herd[0].cancel()
    await asyncio.sleep(0)
    source.go.set()
    outcomes = await asyncio.gather(*herd, return_exceptions=True)
    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert outcomes[1:] == [1] * 99
    assert source.asked == 1


async def test_a_failure_reaches_all_who_wait_and_is_not_kept() -> None:
    source = Source()
    source.go.clear()
    source.fails = True
    kept: Expiring[str, int] = Expiring(5, 100)
    herd = [asyncio.ensure_future(kept.get("a", source)) for _ in range(10)]
    await asyncio.sleep(0)
    source.go.set()
    outcomes = await asyncio.gather(*herd, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [UnavailableError] * 10
    source.fails = False
    assert await kept.get("a", source) == 2


async def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    source = Source()
    kept: Expiring[int, int] = Expiring(5, 100)
    for key in range(20):
        await kept.get(key, source)
    assert len(kept) == 5
    assert [await kept.get(key, source) for key in range(15, 20)] == [16, 17, 18, 19, 20]
    assert await kept.get(0, source) == 21


async def test_a_flood_of_bad_answers_pushes_no_good_one_out() -> None:
    good, bad = Source(), Source(good=False)
    kept: Expiring[str, int] = Expiring(5, 100)
    assert await kept.get("a", good) == 1
    for number in range(50):
        await kept.get(f"junk-{number}", bad)
    assert len(kept) == 6
    assert await kept.get("a", good) == 1


async def test_what_has_expired_is_dropped_when_something_new_comes() -> None:
    clock, source = Clock(), Source(seconds=10)
    kept: Expiring[int, int] = Expiring(100, 100, clock=clock)
    for key in range(50):
        await kept.get(key, source)
    clock.now += 11
    await kept.get(50, source)
    assert len(kept) == 1


async def test_no_more_are_asked_for_at_a_time_than_are_allowed() -> None:
    source = Source()
    source.go.clear()
    kept: Expiring[int, int] = Expiring(100, 3)
    waiting = [asyncio.ensure_future(kept.get(key, source)) for key in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(OverflowError):
        await kept.get(3, source)
    source.go.set()
    assert sorted(await asyncio.gather(*waiting)) == [1, 2, 3]


# --- what Kubernetes says, remembered ---


def jwt(**claims: Any) -> str:
    """Return what looks like a JSON Web Token; nobody here checks its signature."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in ({"alg": "none"}, claims)]
    return b".".join([*parts, b"c2ln"]).decode()


class Cluster(Reviews):
    """Answers by rule and counts; the real one is asked in tests/integration/test_auth_kubernetes.py."""

    def __init__(self) -> None:
        super().__init__("https://nowhere.invalid", Path("/nowhere"))
        self.tokens: list[tuple[str, str | None]] = []
        self.accesses: list[Access] = []
        self.away = False

    async def whose(self, token: str, audience: str | None) -> User | None:
        self.tokens.append((token, audience))
        if self.away:
            raise UnavailableError("away")
        return None if token.startswith("junk") else User("system:serviceaccount:shop:web", groups=("g",))

    async def may(self, user: User, access: Access) -> bool:
        self.accesses.append(access)
        if self.away:
            raise UnavailableError("away")
        return isinstance(access, PathAccess) or access.verb == "get"


async def test_the_api_is_asked_once_for_a_token_and_once_for_a_right() -> None:
    cluster = Cluster()
    decides = Kubernetes(cluster)
    for _ in range(5):
        caller = await decides.caller(request("t"))
        await caller.require(access())
    assert cluster.tokens == [("t", "refold")]
    assert cluster.accesses == [access()]
    # Another token of the same user: the right is known.
    await (await decides.caller(request("t2"))).require(access())
    assert (len(cluster.tokens), len(cluster.accesses)) == (2, 1)
    others = [access(name="other"), access(namespace="other"), access(kind=ROWS)]
    for other in others:
        await caller.require(other)
    for _ in range(3):
        assert (await refusal(caller.require(access("watch")))).status == 403
    assert cluster.accesses[1:] == [*others, access("watch")]


async def test_a_refusal_names_the_caller_and_the_role_to_give() -> None:
    caller = await Kubernetes(Cluster()).caller(request("t"))
    problem = await refusal(caller.require(access("create")))
    assert (problem.status, problem.slug) == (403, "forbidden")
    assert "system:serviceaccount:shop:web may not create eventstreams/events of 'orders'" in problem.detail
    rule = (
        '{"apiGroups":["refold.dev"],"resources":["eventstreams/events"],"verbs":["create"],"resourceNames":["orders"]}'
    )
    assert f"bind a Role of the namespace 'shop' with this rule to it: {rule}" in problem.detail


async def test_while_the_api_is_away_what_it_decided_holds_and_the_rest_is_503_with_retry_after() -> None:
    cluster = Cluster()
    decides = Kubernetes(cluster)
    caller = await decides.caller(request("t"))
    await caller.require(access())
    cluster.away = True
    await (await decides.caller(request("t"))).require(access())
    for asked in (decides.caller(request("new")), caller.require(access("create"))):
        problem = await refusal(asked)
        assert (problem.status, problem.slug) == (503, "authorisation-unavailable")
        assert problem.headers["retry-after"] == "1"


async def test_a_token_is_never_good_beyond_its_own_expiry() -> None:
    cluster = Cluster()
    decides = Kubernetes(cluster)
    token = jwt(aud=["refold"], exp=time.time() + 0.3)
    await decides.caller(request(token))
    await decides.caller(request(token))
    assert len(cluster.tokens) == 1
    await asyncio.sleep(0.35)
    problem = await refusal(decides.caller(request(token)))
    assert problem.status == 401
    assert "the bearer token has expired; get one by `kubectl create token" in problem.detail
    assert len(cluster.tokens) == 1, "nobody needs to be asked about it"


@pytest.mark.parametrize(
    ("token", "path", "why"),
    [
        ("junk", "/v1", "isn't one of this cluster"),
        ("junk." + jwt(aud="other").split(".")[1] + ".x", "/v1", "is for the audience other, not for refold"),
        ("junk." + jwt(aud=["refold"]).split(".")[1] + ".x", METRICS, "takes those for the Kubernetes API"),
        ("junk.!!.x", "/v1", "isn't one of this cluster"),
        ("junk.bm90IGpzb24.x", "/v1", "isn't one of this cluster"),
        ("junk.W10.x", "/v1", "isn't one of this cluster"),
        ("j" * 20_000, "/v1", "isn't one of this cluster"),
        ("jünk", "/v1", "isn't one of this cluster"),
    ],
)
async def test_a_token_that_is_not_valid_is_told_why(token: str, path: str, why: str) -> None:
    decides = Kubernetes(Cluster())
    problem = await refusal(decides.caller(request(token, path)))
    assert (problem.status, problem.headers["www-authenticate"].endswith('error="invalid_token"')) == (401, True)
    assert why in problem.detail
    assert token not in problem.detail


async def test_metrics_take_the_cluster_s_own_tokens_and_these_are_good_for_nothing_else() -> None:
    cluster = Cluster()
    decides = Kubernetes(cluster)
    for path in (METRICS, "/v1/rows"):
        await decides.caller(request("t", path))
    assert cluster.tokens == [("t", None), ("t", "refold")]
    await (await decides.caller(request("t", METRICS))).require(PathAccess(METRICS))
    assert cluster.accesses == [PathAccess(METRICS)]


async def test_no_token_is_kept() -> None:
    decides = Kubernetes(Cluster())
    await decides.caller(request("very-special-token"))
    keys = [*decides._callers._good, *decides._callers._others]
    assert keys == [hashlib.sha256(b"very-special-token").digest()]


async def test_a_hit_costs_a_few_microseconds() -> None:
    decides = Kubernetes(Cluster())
    scope = request(jwt(aud=["refold"], exp=time.time() + 3600, padding="x" * 800))
    wanted = access()
    await (await decides.caller(scope)).require(wanted)
    rounds = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(500):
            await (await decides.caller(scope)).require(wanted)
        rounds.append((time.perf_counter() - began) / 500)
    # Hashing the token is what it can't be without: several times that, and not a thousand times.
    began = time.perf_counter()
    for _ in range(500):
        hashlib.sha256(scope["headers"][1][1]).digest()
    assert min(rounds) < 50 * (time.perf_counter() - began) / 500


# --- a file of tokens ---

FILE = """
tokens:
  - name: shop-web
    sha256: {web}
    allow:
      - {{resources: [eventstreams/events], verbs: [create, get], namespaces: [shop], names: [orders]}}
      - {{resources: [projections/rows], verbs: [get], namespaces: [shop], names: ["*"]}}
  - name: prometheus
    sha256: {prometheus}
    metrics: true
"""


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.yaml"
    path.write_text(FILE.format(web=digest("web"), prometheus=digest("prometheus")))
    return path


@pytest.mark.parametrize(
    ("token", "asked", "allowed"),
    [
        ("web", access("create"), True),
        ("web", access("get"), True),
        ("web", access("watch"), False),
        ("web", access(name="payments"), False),
        ("web", access(namespace="bank"), False),
        ("web", access("create", ROWS), False),
        ("web", access("get", ROWS, name="any"), True),
        ("web", access("get", ROWS, namespace="bank"), False),
        ("web", PathAccess(METRICS), False),
        ("prometheus", PathAccess(METRICS), True),
        ("prometheus", access(), False),
    ],
)
async def test_a_file_of_tokens_says_who_may_do_what(file: Path, token: str, asked: Access, allowed: bool) -> None:
    caller = await TokensFile(file).caller(request(token))
    if allowed:
        await caller.require(asked)
        return
    problem = await refusal(caller.require(asked))
    assert problem.status == 403
    assert problem.members["caller"] in ("shop-web", "prometheus")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "LOOK_SECONDS", 0.0)


async def test_a_changed_file_takes_effect_and_a_wrong_one_changes_nothing_and_is_complained_of_once(
    file: Path, at_once: None
) -> None:
    def write(content: str) -> None:
        file.write_text(content)
        os.utime(file, ns=(0, len(content)))

    decides = TokensFile(file)
    await decides.caller(request("web"))
    assert (await refusal(decides.caller(request("new")))).status == 401
    newer = file.with_name("newer")
    newer.write_text(FILE.format(web=digest("new"), prometheus=digest("prometheus")))
    newer.rename(file)
    await decides.caller(request("new"))
    assert (await refusal(decides.caller(request("web")))).status == 401
    with structlog.testing.capture_logs() as logged:
        for content in ("tokens: []", "{"):
            write(content)
            await decides.caller(request("new"))
            await decides.caller(request("new"))
        os.unlink(file)  # noqa: PTH108
        await decides.caller(request("new"))
    assert [entry["log_level"] for entry in logged] == ["error"] * 3
    assert "wrong at tokens" in logged[0]["why"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "wrong at the whole"),
        ("[", "isn't YAML"),
        ("tokens: [{name: a, sha256: short}]", "wrong at tokens.0.sha256"),
        (f"tokens: [{{name: a, sha256: {'a' * 64}, token: plain}}]", "wrong at tokens.0.token"),
        (f"tokens: [{{name: a, sha256: {'a' * 64}, allow: [{{verbs: [get]}}]}}]", "wrong at tokens.0.allow.0"),
        (f"tokens: [{{name: a, sha256: {'a' * 64}}}, {{name: b, sha256: {'a' * 64}}}]", "has a token twice"),
    ],
)
def test_a_wrong_file_is_refused_at_the_start_with_the_place_and_no_value(
    tmp_path: Path, content: str, why: str
) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(content)
    with pytest.raises(SetupError, match="file of tokens") as refused:
        authority(f"tokens:{path}")
    assert why in str(refused.value)
    assert "plain" not in str(refused.value)


# --- no check at all ---


async def test_without_a_check_the_log_says_so_at_the_start_and_again_while_it_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(everyone, "REMIND_SECONDS", 0.0)
    with structlog.testing.capture_logs() as logged:
        async with authority("none") as decides:
            assert isinstance(decides, Everyone)
            caller = await decides.caller({"type": "http", "path": "/v1", "headers": []})
            await caller.require(access("create"))
    assert [(entry["log_level"], entry["event"][:16]) for entry in logged] == [("warning", "NO AUTHORISATION")] * 2


def test_times_are_short() -> None:
    assert kubernetes.NO_SECONDS <= kubernetes.YES_SECONDS <= 60
