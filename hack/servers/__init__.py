"""Private PostgreSQL and Kafka servers on 127.0.0.1, for tests and benchmarks.

Real servers with durability on (fsync, synchronous_commit), each with a data folder and a free port of its own, started
as child processes so that a test can kill, stop and restart them. `hack/servers/install.sh` brings what they need.
"""

from hack.servers.kafka import Kafka, SecuredKafka
from hack.servers.postgres import Postgres

__all__ = ["Kafka", "Postgres", "SecuredKafka"]
