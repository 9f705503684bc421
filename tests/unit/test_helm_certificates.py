"""Certificates, by cert-manager or by hand, name exactly the addresses at which the chart's services are dialled."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

import certificate_issuer
from gradwire.certs.authority import Authority
from gradwire.cli.app import app
from gradwire_protocol.channels import parse_address
from gradwire_protocol.credentials import OwnCertificate
from gradwire_protocol.roles import SERVED_BY, Role, role_of
from gradwire_protocol.service_names import names_host, service_name
from gradwire_protocol.tls_files import TlsFiles
from helm_chart import CERT_MANAGER, Rendered, needs_helm, rendered

pytestmark = needs_helm

SERVERS = (Role.STAGE, Role.PARAMETER)
PARAMETERS = {"parameter": {"replicas": 3}}
IN_FOLDER = {"authority": "ca.crt", "certificate": "tls.crt", "key": "tls.key"}


@pytest.fixture(scope="module")
def chart() -> Rendered:
    return rendered({**CERT_MANAGER, **PARAMETERS})


def certificates(chart: Rendered) -> Mapping[Role, dict]:
    return {role_of(each["spec"]["uris"]): each["spec"] for each in chart.of_kind("Certificate")}


def hosts(chart: Rendered, role: Role) -> list[str]:
    """Return the hosts that a role's services advertise: each pod its own, by its host name."""
    pod = chart.pod(role)
    if role is Role.COORDINATOR:
        return [parse_address(pod.environment["GRADWIRE_COORDINATOR_ADVERTISE"])[0]]
    template = pod.environment["GRADWIRE_STAGE_ADVERTISE"]
    name = pod.owner["metadata"]["name"]
    # A pod's host name is its own name: the set's, and a number.
    names = [f"{name}-{number}" for number in range(pod.owner["spec"]["replicas"])]
    return [parse_address(template.replace("{hostname}", each))[0] for each in names]


def test_each_role_has_one(chart: Rendered) -> None:
    assert set(certificates(chart)) == {Role.COORDINATOR, Role.STAGE, Role.PARAMETER, Role.CLIENT}
    assert set(certificates(rendered(CERT_MANAGER))) == {Role.COORDINATOR, Role.STAGE, Role.CLIENT}


def test_advertised_hosts_have_the_names_that_dns_gives_to_pods(chart: Rendered) -> None:
    """Kubernetes: POD.SERVICE.NAMESPACE.svc for the pods of a headless service, SERVICE.NAMESPACE.svc for others."""
    for role in SERVERS:
        stateful = chart.pod(role).owner
        service, name = stateful["spec"]["serviceName"], stateful["metadata"]["name"]
        replicas = stateful["spec"]["replicas"]
        assert hosts(chart, role) == [f"{name}-{number}.{service}.training.svc" for number in range(replicas)]
    (service,) = [each for each in chart.of_kind("Service") if each["metadata"]["name"].endswith("coordinator")]
    assert hosts(chart, Role.COORDINATOR) == [f"{service['metadata']['name']}.training.svc"]


@pytest.mark.parametrize("role", [Role.COORDINATOR, *SERVERS])
def test_certificates_name_what_is_advertised(chart: Rendered, role: Role) -> None:
    names = certificates(chart)[role]["dnsNames"]
    for host in hosts(chart, role):
        # What the coordinator compares with a registration, and what gRPC compares when somebody dials.
        assert names_host(names, host)
        assert names_host(names, service_name(host, SERVED_BY[role]))
        # No other role is served there, and no other service's pods are named.
        for other in set(SERVED_BY.values()) - {SERVED_BY[role]}:
            assert not names_host(names, service_name(host, other))
    for stranger in ("x.training.svc", "lab-gradwire-stage-0.lab-gradwire-stage.other.svc", "training.svc"):
        assert not names_host(names, stranger)


def test_a_client_serves_nothing(chart: Rendered) -> None:
    client = certificates(chart)[Role.CLIENT]
    assert client.get("dnsNames", []) == []
    assert "server auth" not in client["usages"]
    for role in (Role.COORDINATOR, *SERVERS):
        assert {"server auth", "client auth"} <= set(certificates(chart)[role]["usages"])


def commands(notes: str, program: str) -> list[Sequence[str]]:
    return [shlex.split(line) for line in notes.splitlines() if line.strip().startswith(program + " ")]


def extensions(pem: bytes) -> tuple[set[x509.GeneralName], set[x509.ObjectIdentifier], str]:
    certificate = x509.load_pem_x509_certificate(pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    return set(names), set(usages), certificate.subject.rfc4514_string()


def test_made_by_hand_as_the_notes_say_they_are_the_same(
    chart: Rendered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = rendered(PARAMETERS).notes
    monkeypatch.chdir(tmp_path)
    for command in commands(notes, "gradwire"):
        ran = CliRunner().invoke(app, command[1:])
        assert ran.exit_code == 0, (command, ran.output)
    secrets: dict[str, dict[str, Path]] = {}
    for command in commands(notes, "kubectl"):
        if "secret" not in command:
            continue
        files = [flag.removeprefix("--from-file=").split("=") for flag in command if flag.startswith("--from-file=")]
        secrets[command[command.index("generic") + 1]] = {key: Path(path) for key, path in files}
    authority = Authority.open(tmp_path / "ca")
    assert len(secrets) == 4
    for resource in chart.of_kind("Certificate"):
        made = secrets[resource["spec"]["secretName"]]
        assert set(made) == set(IN_FOLDER.values())
        issued = certificate_issuer.issue(resource, authority, tmp_path / resource["metadata"]["name"])
        assert extensions(made["tls.crt"].read_bytes()) == extensions((issued / "tls.crt").read_bytes())
        assert made["ca.crt"].read_bytes() == (issued / "ca.crt").read_bytes()
        files = TlsFiles(**{part: made[key] for part, key in IN_FOLDER.items()})
        assert OwnCertificate(files).current().info.role == role_of(resource["spec"]["uris"])


def test_services_read_what_cert_manager_writes(
    chart: Rendered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority.create(tmp_path / "ca")
    # In a pod, the files are root's, and the service runs as another user.
    monkeypatch.setattr("os.geteuid", lambda: 10001)
    for resource in chart.of_kind("Certificate"):
        role = role_of(resource["spec"]["uris"])
        folder = certificate_issuer.issue(resource, authority, tmp_path / str(role))
        pod = chart.pod(role) if role is not Role.CLIENT else rendered({"trainer": {"enabled": True}}).pod(role)
        paths = {name: value for name, value in pod.environment.items() if "_TLS_" in name}
        files = TlsFiles(
            **{
                part: Path(pod.placed(next(v for n, v in paths.items() if n.endswith(part.upper())), {"certs": folder}))
                for part in IN_FOLDER
            }
        )
        assert files.key_exposure() == ""
        info = OwnCertificate(files).current().info
        assert (info.role, info.name) == (role, resource["spec"]["commonName"])
        # Renewed before the service warns of its end.
        renewed = resource["spec"]["renewBefore"].removesuffix("h")
        assert not info.is_due(info.not_after - timedelta(hours=int(renewed)))
