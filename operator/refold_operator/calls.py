"""How long calls to backends take and how they end, of operator and webhook; docs/metrics.md describes the metric."""

import contextlib
import functools
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, ParamSpec, TypeVar

from prometheus_client import Histogram

from refold_operator.errors import UnreachableError

CALLS = Histogram(
    "refold_backend_call_seconds",
    "Calls to a backend.",
    ["backend", "outcome"],
    buckets=(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)

P = ParamSpec("P")
T = TypeVar("T")
Errors = type[Exception] | tuple[type[Exception], ...]


@contextlib.contextmanager
def call(backend: str, *, refused: Errors = (), unavailable: Errors = UnreachableError) -> Iterator[None]:
    """Measure a call to a backend by the error that it ends with: `refused`, `unavailable`, or `ok` with any other.

    So an answer that the caller knows what to make of is `ok`. A call that is cancelled isn't counted.
    """
    begin, outcome = time.perf_counter(), "ok"
    try:
        yield
    except Exception as error:
        if isinstance(error, unavailable):
            outcome = "unavailable"
        elif isinstance(error, refused):
            outcome = "refused"
        CALLS.labels(backend, outcome).observe(time.perf_counter() - begin)
        raise
    CALLS.labels(backend, outcome).observe(time.perf_counter() - begin)


def measured(
    backend: str, *, refused: Errors = (), unavailable: Errors = UnreachableError
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Decorate an async function that is one `call`."""

    def decorate(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        @functools.wraps(function)
        async def run(*args: P.args, **kwargs: P.kwargs) -> T:
            with call(backend, refused=refused, unavailable=unavailable):
                return await function(*args, **kwargs)

        return run

    return decorate
