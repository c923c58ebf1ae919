"""The event store's settings, from the environment."""

import dataclasses
import itertools
from typing import Annotated, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from refold.eventstore.appends import Limits
from refold.web.auth.choice import DEFAULT, Choice

_MIB = 1024 * 1024


class Settings(BaseSettings):
    """Variables named `REFOLD_` and the field's name in capitals."""

    model_config = SettingsConfigDict(env_prefix="REFOLD_")

    #: The store's database, as its service role. A direct connection, not one through a pool of transactions.
    store_dsn: SecretStr
    #: Who decides who may call: `kubernetes`, `tokens:FILE` or `none`.
    auth: Choice = DEFAULT
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    #: The chart's `eventstore.limits`; `refold.eventstore.Limits` tells what each is.
    append_events: Annotated[int, Field(ge=1, le=10_000)] = 1000
    event_bytes: Annotated[int, Field(ge=1024, le=32 * _MIB)] = 512 * 1024
    metadata_bytes: Annotated[int, Field(ge=1024, le=32 * _MIB)] = 64 * 1024
    append_bytes: Annotated[int, Field(ge=1024, le=256 * _MIB)] = 4 * _MIB
    body_bytes: Annotated[int, Field(ge=1024, le=512 * _MIB)] = 8 * _MIB
    waiting_appends: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    waiting_bytes: Annotated[int, Field(ge=1024, le=4096 * _MIB)] = 128 * _MIB
    #: How many callers may watch events at once; one that reads slowly holds up to 512 KiB of them.
    live_readers: Annotated[int, Field(ge=0, le=100_000)] = 1000

    @model_validator(mode="after")
    def _limits_fit(self) -> Self:
        names = ("metadata_bytes", "event_bytes", "append_bytes", "body_bytes")
        for part, whole in itertools.pairwise(names):
            few, many = getattr(self, part), getattr(self, whole)
            if few > many:
                raise ValueError(f"REFOLD_{part.upper()} is {few}, over REFOLD_{whole.upper()}, which is {many}")
        return self

    def limits(self) -> Limits:
        """Return the bounds of appends."""
        return Limits(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Limits)})
