"""What a projection's two logins may do in a Redis that several projections share: rules for `ACL SETUSER`.

Redis looks at the rights of whoever runs a script with each command in it, so the rules hold there, too. Both may read
all of their projection's keys; what they may change is named by key.
"""

import hashlib

from refold.projection.readstore.redis import prefix

#: As `version_of` names versions, in a pattern of Redis.
_VERSION = "[0-9a-f]" * 8
#: What every client says when it connects.
_CONNECT = ("+@connection", "-@admin", "-@dangerous", "+info")
_READ = (
    "eval", "evalsha", "time", "exists", "get", "hexists", "hget", "hgetall", "hkeys", "hlen", "hmget", "hvals",
    "zlexcount", "zrange", "zrangebylex", "zrevrangebylex",
)  # fmt: skip
_WRITE = ("del", "hdel", "hincrby", "hset", "incr", "zadd", "zrem")
_MARK = ("hdel", "hset")


def projector(namespace: str, name: str) -> list[str]:
    """Return what projectors may do: change what is of versions, and keep count of what was parked and discarded."""
    base = prefix(namespace, name)
    changed = [f"{base}{_VERSION}:*", *(base + key for key in ("parked-id", "discarded", "discards"))]
    return _rules(base, changed, (*_READ, *_WRITE))


def query(namespace: str, name: str) -> list[str]:
    """Return what query services may do: read, and mark parked events.

    The projection's bare prefix, which their scripts are given and no key is named, counts as changed by a script.
    """
    base = prefix(namespace, name)
    return _rules(base, [base, f"{base}{_VERSION}:asked"], (*_READ, *_MARK))


def _rules(base: str, changed: list[str], commands: tuple[str, ...]) -> list[str]:
    return [
        f"%R~{base}*", *(f"~{key}" for key in changed), "resetchannels", "-@all", *_CONNECT,
        *(f"+{command}" for command in commands),
    ]  # fmt: skip


def whole(rules: list[str], password: str) -> list[str]:
    """Return the arguments of `ACL SETUSER` after the name, which leave nothing of what the user was before.

    Redis is told the password's hash, so that no log of commands holds the password.
    """
    return ["reset", "on", f"#{hashlib.sha256(password.encode()).hexdigest()}", *rules]
