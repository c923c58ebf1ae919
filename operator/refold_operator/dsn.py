"""DSNs of the logins that the operator makes: the administrator's way to the database, under another name."""

from urllib.parse import quote, urlencode, urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from refold.projection.readstore import stores

# What belongs to the way and not to who goes it; certificates and passfiles are the administrator's own.
_KEPT = ("host", "hostaddr", "port", "dbname", "sslmode", "target_session_attrs", "connect_timeout")


def check(dsn: str) -> None:
    """Raise ValueError, without the DSN in it, where `dsn` isn't one or lacks host or database name."""
    try:
        parts = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        raise ValueError("not a PostgreSQL DSN (postgresql://user:password@host:port/database)") from None
    for needed in ("host", "dbname"):
        if not parts.get(needed):
            raise ValueError(f"the DSN must name {needed}: postgresql://user:password@host:port/database")


def login(admin_dsn: str, user: str, password: str) -> str:
    """Return the DSN of `user` to the same database as `admin_dsn`."""
    parts = {name: str(value) for name, value in conninfo_to_dict(admin_dsn).items() if name in _KEPT}
    return make_conninfo(**{**parts, "user": user, "password": password})


def check_redis(url: str) -> None:
    """Raise ValueError, without the URL in it, where `url` isn't one of a Redis with a user."""
    parts = urlsplit(url)
    if not url.startswith(stores.REDIS) or not parts.hostname or not parts.username or not parts.password:
        raise ValueError("not the URL of a Redis with a user: redis://user:password@host:port/database")


def redis_login(admin_url: str, user: str, password: str) -> str:
    """Return the URL of `user` to the same Redis and database as `admin_url`."""
    parts = urlsplit(admin_url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{quote(user, safe='')}:{quote(password, safe='')}@{host}").geturl()


def binding(dsn: str) -> dict[str, str]:
    """Return a login's DSN as the entries that workloads look for in a Secret.

    They are those of the Service Binding specification for PostgreSQL, and `dbname` as CloudNativePG has it.
    """
    parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    host, port, database = parts["host"], parts.get("port", "5432"), parts["dbname"]
    hosts, ports = host.split(","), port.split(",")
    # Several hosts have a port each, or one for all.
    places = zip(hosts, ports if len(ports) == len(hosts) else ports * len(hosts), strict=True)
    where = ",".join(f"[{one}]:{its}" if ":" in one else f"{one}:{its}" for one, its in places)
    user, password, path = (quote(parts[part], safe="") for part in ("user", "password", "dbname"))
    options = urlencode([(name, parts[name]) for name in ("sslmode", "target_session_attrs") if name in parts])
    uri = f"postgresql://{user}:{password}@{where}/{path}"
    return {
        "type": "postgresql",
        "provider": "refold",
        "host": host,
        "port": port,
        "database": database,
        "dbname": database,
        "username": parts["user"],
        "password": parts["password"],
        "uri": f"{uri}?{options}" if options else uri,
    }
