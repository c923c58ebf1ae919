"""The query service's OpenAPI description against the service: schemathesis makes requests of it, good and bad ones.

`REFOLD_EXAMPLES` is how many for each operation and kind (default 25; `make attack`: 400).
"""

import os
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from refold.eventstore import EventStore, NewEvent, catalog
from refold.web import sent_events
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from hack.servers import Postgres
from tests import querying
from tests.querying import TOKEN
from tests.served import Served

EXAMPLES = int(os.environ.get("REFOLD_EXAMPLES", "25"))
OPERATIONS = ["row", "history", "rows", "changes", "status", "parked", "retry", "discard"]
#: What a schema can't say of a query string: texts that are filters and orders, right ones and nearly right ones.
FILTERS = [
    f"{column}:{operator}:{value}"
    for column in ("key", "status", "items", "total", "paid", "at", "more", "plain", "colour")
    for operator in ("eq", "ne", "lt", "in", "prefix", "like")
    for value in ("", "1", "-1e3", "1,2", "true", "a\\", "\U0010ffff", "2026-01-31T23:59:59Z", "k1\0")
]
ORDERS = ["key", "key:desc", "status", "items:desc", "total:asc", "paid", "at:desc", "more", "plain", "items:up"]
#: Moments of a history, and nearly such.
MOMENTS = ["1", "2", "0", "-1", "9" * 18, "2026-01-31T23:59:59Z", "2999-01-01T00:00:00+14:00", "2026-01-31", "k1\0"]


@pytest.fixture(scope="module")
async def api(postgres: Postgres) -> Iterator[Served]:
    with psycopg.connect(postgres.dsn(), autocommit=True) as conn:
        conn.execute("create database described_rows")
    dsn = postgres.dsn("described_rows")
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        await catalog.install_store(conn)
        stream = await catalog.claim_stream(
            conn, namespace="shop", name="orders", uid="u1", partitions=2, topic="shop.orders", kafka_cluster="k"
        )
        await catalog.activate(conn, stream)
    async with await EventStore.open(dsn) as store:
        for number in range(20):
            await store.append("shop", "orders", f"k{number}", [NewEvent.of("OrderPlaced", {})])
    model = await querying.make(dsn)
    wanted = querying.definition()
    [ref] = wanted.streams
    ref = ref.model_copy(update={"incarnation": stream.incarnation, "event_schema": stream.schema})
    await model.version(wanted=wanted.model_copy(update={"streams": [ref]}))
    for number in range(20):
        model.put(f"k{number}", status="placed", items=number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sent_events, "LIFETIME", 0.0)  # what is followed ends at once
        with querying.serve(model, postgres, store_dsn=dsn) as served:
            yield served


@pytest.fixture(scope="module")
def operations(api: Served) -> dict[str, schemathesis.APIOperation[Any, Any, Any, Any]]:
    schema = schemathesis.openapi.from_dict(api.ask("/openapi.json").json())
    found = [result.ok() for result in schema.get_all_operations()]
    return {one.definition.raw["operationId"]: one for one in found}


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_answers_as_it_is_described(
    api: Served, operations: dict[str, Any], name: str, mode: GenerationMode
) -> None:
    operation = operations[name]
    cursors = [
        api.ask(f"/v1/rows?limit=1&order={order}").json().get("next") for order in ("key", "status", "items:desc")
    ]
    query = st.fixed_dictionaries(
        {},
        optional={
            "where": st.lists(st.sampled_from(FILTERS), max_size=3),
            "order": st.sampled_from(ORDERS),
            "cursor": st.sampled_from(cursors),
        },
    )

    moment = st.none() | st.tuples(st.sampled_from(["k1", "k2", "none"]), st.sampled_from(MOMENTS))

    @given(case=operation.as_strategy(generation_mode=mode), known=query, moment=moment)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],  # a failure is short enough; looking for a shorter one takes minutes
    )
    def ask(case: schemathesis.Case, known: dict[str, Any], moment: tuple[str, str] | None) -> None:
        case.headers.pop("Refold-Token", None)  # of what is never applied: it would be waited for
        if name == "rows":
            case.query |= known
        if name in ("row", "history") and moment is not None:
            key, at = moment
            case.path_parameters["key"] = key
            case.query["at"] = at
        response = case.call(base_url=api.url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=20)
        checks = [not_a_server_error, status_code_conformance]
        if response.status_code == 304:
            assert case.headers["If-None-Match"] == "*"
            assert not response.content
            assert {"etag", "refold-position"} <= set(response.headers)
            case.validate_response(response, checks=checks)
            return
        checks.append(content_type_conformance)
        if not response.headers["content-type"][0].startswith(sent_events.MEDIA_TYPE):
            checks.append(response_schema_conformance)
        case.validate_response(response, checks=checks)

    ask()


def test_every_operation_of_the_description_is_asked(operations: dict[str, Any]) -> None:
    assert sorted(operations) == sorted(OPERATIONS)
