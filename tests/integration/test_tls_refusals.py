"""Connections that must not come about, or not do anything: told quickly, and as what they are."""

from __future__ import annotations

import dataclasses
import socket
import ssl
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from coordinator_cluster import Cluster
from odd_certificates import DAY, careless_channel, odd
from structlog.testing import capture_logs

import gradwire
from gradwire.certs.authority import Authority
from gradwire.certs.members import issue
from gradwire_protocol.channels import MAXIMUM_MESSAGE_BYTES, open_channel
from gradwire_protocol.errors import (
    GradwireError,
    LimitExceeded,
    NotAllowed,
    SettingsError,
    Unreachable,
    from_rpc_error,
)
from gradwire_protocol.roles import ROLE_PREFIX, Role, Served
from gradwire_protocol.serving import Service, ServiceSettings
from gradwire_protocol.tls_files import TlsFiles
from gradwire_protocol.v1 import coordinator_pb2, coordinator_pb2_grpc

QUICK_SECONDS = 5.0


class Answers(coordinator_pb2_grpc.CoordinatorServiceServicer):
    def GetStatus(self, request: Any, context: Any) -> coordinator_pb2.GetStatusReply:
        return coordinator_pb2.GetStatusReply(version="here")


class Site:
    """An authority, a coordinator that answers, and certificates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.create(folder / "authority")
        self.client = self.issue(Role.CLIENT)
        self.service = self.serve(self.issue(Role.COORDINATOR), role=Role.COORDINATOR)
        self.address = self.service.address

    def issue(self, role: Role, name: str = "", addresses: tuple[str, ...] = ("127.0.0.1",)) -> TlsFiles:
        return issue(self.authority, role=role, name=name or str(role), addresses=addresses)

    def serve(self, tls: TlsFiles | None, role: Role | None = None) -> Service:
        service = Service("coordinator", ServiceSettings(metrics_listen="", tls=tls, role=role))
        coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(Answers(), service.server)
        service.start()
        return service


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("site"))
    yield made
    made.service.stop(0.0)


def refusal(channel: Any) -> GradwireError:
    """Return the typed error of a call, which must come quickly."""
    began = time.monotonic()
    with channel, pytest.raises(grpc.RpcError) as caught:
        coordinator_pb2_grpc.CoordinatorServiceStub(channel).GetStatus(coordinator_pb2.GetStatusRequest(), timeout=30)
    assert time.monotonic() - began < QUICK_SECONDS
    return from_rpc_error(caught.value, target="the coordinator")


def careless(site: Site, files: TlsFiles | None) -> Any:
    return careless_channel(site.address, files, site.authority.trusted_pem, serves=Served.COORDINATOR)


def test_the_right_certificate_is_answered(site: Site) -> None:
    with gradwire.connect(site.address, site.client) as cluster:
        assert cluster.status().version == "here"


# --- what a server refuses


def test_a_certificate_of_another_authority_is_refused(site: Site, tmp_path: Path) -> None:
    other = issue(Authority.create(tmp_path / "other"), role=Role.CLIENT, name="stranger")
    assert isinstance(refusal(careless(site, other)), Unreachable)


@pytest.mark.parametrize(("start", "end"), [(-2 * DAY, -DAY), (DAY, 2 * DAY)], ids=["expired", "not yet"])
def test_a_certificate_out_of_its_time_is_refused(site: Site, tmp_path: Path, start: timedelta, end: timedelta) -> None:
    files = odd(site.authority, tmp_path / "odd", start=start, end=end)
    assert isinstance(refusal(careless(site, files)), Unreachable)
    # Who holds it is told at once, before anything is sent.
    with pytest.raises(SettingsError, match=r"has expired|not valid yet"):
        gradwire.connect(site.address, files)


def test_no_certificate_is_refused(site: Site) -> None:
    assert isinstance(refusal(careless(site, None)), Unreachable)


@pytest.mark.parametrize(
    "uris",
    [[], ["spiffe://gradwire/role/root"], [ROLE_PREFIX + "client", ROLE_PREFIX + "stage"], ["https://example.org"]],
    ids=["none", "unknown", "two", "other"],
)
def test_a_certificate_without_a_role_may_do_nothing(site: Site, tmp_path: Path, uris: list[str]) -> None:
    error = refusal(careless(site, odd(site.authority, tmp_path / "odd", uris=uris)))
    assert isinstance(error, NotAllowed)
    assert "without a role" in error.message


def test_plaintext_to_a_server_with_tls_is_refused(site: Site) -> None:
    began = time.monotonic()
    with pytest.raises(Unreachable, match="TLS"):
        gradwire.connect(site.address)
    assert time.monotonic() - began < QUICK_SECONDS


def secured(site: Site, oldest: ssl.TLSVersion, newest: ssl.TLSVersion) -> str | None:
    """Connect with the right certificate, whatever this machine's own rules are; return the version of TLS."""
    context = ssl.create_default_context(cadata=site.authority.trusted_pem.decode())
    context.load_cert_chain(site.client.certificate, site.client.key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the versions that this is about
        context.minimum_version, context.maximum_version = oldest, newest
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.set_alpn_protocols(["h2"])
    host, _, port = site.address.partition(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as connection,
        context.wrap_socket(connection, server_hostname=host) as made,
    ):
        return made.version()


def test_old_versions_of_tls_are_refused(site: Site) -> None:
    assert secured(site, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    assert secured(site, ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    # The server closes the connection: this side would have gone on.
    with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
        secured(site, ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1)


# --- what a client refuses


def test_a_server_with_plaintext_is_told_so(site: Site) -> None:
    plain = site.serve(None)
    try:
        began = time.monotonic()
        with pytest.raises(Unreachable, match="speaks plaintext"):
            gradwire.connect(plain.address, site.client)
        assert time.monotonic() - began < QUICK_SECONDS
    finally:
        plain.stop(0.0)


@pytest.mark.parametrize("role", [Role.STAGE, Role.PARAMETER])
def test_a_server_of_another_role_is_not_talked_to(site: Site, role: Role) -> None:
    """It has a certificate of the authority, for the right host: a stolen stage server's key is no coordinator."""
    service = site.serve(site.issue(role))
    try:
        with pytest.raises(Unreachable, match="not for this kind of service"):
            gradwire.connect(service.address, site.client)
        with open_channel(service.address, site.issue(Role.COORDINATOR)) as channel:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=10)
    finally:
        service.stop(0.0)


def test_a_server_for_another_host_is_not_talked_to(site: Site) -> None:
    service = site.serve(site.issue(Role.COORDINATOR, "elsewhere", ("10.0.0.7", "localhost")))
    try:
        with pytest.raises(Unreachable, match="not for this address"):
            gradwire.connect(service.address, site.client)
        with gradwire.connect(service.address.replace("127.0.0.1", "localhost"), site.client) as cluster:
            assert cluster.status().version == "here"
    finally:
        service.stop(0.0)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [(-2 * DAY, -DAY, "has ended"), (DAY, 2 * DAY, "not valid yet")],
    ids=["expired", "not yet"],
)
def test_a_server_out_of_its_time_is_not_talked_to(
    site: Site, tmp_path: Path, start: timedelta, end: timedelta, message: str
) -> None:
    files = odd(
        site.authority,
        tmp_path / "odd",
        uris=[ROLE_PREFIX + "coordinator"],
        start=start,
        end=end,
        serves=Served.COORDINATOR,
    )
    with pytest.raises(SettingsError, match=r"has expired|not valid yet"):
        site.serve(files)
    server = grpc.server(ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials([(files.key.read_bytes(), files.certificate.read_bytes())])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        with pytest.raises(Unreachable, match=message):
            gradwire.connect(f"127.0.0.1:{port}", site.client)
    finally:
        server.stop(None).wait()


def test_a_server_of_another_authority_is_not_talked_to(site: Site, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other")
    stranger = issue(other, role=Role.COORDINATOR, name="stranger", addresses=["127.0.0.1"])
    service = site.serve(stranger)
    try:
        with pytest.raises(Unreachable, match="its authority is not one in --tls-authority"):
            gradwire.connect(service.address, site.client)
    finally:
        service.stop(0.0)


# --- what a service refuses of its own settings


def test_a_service_does_not_start_with_a_certificate_of_another_role(site: Site) -> None:
    with pytest.raises(SettingsError, match="not one for this service") as caught:
        site.serve(site.issue(Role.STAGE), role=Role.COORDINATOR)
    assert "role coordinator" in caught.value.expected
    assert "role stage" in caught.value.got


def test_plaintext_off_loopback_is_refused_or_warned_about(site: Site) -> None:
    everywhere = ServiceSettings(listen="0.0.0.0:0", advertise="127.0.0.1:1", metrics_listen="")
    with pytest.raises(SettingsError, match="Plaintext is allowed on loopback only"):
        Service("open", everywhere)
    for _ in range(2):
        with capture_logs() as logs:
            Service("open", dataclasses.replace(everywhere, insecure=True)).stop(0.0)
        assert [log["log_level"] for log in logs] == ["warning"]
        assert "may call everything" in logs[0]["event"]
    with capture_logs() as logs:
        Service("loopback", ServiceSettings(metrics_listen="", insecure=True)).stop(0.0)
        Service("secure", dataclasses.replace(everywhere, tls=site.client, insecure=True)).stop(0.0)
    assert logs == []


def test_a_key_that_others_can_read_is_warned_about(site: Site) -> None:
    files = site.issue(Role.COORDINATOR, "open")
    files.key.chmod(0o644)
    with capture_logs() as logs:
        service = site.serve(files)
    service.stop(0.0)
    warning = next(log for log in logs if log["log_level"] == "warning")
    assert "private key" in warning["event"]
    client = site.issue(Role.CLIENT, "open-client")
    client.key.chmod(0o640)
    with pytest.warns(UserWarning, match="private key"), gradwire.connect(site.address, client):
        pass


# --- messages


def test_oversized_and_malformed_messages_end_only_their_calls(site: Site) -> None:
    method = "/gradwire_protocol.v1.CoordinatorService/GetStatus"
    with open_channel(site.address, site.client, serves=Served.COORDINATOR) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(method)(b"\xff" * 1000, timeout=20)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
    options = (("grpc.max_send_message_length", -1),)
    credentials = grpc.ssl_channel_credentials(
        site.authority.trusted_pem, site.client.key.read_bytes(), site.client.certificate.read_bytes()
    )
    with grpc.secure_channel(site.address, credentials, options=options) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(method)(bytes(MAXIMUM_MESSAGE_BYTES + 1), timeout=60)
        assert isinstance(from_rpc_error(caught.value), LimitExceeded)
    with gradwire.connect(site.address, site.client) as cluster:
        assert cluster.status().version == "here"


def test_bytes_that_are_no_tls_end_only_their_connection(site: Site) -> None:
    host, _, port = site.address.partition(":")
    for noise in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\xff\xff" + bytes(70_000),
        bytes(100),
        b"PRI * HTTP/2.0\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.settimeout(10)
            try:
                connection.sendall(noise)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass
            except OSError:
                pass
    with gradwire.connect(site.address, site.client) as cluster:
        assert cluster.status().version == "here"


# --- who a server says it is


def registration(address: str) -> coordinator_pb2.RegisterRequest:
    return coordinator_pb2.RegisterRequest(server="s", role=coordinator_pb2.SERVER_ROLE_STAGE, address=address)


def test_a_servers_place_is_its_certificates(tmp_path: Path, site: Site) -> None:
    """Nobody else's certificate renews, replaces or ends a registration."""
    cluster = Cluster(tmp_path, tls=site.issue(Role.COORDINATOR))
    try:
        own, other = site.issue(Role.STAGE, "one"), site.issue(Role.STAGE, "two")
        with (
            open_channel(cluster.service.address, own, serves=Served.COORDINATOR) as one,
            open_channel(cluster.service.address, other, serves=Served.COORDINATOR) as two,
        ):
            first, second = map(coordinator_pb2_grpc.CoordinatorServiceStub, (one, two))
            first.Register(registration("127.0.0.1:1"), timeout=10)
            for attempt in (
                lambda: second.Register(registration("127.0.0.1:2"), timeout=10),
                lambda: second.Heartbeat(coordinator_pb2.HeartbeatRequest(server="s"), timeout=10),
                lambda: second.Deregister(coordinator_pb2.DeregisterRequest(server="s"), timeout=10),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    attempt()
                assert isinstance(from_rpc_error(caught.value), NotAllowed)
            with pytest.raises(grpc.RpcError) as caught:
                first.Register(registration("10.0.0.1:1"), timeout=10)
            assert isinstance(from_rpc_error(caught.value), NotAllowed)
            first.Heartbeat(coordinator_pb2.HeartbeatRequest(server="s"), timeout=10)
            assert [server.address for server in cluster.registry.servers()] == ["127.0.0.1:1"]
            site.issue(Role.STAGE, "one")  # rotated: the same name
            first.Register(registration("127.0.0.1:3"), timeout=10)
            first.Deregister(coordinator_pb2.DeregisterRequest(server="s"), timeout=10)
            assert cluster.registry.servers() == []
    finally:
        cluster.close()
