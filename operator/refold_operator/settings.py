"""The operator's settings: environment variables that the chart sets."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict
from refold import kafka

from refold_operator.administrators import AdministratorSettings
from refold_operator.tenants import TenantSettings


class AccessSettings(kafka.Settings):
    """How the operator reaches Kafka, and what it makes of users and rights there."""

    #: Make a SCRAM user for the projectors of each Projection and for the consumers of each EventStream.
    kafka_manage_users: bool = False
    #: Make the ACLs that relay, projectors and consumers need, so that nobody else may write.
    kafka_manage_acls: bool = False
    #: Who the relay is to Kafka's authorizer, such as `User:refold-relay` or `User:CN=refold-relay`.
    kafka_relay_principal: str = ""
    #: The credentials of all projectors, as `kafka_credentials`; where their users aren't made by the operator.
    kafka_projector_credentials: Path | None = None
    kafka_projector_username: str = ""
    #: Who all projectors are to Kafka's authorizer, where their users aren't made by the operator.
    kafka_projector_principal: str = ""

    @model_validator(mode="after")
    def _has_principals(self) -> Self:
        scram = self.kafka_security_protocol.startswith("SASL") and self.kafka_sasl_mechanism != "PLAIN"
        if self.kafka_security_protocol.startswith("SASL") and not (
            self.kafka_manage_users or self.kafka_projector_credentials
        ):
            raise ValueError(
                f"REFOLD_KAFKA_SECURITY_PROTOCOL={self.kafka_security_protocol} needs "
                "REFOLD_KAFKA_PROJECTOR_CREDENTIALS, a folder with the projectors' username and password, or "
                "REFOLD_KAFKA_MANAGE_USERS"
            )
        if self.kafka_manage_users and not scram:
            raise ValueError("REFOLD_KAFKA_MANAGE_USERS needs a SASL protocol and a SCRAM mechanism")
        if self.kafka_manage_acls and not self.kafka_relay_principal:
            raise ValueError("REFOLD_KAFKA_MANAGE_ACLS needs REFOLD_KAFKA_RELAY_PRINCIPAL")
        if self.kafka_manage_acls and not self.kafka_manage_users and not self.kafka_projector_principal:
            raise ValueError(
                "REFOLD_KAFKA_MANAGE_ACLS needs REFOLD_KAFKA_PROJECTOR_PRINCIPAL, or REFOLD_KAFKA_MANAGE_USERS"
            )
        return self

    def projectors(self) -> kafka.Brokers | None:
        """Return Kafka as all projectors reach it; None where the operator makes a user for each Projection."""
        if self.kafka_manage_users:
            return None
        return kafka.Settings(
            kafka_bootstrap=self.kafka_bootstrap,
            kafka_security_protocol=self.kafka_security_protocol,
            kafka_sasl_mechanism=self.kafka_sasl_mechanism,
            kafka_credentials=self.kafka_projector_credentials,
            kafka_username=self.kafka_projector_username,
            kafka_ca=self.kafka_ca,
        ).brokers()


class Settings(AccessSettings, AdministratorSettings, TenantSettings):
    """What the operator needs to know of its installation. Secrets never appear in logs or messages."""

    model_config = SettingsConfigDict(env_prefix="REFOLD_", hide_input_in_errors=True)

    #: The image of projectors and query services: the operator's own.
    image: str
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    #: The namespace that the operator runs in; the event store's and the relay's logins are put there.
    namespace: str
    #: Replication factor of topics whose EventStream doesn't say.
    topic_replicas: int = Field(default=1, ge=1)
    #: Probes and metrics.
    port: int = 8080
    #: How many resources are reconciled at the same time; what they ask for goes together (`batching`).
    workers: int = Field(default=48, ge=1)
    #: How long the Lease of the replica that works lasts, in seconds; the other one takes over soon after its end.
    lease_seconds: int = Field(default=8, ge=1)
    #: How often every resource is compared with what is there, in seconds, beside watching.
    resync_seconds: float = Field(default=300.0, gt=0)

    #: How often the projectors of Projections with `spec.projector.autoscaling` are looked at, in seconds.
    autoscaler_seconds: float = Field(default=5.0, gt=0)

    @property
    def everywhere(self) -> list[str]:
        """The namespaces that the operator looks into: its own, where its Secrets are, too; empty: all."""
        return sorted({*self.namespaces, self.namespace}) if self.namespaces else []
