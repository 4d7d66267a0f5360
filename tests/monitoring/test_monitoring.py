"""Prometheus, its rules and Grafana's dashboard: valid by their own tools, and asked over a real server."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.monitoring.prometheus import MISSING, MONITORING, PROMETHEUS, PROMTOOL, Prometheus
from tests.monitoring.queries import DASHBOARD, Query, for_prometheus, of_dashboard, of_rules, panels
from tests.monitoring.scene import scene
from tpray.serving.load import REASONS
from tpray.serving.metrics import METRICS
from tpray.serving.metrics import MISSING as REPLICAS_MISSING

HERE = Path(__file__).parent
README = (HERE.parents[1] / "README.md").read_text()
QUERIES = [*of_dashboard(), *of_rules()]
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason=MISSING)

OF_PROMETHEUS = {"up", "ALERTS"}
ALWAYS = {"model", "replica", "instance", "job"}
"""The labels that each sample has: two of tpray's, two of Prometheus's."""


def promtool(*arguments: str | Path) -> str:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def declared() -> dict[str, set[str]]:
    """The labels of each series that a scrape, or a rule, brings."""
    found = {REPLICAS_MISSING: ALWAYS} | dict.fromkeys(OF_PROMETHEUS, ALWAYS | {"alertname", "alertstate"})
    for metric in METRICS:
        labels = ALWAYS | set(metric.labels)
        if metric.kind == "histogram":
            found |= {
                f"{metric.name}_bucket": labels | {"le"},
                f"{metric.name}_sum": labels,
                f"{metric.name}_count": labels,
            }
        else:
            found[metric.name] = labels
    recorded = {query.of for query in of_rules() if ":" in query.of}
    return found | dict.fromkeys(recorded, ALWAYS | {"rank"})


def named(expr: str) -> set[str]:
    """The series that a query names."""
    bare = re.sub(r"#.*", "", expr)
    bare = re.sub(r'"[^"]*"|\[[^]]*\]|\{[^}]*\}', " ", bare)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    names = set(re.findall(r"[a-zA-Z_][\w:]*", bare))
    words = {"by", "without", "on", "and", "or", "unless", "offset", "bool", *re.findall(r"(\w+)\s*\(", bare)}
    return {name for name in names - words if not re.fullmatch(r"e\d+|\d\w*|h|m|s", name)}


def labels_of(expr: str) -> set[str]:
    """The labels that a query selects or groups by."""
    chosen = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expr)
    grouped = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", expr)
    return set(chosen) | {label.strip() for labels in grouped for label in labels.split(",") if label.strip()}


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.of)
def test_queries_name_only_what_is_declared(query: Query) -> None:
    series = named(query.expr)
    assert series
    assert series <= declared().keys()
    known = set().union(*(declared()[name] for name in series))
    assert labels_of(query.expr) <= known
    assert set(re.findall(r"{{(\w+)}}", query.legend)) <= known


def test_reasons_and_kinds_are_those_that_there_are() -> None:
    """A misspelt value matches nothing, and its alert would never fire."""
    reasons = {reason for _, reason in REASONS}
    for query in QUERIES:
        for values in re.findall(r'reason=~?"([^"]+)"', query.expr):
            assert set(values.split("|")) <= reasons, query.of
        assert set(re.findall(r'dialect!?="([^"]+)"', query.expr)) <= {"none"}


def test_every_metric_is_watched() -> None:
    """On the dashboard or by an alert; what is not says why."""
    seen = {re.sub("_(bucket|sum|count)$", "", name) for query in QUERIES for name in named(query.expr)}
    not_needed = {
        "tpray_rows_total", "tpray_steps_total",  # the histogram of rows of steps has both
        "tpray_tokens_total",  # tokens of steps are shown; these are for the bill of a key
        "tpray_steps_halved_total",  # says nothing that the refusals of its rows do not
    }  # fmt: skip
    assert {metric.name for metric in METRICS} - seen == not_needed


@needs_promtool
def test_the_configuration_and_each_variant_of_it_are_valid(tmp_path: Path) -> None:
    """Also with the lines that are comments, which are for keys, TLS, Ray and an Alertmanager."""
    text = (MONITORING / "prometheus.yml").read_text()
    assert "1 rule files found" in promtool("check", "config", "--lint=all", MONITORING / "prometheus.yml")
    uncommented = re.sub(r"^(\s*)#(?! \S)", r"\1", text, flags=re.M)
    config = yaml.safe_load(uncommented)
    assert [job["job_name"] for job in config["scrape_configs"]] == ["tpray", "ray", "haproxy"]
    assert {"authorization", "scheme", "tls_config"} <= config["scrape_configs"][0].keys()
    assert config["alerting"]
    (tmp_path / "key").write_text("a-key")
    for name in ("/etc/prometheus/tpray.key", "/etc/prometheus/ca.pem"):
        uncommented = uncommented.replace(name, str(tmp_path / "key"))
    (tmp_path / "alerts.yml").write_text((MONITORING / "alerts.yml").read_text())
    (tmp_path / "prometheus.yml").write_text(uncommented)
    promtool("check", "config", "--syntax-only", tmp_path / "prometheus.yml")


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", MONITORING / "alerts.yml")
    promtool("test", "rules", HERE / "alerts_test.yml")


def test_each_alert_fires_in_a_test_and_is_in_the_readme() -> None:
    alerts = [query.of for query in of_rules() if ":" not in query.of]
    tested = (HERE / "alerts_test.yml").read_text()
    assert [name for name in alerts if f'alertname="{name}"' not in tested] == []
    section = README.partition("## Watching it: Prometheus and Grafana")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(Tpray\w+)`", section, re.M) == alerts


def test_the_dashboard_is_one_of_grafana() -> None:
    """Grafana's own types keep each field of it: an unknown one they would drop."""
    sdk = pytest.importorskip("grafana_foundation_sdk", reason="the extra `clients` is not installed")
    assert sdk
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    written = json.loads(DASHBOARD.read_text())
    read = json.loads(json.dumps(Dashboard.from_json(written), cls=JSONEncoder))
    assert lost(written, read) == []
    ids = [panel["id"] for panel in written["panels"]]
    assert len(ids) == len(set(ids))
    assert [each["name"] for each in written["templating"]["list"]] == [
        "datasource",
        "server",
        "model",
        "replica",
        "key",
    ]


def lost(written: Any, read: Any, path: str = "") -> list[str]:
    """The fields of one JSON that are not, or not so, in another; ``read`` may have more."""
    if isinstance(written, dict) and isinstance(read, dict):
        return [bad for key, value in written.items() for bad in lost(value, read.get(key), f"{path}.{key}")]
    if isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        return [bad for i, pair in enumerate(zip(written, read, strict=True)) for bad in lost(*pair, f"{path}[{i}]")]
    return [] if written == read else [path]


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in panels():
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            assert taken.setdefault(cell, panel["title"]) == panel["title"]


def test_grafana_finds_what_compose_gives_it() -> None:
    """The compose file is one by the specification; what it mounts is there; ports, pace and paths agree."""
    compose_spec = pytest.importorskip("compose_spec", reason="the extra `clients` is not installed")
    text = (MONITORING / "compose.yaml").read_text()
    compose_spec.PyCompose.from_yaml(text)
    services = yaml.safe_load(text)["services"]
    mounts: dict[str, str] = {}
    for service in services.values():
        assert service["network_mode"] == "host", "a server on the loopback is reached from there alone"
        assert re.fullmatch(r"\w+/\w+:v?\d+\.\d+\.\d+", service["image"]), "a version"
        for source, target, *_ in (volume.split(":") for volume in service["volumes"]):
            if source.startswith("./"):
                assert (MONITORING / source).exists()
                mounts[target] = source
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    environment = services["grafana"]["environment"]
    assert environment["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    provisioning = MONITORING / mounts["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://127.0.0.1:9090"
    scrape_interval = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape_interval
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "tpray.yaml").read_text())["providers"]
    home = environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{DASHBOARD.name}"
    assert (MONITORING / mounts[provider["options"]["path"]] / DASHBOARD.name).exists()
    rule_files = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["rule_files"]
    assert {f"/etc/prometheus/{name}" for name in rule_files} <= mounts.keys()


RUN_S = 30
"""How much time is asked for."""


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[Prometheus]:
    """Prometheus over a server that has lost a rank, and was busy and refused requests."""
    with scene(tmp_path_factory.mktemp("watched"), free_port(), free_port(), every_s=2) as found:
        found.restart()
        found.traffic(8)
        yield found.prometheus


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(PROMETHEUS is None, reason=MISSING)
def test_prometheus_answers_every_query_over_a_real_server(watched: Prometheus) -> None:
    """Each has an answer; but an alert has none while nothing is wrong, and alerts_test.yml tests these."""

    def ask(query: Query) -> list[Any]:
        return watched.value(for_prometheus(query.expr, watched.every_s, RUN_S))

    rules = [rule for group in watched.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {query.of for query in of_rules()}
    assert [rule["lastError"] for rule in rules if rule.get("lastError")] == []
    for query in QUERIES:
        ask(query)  # no error
    needed = [query for query in QUERIES if not query.of.startswith("Tpray")]
    give_up = time.monotonic() + 60
    while empty := [query.of for query in needed if not ask(query)]:
        assert time.monotonic() < give_up, empty  # a slow machine is late with a scrape, and a rate needs two
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"][1:]:
        series, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
        values = watched.ask(f"label/{label}/values", **{"match[]": for_prometheus(series, watched.every_s, RUN_S)})
        assert values, variable["name"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(PROMETHEUS is None, reason=MISSING)
def test_prometheus_has_seen_what_happened(watched: Prometheus) -> None:
    def now(query: str) -> float:
        (found,) = watched.value(query)
        return float(found["value"][1])

    assert now("sum(tpray_group_restarts_total)") == 1
    assert now("sum(tpray_group_up)") == 1
    assert now('sum(tpray_refusals_total{reason="unauthorized"})') > 1
    assert now('sum(tpray_refusals_total{reason="overloaded"})') > 1
    for name in ("shop", "reports"):
        assert now(f'sum(tpray_requests_total{{key="{name}", status="200"}})') > 1
    assert now("count(tpray_rank_memory_bytes > 1e7)") == 2
    assert now("count(tpray_rank_wait_seconds_total > 0)") == 2
