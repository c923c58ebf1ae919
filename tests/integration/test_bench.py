"""The benchmarks, run small: each workload checks its own results and fails where they are wrong."""

import json
import subprocess
import sys
from pathlib import Path

import psycopg
from confluent_kafka.admin import AdminClient

from bench.workloads import WORKLOADS
from hack.servers import Kafka, Postgres
from hack.servers.kubernetes_api import programs

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)


def test_every_workload_gives_right_results_beside_its_limit_and_leaves_given_servers_as_they_were(
    tmp_path: Path, postgres: Postgres, kafka: Kafka
) -> None:
    chosen = [name for name, workload in WORKLOADS.items() if programs() or not workload.kubernetes]
    done = bench(
        *chosen,
        "--events",
        "100",
        "--runs",
        "1",
        "--store",
        postgres.dsn(),
        "--kafka",
        kafka.bootstrap,
        "--into",
        str(tmp_path),
    )

    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert list(dict.fromkeys(result["workload"] for result in results)) == chosen
    for result in results:
        assert result["events_per_s"]["min"] > 0
        assert result["limit"]["events_per_s"] > 0
        assert result["ratio"] > 0
    kept = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [{key: value for key, value in result.items() if key != "taken"} for result in kept] == results
    assert {file.stem for file in tmp_path.glob("*.svg")} == set(chosen)
    with psycopg.connect(postgres.dsn()) as conn:
        query = (
            "select datname from pg_database where datname like 'bench%' "
            "union select rolname from pg_roles where rolname like '%bench%'"
        )
        assert conn.execute(query).fetchall() == []
    topics = AdminClient({"bootstrap.servers": kafka.bootstrap}).list_topics(timeout=30).topics
    assert [name for name in topics if name.startswith("bench")] == []


def test_events_come_from_a_file(tmp_path: Path, postgres: Postgres, kafka: Kafka) -> None:
    file = tmp_path / "events.jsonl"
    lines = [{"subject": f"s-{n % 7}", "type": "Happened", "data": {"n": n}} for n in range(90)]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    done = bench(
        "append-32", "--input", str(file), "--runs", "1", "--store", postgres.dsn(), "--kafka", kafka.bootstrap
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["params"]["events"] == 90


def test_an_unknown_workload_is_refused_with_the_names_of_those_there_are() -> None:
    done = bench("apend-32")

    assert done.returncode == 2
    assert "append-32" in done.stderr
