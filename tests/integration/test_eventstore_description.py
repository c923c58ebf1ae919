"""The event store's OpenAPI description against the event store: schemathesis makes requests of it, good and bad ones.

`REFOLD_EXAMPLES` is how many for each operation and kind (default 25; `make attack`: 400).
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import msgspec
import psycopg
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from refold.events import Event
from refold.eventstore import catalog, server
from refold.eventstore.bulk import BulkAnswer
from refold.eventstore.settings import Settings
from refold.projection.definition import Column, Definition, FoldRule, StreamRef, VersionDefinition
from refold.query import state
from refold.web import sent_events
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from hack.servers import Postgres
from hack.servers.callers import tokens_file
from tests.served import Served, serve
from tests.stores import Installed, check_history, connected, install

TOKEN = "t0ken"
EXAMPLES = int(os.environ.get("REFOLD_EXAMPLES", "25"))
NDJSON = "application/x-ndjson"
OPERATIONS = [
    "append", "append_all", "bulk", "read_subject", "read_partition", "watch_subject", "watch_partition",
    "watch_stream", "state",
]  # fmt: skip


@schemathesis.serializer(NDJSON)
def lines(_: schemathesis.SerializationContext, value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


@pytest.fixture(scope="module")
async def installed(postgres: Postgres) -> Installed:
    with psycopg.connect(postgres.dsn(), autocommit=True) as conn:
        conn.execute("create database described")
    found = await install(postgres.dsn("described"))
    stream = await found.stream()
    ref = StreamRef(
        namespace="shop", name="orders", incarnation=stream.incarnation, partitions=stream.partitions,
        topic=stream.topic, schema=stream.schema,
    )  # fmt: skip
    counts = Definition(
        streams=["orders"], columns=[Column(name="n", type="integer")], fold=[FoldRule(type="T", add={"n": "1"})]
    )
    async with connected(found.admin) as conn:
        await catalog.set_definition(
            conn, namespace="shop", name="counts", uid="u", version="v1",
            definition=VersionDefinition(definition=counts, streams=[ref]).to_json(),
        )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def api(installed: Installed) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sent_events, "LIFETIME", 0.0)  # what is watched ends at once
        settings = Settings(store_dsn=installed.service, auth=tokens_file(TOKEN))
        with serve(server.make(settings, state.operations), TOKEN) as served:
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

    @given(case=operation.as_strategy(generation_mode=mode), real=st.booleans())
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],  # a failure is short enough; looking for a shorter one takes minutes
    )
    def ask(case: schemathesis.Case, real: bool) -> None:
        if real:  # of a stream that is there
            case.path_parameters |= {"namespace": "shop", "name": "orders"}
            if "projection" in (case.query or {}):
                case.query["projection"] = "counts"
        response = case.call(base_url=api.url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=20)
        checks = [not_a_server_error, status_code_conformance, content_type_conformance]
        kind = response.headers.get("content-type", [""])[0]
        if kind == NDJSON:
            line = msgspec.json.Decoder(BulkAnswer if name == "bulk" else Event, strict=True)
            for raw in response.content.splitlines():
                line.decode(raw)
        elif not kind.startswith(sent_events.MEDIA_TYPE):
            checks.append(response_schema_conformance)
        case.validate_response(response, checks=checks)

    ask()


async def test_every_operation_of_the_description_is_asked_and_left_a_right_history(
    api: Served, operations: dict[str, Any], installed: Installed
) -> None:
    assert sorted(operations) == sorted(OPERATIONS)
    body = b'{"events": [{"id": "last", "type": "T", "data": 1}]}'
    assert api.ask("/v1/streams/shop/orders/subjects/last/events", "POST", body=body).status == 201
    history = await installed.query(
        'select partition, position, subject, revision, id, recorded_at from "shop.orders".events '
        "order by partition, position"
    )
    assert history
    check_history(history)
