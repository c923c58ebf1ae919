"""What the query service answers when it can't answer: each of its problems, in one place."""

from collections.abc import Collection, Sequence
from typing import Any

from refold.projection.past import Bad
from refold.web.problems import Problem


def row_not_found(key: str) -> Problem:
    """No row has the key, in the state that the headers tell."""
    return Problem(
        404,
        "row-not-found",
        "No such row",
        f"there is no row with the key {key!r}; the Refold-Lag headers tell what isn't applied yet",
        key=key,
    )


def no_events(key: str) -> Problem:
    """Nothing had happened that the row could be of."""
    return Problem(
        404,
        "row-not-found",
        "No such row",
        f"there was no row with the key {key!r}: its subject had no events by then",
        key=key,
    )


def no_row_then(key: str, revision: int, bad: Bad | None) -> Problem:
    """There were events, but no row."""
    why = "its events had made none, or had deleted it"
    if bad is not None:
        why = f"event {bad.revision} is parked, with all behind it: {bad.error}"
    return Problem(
        404,
        "row-not-found",
        "No such row",
        f"there was no row with the key {key!r} after event {revision} of its subject: {why}",
        key=key,
    )


def no_history(reason: str) -> Problem:
    """The Projection's rows can't be folded at a moment."""
    return Problem(400, "no-row-history", "No history of a row", f"rows have no state at a moment: {reason}")


def without_event_store() -> Problem:
    """The service wasn't told where histories are."""
    return Problem(
        501,
        "no-event-store",
        "No event store",
        "this query service was started without REFOLD_STORE_DSN, so it can't read the history of a row; in a cluster "
        "the operator gives it at its next look, once it is of this release",
    )


def other_history(stream: str) -> Problem:
    """The stream was deleted, or made anew, since the version was."""
    return Problem(
        410,
        "other-history",
        "Another history",
        f"the stream {stream} was deleted, or made again, since the live version was made of it: that history is gone",
    )


def projection_not_found(projection: str) -> Problem:
    """The event store wasn't told what such a Projection folds."""
    return Problem(
        404,
        "projection-not-found",
        "No such Projection",
        f"the event store knows no live version of a Projection {projection}; has it one (kubectl describe "
        "projection)? The operator tells the event store a moment after it goes live",
        field="projection",
    )


def stream_not_folded(projection: str, stream: str, streams: Sequence[str]) -> Problem:
    """The Projection folds other streams."""
    return Problem(
        400,
        "stream-not-folded",
        "Stream not folded",
        f"the Projection {projection} doesn't fold the stream {stream}, but {', '.join(streams)}",
        field="projection",
    )


def history_unavailable() -> Problem:
    """The event store doesn't answer."""
    return Problem(
        503,
        "history-unavailable",
        "History unavailable",
        "the event store's database didn't answer or refused; this passes by itself once it is back",
        retry_after=1,
    )


def history_too_long(seconds: float) -> Problem:
    """A subject has too many events."""
    return Problem(
        503,
        "history-too-long",
        "History too long",
        f"the row's history wasn't folded within {seconds:.0f} s: ask for an earlier moment, or build the read model "
        "as it was with spec.asOf",
        retry_after=10,
    )


def invalid_key() -> Problem:
    """No row can have such a key."""
    return Problem(400, "invalid-key", "Invalid key", "a key holds no NUL character", field="key")


def invalid_query(detail: str, field: str) -> Problem:
    """A parameter of the query string, or a header, has the wrong form."""
    return Problem(400, "invalid-query", "Invalid query", detail, field=field)


def unknown_column(column: str, columns: Collection[str], field: str) -> Problem:
    """A filter or an order names a column that the projection doesn't declare."""
    return Problem(
        422,
        "unknown-column",
        "Unknown column",
        f"the projection has no column {column!r}; it has {', '.join(sorted(columns))}",
        field=field,
        column=column,
    )


def column_not_indexed(column: str, indexed: Sequence[str], field: str) -> Problem:
    """A filter on the column, or an order by it, would read the whole table."""
    return Problem(
        422,
        "column-not-indexed",
        "Column not indexed",
        f"the column {column!r} has no index, so every row would be read for it; give it 'index: true' in the "
        f"Projection's columns (this rebuilds nothing). With an index: {', '.join(indexed)}",
        field=field,
        column=column,
    )


def not_comparable(column: str, type_: str, field: str) -> Problem:
    """A filter or an order names a column whose values aren't compared."""
    return Problem(
        422,
        "not-comparable",
        "Not comparable",
        f"the column {column!r} is {type_}, by which rows are neither filtered nor ordered: set a column of another "
        "type to the part of it that you look for, with 'index: true'",
        field=field,
        column=column,
    )


def unknown_operator(operator: str, operators: Collection[str]) -> Problem:
    """A filter's operator isn't known."""
    return Problem(
        422,
        "unknown-operator",
        "Unknown operator",
        f"a filter can't compare by {operator!r}; known: {', '.join(sorted(operators))}",
        field="where",
    )


def operator_not_for_type(column: str, type_: str, operator: str, operators: Sequence[str], way_out: str) -> Problem:
    """A filter's operator isn't one for the type of its column."""
    return Problem(
        422,
        "operator-not-for-type",
        "Operator not for this type",
        f"the column {column!r} is {type_}, which has no operator {operator!r} (but {', '.join(operators)}): {way_out}",
        field="where",
        column=column,
    )


def invalid_value(column: str, value: str, expected: str) -> Problem:
    """A filter's value isn't of its column's type."""
    return Problem(
        422,
        "invalid-value",
        "Invalid value",
        f"the column {column!r} is compared with {expected}, and {value[:100]!r} isn't one",
        field="where",
        column=column,
    )


def invalid_token(detail: str) -> Problem:
    """The Refold-Token isn't one, or names what this projection never applies."""
    return Problem(400, "invalid-token", "Invalid token", detail, field="Refold-Token")


def not_applied(waited: float, missing: Sequence[dict[str, Any]]) -> Problem:
    """The token's positions weren't applied in time."""
    return Problem(
        504,
        "not-applied",
        "Not applied yet",
        f"after {waited:.1f} s the read model still lacks events that the token names; try again, or send no "
        "Refold-Token to read what is there",
        retry_after=1,
        missing=list(missing),
    )


def not_parked(id_: int) -> Problem:
    """No event with this id is parked, not any more perhaps."""
    return Problem(
        404,
        "not-parked",
        "Not parked",
        f"no event with the id {id_} is parked: it took effect, was discarded, or its version is gone",
    )


def no_such_id(text: str) -> Problem:
    """No parked event can have such an id."""
    return Problem(404, "not-parked", "Not parked", f"the id of a parked event is a number, not {text[:100]!r}")


def version_not_found(version: str, projection: str) -> Problem:
    """The read store holds no such version."""
    return Problem(
        404,
        "version-not-found",
        "No such version",
        f"the Projection {projection} has no version {version[:100]!r} in the read store (any more)",
        field="version",
    )


def of_another_version(id_: int, version: str, wanted: str) -> Problem:
    """The parked event isn't of the version that was asked for, the live one where none was."""
    return Problem(
        409,
        "version-swapped",
        "Of another version",
        f"the parked event {id_} is of version {version}, not of {wanted}; look at GET /v1/parked again, or name the "
        f"version: ?version={version}",
        version=version,
    )


def swapped(id_: int, version: str) -> Problem:
    """While it was asked for, another version went live, or this one was dropped."""
    return Problem(
        409,
        "version-swapped",
        "Another version is live",
        f"another version than {version} went live before anything was done about the parked event {id_}; look at "
        "GET /v1/parked again",
        version=version,
    )


def parked_event_busy(id_: int) -> Problem:
    """Somebody else asks for the same parked event."""
    return Problem(
        409,
        "parked-event-busy",
        "Somebody else asks",
        f"somebody else asks for the parked event {id_} at the same time; look at GET /v1/parked in a few seconds",
        retry_after=2,
    )


def still_bad(id_: int, first: int, position: int, error: str) -> Problem:
    """A parked event was folded again, up to one that fails as before."""
    detail = error if first == id_ else f"the event {first} of its row comes before it and still fails: {error}"
    return Problem(
        409,
        "still-bad",
        "Still bad",
        f"{detail}. It stays parked, with all behind it; correct the definition (which rebuilds the Projection), or "
        f"discard the event {first}",
        first={"id": first, "position": position, "error": error},
    )


def otherwise_settled(id_: int, outcome: str) -> Problem:
    """Somebody else's wish for the parked event, or an earlier one of its row, was done first."""
    return Problem(
        409,
        "otherwise-settled",
        "Otherwise settled",
        f"the parked event {id_} was {outcome} at the same time, since somebody else asked for that",
        outcome=outcome,
    )


def not_settled(id_: int, version: str, seconds: float) -> Problem:
    """No projector has done what was asked."""
    return Problem(
        504,
        "not-settled",
        "Not done",
        f"no projector of version {version} did anything about the parked event {id_} within {seconds:.0f} s, so it "
        "was left as it is; does one run, and does it reach the event store? Then try again",
        retry_after=5,
    )


def no_live_version(projection: str) -> Problem:
    """Nothing is there yet that could be read."""
    return Problem(
        503,
        "no-live-version",
        "No live version",
        f"the Projection {projection} has no live version in the read store yet; its conditions tell why "
        f"(kubectl describe projection)",
        retry_after=2,
    )


def unavailable(detail: str) -> Problem:
    """The read store doesn't answer."""
    return Problem(503, "readstore-unavailable", "Read store unavailable", detail, retry_after=1)


def too_slow(detail: str) -> Problem:
    """A page took too long to find, or would have."""
    return Problem(
        503,
        "query-too-slow",
        "Query too slow",
        f"{detail}, since the filters leave too many to be put in order; order by "
        "a column that is filtered by (its index then gives the order), or filter by a further one. Just after "
        "'index: true' was added, the index is still being built",
        retry_after=10,
    )


def overloaded(detail: str, service: str = "query service") -> Problem:
    """More requests wait for a database than is good."""
    return Problem(
        503,
        "overloaded",
        "Overloaded",
        f"{detail}; send fewer at once, or scale the {service}",
        retry_after=1,
    )
