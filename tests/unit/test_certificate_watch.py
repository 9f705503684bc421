"""When a certificate ends: a metric and a warning, which goes when another one is there."""

import time
from datetime import timedelta

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from gradwire.certs.authority import Authority
from gradwire.certs.members import issue
from gradwire_protocol.certificate_watch import CertificateWatch
from gradwire_protocol.credentials import OwnCertificate
from gradwire_protocol.roles import Role

METRIC = "gradwire_certificate_expiry_timestamp_seconds"
RENEWAL = "gradwire_certificate_renewal_timestamp_seconds"


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "authority")


def test_the_metric_follows_the_files(authority):
    registry = CollectorRegistry()
    own = OwnCertificate(issue(authority, role=Role.CLIENT, name="a", life=timedelta(days=2)))
    CertificateWatch(own, registry)
    first = registry.get_sample_value(METRIC)
    assert first == own.current().info.not_after.timestamp()
    renewal = registry.get_sample_value(RENEWAL)
    # Of a short life the last quarter, and it began five minutes ago.
    assert first - renewal == pytest.approx(0.25 * (2 * 86400 + 300), abs=60)
    assert renewal == own.current().info.due_at.timestamp()
    issue(authority, role=Role.CLIENT, name="a", life=timedelta(days=5))
    assert registry.get_sample_value(METRIC) - first == pytest.approx(3 * 86400, abs=5)


def test_it_warns_while_another_is_due(authority):
    # Due in its last quarter: most of its life is the five minutes before it was made.
    own = OwnCertificate(issue(authority, role=Role.CLIENT, name="a", life=timedelta(seconds=60)))
    with capture_logs() as logs:
        watch = CertificateWatch(own, CollectorRegistry(), look_seconds=0.02, warn_seconds=0.2)
        watch.start()
        deadline = time.monotonic() + 10
        while len(logs) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert {log["event"] for log in logs} == {"this service's certificate ends soon"}
        assert logs[0]["name"] == "a"
        issue(authority, role=Role.CLIENT, name="a", life=timedelta(days=5))
        deadline = time.monotonic() + 10
        while logs[-1]["event"] != "TLS files were replaced" and time.monotonic() < deadline:
            time.sleep(0.01)
        count = len(logs)
        time.sleep(0.5)
        assert len(logs) == count
        watch.stop()
        watch.stop()
