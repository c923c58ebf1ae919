"""A read model with parked events, and the query service by which they are listed, folded again and discarded."""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from refold.projection.definition import Column, Definition, FoldRule, VersionDefinition
from refold.projection.readstore import postgres
from refold.query.server import app
from refold.query.settings import Settings

from hack.servers.callers import tokens_file
from tests import served
from tests.projecting import NAMESPACE, ReadModel, World
from tests.served import Answer, Served

TOKEN = "a-secret"
#: What PostgreSQL can't hold in an index, which isn't part of a version: without the index it is good.
NOTES = Definition(
    streams=["orders"],
    columns=[
        Column(name="note", type="text", index=True),
        Column(name="events", type="integer"),
        Column(name="log", type="json"),
    ],
    fold=[
        FoldRule(type="Noted", set={"note": "data.note"}),
        *(
            FoldRule(type=type_, add={"events": "1"}, append={"log": "event.revision"})
            for type_ in ("Noted", "Counted")
        ),
    ],
)


@contextmanager
def serve(model: ReadModel) -> Iterator[Served]:
    """Serve the read model with the rights that the operator gives."""
    database = conninfo_to_dict(model.world.dsn)["dbname"]
    assert isinstance(database, str)
    _, login = postgres.logins(database, model.schema)
    settings = Settings.model_validate(
        {
            "projection": f"{NAMESPACE}/{model.name}",
            "readstore_dsn": make_conninfo(model.world.dsn, user=login, password="q" * 32),
            "auth": tokens_file(TOKEN),
        }
    )
    with served.serve(app(settings), TOKEN) as service:
        yield service


async def make(world: World, definition: Definition, name: str) -> ReadModel:
    model = await world.projection(definition, name)
    async with await AsyncConnection.connect(world.dsn, autocommit=True) as conn:
        await postgres.ensure_logins(
            conn, namespace=NAMESPACE, name=name, projector_password="p" * 32, query_password="q" * 32
        )
    return model


def as_operator_makes_it(model: ReadModel) -> dict[str, Any]:
    """Return the projector's settings with the login that the operator makes."""
    database = conninfo_to_dict(model.world.dsn)["dbname"]
    login, _ = postgres.logins(str(database), model.schema)
    return {"readstore_dsn": make_conninfo(model.world.dsn, user=login, password="p" * 32)}


async def drop_index(model: ReadModel) -> None:
    columns = [column.model_copy(update={"index": False}) for column in model.definition.columns]
    definition = VersionDefinition(
        definition=model.definition.model_copy(update={"columns": columns}),
        streams=[model.world.streams[name] for name in model.definition.streams],
    )
    async with await AsyncConnection.connect(model.world.dsn, autocommit=True) as conn:
        await postgres.ensure_version(
            conn, namespace=NAMESPACE, name=model.name, version=model.version, definition=definition
        )


def notes(world: World) -> dict[str, dict[str, Any]]:
    """The reference of NOTES."""
    rows: dict[str, dict[str, Any]] = {}
    for log in world.events["orders"]:
        for event in log:
            row = rows.setdefault(event.subject, {"note": None, "events": 0, "log": []})
            row["note"] = json.loads(bytes(event.data)).get("note", row["note"])
            row["events"] += 1
            row["log"].append(event.revision)
    return rows


def noted(subject: str, *, bad: bool = False) -> tuple[str, str, dict[str, Any]]:
    """Return an event; a bad one can't be indexed."""
    return (subject, "Noted", {"note": secrets.token_hex(4000)}) if bad else (subject, "Counted", {})


def listed(service: Served, query: str = "") -> list[dict[str, Any]]:
    answer = service.ask(f"/v1/parked{query}")
    assert answer.status == 200, answer.body
    return answer.json()["parked"]  # type: ignore[no-any-return]


def ask(service: Served, verb: str, id_: object, query: str = "") -> Answer:
    return service.ask(f"/v1/parked/{id_}:{verb}{query}", "POST", headers={"content-length": "0"})


def kind(answer: Answer) -> tuple[int, str]:
    """Return status and the end of the problem's type."""
    return answer.status, answer.json()["type"].rsplit("/", 1)[1]


async def filled(world: World, *, subjects: int) -> ReadModel:
    """Return a read model in which a row of each subject is parked, and what it failed by is gone."""
    model = await make(world, NOTES, "notes")
    keys = [f"s{number}" for number in range(subjects)]
    world.append([noted(key) for key in keys])
    with model.projector():
        model.wait()
        world.append([noted(key, bad=number % 3 > 0) for number, key in enumerate(keys)])
        world.append([noted(key) for key in keys])
        model.wait()
    assert model.rows() != notes(world)
    assert len(model.parked()) == 2 * len([n for n in range(subjects) if n % 3 > 0])
    await drop_index(model)
    return model
