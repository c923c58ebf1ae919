"""A file of tokens, for running without a cluster: who may call is written in it, and what they may do.

The file is YAML. It holds no secret: a token stands there as the SHA-256 of it (`printf %s "$TOKEN" | sha256sum`), so
make tokens that can't be guessed (`openssl rand -hex 32`). `"*"` stands for all::

    tokens:
      - name: shop-web                       # what answers and logs call the caller
        sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
        allow:
          - {resources: [eventstreams/events], verbs: [create, get], namespaces: [shop], names: [orders]}
          - {resources: [projections/rows], verbs: [get], namespaces: [shop], names: ["*"]}
      - name: prometheus
        sha256: …
        metrics: true                        # may read /metrics

A changed file takes effect within a second. One that can't be read or is wrong changes nothing: the log says what is
wrong with it, and who was known stays known.
"""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import structlog
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import Scope

from refold.setup import SetupError
from refold.web.auth.access import Access, PathAccess, bearer, forbidden, unauthenticated

#: Seconds between two looks at the file, while requests come.
LOOK_SECONDS = 1.0

_log = structlog.get_logger(__name__)
_Names = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class Rule(BaseModel):
    """What a caller may do: each combination of these."""

    model_config = ConfigDict(extra="forbid")

    resources: Annotated[list[Literal["eventstreams/events", "projections/rows", "*"]], Field(min_length=1)]
    verbs: Annotated[list[Literal["create", "get", "update", "watch", "*"]], Field(min_length=1)]
    namespaces: _Names
    names: _Names


class Entry(BaseModel):
    """A token and what its bearer may do."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    allow: list[Rule] = []
    metrics: bool = False


class Document(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid")

    tokens: Annotated[list[Entry], Field(min_length=1)]


class _Caller:
    def __init__(self, entry: Entry) -> None:
        self._entry = entry

    @property
    def name(self) -> str:
        """The entry's name."""
        return self._entry.name

    async def require(self, access: Access) -> None:
        """Return where a rule of the file allows this."""
        entry = self._entry
        if isinstance(access, PathAccess):
            if entry.metrics:
                return
            raise forbidden(entry.name, access, "give it 'metrics: true' in the file of tokens")
        for rule in entry.allow:
            if (
                _covers(rule.namespaces, access.namespace)
                and _covers(rule.names, access.name)
                and _covers(rule.resources, access.kind)
                and _covers(rule.verbs, access.verb)
            ):
                return
        raise forbidden(entry.name, access, "give it a rule that says so under 'allow' in the file of tokens")


class TokensFile:
    """Who may call, by a file of tokens.

    Args:
        path: of the file.

    Raises:
        SetupError: the file can't be read or is wrong.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = _changed(path)
        self._callers = _read(path)
        self._look = time.monotonic() + LOOK_SECONDS

    async def __aenter__(self) -> "TokensFile":
        _log.info("Callers are those of the file of tokens", file=str(self._path), tokens=len(self._callers))
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing is held."""

    async def caller(self, scope: Scope) -> _Caller:
        """Return whose token was sent."""
        if time.monotonic() >= self._look:
            self._reload()
        caller = self._callers.get(hashlib.sha256(bearer(scope)).hexdigest())
        if caller is None:
            raise unauthenticated("the bearer token isn't in this service's file of tokens")
        return caller

    def _reload(self) -> None:
        self._look = time.monotonic() + LOOK_SECONDS
        try:
            changed = _changed(self._path)
            if changed == self._changed:
                return
            self._changed = changed  # so that a wrong file is complained of once
            self._callers = _read(self._path)
        except SetupError as error:
            _log.error("The file of tokens changed and can't be used; who was known stays known", why=str(error))
        else:
            _log.info("The file of tokens was read again", file=str(self._path), tokens=len(self._callers))


def _covers(wanted: Sequence[str], one: str) -> bool:
    return one in wanted or "*" in wanted


def _changed(path: Path) -> Any:
    """Return what changes with the file: also when another one took its place, as in a mounted Secret."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _read(path: Path) -> dict[str, _Caller]:
    try:
        document = Document.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"the file of tokens {path} can't be read: {error}") from error
    except yaml.YAMLError as error:
        raise SetupError(f"the file of tokens {path} isn't YAML: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise SetupError(f"the file of tokens {path} is wrong at {place}: {first['msg']}") from error
    callers = {entry.sha256: _Caller(entry) for entry in document.tokens}
    if len(callers) < len(document.tokens):
        raise SetupError(f"the file of tokens {path} has a token twice")
    return callers
