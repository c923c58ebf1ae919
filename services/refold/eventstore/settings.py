"""The event store's settings, from the environment."""

from typing import Annotated

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from refold.web.auth.choice import DEFAULT, Choice


class Settings(BaseSettings):
    """Variables named `REFOLD_` and the field's name in capitals."""

    model_config = SettingsConfigDict(env_prefix="REFOLD_")

    #: The store's database, as its service role. A direct connection, not one through a pool of transactions.
    store_dsn: SecretStr
    #: Who decides who may call: `kubernetes`, `tokens:FILE` or `none`.
    auth: Choice = DEFAULT
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    #: The most events of one append.
    append_events: Annotated[int, Field(ge=1, le=10_000)] = 1000
    #: The most bytes of one event's data and metadata; must stay below two thirds of the topics' max.message.bytes.
    event_bytes: Annotated[int, Field(ge=1024, le=64 * 1024 * 1024)] = 512 * 1024
    #: The most bytes of one append's data and metadata; its body, or its line of a bulk, may have twice as many.
    append_bytes: Annotated[int, Field(ge=1024, le=256 * 1024 * 1024)] = 4 * 1024 * 1024
    #: How many callers may watch events at once; one that reads slowly holds up to 512 KiB of them.
    live_readers: Annotated[int, Field(ge=0, le=100_000)] = 1000
