"""The administrators' logins at event store, read store and Redis: from the environment, or from files.

A file is what the chart mounts of a Secret. It is read anew whenever a connection is made, so that a password which is
changed there is taken over without a restart of the operator; the kubelet brings the change within about a minute.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Self

from pydantic import SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings

from refold_operator.dsn import check, check_redis

#: Returns the DSN (or URL, of a Redis) as it is now.
#:
#: Raises:
#:     OSError: the file can't be read.
Login = Callable[[], str]


class AdministratorSettings(BaseSettings):
    """How the operator logs in as administrator: by a value, or by the file that holds it, which counts if both are."""

    #: An administrator's DSN of the store's database: it installs schemas and makes roles.
    store_admin_dsn: SecretStr | None = None
    store_admin_dsn_file: Path | None = None
    #: The same for the read store; it may be the same database.
    readstore_admin_dsn: SecretStr | None = None
    readstore_admin_dsn_file: Path | None = None
    #: The URL of the Redis where Projections stand that choose one and name none; its user may make ACL users.
    redis_admin_url: SecretStr | None = None
    redis_admin_url_file: Path | None = None

    @property
    def store_admin(self) -> Login:
        """The login at the store's database."""
        return _needed("store_admin_dsn", self.store_admin_dsn, self.store_admin_dsn_file)

    @property
    def readstore_admin(self) -> Login:
        """The login at the read store's."""
        return _needed("readstore_admin_dsn", self.readstore_admin_dsn, self.readstore_admin_dsn_file)

    @property
    def redis_admin(self) -> Login | None:
        """The login at the installation's Redis, None where it has none."""
        return _login(self.redis_admin_url, self.redis_admin_url_file)

    @field_validator(
        "store_admin_dsn", "store_admin_dsn_file", "readstore_admin_dsn", "readstore_admin_dsn_file", "redis_admin_url",
        "redis_admin_url_file",
    )  # fmt: skip
    @classmethod
    def _is_a_login(cls, given: SecretStr | Path | None, info: ValidationInfo) -> SecretStr | Path | None:
        if given is None:
            return None
        try:
            text = given.get_secret_value() if isinstance(given, SecretStr) else given.read_text().strip()
        except OSError as error:
            raise ValueError(str(error)) from None
        of_redis = info.field_name is not None and info.field_name.startswith("redis")
        (check_redis if of_redis else check)(text)
        return given

    @model_validator(mode="after")
    def _are_there(self) -> Self:
        # each raises where it is missing
        _ = self.store_admin, self.readstore_admin
        return self


def _login(value: SecretStr | None, file: Path | None) -> Login | None:
    # The file counts where both are there: so it is in an upgrade after a rollback that failed, as Helm then leaves
    # the former release's variable in the Deployment.
    if file is not None:
        return lambda: file.read_text().strip()
    return None if value is None else value.get_secret_value


def _needed(name: str, value: SecretStr | None, file: Path | None) -> Login:
    login = _login(value, file)
    if login is None:
        raise ValueError(f"REFOLD_{name.upper()} is missing, or REFOLD_{name.upper()}_FILE, a file that holds it")
    return login
