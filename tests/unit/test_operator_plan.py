"""What the operator decides, without any server: topics, versions, manifests, conditions, passwords."""

import base64
import datetime as dt
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import refold
from psycopg.conninfo import conninfo_to_dict
from pydantic import ValidationError
from refold import kafka
from refold.eventstore.catalog import Stream
from refold.projection.definition import Handler
from refold.projection.readstore import PartitionStatus, ProjectionStatus, VersionStatus
from refold_operator import children, controller, credentials, dsn, eventstream, projection, resources
from refold_operator.children import Image
from refold_operator.cluster import covers
from refold_operator.errors import ReconcileError
from refold_operator.eventstream import Create, Examine, Keep, Refuse, plan_topic
from refold_operator.kafka import Topic
from refold_operator.pace import Paces
from refold_operator.projection import build_status, plan_versions
from refold_operator.settings import AccessSettings, Settings
from refold_operator.status import Condition, conditions, merge_patch, only_numbers_changed

CLUSTER = "kafka-one"
EVENT_BYTES = 512 * 1024
MESSAGE_BYTES = {"max.message.bytes": "1048588"}  # Kafka's own default, which is enough for EVENT_BYTES


def stream(**spec: Any) -> resources.EventStream:
    metadata = {"namespace": "shop", "name": "orders", "uid": "u-1", "generation": 1, "resourceVersion": "7"}
    return resources.event_stream({"metadata": metadata, "spec": {"partitions": 6, **spec}})


def claim(**changes: Any) -> Stream:
    values: dict[str, Any] = {
        "stream": 1, "namespace": "shop", "name": "orders", "incarnation": "0" * 16, "uid": "u-1",
        "schema": "shop.orders", "partitions": 6, "topic": "shop.orders", "kafka_cluster": CLUSTER,
        "topic_id": "id-1", "state": "active", "migration": 1, "types_revision": 0,
    }  # fmt: skip
    return Stream(**{**values, **changes})


def topic(**changes: Any) -> Topic:
    values: dict[str, Any] = {
        "name": "shop.orders", "id": "id-1", "partitions": 6, "replicas": 1,
        "config": {"cleanup.policy": "delete", **MESSAGE_BYTES},
    }  # fmt: skip
    return Topic(**{**values, **changes})


def plan(
    resource: resources.EventStream, *, topic: Topic | None, claim: Stream | None, cluster: str = CLUSTER,
    held: int | None = None,
) -> Refuse | Examine | Create | Keep:  # fmt: skip
    return plan_topic(
        resource,
        topic=topic,
        claim=claim,
        kafka_cluster=cluster,
        default_replicas=2,
        event_bytes=EVENT_BYTES,
        held=held,
    )


class TestTopics:
    def test_a_missing_topic_is_created_and_never_compacted(self) -> None:
        config = {"retention.ms": "1000"}
        assert plan(stream(topic={"config": config}), topic=None, claim=None) == Create(
            6, 2, {"cleanup.policy": "delete", "retention.ms": "1000", **MESSAGE_BYTES}
        )

    def test_the_specs_replicas_come_before_the_installations(self) -> None:
        planned = plan(stream(topic={"replicas": 3}), topic=None, claim=None)
        assert isinstance(planned, Create)
        assert planned.replicas == 3

    def test_a_topic_without_a_claim_is_left_alone(self) -> None:
        planned = plan(stream(), topic=topic(), claim=None)
        assert isinstance(planned, Refuse)
        assert planned.reason == "TopicConflict"
        assert "spec.topic.name" in planned.message

    def test_a_topic_of_somebody_else_is_adopted_where_the_spec_says_so_and_it_is_empty(self) -> None:
        adopting = stream(topic={"adopt": True})
        for found, known in ((topic(), None), (topic(id="id-2"), claim()), (topic(), claim(uid=None, topic_id=None))):
            assert isinstance(plan(stream(), topic=found, claim=known, held=0), Refuse)
            assert plan(adopting, topic=found, claim=known) == Examine()
            assert plan(adopting, topic=found, claim=known, held=0) == Keep({})
            refused = plan(adopting, topic=found, claim=known, held=7)
            assert isinstance(refused, Refuse)
            assert (refused.reason, "7 records" in refused.message) == ("TopicConflict", True)
        few = plan(adopting, topic=topic(partitions=5), claim=None, held=0)
        assert isinstance(few, Refuse)
        assert "5 partitions" in few.message
        assert plan(adopting, topic=topic(), claim=claim()) == Keep({}), "its own isn't looked into"

    def test_a_topic_of_another_kafka_cluster_is_not_the_claimed_one(self) -> None:
        planned = plan(stream(), topic=topic(), claim=claim(), cluster="kafka-two")
        assert isinstance(planned, Refuse)
        assert planned.reason == "TopicConflict"

    def test_a_topic_that_was_made_just_before_a_crash_is_ours(self) -> None:
        just_made = claim(topic_id=None, state="claimed")
        assert plan(stream(), topic=topic(), claim=just_made) == Keep({})
        assert plan(stream(), topic=topic(), claim=claim(topic_id="")) == Keep({})

    def test_a_claim_without_an_id_of_another_resource_gives_no_right_to_the_topic(self) -> None:
        for other in (None, "u-2"):
            planned = plan(stream(), topic=topic(), claim=claim(uid=other, topic_id=None, state="claimed"))
            assert isinstance(planned, Refuse)

    def test_a_released_claim_takes_its_topic_back(self) -> None:
        assert plan(stream(), topic=topic(), claim=claim(uid=None, state="released")) == Keep({})

    def test_a_topic_that_someone_made_again_is_not_ours(self) -> None:
        planned = plan(stream(), topic=topic(id="id-2"), claim=claim())
        assert isinstance(planned, Refuse)
        assert "id-2" in planned.message

    def test_a_deleted_topic_is_made_again(self) -> None:
        assert isinstance(plan(stream(), topic=None, claim=claim()), Create)

    def test_a_topic_with_fewer_partitions_is_refused_and_one_with_more_is_noted(self) -> None:
        planned = plan(stream(), topic=topic(partitions=4), claim=claim())
        assert isinstance(planned, Refuse)
        planned = plan(stream(), topic=topic(partitions=8), claim=claim())
        assert isinstance(planned, Keep)
        assert "2 more partitions" in planned.note

    @pytest.mark.parametrize(
        ("spec", "reason"),
        [({"partitions": 3}, "PartitionsImmutable"), ({"topic": {"name": "elsewhere"}}, "TopicImmutable")],
    )
    def test_what_the_history_was_made_with_cannot_be_changed(self, spec: dict[str, Any], reason: str) -> None:
        planned = plan(stream(**spec), topic=topic(), claim=claim(uid=None, state="released"))
        assert isinstance(planned, Refuse)
        assert planned.reason == reason
        assert "spec." in planned.message

    def test_drift_of_managed_configs_is_undone_and_others_are_left(self) -> None:
        drifted = topic(
            config={"cleanup.policy": "compact", "retention.ms": "5", "segment.ms": "7", "follower.replication.x": "1"}
        )
        planned = plan(stream(topic={"config": {"retention.ms": "1000"}}), topic=drifted, claim=claim())
        assert planned == Keep(
            {"cleanup.policy": "delete", "retention.ms": "1000", "segment.ms": None, **MESSAGE_BYTES}
        )

    def test_a_topic_takes_whatever_the_event_store_accepts(self) -> None:
        asked = {"topic": None, "claim": None, "kafka_cluster": CLUSTER, "default_replicas": 1}
        planned = plan_topic(stream(), **asked, event_bytes=4 * 1024 * 1024)
        assert isinstance(planned, Create)
        assert int(planned.config["max.message.bytes"]) >= 6 * 1024 * 1024

    def test_a_topic_for_small_events_may_be_small(self) -> None:
        asked = {"topic": None, "claim": None, "kafka_cluster": CLUSTER, "default_replicas": 1}
        planned = plan_topic(stream(topic={"config": {"max.message.bytes": "100000"}}), **asked, event_bytes=32 * 1024)
        assert isinstance(planned, Create)
        assert planned.config["max.message.bytes"] == "100000"

    def test_an_unchanged_topic_needs_nothing(self) -> None:
        assert plan(stream(), topic=topic(), claim=claim()) == Keep({})

    def test_the_topic_is_named_after_the_stream_unless_the_spec_says_otherwise(self) -> None:
        assert eventstream.topic_name(stream()) == "shop.orders"
        assert eventstream.topic_name(stream(topic={"name": "other"})) == "other"


class TestEventTypes:
    def test_a_stream_without_events_takes_any(self) -> None:
        assert eventstream.event_types(stream()) is None

    def test_a_type_without_a_schema_takes_any_data(self) -> None:
        listed = [
            {"name": "Placed", "schema": {"type": "object"}},
            {"name": "Noted"},
            {"name": "Never", "schema": False},
        ]
        assert eventstream.event_types(stream(events=listed)) == {
            "Placed": {"type": "object"}, "Noted": True, "Never": False,
        }  # fmt: skip


def owner(**spec: Any) -> resources.Projection:
    metadata = {"namespace": "shop", "name": "status", "uid": "u-9", "generation": 4, "resourceVersion": "7"}
    return resources.projection({"metadata": metadata, "spec": {"streams": ["orders"], **spec}})


IMAGE = Image("refold/refold:1", "IfNotPresent")
BROKERS = kafka.Settings(kafka_bootstrap="kafka:9092").brokers()


def projector(resource: resources.Projection, *, store_dsn: str = "host=a") -> children.Manifest:
    secret = children.projector_secret(resource, "abc", store_dsn=store_dsn, readstore_dsn="host=b", kafka_files={})
    replicas = resource.spec.projector.replicas
    return children.projector(resource, "abc", image=IMAGE, brokers=BROKERS, secret=secret, replicas=replicas)


def query(resource: resources.Projection, *, store_dsn: str | None = None) -> children.Manifest:
    secret = children.query_secret(resource, readstore_dsn="host=b", store_dsn=store_dsn)
    account = {"metadata": {"name": "status-query", "uid": "u-1"}}
    return children.query(resource, image=IMAGE, secret=secret, account=account)


class TestManifests:
    def test_a_query_service_knows_the_event_store_where_rows_have_a_history(self) -> None:
        for store in (None, "host=a"):
            (container,) = query(owner(), store_dsn=store)["spec"]["template"]["spec"]["containers"]
            keys = {
                one["name"]: one["valueFrom"]["secretKeyRef"]["key"] for one in container["env"] if "valueFrom" in one
            }
            wanted = {"REFOLD_READSTORE_DSN": "readstore-dsn"}
            assert keys == (wanted if store is None else wanted | {"REFOLD_STORE_DSN": "store-dsn"})

    def test_a_projector_finds_its_kafka_credentials_where_its_variables_say(self, tmp_path: Path) -> None:
        brokers = kafka.Settings(
            kafka_bootstrap="kafka:9093", kafka_security_protocol="SASL_SSL", kafka_credentials=tmp_path
        ).brokers()
        files = {"username": "u", "password": "hunter2", "ca.crt": "CA"}
        secret = children.projector_secret(owner(), "abc", store_dsn="a", readstore_dsn="b", kafka_files=files)
        made = children.projector(owner(), "abc", image=IMAGE, brokers=brokers, secret=secret, replicas=1)
        pod = made["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        env = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert env["REFOLD_KAFKA_SECURITY_PROTOCOL"] == "SASL_SSL"
        assert env["REFOLD_KAFKA_SASL_MECHANISM"] == "SCRAM-SHA-512"
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        (volume,) = [v for v in pod["volumes"] if v["name"] == mounts[env["REFOLD_KAFKA_CREDENTIALS"]]]
        assert {item["path"] for item in volume["secret"]["items"]} == set(files), "no DSN is in the folder"
        assert volume["secret"]["secretName"] == secret["metadata"]["name"]
        assert "hunter2" not in str(made)

    def test_without_security_a_projector_has_no_kafka_credentials(self) -> None:
        pod = projector(owner())["spec"]["template"]["spec"]
        assert [volume["name"] for volume in pod["volumes"]] == ["tmp"]
        assert "REFOLD_KAFKA_CREDENTIALS" not in str(pod)

    def test_the_secret_for_consumers_belongs_to_the_stream(self) -> None:
        secret = children.consumer_secret(stream(), {"username": "u", "ca.crt": "CA"})
        assert secret["metadata"]["name"] == "orders-consumer"
        (reference,) = secret["metadata"]["ownerReferences"]
        assert (reference["kind"], reference["name"], reference["uid"]) == ("EventStream", "orders", "u-1")
        assert children.owned_by(secret, stream())
        assert base64.b64decode(secret["data"]["ca.crt"]) == b"CA"

    @pytest.mark.parametrize("manifest", [projector(owner()), query(owner())], ids=["projector", "query"])
    def test_pods_meet_the_restricted_standard(self, manifest: children.Manifest) -> None:
        pod = manifest["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 65532
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        ours = container["args"] == ["query"]
        assert (pod["automountServiceAccountToken"], pod.get("serviceAccountName")) == (
            (True, "status-query") if ours else (False, None)
        )
        assert {"livenessProbe", "readinessProbe", "startupProbe"} <= set(container)

    @pytest.mark.parametrize("manifest", [projector(owner()), query(owner())], ids=["projector", "query"])
    def test_replicas_are_spread_over_nodes_and_zones_each_deployments_by_themselves(
        self, manifest: children.Manifest
    ) -> None:
        spread = manifest["spec"]["template"]["spec"]["topologySpreadConstraints"]
        assert [each["topologyKey"] for each in spread] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
        assert all(each["labelSelector"] == manifest["spec"]["selector"] for each in spread)
        assert all(each["whenUnsatisfiable"] == "ScheduleAnyway" for each in spread), "one node is enough"

    @pytest.mark.parametrize("manifest", [projector(owner()), query(owner())], ids=["projector", "query"])
    def test_secrets_come_from_secrets_only(self, manifest: children.Manifest) -> None:
        (container,) = manifest["spec"]["template"]["spec"]["containers"]
        for variable in container["env"]:
            secret = variable["name"].endswith("_DSN")
            assert ("valueFrom" in variable) is secret, variable["name"]

    def test_a_projectors_environment_is_the_contract(self) -> None:
        manifest = projector(owner())
        (container,) = manifest["spec"]["template"]["spec"]["containers"]
        assert container["args"] == ["projector"]
        values = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert values == {
            "REFOLD_PROJECTION": "shop/status",
            "REFOLD_VERSION": "abc",
            "REFOLD_KAFKA_BOOTSTRAP": "kafka:9092",
            "REFOLD_STORE_DSN": None,
            "REFOLD_READSTORE_DSN": None,
            "REFOLD_PORT": "8080",
        }
        assert manifest["metadata"]["name"] == "status-projector-abc"

    def test_a_handlers_image_is_told_which_refold_it_has_to_go_together_with(self) -> None:
        secret = children.projector_secret(owner(), "abc", store_dsn="a", readstore_dsn="b", kafka_files={})
        image = Image("registry/acme:1", "Always")
        made = children.projector(
            owner(), "abc", image=image, brokers=BROKERS, secret=secret, replicas=1, installed=refold.__version__
        )
        (container,) = made["spec"]["template"]["spec"]["containers"]
        (plain,) = projector(owner())["spec"]["template"]["spec"]["containers"]
        installed = {"name": "REFOLD_INSTALLED", "value": refold.__version__}
        assert container == {
            **plain, "image": "registry/acme:1", "imagePullPolicy": "Always", "env": [*plain["env"], installed]
        }, "the same command, rights and probes as with Refold's own image"  # fmt: skip

    def test_a_version_runs_its_own_code_wherever_that_stands_now(self) -> None:
        one, two = (f"registry/acme@sha256:{digit * 64}" for digit in "12")
        moved = one.replace("registry", "mirror:5000")
        handler = Handler(image=one, function="acme:project")

        def image(spec: dict[str, Any]) -> str:
            found = projection.projector_image(owner(**spec), handler, IMAGE)
            assert found.pull_policy == IMAGE.pull_policy
            return found.name

        assert projection.projector_image(owner(), None, IMAGE) == IMAGE
        assert image({"handler": {"image": moved, "function": "acme:project"}}) == moved
        assert image({"handler": {"image": two, "function": "acme:project"}}) == one, "it is another version"
        assert image({"handler": {"image": moved, "function": "acme:other"}}) == one
        assert image({"handler": {"image": 7}}) == one, "a broken spec leaves what runs alone"
        assert image({}) == one

    def test_the_number_of_scaled_query_processes_is_their_autoscalers(self) -> None:
        scaling = {"minReplicas": 2, "maxReplicas": 5, "targetCPUUtilizationPercentage": 60}
        scaled = owner(query={"autoscaling": scaling})
        assert "replicas" not in query(scaled)["spec"]
        assert scaled.spec.query.scaling is not None
        made = children.query_autoscaler(scaled, scaled.spec.query.scaling)
        assert made["spec"]["scaleTargetRef"]["name"] == query(scaled)["metadata"]["name"]
        assert (made["spec"]["minReplicas"], made["spec"]["maxReplicas"]) == (2, 5)
        assert made["spec"]["metrics"][0]["resource"]["target"]["averageUtilization"] == 60
        assert children.owned_by(made, owner())
        stopped = owner(query={"replicas": 0, "autoscaling": scaling})
        assert query(stopped)["spec"]["replicas"] == 0
        assert stopped.spec.query.scaling is None

    def test_other_credentials_replace_the_pods(self) -> None:
        first, second = (
            projector(owner(), store_dsn=each)["spec"]["template"]["metadata"]["annotations"]
            for each in ("host=a", "host=c")
        )
        assert first != second

    def test_everything_is_owned_by_the_projection(self) -> None:
        for manifest in (projector(owner()), query(owner()), children.query_service(owner())):
            assert children.owned_by(manifest, owner())
            assert manifest["metadata"]["labels"][children.MANAGED_BY] == children.MANAGER
        stranger = owner().model_copy(update={"metadata": owner().metadata.model_copy(update={"uid": "u-8"})})
        assert not children.owned_by(query(stranger), owner())

    def test_the_service_finds_the_query_pods_and_no_projectors(self) -> None:
        selector = children.query_service(owner())["spec"]["selector"]
        assert selector.items() <= query(owner())["spec"]["template"]["metadata"]["labels"].items()
        assert not selector.items() <= projector(owner())["spec"]["template"]["metadata"]["labels"].items()

    def test_the_scale_selector_finds_the_versions_pods_only(self) -> None:
        selector = dict(part.split("=") for part in children.projector_selector(owner(), "abc").split(","))
        labels = projector(owner())["spec"]["template"]["metadata"]["labels"]
        assert selector.items() <= labels.items()
        assert selector[children.VERSION_LABEL] == "abc"

    def test_replicas_and_resources_come_from_the_spec(self) -> None:
        resource = owner(projector={"replicas": 3, "resources": {"requests": {"memory": "1Gi"}}})
        manifest = projector(resource)
        assert manifest["spec"]["replicas"] == 3
        (container,) = manifest["spec"]["template"]["spec"]["containers"]
        # a default limit below the request would be refused by the API server
        assert container["resources"]["requests"]["memory"] == "1Gi"
        assert "memory" not in container["resources"]["limits"]
        assert container["resources"]["requests"]["cpu"]

    def test_the_longest_names_fit_into_labels(self) -> None:
        resource = owner()
        long = resource.model_copy(update={"metadata": resource.metadata.model_copy(update={"name": "n" * 40})})
        manifest = children.projector(
            long, "0123abcd", image=IMAGE, brokers=BROKERS, replicas=1,
            secret=children.projector_secret(long, "0123abcd", store_dsn="", readstore_dsn="", kafka_files={}),
        )  # fmt: skip
        assert all(len(value) <= 63 for value in manifest["metadata"]["labels"].values())
        assert len(children.query_service(long)["metadata"]["name"]) <= 63

    def test_a_changed_child_is_told_from_a_changed_wish(self) -> None:
        applied = children.stamped(query(owner()))
        assert children.same_wish(applied, children.stamped(query(owner())))
        assert not children.same_wish(applied, children.stamped(query(owner(query={"replicas": 2}))))
        assert not children.same_wish(query(owner()), applied)

    def test_secrets_are_base64(self) -> None:
        secret = children.installation_secret("refold-system", "refold-relay", {"dsn": "host=é"})
        assert base64.b64decode(secret["data"]["dsn"]).decode() == "host=é"


class TestCovering:
    def test_what_the_api_server_adds_is_no_difference(self) -> None:
        assert covers({"a": 1, "b": [{"c": 2, "added": 3}], "added": {}}, {"a": 1, "b": [{"c": 2}]})

    @pytest.mark.parametrize(
        "live", [{}, {"a": 2, "b": []}, {"a": 1, "b": [1, 2]}, {"a": 1, "b": {"c": 1}}, {"a": 1, "b": None}]
    )
    def test_what_differs_is_a_difference(self, live: dict[str, Any]) -> None:
        assert not covers(live, {"a": 1, "b": [1]})


class TestConditions:
    NOW = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)

    def test_the_transition_time_stays_while_the_status_does(self) -> None:
        before = [{"type": "Ready", "status": "False", "reason": "A", "lastTransitionTime": "2020-01-01T00:00:00Z"}]
        (same,) = conditions([Condition("Ready", "False", "B", "m")], before=before, generation=3, now=self.NOW)
        assert same["lastTransitionTime"] == "2020-01-01T00:00:00Z"
        assert (same["reason"], same["observedGeneration"]) == ("B", 3)
        (other,) = conditions([Condition("Ready", "True", "B", "m")], before=before, generation=3, now=self.NOW)
        assert other["lastTransitionTime"] == "2026-01-02T03:04:05Z"

    def test_a_message_fits_into_the_schema(self) -> None:
        (condition,) = conditions([Condition("Ready", "True", "B", "m" * 9999)], before=[], generation=1, now=self.NOW)
        assert len(condition["message"]) == 4096

    def test_the_patch_leads_from_one_status_to_the_next(self) -> None:
        before = {"same": 1, "gone": 2, "inner": {"same": 1, "gone": 2}, "list": [1]}
        after = {"same": 1, "inner": {"same": 1, "new": 3}, "list": [2]}
        assert merge_patch(before, after) == {"gone": None, "inner": {"gone": None, "new": 3}, "list": [2]}
        assert merge_patch(after, after) == {}

    def test_numbers_alone_are_told_from_news(self) -> None:
        assert only_numbers_changed({"events": 1, "topic": "t"}, {"events": 2, "topic": "t"}, ["events"])
        assert not only_numbers_changed({"events": 1, "topic": "t"}, {"events": 2, "topic": "u"}, ["events"])


def version(name: str, **changes: Any) -> VersionStatus:
    values: dict[str, Any] = {
        "version": name, "live": False, "created_at": dt.datetime.now(dt.UTC), "parked": 0, "parked_error": None,
        "partitions": [partition()], "retired_at": None, "retired_seconds": None,
    }  # fmt: skip
    return VersionStatus(**{**values, **changes})


def partition(**changes: Any) -> PartitionStatus:
    values: dict[str, Any] = {
        "incarnation": "0" * 16, "partition": 0, "position": 10, "recorded_at": None, "head": 10, "lag_seconds": 0.0,
        "seen_at": dt.datetime.now(dt.UTC), "stopped": None,
    }  # fmt: skip
    return PartitionStatus(**{**values, **changes})


def deployment(name: str, *, wanted: int = 1, available: int = 1) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "generation": 1},
        "spec": {"replicas": wanted},
        "status": {
            "observedGeneration": 1, "replicas": wanted, "updatedReplicas": wanted, "availableReplicas": available,
        },
    }  # fmt: skip


def progress(*partitions: PartitionStatus) -> str:
    text: str = build_status(version("new", partitions=list(partitions)), None, None)["progress"]
    return text


def outcome(
    *,
    target: str | None = "new",
    live: str | None = "new",
    versions: list[VersionStatus] | None = None,
    deployments: list[dict[str, Any]] | None = None,
    problem: ReconcileError | None = None,
    resource: resources.Projection | None = None,
    behind: int = 0,
    pace: float | None = None,
) -> tuple[dict[str, Condition], projection.Result]:
    state = ProjectionStatus(
        live=live, versions={each.version: each for each in ([version("new")] if versions is None else versions)}
    )
    if deployments is None:
        deployments = [deployment("status-query"), deployment("status-projector-new")]
    result = projection._result(
        resource or owner(),
        target=target,
        state=state,
        deployments={each["metadata"]["name"]: each for each in deployments},
        problem=problem,
        found=[],
        behind=behind,
        pace=pace,
        scaling=[],
    )
    return {condition.type: condition for condition in result.conditions}, result


class TestProjectionStatus:
    def test_a_projection_that_serves_is_ready_and_nothing_else(self) -> None:
        found, result = outcome()
        assert {name: condition.status for name, condition in found.items()} == {
            "Ready": "True", "Available": "True", "Progressing": "False", "Degraded": "False",
        }  # fmt: skip
        assert result.status["live"] == {"version": "new"}
        assert result.status["lag"] == {"events": 0, "seconds": 0.0}
        assert result.status["replicas"] == 1
        assert result.status["url"] == "http://status-query.shop.svc"
        assert result.again is None
        assert not result.failed

    def test_the_former_version_serves_while_the_next_is_built(self) -> None:
        building = version("new", partitions=[partition(position=3)])
        found, result = outcome(
            live="old",
            versions=[version("old"), building],
            deployments=[deployment("status-query"), deployment("status-projector-old")],
        )
        assert found["Available"].status == "True"
        assert (found["Ready"].status, found["Ready"].reason) == ("False", "Building")
        assert found["Progressing"].status == "True"
        assert result.status["building"] == {"version": "new", "progress": "30%", "applied": 3, "events": 10}
        assert result.again is not None

    def test_the_pace_of_a_build_tells_how_long_the_rest_takes(self) -> None:
        building = version("new", partitions=[partition(position=3_000, head=10_000)])
        _, result = outcome(live="old", versions=[version("old"), building], pace=1999.6)
        assert result.status["building"] == {
            "version": "new", "progress": "30%", "applied": 3000, "events": 10_000, "eventsPerSecond": 2000,
            "remainingSeconds": 4,
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("building", "status", "says"),
        [
            (version("new", parked=3, parked_error="no field x"), {}, "3 of its events failed .* 1 of the live"),
            (version("new", discarded=3), {}, "3 of its events were discarded, 1 of the live .* change the definition"),
            (version("new", partitions=[partition(stopped="lacks position 7")]), {}, "lacks position 7"),
            (
                version("new"),
                {
                    "type": "Progressing",
                    "status": "False",
                    "reason": "ProgressDeadlineExceeded",
                    "message": "timed out",
                },
                "don't start: timed out",
            ),
            (
                version("new"),
                {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": "exceeded quota"},
                "exceeded quota",
            ),
        ],
    )
    def test_a_build_that_fails_is_said_and_leaves_the_live_version_available(
        self, building: VersionStatus, status: dict[str, str], says: str
    ) -> None:
        builder = deployment("status-projector-new")
        builder["status"]["conditions"] = [status] if status else []
        found, result = outcome(
            live="old",
            versions=[version("old", parked=1, parked_error="y"), building],
            deployments=[deployment("status-query"), deployment("status-projector-old"), builder],
        )
        assert found["Available"].status == "True"
        assert (found["Ready"].status, found["Ready"].reason) == ("False", "BuildFailed")
        assert re.search(says, found["Ready"].message)
        assert (found["Progressing"].status, found["Degraded"].status) == ("False", "True")
        assert result.again is not None, "it may go on: an event may be discarded, a quota raised"

    def test_as_many_parked_events_as_in_the_live_version_are_no_failure(self) -> None:
        versions = [version("old", parked=2, parked_error="y"), version("new", parked=2, parked_error="y")]
        assert outcome(live="old", versions=versions)[0]["Ready"].reason == "Building"

    def test_a_bad_definition_leaves_the_live_version_available(self) -> None:
        error = ReconcileError("Ready", "UnknownColumn", "spec.fold[0].set.x: there is no column x")
        found, result = outcome(target=None, problem=error)
        assert found["Available"].status == "True"
        assert (found["Ready"].status, found["Ready"].message) == ("False", "spec.fold[0].set.x: there is no column x")
        assert found["Degraded"].status == "True"
        assert result.failed

    def test_waiting_for_a_stream_is_progress_and_no_degradation(self) -> None:
        waits = ReconcileError("Ready", "StreamNotReady", "the EventStream shop/orders doesn't exist")
        found, result = outcome(target=None, live=None, versions=[], deployments=[], problem=waits)
        assert {name: condition.status for name, condition in found.items()} == {
            "Ready": "False", "Available": "False", "Progressing": "True", "Degraded": "False",
        }  # fmt: skip
        assert "live" not in result.status
        broken = ReconcileError("Ready", "UnknownColumn", "spec.fold[0].set.x: there is no column x")
        found, _ = outcome(target=None, live=None, versions=[], deployments=[], problem=broken)
        assert (found["Progressing"].status, found["Degraded"].status) == ("False", "True")

    def test_parked_events_and_stopped_partitions_are_degraded_but_serve(self) -> None:
        found, _ = outcome(versions=[version("new", parked=2, parked_error="no field x")])
        assert (found["Degraded"].reason, found["Ready"].status) == ("EventsParked", "True")
        assert "no field x" in found["Degraded"].message
        found, _ = outcome(versions=[version("new", partitions=[partition(stopped="too many parked")])])
        assert found["Degraded"].reason == "PartitionStopped"

    def test_as_of_a_moment_it_is_being_built_until_it_is_complete_and_then_needs_no_projector(self) -> None:
        resource = owner(asOf="2026-01-31T23:59:59Z")
        found, result = outcome(versions=[version("new", partitions=[partition(position=3)])], resource=resource)
        assert (found["Ready"].reason, found["Progressing"].status) == ("Building", "True")
        assert found["Available"].status == "True", "it serves what it has, with its lag"
        assert result.status["building"]["progress"] == "30%"
        ended = [deployment("status-query"), deployment("status-projector-new", wanted=0, available=0)]
        found, result = outcome(resource=resource, deployments=ended)
        assert (found["Ready"].status, found["Ready"].reason) == ("True", "Complete")
        assert "2026-01-31T23:59:59" in found["Ready"].message
        assert found["Progressing"].status == "False"
        assert "building" not in result.status

    def test_a_finished_version_needs_no_projectors_unless_events_are_parked(self) -> None:
        versions = {
            "done": version("done"),
            "parked": version("parked", parked=1, parked_error="no field x"),
            "short": version("short", partitions=[partition(position=9)]),
        }
        state = ProjectionStatus(live="done", versions=versions)
        assert projection._finished(owner(asOf="2026-01-31T23:59:59Z"), state) == {"done"}
        assert projection._finished(owner(), state) == set()

    def test_a_ttl_counts_from_the_creation(self) -> None:
        created = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
        metadata = {**owner().metadata.model_dump(by_alias=True), "creationTimestamp": "2026-01-01T00:00:00Z"}
        body = {"metadata": metadata, "spec": {"streams": ["orders"], "asOf": "2025-01-01T00:00:00Z", "ttl": "1h"}}
        left = projection.seconds_left(resources.projection(body), now=created + dt.timedelta(minutes=50))
        assert left == 600
        assert projection.seconds_left(owner(), now=created) is None

    def test_without_a_running_query_process_nothing_is_available(self) -> None:
        found, _ = outcome(deployments=[deployment("status-query", available=0), deployment("status-projector-new")])
        assert (found["Available"].status, found["Available"].reason) == ("False", "QueryStarting")
        assert found["Ready"].status == "False"
        found, _ = outcome(resource=owner(query={"replicas": 0}))
        assert found["Available"].reason == "ScaledToZero"

    def test_events_that_no_projector_has_seen_yet_are_looked_for_again_soon(self) -> None:
        unseen = [version("new", partitions=[partition(position=0, head=0, seen_at=None)])]
        found, result = outcome(versions=unseen, behind=7)
        assert found["Ready"].status == "True"
        assert result.again == 30
        assert outcome(versions=unseen)[1].again is None

    SERVED: ClassVar = {
        "url": "http://status-query.shop.svc", "live": {"version": "new"}, "lag": {"events": 3, "seconds": 0.5},
        "parked": 2, "replicas": 1, "selector": "a=b", "observedGeneration": 1,
        "building": {"version": "next", "progress": "50%"},
        "conditions": [{"type": "Available", "status": "True", "reason": "Serving", "message": "version new serves"}],
    }  # fmt: skip
    AWAY = ReconcileError("Ready", "ReadStoreUnreachable", "the read store (at db:5432) can't be reached: refused")

    def unseen(
        self, *deployments: dict[str, Any], status: dict[str, Any] = SERVED, looked: bool = True
    ) -> tuple[dict[str, Condition], projection.Result]:
        there = {each["metadata"]["name"]: each for each in deployments} if looked else None
        resource = owner().model_copy(update={"status": status})
        result = projection._unseen(resource, deployments=there, problem=self.AWAY)
        return {condition.type: condition for condition in result.conditions}, result

    def test_while_nobody_can_ask_the_read_store_what_was_known_stays_and_the_outage_is_named(self) -> None:
        found, result = self.unseen(deployment("status-query"), deployment("status-projector-new", wanted=4))
        kept = {name: value for name, value in self.SERVED.items() if name not in ("conditions", "observedGeneration")}
        assert result.status == {**kept, "replicas": 4}
        assert result.failed
        assert (found["Available"].status, found["Ready"].status) == ("True", "False")
        assert {condition.reason for condition in found.values()} == {"ReadStoreUnreachable"}
        assert all("db:5432" in condition.message for condition in found.values())

    def test_without_a_query_process_the_outage_is_the_reason_why_nothing_is_available(self) -> None:
        found, _ = self.unseen(deployment("status-query", available=0))
        assert (found["Available"].status, found["Available"].reason) == ("False", "ReadStoreUnreachable")
        found, _ = self.unseen()
        assert (found["Available"].status, found["Available"].reason) == ("False", "ReadStoreUnreachable")
        found, result = self.unseen(status={})
        assert (found["Available"].status, found["Available"].reason) == ("False", "ReadStoreUnreachable")
        assert "live" not in result.status
        found, _ = outcome(deployments=[deployment("status-query", available=0)], problem=self.AWAY)
        assert found["Available"].reason == "ReadStoreUnreachable"

    def test_where_the_processes_cannot_be_seen_either_available_stays_as_it_was(self) -> None:
        found, result = self.unseen(looked=False)
        assert found["Available"] == Condition("Available", "True", "Serving", "version new serves")
        assert result.status["replicas"] == 1
        found, _ = self.unseen(looked=False, status={})
        assert found["Available"].status == "Unknown"

    def test_a_projector_that_does_not_start_is_not_ready_unless_none_is_wanted(self) -> None:
        starting = [deployment("status-query"), deployment("status-projector-new", available=0)]
        assert outcome(deployments=starting)[0]["Ready"].reason == "ProjectorStarting"
        stopped = [deployment("status-query"), deployment("status-projector-new", wanted=0, available=0)]
        found, _ = outcome(deployments=stopped, resource=owner(projector={"replicas": 0}))
        assert found["Ready"].status == "True"
        assert found["Progressing"].status == "False"

    def test_progress_is_never_complete_before_every_partition_was_seen(self) -> None:
        unseen = [partition(), partition(partition=1, position=0, head=0, seen_at=None)]
        assert progress(*unseen) == "99%"
        assert progress(partition(position=0, head=0)) == "100%"
        assert progress(partition(position=0, head=0, seen_at=None)) == "0%"

    def test_what_the_live_version_saw_counts_until_the_builds_own_look(self) -> None:
        unseen = version("new", partitions=[partition(position=0, head=0, seen_at=None)])
        assert build_status(unseen, version("old"), None)["events"] == 10
        assert build_status(unseen, version("old"), None)["progress"] == "0%"

    def test_a_kept_version_is_told_with_its_end_and_looked_at_then(self) -> None:
        at = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
        versions = [version("new"), version("old", retired_at=at, retired_seconds=90.0)]
        _, result = outcome(versions=versions, resource=owner(keepPrevious="2m"))
        assert result.status["previous"] == {"version": "old", "keptUntil": "2026-01-02T03:06:05Z"}
        assert result.again == 30
        _, result = outcome(versions=versions, resource=owner(keepPrevious="1m"))
        assert "previous" not in result.status


HOUR = dt.timedelta(hours=1)


def retired(name: str, seconds: float) -> VersionStatus:
    at = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=seconds)
    return version(name, retired_at=at, retired_seconds=seconds)


def planned(
    *versions: VersionStatus, target: str | None, live: str | None, running: set[str] | None = None
) -> projection.Versions:
    state = ProjectionStatus(live=live, versions={one.version: one for one in versions})
    return plan_versions(target=target, state=state, running=running or set(), keep_previous=HOUR)


class TestVersions:
    def test_the_live_and_the_wanted_version_stay_and_all_others_go(self) -> None:
        plan = planned(version("a"), version("b"), version("c"), target="c", live="a", running={"a", "x"})
        assert (plan.keep, plan.drop) == ({"a", "c"}, {"b", "x"})
        assert planned(target="c", live=None).keep == {"c"}

    def test_the_version_before_the_live_one_is_kept_for_a_while(self) -> None:
        plan = planned(retired("a", 3599), version("b"), target="b", live="b")
        assert (plan.keep, plan.drop) == ({"a", "b"}, frozenset())
        assert plan.previous is not None
        assert plan.previous.version == "a"
        plan = planned(retired("a", 3601), version("b"), target="b", live="b")
        assert (plan.keep, plan.drop, plan.previous) == ({"b"}, {"a"}, None)

    def test_only_the_last_one_is_kept_so_that_edits_in_a_row_do_not_pile_up(self) -> None:
        plan = planned(retired("a", 20), retired("b", 10), version("c"), target="c", live="c")
        assert (plan.keep, plan.drop) == ({"b", "c"}, {"a"})

    def test_going_back_keeps_both_and_nothing_is_dropped_that_may_become_wanted(self) -> None:
        plan = planned(retired("a", 20), version("b"), target="a", live="b")
        assert (plan.keep, plan.drop) == ({"a", "b"}, frozenset())
        plan = planned(retired("a", 4000), version("b"), target="a", live="b")
        assert plan.keep == {"a", "b"}, "it is wanted, however long ago it was live"

    def test_while_nobody_knows_what_is_wanted_only_what_was_live_long_ago_goes(self) -> None:
        plan = planned(retired("a", 4000), version("b"), version("c"), target=None, live="b", running={"b", "c"})
        assert (plan.keep, plan.drop) == ({"b"}, {"a"})


class TestPaces:
    KEY = ("shop", "status")

    def at(self, position: int, name: str = "new") -> VersionStatus:
        return version(name, partitions=[partition(position=position)])

    def test_a_pace_is_known_from_the_second_look_on_and_is_that_of_the_last_half_minute(self) -> None:
        paces = Paces()
        assert paces.see(self.KEY, self.at(0), now=100) is None
        assert paces.see(self.KEY, self.at(2000), now=102) == 1000
        for second in range(104, 200, 2):
            pace = paces.see(self.KEY, self.at(2000 + 10 * (second - 102)), now=second)
        assert pace == pytest.approx(10)
        assert paces.see(self.KEY, self.at(4000), now=1198) == pytest.approx(1, rel=0.1), "a look a long time after"

    def test_another_version_and_another_projection_have_paces_of_their_own(self) -> None:
        paces = Paces()
        paces.see(self.KEY, self.at(500), now=100)
        assert paces.see(self.KEY, self.at(100, "other"), now=102) is None
        assert paces.see(("shop", "else"), self.at(600), now=102) is None
        assert paces.see(self.KEY, None, now=103) is None
        assert paces.see(self.KEY, self.at(200, "other"), now=104) is None


class TestCredentials:
    def test_a_password_depends_on_the_key_and_the_login(self) -> None:
        key = b"k" * 32
        assert credentials.password(key, "a") == credentials.password(key, "a")
        assert len({credentials.password(each, name) for each in (key, b"l" * 32) for name in "ab"}) == 4
        assert len(credentials.password(key, "a")) >= 43

    def test_keys_are_random(self) -> None:
        assert credentials.new_key() != credentials.new_key()
        assert len(credentials.new_key()) == 32

    def test_a_login_goes_the_administrators_way(self) -> None:
        made = dsn.login("postgresql://admin:s%20ecret@db:6543/shop?sslmode=require&passfile=/x", "us er", "p'w")
        assert conninfo_to_dict(made) == {
            "host": "db", "port": "6543", "dbname": "shop", "sslmode": "require", "user": "us er", "password": "p'w",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("admin", "uri"),
        [
            ("postgresql://a:b@db:6543/sh%20op", "postgresql://u%40s:p%2Fw@db:6543/sh%20op"),
            ("host=db dbname=shop sslmode=verify-full", "postgresql://u%40s:p%2Fw@db:5432/shop?sslmode=verify-full"),
            ("host=one,two port=1 dbname=shop", "postgresql://u%40s:p%2Fw@one:1,two:1/shop"),
            ("host=::1 dbname=shop", "postgresql://u%40s:p%2Fw@[::1]:5432/shop"),
        ],
    )
    def test_a_login_is_told_to_workloads_entry_by_entry_and_as_a_uri(self, admin: str, uri: str) -> None:
        made = dsn.login(admin, "u@s", "p/w")
        told = dsn.binding(made)
        assert told["uri"] == uri
        with_port = {**conninfo_to_dict(made), "port": told["port"]}
        assert {name: str(value) for name, value in conninfo_to_dict(uri).items()} | {"port": told["port"]} == with_port
        assert (told["username"], told["password"], told["database"]) == ("u@s", "p/w", with_port["dbname"])

    @pytest.mark.parametrize("wrong", ["nonsense", "postgresql://db", "dbname=x", "postgresql:///x"])
    def test_a_dsn_that_cannot_work_is_refused_without_being_told(self, wrong: str) -> None:
        with pytest.raises(ValidationError) as refused:
            Settings(
                store_admin_dsn=wrong, readstore_admin_dsn=wrong, kafka_bootstrap="k", image="i", namespace="n",
            )  # type: ignore[arg-type]  # fmt: skip
        assert wrong not in str(refused.value)
        assert "secret" not in str(refused.value)

    def test_an_administrator_is_given_as_a_value_or_as_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "dsn"
        file.write_text("postgresql://a:b@db/store\n")
        others = {
            "kafka_bootstrap": "k",
            "image": "i",
            "namespace": "n",
            "readstore_admin_dsn": "postgresql://a:b@db/read",
        }
        settings = Settings(store_admin_dsn_file=file, **others)  # type: ignore[arg-type]
        assert settings.store_admin() == "postgresql://a:b@db/store"
        file.write_text("postgresql://a:c@db/store")
        assert settings.store_admin() == "postgresql://a:c@db/store"
        assert settings.redis_admin is None
        both = {"store_admin_dsn": "postgresql://a:b@db/other", "store_admin_dsn_file": file}
        assert Settings(**both, **others).store_admin() == "postgresql://a:c@db/store"  # type: ignore[arg-type]
        for given, said in (
            ({}, "REFOLD_STORE_ADMIN_DSN is missing"),
            ({"store_admin_dsn_file": tmp_path / "none"}, "No such file"),
        ):
            with pytest.raises(ValidationError, match=said):
                Settings(**given, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"kafka_security_protocol": "SASL_SSL", "kafka_credentials": "x"}, "PROJECTOR_CREDENTIALS"),
        ({"kafka_security_protocol": "SSL", "kafka_manage_users": True}, "SCRAM"),
        ({"kafka_manage_acls": True}, "RELAY_PRINCIPAL"),
        ({"kafka_manage_acls": True, "kafka_relay_principal": "User:relay"}, "PROJECTOR_PRINCIPAL"),
    ],
)
def test_access_that_cant_be_managed_is_refused_at_the_start(settings: dict[str, Any], missing: str) -> None:
    with pytest.raises(ValidationError, match=missing):
        AccessSettings(kafka_bootstrap="kafka:9092", **settings)


class TestPaused:
    NOW = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)

    @pytest.mark.parametrize(
        ("spec", "annotations", "why"),
        [
            ({}, {}, None),
            ({"paused": True}, {}, "spec.paused"),
            ({"paused": False}, {"refold.dev/paused": "false"}, None),
            ({}, {"refold.dev/paused": "true"}, "refold.dev/paused is true"),
            ({}, {"refold.dev/paused": ""}, "refold.dev/paused is there"),
        ],
    )
    def test_the_spec_or_the_annotation_pauses(
        self, spec: dict[str, Any], annotations: dict[str, str], why: str | None
    ) -> None:
        resource = owner(**spec)
        metadata = resource.metadata.model_copy(update={"annotations": annotations})
        found = resources.why_paused(resource.model_copy(update={"metadata": metadata}))
        assert (found is None) if why is None else (why in str(found))

    def test_what_was_known_stays_and_nobody_knows_whether_it_is_as_specified(self) -> None:
        kept = {
            "type": "Available", "status": "True", "reason": "Serving", "message": "m", "observedGeneration": 0,
            "lastTransitionTime": "2020-01-01T00:00:00Z",
        }  # fmt: skip
        before = {"observedGeneration": 0, "live": {"version": "new"}, "conditions": [{**kept, "type": "Ready"}, kept]}
        after = controller.paused(before, owner(), "spec.paused is true", now=self.NOW)
        assert after["live"] == {"version": "new"}
        assert after["observedGeneration"] == 4
        ready, available, progressing = after["conditions"]
        assert (ready["type"], ready["status"], ready["observedGeneration"]) == ("Ready", "Unknown", 4)
        assert ready["lastTransitionTime"] == "2026-01-02T03:04:05Z"
        assert available == kept, "it is about the generation that was looked at"
        assert (progressing["type"], progressing["status"]) == ("Progressing", "False")
        assert controller.paused(after, owner(), "spec.paused is true", now=self.NOW) == after
