"""The projector's settings, from environment variables `REFOLD_…`."""

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import SettingsConfigDict

from refold import kafka


class Settings(kafka.Settings):
    """What one projector process is given; all processes of a version are given the same."""

    model_config = SettingsConfigDict(env_prefix="REFOLD_")

    #: `namespace/name` of the Projection.
    projection: str = Field(pattern=r"^[^/]+/[^/]+$")
    #: Which version of it to fold; the read store holds its definition.
    version: str
    #: PostgreSQL of the read store, as the projection's projector login.
    readstore_dsn: SecretStr
    #: PostgreSQL of the event store, as a login that may read the streams and the heads.
    store_dsn: SecretStr
    #: Which Refold the installation runs, told to images with a handler; empty where nobody says: no check.
    installed: str = ""
    #: Where `/healthz`, `/readyz` and `/metrics` are served.
    port: int = Field(8080, ge=0, le=65535)
    #: Events that one transaction of the read store holds at most; more cost memory (about 2 KiB each) and save little.
    batch_events: int = Field(10_000, ge=1)
    #: Events of one partition that may be parked; beyond them the partition stops.
    parked_limit: int = Field(1000, ge=1)
    #: Seconds without a heartbeat after which Kafka gives the partitions to others (the broker's minimum is 6).
    session_seconds: int = Field(10, ge=1)

    @field_validator("version")
    @classmethod
    def _is_a_version(cls, value: str) -> str:
        if not value.isalnum():
            raise ValueError("the name of a version has letters and digits only")
        return value

    @property
    def namespace(self) -> str:
        """The Projection's namespace."""
        return self.projection.partition("/")[0]

    @property
    def name(self) -> str:
        """The Projection's name."""
        return self.projection.partition("/")[2]
