"""PodMonitors, alerts and dashboard of the chart: that they ask for metrics which the processes really have."""

import functools
import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import refold
import refold_operator
import yaml
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase

from tests.charts import CHART, EMBEDDED, NAMESPACE, ROOT, Manifest, at, merged, one, pods, refusal, render

SCRAPED = merged(EMBEDDED, at("networkPolicy.metricsFrom", [{"namespaceSelector": {}}]))
PARTS = ("podMonitors", "alerts", "dashboard")
ALL = merged(SCRAPED, *(at(f"monitoring.{part}.enabled", True) for part in PARTS))
FILES = CHART / "files" / "monitoring"
SAMPLES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


@functools.cache
def exposed() -> dict[str, tuple[str, frozenset[str]]]:
    """Return type and labels of all samples that Refold's modules, once imported, have in Prometheus' registry."""
    for package in (refold, refold_operator):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    found = {}
    for metric in list(REGISTRY._collector_to_names):
        if isinstance(metric, MetricWrapperBase):
            for suffix in SAMPLES[metric._type]:
                more = {"le"} if suffix == "_bucket" else set()
                found[f"{metric._name}{suffix}"] = metric._type, frozenset({*metric._labelnames, *more})
    return found


@functools.cache
def target_labels() -> set[str]:
    """Return the labels that every sample gets from where it was scraped."""
    ours = {"namespace", "pod", "container"}  # prometheus-operator's
    for monitor in render(ALL):
        if monitor["kind"] == "PodMonitor":
            (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
            ours |= {relabeling["targetLabel"] for relabeling in endpoint.get("relabelings", [])}
    return ours


def rules(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rule for group in groups for rule in group["rules"]]


def board() -> dict[str, Any]:
    result: dict[str, Any] = json.loads((FILES / "dashboard.json").read_text())
    return result


def panels() -> list[dict[str, Any]]:
    return [panel for panel in board()["panels"] if panel["type"] != "row"]


def asked() -> list[Any]:
    """Return every expression of alerts and dashboard, parsed, with the alert's or panel's name."""
    groups = yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"]
    texts = [(rule["alert"], rule["expr"]) for rule in rules(groups)]
    texts += [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]
    result = []
    for name, text in texts:
        text = text.replace("$__rate_interval", "5m").replace("$stream", ".*")
        try:
            result.append(pytest.param(promql_parser.parse(text), id=f"{name}: {text[:40]}"))
        except ValueError as error:
            pytest.fail(f"{name}: {text}: {error}")
    return result


def below(expression: Any) -> Iterator[Any]:
    """Yield an expression and all that it is made of."""
    yield expression
    for name in ("lhs", "rhs", "expr", "vector_selector", "args"):
        part = getattr(expression, name, None)
        for each in part if isinstance(part, list) else [part]:
            if each is not None:
                yield from below(each)


def selectors(expression: Any) -> list[Any]:
    return [each for each in below(expression) if isinstance(each, promql_parser.VectorSelector)]


@pytest.fixture(params=asked())
def expression(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_it_asks_for_metrics_and_labels_that_are_exposed(expression: Any) -> None:
    assert selectors(expression)
    for selector in selectors(expression):
        assert selector.name in exposed()
        _, labels = exposed()[selector.name]
        assert {matcher.name for matcher in selector.matchers.matchers} <= labels | target_labels()
    for aggregation in below(expression):
        if isinstance(aggregation, promql_parser.AggregateExpr) and aggregation.modifier is not None:
            for selector in selectors(aggregation.expr):
                assert set(aggregation.modifier.labels) <= exposed()[selector.name][1] | target_labels()


def test_it_takes_rates_of_what_counts_and_of_nothing_else(expression: Any) -> None:
    in_ranges = [
        each.vector_selector.name for each in below(expression) if isinstance(each, promql_parser.MatrixSelector)
    ]
    for selector in selectors(expression):
        counts = exposed()[selector.name][0] != "gauge"
        assert counts == (selector.name in in_ranges), selector.name


def test_a_value_that_an_expression_filters_by_is_one_that_there_is() -> None:
    asked_reasons = {"Overloaded", "Unavailable", "InvalidData", "UnknownType"}
    errors = importlib.import_module("refold.eventstore.errors")
    assert asked_reasons == {
        value
        for parameter in asked()
        for selector in selectors(parameter.values[0])
        if selector.name == "refold_refused_appends_total"
        for matcher in selector.matchers.matchers
        for value in matcher.value.split("|")
    }
    assert all(hasattr(errors, f"{reason}Error") for reason in asked_reasons)


# --- alerts ---


def alerts(*layers: dict[str, Any]) -> list[dict[str, Any]]:
    return rules(one(render(merged(ALL, *layers)), "PrometheusRule", "refold-alerts")["spec"]["groups"])


def test_every_alert_says_what_is_wrong_how_bad_it_is_and_where_what_to_do_stands() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names)
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs" / "alerts.md").read_text(), re.MULTILINE)
    assert headings == names, "docs/alerts.md has a chapter for each, in this order"
    for rule in alerts():
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["runbook_url"] == f"docs/alerts.md#{rule['alert'].lower()}"


def test_an_alerts_text_names_only_labels_that_its_expression_leaves() -> None:
    for rule in alerts():
        outer = promql_parser.parse(rule["expr"])
        while isinstance(outer, promql_parser.BinaryExpr):
            outer = outer.lhs
        modifier = getattr(outer, "modifier", None)
        left = set(modifier.labels) if modifier is not None else set()
        used = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        assert used <= left, rule["alert"]


def test_the_runbook_is_found_where_the_values_say() -> None:
    first, *_ = alerts(at("monitoring.alerts.runbook", "https://runbooks.example/refold"))
    assert first["annotations"]["runbook_url"] == "https://runbooks.example/refold#refoldoperatorgone"


def test_without_a_webhook_nobody_is_called_since_it_is_gone() -> None:
    left = {rule["alert"] for rule in alerts()} - {rule["alert"] for rule in alerts(at("webhook.enabled", False))}
    assert left == {"RefoldWebhookGone", "RefoldWebhookCertificate", "RefoldReviewsFail"}


# --- dashboard ---


def test_grafanas_sidecar_finds_the_dashboard_by_its_label() -> None:
    found = one(render(ALL), "ConfigMap", "refold-dashboard")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(found["data"]["refold.json"]) == board()


def test_the_dashboards_panels_have_ids_of_their_own_and_places_that_do_not_overlap() -> None:
    everything = board()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_dashboard_asks_the_data_source_that_is_chosen_and_for_streams_that_there_are() -> None:
    source, stream = board()["templating"]["list"]
    assert source["type"] == "datasource"
    for panel in panels():
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {f"${{{source['name']}}}"}
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", stream["query"]["query"]).groups()  # type: ignore[union-attr]
    assert label in exposed()[metric][1]


# --- PodMonitors ---


def child(component: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/part-of": "refold", "app.kubernetes.io/managed-by": "refold-operator",
        "app.kubernetes.io/component": component,
    }  # fmt: skip


def chosen(monitor: Manifest, labels: dict[str, str]) -> bool:
    selector = monitor["spec"]["selector"]
    (among,) = selector["matchExpressions"]
    assert among["operator"] == "In"
    return selector["matchLabels"].items() <= labels.items() and labels.get(among["key"]) in among["values"]


def test_each_process_is_scraped_once_with_a_token_where_it_asks_for_one() -> None:
    manifests = render(ALL)
    monitors = [manifest for manifest in manifests if manifest["kind"] == "PodMonitor"]
    running = {name.split("/")[1]: pod["metadata"]["labels"] for name, pod in pods(manifests)}
    running |= {component: child(component) for component in ("projector", "query")}
    scraped = {}
    for name, labels in running.items():
        found = [monitor for monitor in monitors if chosen(monitor, labels)]
        if found:
            (monitor,) = found
            (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
            assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")
            scraped[name] = "authorization" in endpoint, "namespaceSelector" in monitor["spec"]
    assert scraped == {
        "refold-operator": (False, False), "refold-relay": (False, False), "refold-webhook": (False, False),
        "refold-eventstore": (True, False), "projector": (False, True), "query": (True, True),
    }  # fmt: skip


def test_prometheus_token_may_read_metrics_and_nothing_else() -> None:
    manifests = render(ALL)
    endpoints = [monitor["spec"]["podMetricsEndpoints"][0] for monitor in manifests if monitor["kind"] == "PodMonitor"]
    tokens = [endpoint["authorization"] for endpoint in endpoints if "authorization" in endpoint]
    assert tokens == [{"credentials": {"name": "refold-metrics", "key": "token"}}] * 2
    secret = one(manifests, "Secret", "refold-metrics")
    assert secret["type"] == "kubernetes.io/service-account-token"
    account = secret["metadata"]["annotations"]["kubernetes.io/service-account.name"]
    (binding,) = [
        manifest
        for manifest in manifests
        if manifest["kind"].endswith("Binding")
        and account in [subject["name"] for subject in manifest.get("subjects", [])]
    ]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}]
    role = one(manifests, binding["roleRef"]["kind"], binding["roleRef"]["name"])
    assert role["rules"] == [{"nonResourceURLs": ["/metrics"], "verbs": ["get"]}]


def test_who_scrapes_must_be_let_in() -> None:
    message = refusal(merged(EMBEDDED, at("monitoring.podMonitors.enabled", True)))
    assert "networkPolicy.metricsFrom is missing" in message
    render(merged(EMBEDDED, at("monitoring.podMonitors.enabled", True), at("networkPolicy.enabled", False)))


def test_nothing_of_it_is_made_where_nobody_asks() -> None:
    kinds = {"PodMonitor", "PrometheusRule"}
    assert not [m for m in render(EMBEDDED) if m["kind"] in kinds or m["metadata"]["name"].startswith("refold-metrics")]
    assert "refold-dashboard" not in [m["metadata"]["name"] for m in render(EMBEDDED)]
