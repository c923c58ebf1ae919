"""Private PostgreSQL, Kafka and Redis servers on 127.0.0.1, for tests and benchmarks.

Real servers with durability on (fsync, synchronous_commit), each with a data folder and a free port of its own, started
as child processes so that a test can kill, stop and restart them. `hack/servers/install.sh` brings what they need.
"""

from hack.servers.kafka import Kafka, SecuredKafka
from hack.servers.postgres import Postgres
from hack.servers.redis import EmbeddedRedis, Redis

__all__ = ["EmbeddedRedis", "Kafka", "Postgres", "Redis", "SecuredKafka"]
