"""What stands in certificates: addresses, names, roles, and when another one is due."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from gradwire_protocol.certificates import (
    CertificateInfo,
    alternative_names,
    checked_host,
    checked_name,
    read_certificates,
)
from gradwire_protocol.errors import SettingsError
from gradwire_protocol.roles import Role, Served
from gradwire_protocol.service_names import names_host, service_name

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def info(life: timedelta, left: timedelta) -> CertificateInfo:
    return CertificateInfo(
        role=Role.STAGE,
        name="a",
        addresses=(),
        not_before=NOW + left - life,
        not_after=NOW + left,
        fingerprint="",
    )


def test_a_servers_addresses_stand_there_twice():
    names = alternative_names(Role.PARAMETER, ["GPU-1.lab", "10.0.0.7", "[::1]", "10.0.0.7"])
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://gradwire/role/parameter"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["10.0.0.7", "::1"]
    assert names.get_values_for_type(x509.DNSName) == [
        "gpu-1.lab",
        "gpu-1.lab.stage-service.gradwire.invalid",
        "10.0.0.7.stage-service.gradwire.invalid",
        "0000-0000-0000-0000-0000-0000-0000-0001.stage-service.gradwire.invalid",
    ]


def test_a_client_serves_nothing():
    names = alternative_names(Role.CLIENT, ["laptop"])
    assert names.get_values_for_type(x509.DNSName) == ["laptop"]


@pytest.mark.parametrize("host", ["localhost", "gpu-1.lab", "10.0.0.7", "*.gpu.svc", "::1", "_grpc.lab", "a" * 63])
def test_hosts(host):
    assert checked_host(host) == host


@pytest.mark.parametrize(
    "host",
    [
        "",
        "a b",
        "host:80",
        "-a",
        "a..b",
        "*",
        "a.*.b",
        "a/b",
        "spiffe://gradwire/role/client",
        "x" * 64,
        "a." * 120 + "a",
        "host\n",
        "10.0.0.7.coordinator-service.gradwire.invalid",
        "10.0.0.7.Coordinator-Service.Gradwire.INVALID",
    ],
)
def test_other_text_is_no_host(host):
    with pytest.raises(SettingsError, match="Not an address"):
        checked_host(host)


@given(st.text(max_size=80))
def test_no_text_that_passes_for_a_host_names_a_service_or_a_role(text):
    try:
        host = checked_host(text)
    except SettingsError:
        return
    assert not host.endswith(".gradwire.invalid")
    assert "/" not in host


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "x" * 65, "-a", "a\n", "é"])
def test_names_are_fit_for_folders(name):
    with pytest.raises(SettingsError, match="Not a name"):
        checked_name(name)


def test_names_of_services():
    assert service_name("Coordinator.lab", Served.COORDINATOR) == "coordinator.lab.coordinator-service.gradwire.invalid"
    assert service_name("::1", Served.STAGE).startswith("0000-0000-")


def test_hosts_among_a_certificates_names():
    names = ["gpu-1.lab", "10.0.0.7", "*.gpu.svc", "::1"]
    for host in ("GPU-1.lab", "gpu-1.lab.", "10.0.0.7", "pod-3.gpu.svc", "0:0:0:0:0:0:0:1"):
        assert names_host(names, host), host
    for host in ("gpu-2.lab", "10.0.0.70", "gpu.svc", "a.b.gpu.svc", "lab", "", "*.gpu"):
        assert not names_host(names, host), host


@pytest.mark.parametrize(
    ("life_days", "due_days"),
    [(365, 36.5), (90, 9), (30, 7), (28, 7), (10, 2.5), (1, 0.25)],
)
def test_another_is_due_in_time(life_days, due_days):
    life = timedelta(days=life_days)
    assert not info(life, timedelta(days=due_days + 0.01)).is_due(NOW)
    assert info(life, timedelta(days=due_days - 0.01)).is_due(NOW)


def test_what_is_not_valid_now_is_told():
    day = timedelta(days=1)
    info(10 * day, day).check_valid("It", NOW)
    with pytest.raises(SettingsError, match="expired"):
        info(10 * day, -day).check_valid("It", NOW)
    with pytest.raises(SettingsError, match="not valid yet"):
        info(day, 10 * day).check_valid("It", NOW)


@pytest.mark.parametrize("pem", [b"", b"nothing", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_told(pem):
    with pytest.raises(SettingsError, match="the file holds no certificate"):
        read_certificates(pem, "the file")
