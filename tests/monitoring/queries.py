"""What the dashboard and the rules ask of Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from tests.monitoring.prometheus import MONITORING

DASHBOARD = MONITORING / "grafana" / "dashboards" / "tpray.json"


@dataclass(frozen=True)
class Query:
    """Of a panel or a rule, by its title or name. legend: Grafana's, with {{label}}. panel: all that the panel says."""

    of: str
    expr: str
    legend: str = ""
    panel: dict[str, Any] = field(default_factory=dict, repr=False)


def panels() -> list[dict[str, Any]]:
    """Those of the dashboard, in its order; those that only head a row are left out."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def of_dashboard() -> Iterator[Query]:
    for panel in panels():
        for target in panel["targets"]:
            yield Query(panel["title"], target["expr"], target["legendFormat"], panel)


def of_rules() -> Iterator[Query]:
    for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield Query(rule.get("alert", rule.get("record")), rule["expr"])


def for_prometheus(expr: str, every_s: int, range_s: int) -> str:
    """A query as Grafana sends it, where all is chosen in each list.

    Args:
        every_s: how often Prometheus scrapes; a rate spans four of these. range_s: how much time is shown.
    """
    known = {"__rate_interval": f"{4 * every_s}s", "__range": f"{range_s}s"}
    return re.sub(r"\$(\w+)", lambda found: known.get(found[1], ".*"), expr)
