"""The whole data plane as processes on real servers, without a cluster: append, relay, project, query."""

import asyncio
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from confluent_kafka import TopicCollection
from confluent_kafka.admin import AdminClient, NewTopic
from refold import names
from refold.eventstore import catalog, roles
from refold.projection.definition import Column, ColumnType, Definition, FoldRule, StreamRef, VersionDefinition
from refold.projection.readstore import postgres as readstore

from hack.servers import Kafka
from hack.servers.callers import tokens_file
from hack.servers.process import free_port
from tests.stores import PASSWORD, Installed, connected, install

TOKEN = "a-secret"
SUBJECTS = ["o-1", "a/b", "..", "%2F", "ü 🦊", "o-6", "o-7", "o-8"]
DEFINITION = Definition(
    streams=["orders"],
    columns=[
        Column(name="status", type=ColumnType.TEXT, index=True),
        Column(name="items", type=ColumnType.INTEGER),
        Column(name="total", type=ColumnType.NUMERIC),
    ],
    fold=[FoldRule(type="ItemAdded", set={"status": "'open'"}, add={"items": "data.qty", "total": "data.price"})],
)


class Service:
    """One `refold` process; started again it listens on the same port."""

    def __init__(self, command: str, folder: Path, **variables: str) -> None:
        self.port = free_port()
        self._command = command
        self._log = folder / f"{command}.log"
        self._environment = {
            **os.environ,
            "REFOLD_PORT": str(self.port),
            **{f"REFOLD_{name.upper()}": value for name, value in variables.items()},
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = Path(sys.executable).with_name("refold")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([program, self._command], env=self._environment, stderr=log)

    def kill(self) -> None:
        """Kill with -9."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """Ask it to end and return its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(40)
        finally:
            self._process.kill()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Return status and decoded JSON of an answer; 0 and the reason where there is none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"authorization": f"Bearer {TOKEN}", **headers})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException) as error:
            return 0, str(error)
        finally:
            connection.close()


class Pipeline:
    """The four services of one stream and one projection."""

    def __init__(self, folder: Path, store: Installed, kafka: Kafka, stream: catalog.Stream) -> None:
        projector, query = readstore.logins(store.database, names.read_schema("shop", "order-status"))
        auth = tokens_file(TOKEN, folder)
        self.eventstore = Service("eventstore", folder, store_dsn=store.service, auth=auth)
        self.relay = Service(
            "relay",
            folder,
            store_dsn=store.dsn(names.store_role(store.database, "relay")),
            kafka_bootstrap=kafka.bootstrap,
            relay_shards="2",
        )
        self.projector = Service(
            "projector",
            folder,
            projection="shop/order-status",
            version="v1",
            readstore_dsn=store.dsn(projector),
            store_dsn=store.dsn(projector),
            kafka_bootstrap=kafka.bootstrap,
        )
        self.query = Service("query", folder, projection="shop/order-status", readstore_dsn=store.dsn(query), auth=auth)
        self.services = [self.eventstore, self.relay, self.projector, self.query]
        self.stream = stream

    def append(self, subject: str, number: int) -> str:
        """Append one event, again with the same id until it is acknowledged; return the token."""
        event = {"id": f"e-{number}", "type": "ItemAdded", "data": {"qty": number, "price": 0.1}}
        path = f"/v1/streams/shop/orders/subjects/{quote(subject, safe='')}/events"
        deadline = time.monotonic() + 60
        while True:
            status, answer = self.eventstore.ask("POST", path, {"expectedRevision": "any", "events": [event]})
            if status == 201:
                token: str = answer["token"]
                return token
            assert status in (0, 503), (status, answer)
            assert time.monotonic() < deadline, (status, answer)
            time.sleep(0.1)

    def row(self, subject: str, token: str, seconds: int = 30) -> Any:
        """Return a row that has seen `token`; asked again while the service is away."""
        deadline = time.monotonic() + 2 * seconds
        headers = {"Refold-Token": token, "Prefer": f"wait={seconds}"}
        while True:
            status, answer = self.query.ask("GET", f"/v1/rows/{quote(subject, safe='')}", **headers)
            if status == 200:
                return answer["data"]
            assert status in (0, 503), (status, answer)
            assert time.monotonic() < deadline, (status, answer)
            time.sleep(0.1)


@pytest.fixture
async def pipeline(database: str, kafka: Kafka, tmp_path: Path) -> AsyncIterator[Pipeline]:
    """Everything that the operator would make, then the processes."""
    store = await install(database)
    topic = f"shop.orders.{store.store_id}"
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    admin.create_topics([NewTopic(topic, 3, 1)])[topic].result(30)
    described = admin.describe_topics(TopicCollection([topic]))[topic].result(30)
    async with connected(store.admin) as conn:
        stream = await catalog.claim_stream(
            conn, namespace="shop", name="orders", uid="u1", partitions=3, topic=topic, kafka_cluster="k"
        )
        stream = await catalog.activate(conn, await catalog.record_topic(conn, stream, str(described.topic_id)))
        await readstore.install(conn)
        await readstore.claim_projection(conn, namespace="shop", name="order-status", uid="u2")
        await readstore.ensure_logins(
            conn, namespace="shop", name="order-status", projector_password=PASSWORD, query_password=PASSWORD
        )
        reference = StreamRef(
            namespace="shop", name="orders", incarnation=stream.incarnation, partitions=3, topic=topic,
            event_schema=stream.schema,
        )  # fmt: skip
        await readstore.ensure_version(
            conn,
            namespace="shop",
            name="order-status",
            version="v1",
            definition=VersionDefinition(definition=DEFINITION, streams=[reference]),
        )
        projector, _ = readstore.logins(store.database, names.read_schema("shop", "order-status"))
        groups = [catalog.reader_role(conn, stream), names.store_role(store.database, "heads")]
        await roles.ensure_login(conn, projector, PASSWORD, member_of=groups)
    pipeline = Pipeline(tmp_path, store, kafka, stream)
    with ExitStack() as stack:
        for service in pipeline.services:
            service.start()
            stack.callback(service.kill)
        yield pipeline


async def test_who_appends_reads_back_with_the_token_what_was_written(pipeline: Pipeline) -> None:
    items: Counter[str] = Counter()
    for number in range(1, 41):
        subject = SUBJECTS[number % len(SUBJECTS)]
        token = pipeline.append(subject, number)
        items[subject] += number
        assert pipeline.row(subject, token)["items"] == items[subject]
    status, page = pipeline.query.ask("GET", "/v1/rows?where=status:eq:open")
    assert status == 200
    assert {row["key"]: row["data"]["items"] for row in page["rows"]} == dict(items)
    assert [row["data"]["total"] for row in page["rows"]] == [0.5] * len(SUBJECTS)
    for service in pipeline.services:
        assert service.stop() == 0


async def test_rows_are_right_when_every_process_is_killed_while_events_come(pipeline: Pipeline) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    # Begin when all are at work, so that none is killed before it did anything.
    items: Counter[str] = Counter()
    tokens = {subject: pipeline.append(subject, 0) for subject in SUBJECTS}
    for subject, token in tokens.items():
        pipeline.row(subject, token)
    done = threading.Event()
    failed: list[AssertionError] = []

    def write(writer: int) -> None:
        number = writer + 2
        subjects = SUBJECTS[writer::2]  # a subject has one writer, whose last token is its latest
        try:
            while not done.is_set():
                subject = subjects[number // 2 % len(subjects)]
                tokens[subject] = pipeline.append(subject, number)
                items[subject] += number
                number += 2
        except AssertionError as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(2)]
    for writer in writers:
        writer.start()
    try:
        for service in chance.sample(pipeline.services, len(pipeline.services)):
            await asyncio.sleep(chance.uniform(0.5, 1.5))
            service.kill()
            await asyncio.sleep(chance.uniform(0, 0.5))
            service.start()
        await asyncio.sleep(1)
    finally:
        done.set()
        for writer in writers:
            writer.join()
    assert not failed
    assert {subject: pipeline.row(subject, tokens[subject])["items"] for subject in tokens} == dict(items)
