"""The relay's settings, from environment variables `REFOLD_…`."""

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from refold import kafka


class Settings(kafka.Settings):
    """What one relay process is given; both processes of an installation are given the same."""

    model_config = SettingsConfigDict(env_prefix="REFOLD_")

    #: PostgreSQL of the store, as the relay's role; a direct connection (advisory locks and LISTEN need a session).
    store_dsn: SecretStr
    #: Fixed for the life of a store: the checkpoint topic has as many partitions.
    relay_shards: int = Field(8, ge=1, le=256)
    #: Replicas of the checkpoint topic, used when it is created.
    checkpoint_replicas: int = Field(1, ge=1)
    #: Where `/healthz`, `/readyz` and `/metrics` are served.
    port: int = Field(8080, ge=0, le=65535)
