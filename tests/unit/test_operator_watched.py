"""Resources as watches have brought them."""

from typing import Any

from refold_operator.resources import FINALIZER
from refold_operator.watched import Watched
from refold_operator.workqueue import Key

KEY = Key("EventStream", "shop", "orders")


def orders(version: int, *, finalizer: bool = True, status: int = 0, **metadata: Any) -> dict[str, Any]:
    return {
        "apiVersion": "refold.dev/v1alpha1",
        "kind": "EventStream",
        "metadata": {
            "namespace": "shop", "name": "orders", "uid": "u-1", "generation": 1, "resourceVersion": str(version),
            "finalizers": [FINALIZER] if finalizer else [], **metadata,
        },
        "status": {"events": status},
    }  # fmt: skip


def events(watched: Watched) -> int:
    found = watched.get(KEY)
    assert found is not None
    number: int = found["status"]["events"]
    return number


def test_another_generation_annotation_or_label_is_news_and_a_status_or_the_same_again_isnt() -> None:
    watched = Watched()

    assert watched.bring(orders(1))
    assert not watched.bring(orders(1))
    assert not watched.bring(orders(2, status=5))
    assert watched.bring(orders(3, generation=2))
    assert watched.bring(orders(4, generation=2, annotations={"refold.dev/take-over": "u-0"}))
    assert watched.bring(orders(5, generation=2))
    assert watched.bring(orders(6, generation=2, labels={"look": "again"}))


def test_a_resource_is_news_once_it_has_its_finalizer() -> None:
    watched = Watched()

    assert not watched.bring(orders(1, finalizer=False))
    assert watched.bring(orders(2))


def test_another_resource_of_the_name_is_news() -> None:
    watched = Watched()
    watched.bring(orders(1))

    assert watched.bring(orders(9, uid="u-2"))


def test_what_was_written_isnt_replaced_by_an_earlier_state_that_comes_later() -> None:
    watched = Watched()
    watched.bring(orders(9, status=1))
    watched.take(orders(11, status=3))

    watched.bring(orders(10, status=2))

    assert events(watched) == 3
    watched.bring(orders(12, status=4))
    assert events(watched) == 4


def test_what_is_gone_is_forgotten_and_news_again() -> None:
    watched = Watched()
    watched.bring(orders(1))

    watched.drop(watched.uids())

    assert watched.get(KEY) is None
    assert watched.bring(orders(1))


def test_an_answer_about_what_is_gone_or_was_made_anew_does_not_bring_it_back() -> None:
    watched = Watched()
    watched.take(orders(5))
    assert watched.get(KEY) is None

    watched.bring(orders(3, uid="u-2", status=7))
    watched.take(orders(5, status=1))

    assert events(watched) == 7


def test_a_list_replaces_what_is_known_even_by_an_earlier_version_as_after_a_restore() -> None:
    watched = Watched()
    watched.bring(orders(90, status=9, generation=4))

    assert watched.bring(orders(40, status=4, generation=2), listed=True)
    assert events(watched) == 4


def stream(name: str, created: str, *, uid: str = "", topic: str | None = None) -> dict[str, Any]:
    body = orders(1, creationTimestamp=created)
    body["metadata"] |= {"name": name, "uid": uid or f"u-{name}"}
    return {**body, "spec": {"topic": {"name": topic}} if topic else {}}


def test_of_those_that_want_one_topic_the_oldest_comes_first() -> None:
    watched = Watched()
    bodies = [
        stream("young", "2026-11-27T10:00:02Z", topic="shop.orders"), stream("orders", "2026-11-27T10:00:01Z"),
        stream("other", "2026-11-27T10:00:00Z"), stream("twin", "2026-11-27T10:00:01Z", uid="u-p", topic="shop.orders"),
    ]  # fmt: skip
    for body in bodies:
        watched.bring(body)
        watched.bring(body, listed=True)
    keys = [Key("EventStream", "shop", body["metadata"]["name"]) for body in bodies]
    young, first, other, twin = keys

    def older(key: Key) -> list[str]:
        return [body["metadata"]["name"] for body in watched.older(key)]

    assert [older(key) for key in keys] == [["orders", "twin"], [], [], ["orders"]]
    assert watched.forget(other) == set()
    assert watched.forget(first) == {young, twin}
    assert older(young) == ["twin"]
    assert watched.forget(twin) == {young}
    assert older(young) == older(first) == []
    assert watched.forget(first) == set()
    assert watched.forget(young) == set()
