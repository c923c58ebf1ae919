"""The read store, as the operator manages it: claims, versions, logins, the live pointer."""

import dataclasses
from collections.abc import Collection

import psycopg
from psycopg import sql
from refold import names
from refold.projection.definition import VersionDefinition
from refold.projection.readstore import Applied, NotFoundError, ProjectionStatus, postgres, postgres_sql

from refold_operator import credentials, dsn
from refold_operator.database import Database


@dataclasses.dataclass(frozen=True)
class Logins:
    """The DSNs of a projection's own logins in the read store."""

    projector: str
    query: str


class ReadStore:
    """The read store of one database."""

    def __init__(self, database: Database) -> None:
        """Manage the read models in `database`; nothing is asked of it yet."""
        self.database = database

    async def install(self) -> None:
        """Make what the database needs before the first projection."""
        async with self.database.connection() as connection:
            await postgres.install(connection)

    async def claim(self, *, namespace: str, name: str, uid: str) -> None:
        """Claim the read model of a Projection, taking back what was retained."""
        async with self.database.connection() as connection:
            await postgres.claim_projection(connection, namespace=namespace, name=name, uid=uid)

    async def logins(self, key: bytes, *, namespace: str, name: str) -> Logins:
        """Make the logins of projectors and query services, and return their DSNs.

        Args:
            key: the installation's key of passwords.
            namespace: the Projection's namespace.
            name: the Projection's name.
        """
        schema = names.read_schema(namespace, name)
        projector, query = postgres.logins(self.database.name, schema)
        projector_password, query_password = (credentials.password(key, login) for login in (projector, query))
        async with self.database.connection() as connection:
            await postgres.ensure_logins(
                connection, namespace=namespace, name=name,
                projector_password=projector_password, query_password=query_password,
            )  # fmt: skip
        return Logins(
            projector=dsn.login(self.database.dsn, projector, projector_password),
            query=dsn.login(self.database.dsn, query, query_password),
        )

    async def sql_login(self, key: bytes, *, namespace: str, name: str) -> str:
        """Make the login that may read the live version's rows in SQL, and nothing else; return its DSN."""
        login = postgres_sql.login(self.database.name, names.read_schema(namespace, name))
        password = credentials.password(key, login)
        async with self.database.connection() as connection:
            await postgres.ensure_sql_login(connection, namespace=namespace, name=name, password=password)
        return dsn.login(self.database.dsn, login, password)

    async def drop_sql_login(self, *, namespace: str, name: str) -> None:
        """Drop that login; one that is gone is no error."""
        async with self.database.connection() as connection:
            await postgres.drop_sql_login(connection, namespace=namespace, name=name)

    async def ensure_version(self, *, namespace: str, name: str, version: str, definition: VersionDefinition) -> bool:
        """Make a version's table where it is missing; return whether it was."""
        async with self.database.connection() as connection:
            return await postgres.ensure_version(
                connection, namespace=namespace, name=name, version=version, definition=definition
            )

    async def try_swap(self, *, namespace: str, name: str, version: str) -> bool:
        """Make `version` the live one if it has caught up; return whether it is live."""
        async with self.database.connection() as connection:
            return await postgres.try_swap(connection, namespace=namespace, name=name, version=version)

    async def drop_version(self, *, namespace: str, name: str, version: str) -> None:
        """Drop a version that isn't live."""
        async with self.database.connection() as connection:
            await postgres.drop_version(connection, namespace=namespace, name=name, version=version)

    async def status(self, *, namespace: str, name: str) -> ProjectionStatus:
        """Return how far the versions are; without any where the projection isn't claimed."""
        async with self.database.connection() as connection:
            try:
                return await postgres.status(connection, namespace=namespace, name=name)
            except NotFoundError:
                return ProjectionStatus(live=None, versions={})

    async def applied(
        self, projections: Collection[tuple[str, str]]
    ) -> dict[tuple[str, str], dict[str, list[Applied]]]:
        """Return how far the versions of many Projections are; see `refold.projection.readstore.postgres.applied`."""
        async with self.database.connection() as connection:
            return await postgres.applied(connection, projections)

    async def definitions(self, *, namespace: str, name: str) -> dict[str, VersionDefinition]:
        """Return what each version folds; empty where the projection isn't claimed."""
        schema = sql.Identifier(names.read_schema(namespace, name))
        async with self.database.connection() as connection:
            try:
                cursor = await connection.execute(
                    sql.SQL("select version, definition::text from {}.versions").format(schema)
                )
            except (psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedTable):
                return {}
            return {version: VersionDefinition.from_json(text) for version, text in await cursor.fetchall()}

    async def release(self, *, namespace: str, name: str, uid: str) -> None:
        """Let go of the read model; nothing is dropped."""
        async with self.database.connection() as connection:
            await postgres.release_projection(connection, namespace=namespace, name=name, uid=uid)

    async def drop(self, *, namespace: str, name: str, uid: str) -> None:
        """Drop the read model and its logins, where it is the resource's own."""
        async with self.database.connection() as connection:
            await postgres.drop_projection(connection, namespace=namespace, name=name, uid=uid)
