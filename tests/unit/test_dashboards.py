"""Dashboards are what their builder makes, ask only for what services export, and are fit to be looked at."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from dashboard_queries import DASHBOARDS, filled_in, load, panel_queries, panels
from exported_metrics import label_names, pages
from prometheus_tools import ALERTS, CONFIGURATION, DOCKER

BUILDER = DOCKER / "grafana/build_dashboards.py"
NAMES = ("communication", "overview", "pipeline")
# What Prometheus itself has, and what it adds to each sample.
OF_PROMETHEUS = {"up": {"job", "instance"}, "ALERTS": {"alertname", "alertstate"}}
ADDED = {"job", "instance"}


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def known_labels() -> dict[str, set[str]]:
    """The labels of every series that there can be, by name, recorded ones included."""
    known = {name: labels | ADDED for name, labels in label_names(pages().values()).items()} | OF_PROMETHEUS
    of_server = {"run", "stage", "replica", "shard"} | ADDED
    return known | {rule["record"]: of_server for rule in rules() if "record" in rule}


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    found = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        elif isinstance(node, promql_parser.MatrixSelector):
            visit(node.vector_selector)
        for part in ("expr", "lhs", "rhs", "param"):
            below = getattr(node, part, None)
            if isinstance(below, promql_parser.Expr):
                visit(below)
        for below in getattr(node, "args", ()):
            visit(below)

    visit(promql_parser.parse(expression))
    return found


def unknown(expression: str, known: dict[str, set[str]]) -> list[str]:
    """What an expression asks for that is never there."""
    found = selectors(expression)
    wrong = [selector.name for selector in found if selector.name not in known]
    for selector in found:
        labels = {matcher.name for matcher in selector.matchers.matchers}
        wrong += [f"{selector.name}{{{label}}}" for label in labels - known.get(selector.name, labels)]
    return wrong


def test_the_committed_dashboards_are_what_the_builder_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, BUILDER, tmp_path], check=True, timeout=120)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(made) == sorted(path.name for path in DASHBOARDS.iterdir()) == [f"{name}.json" for name in NAMES]
    for name, content in made.items():
        assert content == (DASHBOARDS / name).read_bytes(), f"{name} is stale: run `make dashboards`"


def test_panels_ask_for_series_that_services_export() -> None:
    known = known_labels()
    asked = panel_queries()
    assert len(asked) > 40
    assert {str(query): unknown(query.expression, known) for query in asked if unknown(query.expression, known)} == {}


def test_alerts_and_rules_ask_for_series_that_services_export() -> None:
    known = known_labels()
    for rule in rules():
        assert selectors(rule["expr"])
        assert unknown(rule["expr"], known) == []


def test_a_wrong_name_and_a_wrong_label_are_noticed() -> None:
    known = known_labels()
    assert unknown("sum(rate(gradwire_step_total[1m])) / 2", known) == ["gradwire_step_total"]
    assert unknown('max(gradwire_loss{runs="a"}) or vector(0)', known) == ["gradwire_loss{runs}"]
    with pytest.raises(ValueError):
        selectors("sum by (run (gradwire_loss)")


def test_variables_are_filled_from_series_that_services_export() -> None:
    known = known_labels()
    for name, dashboard in load().items():
        variables = {item["name"]: item for item in dashboard["templating"]["list"]}
        assert {"datasource", "run"} <= set(variables), name
        assert variables.pop("datasource")["query"] == "prometheus"
        for variable in variables.values():
            asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert asked is not None
            (selector,) = selectors(filled_in(asked[1]))
            assert asked[2] in known[str(selector.name)]
            assert variable["includeAll"]
            assert variable["allValue"] == ".+"


def test_a_panel_says_what_it_means_and_in_which_unit() -> None:
    for name, dashboard in load().items():
        for panel in panels(dashboard):
            where = f"{name}, {panel['title']}"
            assert len(panel["description"]) > 40, where
            assert panel["datasource"]["uid"] == "${datasource}", where
            assert panel["fieldConfig"]["defaults"]["unit"], where
            assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"]), where
            refs = [target.get("refId") for target in panel["targets"]]
            assert len(refs) == len(set(refs)), where
            if panel["type"] != "stat":
                assert all(target["legendFormat"] for target in panel["targets"]), where


def test_panels_fill_rows_and_lie_on_nobody() -> None:
    for name, dashboard in load().items():
        taken: dict[tuple[int, int], str] = {}
        for panel in dashboard["panels"]:
            place = panel["gridPos"]
            for cell in itertools.product(
                range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
            ):
                assert taken.setdefault(cell, panel["title"]) == panel["title"], f"{name}: {panel['title']}"
        height = 1 + max(y for _, y in taken)
        assert set(taken) == set(itertools.product(range(24), range(height))), f"{name} has holes"
        numbers = [panel["id"] for panel in dashboard["panels"]]
        assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize(
    ("series", "alert", "sign"),
    [
        ("stage:gradwire_utilisation:ratio_rate5m", "GradwireStageUnderused", "<"),
        ("stage:gradwire_bubble:ratio_rate5m", "GradwireBubbleLarge", ">"),
        ("stage:gradwire_communication:ratio_rate5m", "GradwireCommunicationHeavy", ">"),
        ("gradwire_run_still_seconds", "GradwireRunStalled", ">="),
    ],
)
def test_colours_change_where_alerts_fire(series: str, alert: str, sign: str) -> None:
    (expression,) = [rule["expr"] for rule in rules() if rule.get("alert") == alert]
    limit = float(re.fullmatch(rf".*{re.escape(series)}.* {sign} ([\d.]+)\s*", expression)[1])  # type: ignore[index]
    # Charts are shaded where it is not fine; figures and bars are green where it is.
    fine = {"green", "transparent"}
    found = [
        panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        for dashboard in load().values()
        for panel in panels(dashboard)
        if any(series in target["expr"] for target in panel["targets"])
    ]
    assert found
    for below, beyond in found:
        bad, good = (below, beyond) if sign == "<" else (beyond, below)
        assert bad["color"] == "red"
        assert good["color"] in fine
        assert beyond["value"] == limit


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    provisioning = DOCKER / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert (source["type"], source["url"], source["isDefault"]) == ("prometheus", "http://prometheus:9090", True)
    scrape = yaml.safe_load(CONFIGURATION.read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape
    (provider,) = yaml.safe_load((provisioning / "dashboards/gradwire.yml").read_text())["providers"]
    assert (provider["type"], provider["options"]["path"]) == ("file", "/var/lib/grafana/dashboards")
