"""A read model in PostgreSQL, changed as projectors and the operator would, and the query service that serves it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import quote, urlencode

import psycopg
from psycopg import sql
from refold import names
from refold.projection.definition import VersionDefinition
from refold.projection.readstore import postgres as readstore
from refold.query.server import app
from refold.query.settings import Settings

from hack.servers import Postgres
from hack.servers.callers import tokens_file
from tests import served
from tests.served import Served

TOKEN = "a-secret"
SCHEMA = names.read_schema("shop", "order-status")
INCARNATION = "0123456789abcdef"


def definition(*, indexed: tuple[str, ...] = ("status", "items", "total", "paid", "at")) -> VersionDefinition:
    columns = {
        "status": "text",
        "items": "integer",
        "total": "numeric",
        "paid": "boolean",
        "at": "timestamp",
        "more": "json",
        "plain": "text",
    }
    return VersionDefinition.model_validate(
        {
            "definition": {
                "streams": ["orders"],
                "columns": [{"name": n, "type": t, "index": n in indexed} for n, t in columns.items()],
                "fold": [{"type": "OrderPlaced", "set": {"status": "'placed'"}}],
            },
            "streams": [
                {
                    "namespace": "shop",
                    "name": "orders",
                    "incarnation": INCARNATION,
                    "partitions": 2,
                    "topic": "shop.orders",
                    "schema": "shop.orders",
                }
            ],
        }
    )


class Model:
    """A read model in `database`, changed as a projector and the operator would."""

    def __init__(self, database: str) -> None:
        self.database = database

    def execute(self, statement: str, *parameters: object) -> None:
        with psycopg.connect(self.database, autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(s=sql.Identifier(SCHEMA)), parameters)

    def put(self, key: str, version: str = "v1", **columns: object) -> None:
        into = sql.SQL("insert into {} ({}) values ({})").format(
            sql.Identifier(SCHEMA, readstore.rows_table(version)),
            sql.SQL(", ").join(map(sql.Identifier, ["key", *columns])),
            sql.SQL(", ").join([sql.SQL("%s")] * (len(columns) + 1)),
        )
        with psycopg.connect(self.database, autocommit=True) as connection:
            connection.execute(into, [key, *columns.values()])

    def advance(self, partition: int, position: int, head: int, version: str = "v1") -> None:
        self.execute(
            "update {s}.positions set position = %s, head = %s, seen_at = now() where partition = %s and version = %s",
            position,
            head,
            partition,
            version,
        )

    def change(self, items: Mapping[str, int | None], *, partition: int, position: int, version: str = "v1") -> None:
        """Set `items` of rows (None: delete the row) and the position in one transaction, as a projector does."""
        table = sql.Identifier(SCHEMA, readstore.rows_table(version))
        with psycopg.connect(self.database) as connection:
            for key, value in sorted(items.items()):
                if value is None:
                    connection.execute(sql.SQL("delete from {} where key = %s").format(table), [key])
                else:
                    connection.execute(
                        sql.SQL(
                            "insert into {} (key, items) values (%s, %s) on conflict (key) do update set items = %s"
                        ).format(table),
                        [key, value, value],
                    )
            connection.execute(
                sql.SQL("update {} set position = %s where partition = %s and version = %s").format(
                    sql.Identifier(SCHEMA, "positions")
                ),
                [position, partition, version],
            )

    async def version(self, name: str = "v1", wanted: VersionDefinition | None = None) -> None:
        async with await psycopg.AsyncConnection.connect(self.database, autocommit=True) as connection:
            await readstore.ensure_version(
                connection,
                namespace="shop",
                name="order-status",
                version=name,
                definition=wanted or definition(),
            )


async def make(database: str) -> Model:
    """Return the read model of shop/order-status in `database`, claimed, with its logins, and yet without a version."""
    model = Model(database)
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        await readstore.install(connection)
        await readstore.claim_projection(connection, namespace="shop", name="order-status", uid="u1")
        await readstore.ensure_logins(
            connection, namespace="shop", name="order-status", projector_password="p" * 32, query_password="q" * 32
        )
    return model


@contextmanager
def serve(model: Model, postgres: Postgres, *, store_dsn: str | None = None) -> Iterator[Served]:
    """Serve the read model, logged in with the rights that the operator gives; histories are in `store_dsn`."""
    database = psycopg.conninfo.conninfo_to_dict(model.database)["dbname"]
    assert isinstance(database, str)
    _, login = readstore.logins(database, SCHEMA)
    dsn = postgres.dsn(database, user=quote(login, safe=""), password="q" * 32)
    settings = Settings.model_validate(
        {"projection": "shop/order-status", "readstore_dsn": dsn, "store_dsn": store_dsn, "auth": tokens_file(TOKEN)}
    )
    with served.serve(app(settings), TOKEN) as service:
        yield service


def where(service: Served, *filters: str, **more: object) -> list[str]:
    """Return the keys that a page with these filters and parameters holds."""
    answer = service.ask("/v1/rows?" + urlencode([("where", f) for f in filters] + list(more.items())))
    assert answer.status == 200, answer.body
    return [row["key"] for row in answer.json()["rows"]]
