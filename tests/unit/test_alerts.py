"""Alerts fire beyond their thresholds and not before, say what to do, and watch every service of a deployment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from exported_metrics import pages
from prometheus_tools import ALERTS, CONFIGURATION, promtool

TESTS = ALERTS.with_name("alerts_test.yml")


def rules(kind: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def test_the_configuration_is_valid() -> None:
    said = promtool("check", "config", CONFIGURATION)
    assert "1 rule files found" in said
    assert f"{len(rules('alert')) + len(rules('record'))} rules found" in said


def test_alerts_fire_beyond_their_thresholds_and_not_before() -> None:
    promtool("test", "rules", TESTS)


@pytest.mark.parametrize(
    ("number", "other"),
    [
        ("< 0.8", "< 0.805"),
        ("< 0.8", "< 0.785"),
        ("> 0.1\n", "> 0.095\n"),
        ("> 0.1\n", "> 0.106\n"),
        ("> 0.3", "> 0.295"),
        ("> 0.3", "> 0.315"),
        (">= 30", ">= 31"),
        (">= 30", ">= 29"),
        ('role="stage"', 'role=~".+"'),
        ("for: 1m", "for: 0s"),
        ("for: 1m", "for: 2m"),
        ("for: 10m", "for: 9m"),
        ("for: 10m", "for: 11m"),
        ("increase(gradwire_servers_lost_total[10m])", "gradwire_servers_lost_total"),
    ],
)
def test_the_tests_of_alerts_notice_another_threshold(number: str, other: str, tmp_path: Path) -> None:
    text = ALERTS.read_text()
    assert number in text
    (tmp_path / ALERTS.name).write_text(text.replace(number, other))
    (tmp_path / TESTS.name).write_text(TESTS.read_text())
    with pytest.raises(AssertionError, match="FAILED"):
        promtool("test", "rules", tmp_path / TESTS.name)


def test_each_alert_is_seen_to_fire_and_not_to_fire() -> None:
    seen = {
        (case["alertname"], bool(case["exp_alerts"]))
        for test in yaml.safe_load(TESTS.read_text())["tests"]
        for case in test["alert_rule_test"]
    }
    assert seen == {(rule["alert"], fires) for rule in rules("alert") for fires in (True, False)}


def test_each_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for rule in rules("alert"):
        assert rule["alert"].startswith("Gradwire")
        assert re.fullmatch(r"\d+(s|m|h)", rule["for"]), rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert len(rule["annotations"]["description"]) > 100, rule["alert"]


def test_recorded_names_say_level_metric_and_operation() -> None:
    for rule in rules("record"):
        assert re.fullmatch(r"[a-z_]+:gradwire_[a-z_]+:(ratio_)?rate5m", rule["record"])


def test_every_service_is_scraped_and_servers_are_found_by_name() -> None:
    jobs = {job["job_name"]: job for job in yaml.safe_load(CONFIGURATION.read_text())["scrape_configs"]}
    assert jobs["gradwire-coordinator"]["static_configs"] == [{"targets": ["coordinator:9464"]}]
    for role in ("stage-server", "parameter-server"):
        (found,) = jobs[f"gradwire-{role}"]["dns_sd_configs"]
        assert (found["names"], found["type"], found["port"]) == ([role], "A", 9464)
    assert "prometheus" in jobs


def test_pages_follow_the_rules_for_names() -> None:
    """With every metric set; those of real services are in tests/integration/test_dashboards_live.py."""
    for page in pages().values():
        assert promtool("check", "metrics", page=page) == ""
    wrong = "# HELP gradwire_wrong Wrong.\n# TYPE gradwire_wrong counter\ngradwire_wrong 1\n"
    with pytest.raises(AssertionError, match="_total"):
        promtool("check", "metrics", page=wrong)
