"""The webhook's settings: environment variables that the chart sets."""

import datetime as dt

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from refold_operator.tenants import TenantSettings
from refold_operator.webhook.certificates import Lifetimes


class Settings(TenantSettings):
    """What the webhook needs to know of its installation."""

    model_config = SettingsConfigDict(env_prefix="REFOLD_", hide_input_in_errors=True)

    #: The namespace that it runs in, of its Service and its Secret.
    namespace: str
    #: The Service that the API server calls, also the name of the Secret and of the ValidatingWebhookConfiguration.
    webhook: str = "refold-webhook"
    #: Reviews, with TLS.
    review_port: int = 8443
    #: Probes and metrics.
    port: int = 8080
    #: How often Secret and configuration are looked at, in seconds.
    look_seconds: float = Field(default=30.0, gt=0)
    #: For how long an authority is good, in seconds; the next one is made after two thirds of it.
    authority_seconds: float = Field(default=365 * 86400.0, gt=0)
    #: The same for the serving certificate.
    certificate_seconds: float = Field(default=90 * 86400.0, gt=0)
    #: How long a new authority is told to the API server before it signs, and how long the former one stays after that;
    #: many times `look_seconds`, so that no replica and no API server is behind.
    overlap_seconds: float = Field(default=3600.0, gt=0)

    @property
    def host(self) -> str:
        """The name by which the API server knows the Service."""
        return f"{self.webhook}.{self.namespace}.svc"

    @property
    def lifetimes(self) -> Lifetimes:
        """How long certificates are good."""
        seconds = (self.authority_seconds, self.certificate_seconds, self.overlap_seconds)
        return Lifetimes(*(dt.timedelta(seconds=each) for each in seconds))
