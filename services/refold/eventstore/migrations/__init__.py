"""The store's numbered SQL files.

`store/` makes the catalog, once a database; `stream/` makes one stream's schema, once a stream. A file that was
released is never changed: a later number changes what it made, online and on a filled store. Files are plain SQL with
psql's notation for variables: `:"name"` a quoted identifier, `:'name'` a literal, `:name` a number.

A release that is rolled back to finds a store that the later one has migrated. It goes by `refold.migrations`, where a
number that it doesn't know keeps it from working; so only what earlier releases can't work with is noted there, and
what merely adds to the store, in `refold.additions`.
"""

import dataclasses
import functools
import importlib.resources
import re
from collections.abc import Mapping

from psycopg import sql

# A number's variable must follow a blank or a parenthesis, so that an array's slice [a:b] isn't taken for one.
_VARIABLE = re.compile(r"(?<!:):\"(\w+)\"|(?<!:):'(\w+)'|(?<=[\s(]):([a-z_]+)\b")


#: The number of the last migration of a store that earlier releases can't work with: all later ones only add to it.
BREAKING = 1


@dataclasses.dataclass(frozen=True)
class Migration:
    """One numbered SQL file."""

    number: int
    name: str
    text: str

    @property
    def note(self) -> str:
        """The table where it is noted that a store has it."""
        return "additions" if self.number > BREAKING else "migrations"

    def render(self, values: Mapping[str, str | int]) -> str:
        """Return the SQL with its variables filled in.

        Raises:
            KeyError: a variable of the file isn't among `values`.
        """

        def fill(match: re.Match[str]) -> str:
            identifier, literal, number = match.groups()
            if identifier:
                return sql.Identifier(str(values[identifier])).as_string()
            if literal:
                return sql.Literal(str(values[literal])).as_string()
            return str(int(values[number]))

        return _VARIABLE.sub(fill, self.text)


@functools.cache
def load(kind: str) -> tuple[Migration, ...]:
    """Return the migrations of `kind` (`store` or `stream`) in order of their numbers."""
    found = []
    for file in importlib.resources.files(__package__).joinpath(kind).iterdir():
        number, _, name = file.name.removesuffix(".sql").partition("_")
        found.append(Migration(int(number), name, file.read_text(encoding="utf-8")))
    return tuple(sorted(found, key=lambda migration: migration.number))
