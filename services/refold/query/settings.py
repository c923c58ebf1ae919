"""The query service's settings, from the environment."""

from typing import Annotated

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from refold.web.auth.choice import DEFAULT, Choice


class Settings(BaseSettings):
    """Variables named `REFOLD_` and the field's name in capitals."""

    model_config = SettingsConfigDict(env_prefix="REFOLD_")

    #: The Projection whose read model is served, as `namespace/name`.
    projection: Annotated[str, Field(pattern=r"^[a-z0-9-]+/[a-z0-9-]+$")]
    #: Where the read model is; its user needs to read the projection's schema, nothing else.
    readstore_dsn: SecretStr
    #: The event store's database, by a login that may read the streams: for rows as they were at a moment. Without it
    #: they are refused.
    store_dsn: SecretStr | None = None
    #: Who decides who may call: `kubernetes`, `tokens:FILE` or `none`.
    auth: Choice = DEFAULT
    port: Annotated[int, Field(ge=0, le=65535)] = 8080

    @property
    def namespace(self) -> str:
        """The Projection's namespace."""
        return self.projection.partition("/")[0]

    @property
    def name(self) -> str:
        """The Projection's name."""
        return self.projection.partition("/")[2]
