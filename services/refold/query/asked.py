"""What a request for a page, or for changes, asks for. Pure."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

from starlette.requests import Request

from refold.projection.past import MOST_STEPS, At, parse_at
from refold.projection.readstore import Order, Page
from refold.query import filters, ordering, problems
from refold.query.live import LiveVersion
from refold.web import paths

DEFAULT_LIMIT = 100
MOST_ROWS = 1000
MOST_FILTERS = 20
#: Keys that one request may name.
MOST_KEYS = 100
_SEVERAL = ("key", "where")
_ONCE = ("order", "limit", "cursor")


class AskedPage(NamedTuple):
    """Which rows, by which order, how many, and beyond which cursor."""

    keys: list[str]
    where: list[str]
    order: Order
    limit: int
    cursor: str | None

    @classmethod
    def of(cls, request: Request) -> Self:
        """Return what the query string asks for.

        Raises:
            Problem: 400 where a parameter is wrong, unknown or given too often.
        """
        several: dict[str, list[str]] = {name: [] for name in _SEVERAL}
        once: dict[str, str] = {}
        for name, value in paths.query(request):
            if name in several:
                several[name].append(value)
            elif name not in _ONCE:
                known = ", ".join((*_SEVERAL, *_ONCE))
                raise problems.invalid_query(f"there is no parameter {name[:100]!r}; known: {known}", name[:100])
            elif name in once:
                raise problems.invalid_query(f"the parameter {name!r} is given twice", name)
            else:
                once[name] = value
        if len(several["where"]) > MOST_FILTERS:
            raise problems.invalid_query(f"over {MOST_FILTERS} filters", "where")
        return cls(
            keys(several["key"]),
            several["where"],
            ordering.parse(once["order"]) if once.get("order") else ordering.BY_KEY,
            _limit(once.get("limit") or str(DEFAULT_LIMIT)),
            once.get("cursor") or None,
        )

    def page(self, live: LiveVersion) -> Page:
        """Return the page, with one row more where there is a next one.

        Raises:
            Problem: 422 where a filter or the order can't be served; 400 where the cursor isn't one for it.
        """
        conditions = [one for text in self.where for one in filters.conditions(text, live.comparable)]
        if self.keys:
            conditions.append(filters.any_key(self.keys))
        filters.indexed(self.order.column, live.comparable, "order")
        after = None if self.cursor is None else ordering.after(self.cursor, self.order, live.comparable)
        return Page(conditions, self.order, after, self.limit + 1)


def watched_keys(request: Request) -> list[str]:
    """Return the keys that a request for changes names.

    Raises:
        Problem: 400 where there is another parameter, or see `keys`.
    """
    given: list[str] = []
    for name, value in paths.query(request):
        if name != "key":
            raise problems.invalid_query(f"there is no parameter {name[:100]!r}; known: key", name[:100])
        given.append(value)
    return keys(given)


class AskedParked(NamedTuple):
    """Which parked events: of which version and key (None: the live one, and all), beyond which id, how many."""

    version: str | None
    key: str | None
    after: int
    limit: int

    @classmethod
    def of(cls, request: Request) -> Self:
        """Return what the query string asks for.

        Raises:
            Problem: 400 where a parameter is wrong, unknown or given too often.
        """
        given = _once(request, ("version", "key", "after", "limit"))
        key = given.get("key")
        if key is not None:
            keys([key])
        after = given.get("after") or "0"
        if not _is_id(after):
            raise problems.invalid_query(f"after is the id of a parked event, not {after[:100]!r}", "after")
        return cls(given.get("version") or None, key, int(after), _limit(given.get("limit") or str(DEFAULT_LIMIT)))


class AskedMoment(NamedTuple):
    """Which moment of a row (None: as it is now), and of how many of the last events what each did."""

    at: At | None
    steps: int

    @classmethod
    def of(cls, request: Request, *, steps: bool = False) -> Self:
        """Return what the query string asks for; of steps only where they may be asked for.

        Raises:
            Problem: 400 where a parameter is wrong, unknown or given too often.
        """
        if not request.scope["query_string"]:
            return cls(None, DEFAULT_LIMIT)
        given = _once(request, ("at", "steps") if steps else ("at",))
        return cls(_at(given), _number(given.get("steps") or str(DEFAULT_LIMIT), "steps", MOST_STEPS))


class AskedState(NamedTuple):
    """By which Projection a subject is folded, until when, and of how many of the last events what each did."""

    projection: str
    at: At | None
    steps: int

    @classmethod
    def of(cls, request: Request) -> Self:
        """Return what the query string asks for.

        Raises:
            Problem: 400 where a parameter is missing, wrong, unknown or given too often.
        """
        given = _once(request, ("projection", "at", "steps"))
        if "projection" not in given:
            raise problems.invalid_query("projection= says by which Projection it is folded", "projection")
        steps = _number(given["steps"], "steps", MOST_STEPS) if "steps" in given else 0
        return cls(given["projection"], _at(given), steps)


def parked_id(request: Request) -> int:
    """Return the id of the parked event in the path.

    Raises:
        Problem: 404 where it can't be one.
    """
    text = paths.parameter(request, "id")
    if not _is_id(text):
        raise problems.no_such_id(text)
    return int(text)


def version(request: Request) -> str | None:
    """Return the version that a request names; None where it doesn't.

    Raises:
        Problem: 400 where there is another parameter, or several.
    """
    return _once(request, ("version",)).get("version") or None


def keys(given: list[str]) -> list[str]:
    """Return the keys of `key=`.

    Raises:
        Problem: 400 where they are too many, or one can't be a key.
    """
    if len(given) > MOST_KEYS:
        raise problems.invalid_query(f"over {MOST_KEYS} keys; ask in parts", "key")
    if any("\0" in key for key in given):
        raise problems.invalid_key()
    return given


def _at(given: Mapping[str, str]) -> At | None:
    if "at" not in given:
        return None
    try:
        return parse_at(given["at"])
    except ValueError as error:
        raise problems.invalid_query(f"at {error}", "at") from error


def _once(request: Request, known: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in paths.query(request):
        if name not in known:
            raise problems.invalid_query(f"there is no parameter {name[:100]!r}; known: {', '.join(known)}", name[:100])
        if name in found:
            raise problems.invalid_query(f"the parameter {name!r} is given twice", name)
        if "\0" in value:
            raise problems.invalid_query(f"the parameter {name!r} holds a NUL character", name)
        found[name] = value
    return found


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 18


def _limit(text: str) -> int:
    return _number(text, "limit", MOST_ROWS)


def _number(text: str, name: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= most):
        raise problems.invalid_query(f"{name} is a number of 1 to {most}, not {text[:100]!r}", name)
    return int(text)
