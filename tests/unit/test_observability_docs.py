"""What docs/observability.md says of metrics, rules and alerts is all there is, and right."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from exported_metrics import label_names, metric_types, pages
from gradwire_stage import timeline
from gradwire_stage.metrics import KINDS
from prometheus_tools import ALERTS

TEXT = (Path(__file__).parents[2] / "docs/observability.md").read_text()


def documented(heading: str) -> dict[str, tuple[str, set[str]]]:
    """Types and labels of the metrics of a table, by name."""
    lines = re.findall(r"^\| `(gradwire_\w+)` \| (\w+) \| ([^|]*)\|([^|]*)\| (.+) \|$", section(heading), re.M)
    assert all(meaning for *_, meaning in lines)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _, _ in lines}


def section(heading: str) -> str:
    return TEXT.split(f"**{heading}**")[1].split("\n**")[0].split("\n## ")[0]


def exported(service: str) -> dict[str, tuple[str, set[str]]]:
    page = pages()[service]
    labels = label_names([page])
    return {
        name: (kind, labels[f"{name}_count" if kind == "histogram" else name])
        for name, kind in metric_types(page).items()
    }


def test_every_metric_is_documented_with_its_type_and_labels() -> None:
    everywhere = documented("On every service")
    for service, heading in (("coordinator", "On the coordinator"), ("stage server", "On stage and parameter servers")):
        assert everywhere | documented(heading) == exported(service)


def test_units_are_those_of_the_names() -> None:
    found = re.findall(r"^\| `gradwire_(\w+?)(?:_total)?` \| \w+ \|[^|]*\| ([^|]*?) ?\|", TEXT, re.M)
    assert len(found) > 30
    for name, unit in found:
        if name.endswith("timestamp_seconds"):
            assert unit == "Unix time"
        elif (suffix := name.rpartition("_")[2]) in ("seconds", "bytes", "ratio"):
            assert unit == suffix, name


def test_every_alert_and_every_recorded_share_is_documented() -> None:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    alerts = {rule["alert"]: rule for rule in rules if "alert" in rule}
    found = re.findall(r"^\| `(Gradwire\w+)` \| ([^|]+) \| (\w+) \| ([^|]+) \|$", TEXT, re.M)
    assert {name: severity for name, _, severity, _ in found} == {
        name: rule["labels"]["severity"] for name, rule in alerts.items()
    }
    for name, when, _, _ in found:
        minutes = {"10m": "10 min", "1m": "1 min", "1h": "1 h"}.get(alerts[name]["for"], "")
        assert minutes in when, name
        for limit in re.findall(r"[<>]=? (0\.\d|30)$", alerts[name]["expr"].strip()):
            assert limit in when, name
    assert all(f"`{rule['record']}`" in TEXT for rule in rules if "ratio" in rule.get("record", ""))


def test_every_phase_reason_and_kind_is_named() -> None:
    for word in (*timeline.BUSY, *timeline.IDLE):
        assert re.search(rf"^\| .*`{word}`.* \|", TEXT, re.M), word
    kinds = TEXT.split("`kind` is what")[1].split("\n\n")[0]
    assert set(re.findall(r'"(\w+)"', kinds)) - {"none"} == set(KINDS.values())
