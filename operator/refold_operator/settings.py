"""The operator's settings: environment variables that the chart sets."""

from typing import Literal

from psycopg.conninfo import conninfo_to_dict
from pydantic import Field, SecretStr, field_validator
from pydantic_settings import SettingsConfigDict
from refold import kafka

from refold_operator.dsn import check


class Settings(kafka.Settings):
    """What the operator needs to know of its installation. Secrets never appear in logs or messages."""

    model_config = SettingsConfigDict(env_prefix="REFOLD_", hide_input_in_errors=True)

    #: An administrator's DSN of the store's database: it installs schemas and makes roles.
    store_admin_dsn: SecretStr
    #: The same for the read store; it may be the same database.
    readstore_admin_dsn: SecretStr
    #: The image of projectors and query services: the operator's own.
    image: str
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    #: The namespace that the operator runs in; the event store's and the relay's logins are put there.
    namespace: str
    #: Replication factor of topics whose EventStream doesn't say.
    topic_replicas: int = Field(default=1, ge=1)
    #: The most bytes of one event that the event store accepts (`eventstore.limits.eventBytes`); topics must take them.
    event_bytes: int = Field(default=512 * 1024, ge=1024)
    #: Probes and metrics.
    port: int = 8080
    #: How many resources are reconciled at the same time.
    workers: int = Field(default=8, ge=1)
    #: How often every resource is compared with what is there, in seconds, beside watching.
    resync_seconds: float = Field(default=300.0, gt=0)

    @field_validator("store_admin_dsn", "readstore_admin_dsn")
    @classmethod
    def _is_a_dsn(cls, value: SecretStr) -> SecretStr:
        check(value.get_secret_value())
        return value

    @property
    def store_database(self) -> str:
        """Name of the store's database."""
        return str(conninfo_to_dict(self.store_admin_dsn.get_secret_value())["dbname"])

    @property
    def readstore_database(self) -> str:
        """Name of the read store's database."""
        return str(conninfo_to_dict(self.readstore_admin_dsn.get_secret_value())["dbname"])
