"""The chart brings the alerts and dashboards that compose uses, byte for byte, to where an operator looks for them."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

import yaml

from helm_chart import CHART, MONITORING, ROOT, VALUE_SETS, ask_helm, needs_helm, rendered, request, selects

pytestmark = needs_helm

PROMETHEUS = ROOT / "docker/prometheus"
DASHBOARDS = ROOT / "docker/grafana/dashboards"
# What a ConfigMap may hold.
LARGEST_BYTES = 2**20


def test_rules_are_those_of_compose() -> None:
    (rules,) = rendered(MONITORING).of_kind("PrometheusRule")
    assert rules["spec"] == yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
    assert rules["metadata"]["labels"]["release"] == "prometheus"


def test_dashboards_are_those_of_compose() -> None:
    maps = rendered(MONITORING).of_kind("ConfigMap")
    files = sorted(DASHBOARDS.glob("*.json"))
    assert files
    held = {name: text for each in maps for name, text in each["data"].items()}
    assert held.keys() == {file.name for file in files}
    for file in files:
        assert held[file.name].rstrip("\n") == file.read_text().rstrip("\n")
        json.loads(held[file.name])
    for each in maps:
        assert len(json.dumps(each)) < LARGEST_BYTES
        assert each["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert each["metadata"]["annotations"] == {"grafana_folder": "Gradwire"}


def test_each_service_is_found_under_the_job_that_alerts_ask_for() -> None:
    chart = rendered({**MONITORING, "parameter": {"replicas": 1}})
    (monitor,) = chart.of_kind("ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    found = [
        service
        for service in chart.of_kind("Service")
        if selects(monitor["spec"]["selector"], service["metadata"]["labels"])
    ]
    assert found == chart.of_kind("Service")
    assert monitor["spec"]["namespaceSelector"]["matchNames"] == ["training"]
    for service in found:
        assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    jobs = {service["metadata"]["labels"][monitor["spec"]["jobLabel"]] for service in found}
    scraped = {job["job_name"] for job in yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]}
    assert jobs == {job for job in scraped if job.startswith("gradwire-")}
    asked = re.findall(r'job=~"([^"]+)"', (PROMETHEUS / "alerts.yml").read_text())
    assert asked
    assert all(re.fullmatch(pattern, job) for pattern in asked for job in jobs)


def test_nothing_of_it_unless_asked_for() -> None:
    assert rendered({}).of_kind("ServiceMonitor", "PrometheusRule", "ConfigMap") == []


def test_a_packaged_chart_is_whole(tmp_path: Path) -> None:
    """The files are links to where they are kept; an archive holds what they lead to."""
    packed = {**request({}, do="package"), "destination": str(tmp_path)}
    (answer,) = ask_helm([packed])
    archive = Path(answer["result"])
    with tarfile.open(archive) as content:
        assert not any(member.issym() or member.islnk() for member in content)
        text = content.extractfile("gradwire/files/alerts.yml")
        assert text is not None
        assert text.read() == (PROMETHEUS / "alerts.yml").read_bytes()
    whole = VALUE_SETS["everything"]
    assert rendered(whole, chart=archive).documents == rendered(whole).documents
    assert (CHART / "files/alerts.yml").is_symlink()
