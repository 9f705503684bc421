"""Joining with a token: a real service on loopback, and what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from gradwire.certs.attempts import Attempts
from gradwire.certs.authority import Authority, new_key
from gradwire.certs.enrolment import EnrolmentServer
from gradwire.certs.join import join
from gradwire.certs.members import issue, read_member
from gradwire.certs.tokens import JoinToken, TokenBook
from gradwire_protocol.channels import bind, open_channel
from gradwire_protocol.credentials import OwnCertificate
from gradwire_protocol.errors import FrameError, LimitExceeded, NotAllowed, SettingsError, Unreachable, from_rpc_error
from gradwire_protocol.roles import Role, Served
from gradwire_protocol.service_names import NEVER_RESOLVED
from gradwire_protocol.v1 import enrolment_pb2, enrolment_pb2_grpc

ADDRESS = ["127.0.0.1"]


@contextmanager
def serving(directory: Path, **changes: object) -> Iterator[str]:
    arguments = {"attempts": Attempts(each=1000, together=1000), **changes}
    with EnrolmentServer(directory, "127.0.0.1:0", **arguments) as server:
        yield server.address


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "authority")


@pytest.fixture
def service(authority: Authority) -> Iterator[str]:
    with serving(authority.directory) as address:
        yield address


def token(authority: Authority, role: Role = Role.STAGE, **changes: object) -> JoinToken:
    return TokenBook(authority.directory).make(role=role, fingerprint=authority.fingerprint, **changes)


def signing_request(key: object = None) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key or new_key(), algorithm).public_bytes(Encoding.DER)


def enroll(authority: Authority, address: str, **changes: object) -> enrolment_pb2.EnrollReply:
    """Call the service as somebody else's program may."""
    options = (("grpc.ssl_target_name_override", Served.ENROLMENT + NEVER_RESOLVED),)
    fields = {"signing_request": signing_request(), "name": "a", "addresses": ADDRESS, **changes}
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(authority.trusted_pem), options=options) as channel:
        try:
            return enrolment_pb2_grpc.EnrolmentServiceStub(channel).Enroll(
                enrolment_pb2.EnrollRequest(**fields), timeout=20
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None


def test_who_joins_gets_a_certificate_that_works(authority: Authority, service: str, tmp_path: Path) -> None:
    files = join(service, token(authority), name="gpu-1", addresses=ADDRESS, folder=tmp_path / "own")
    info = read_member(tmp_path / "own").info
    assert (info.role, info.name, info.addresses) == (Role.STAGE, "gpu-1", ("127.0.0.1",))
    assert files.key_exposure() == ""
    OwnCertificate(files)
    server = grpc.server(ThreadPoolExecutor(1))
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", {"Echo": handler}),))
    address = bind(server, "127.0.0.1:0", files)
    server.start()
    try:
        with open_channel(address, issue(authority, role=Role.CLIENT, name="client")) as channel:
            assert channel.unary_unary("/t.T/Echo")(b"hello", timeout=10) == b"hello"
    finally:
        server.stop(None).wait()


def test_a_token_works_once(authority: Authority, service: str, tmp_path: Path) -> None:
    once = token(authority)
    join(service, once, name="a", addresses=ADDRESS, folder=tmp_path / "a")
    with pytest.raises(NotAllowed, match="has been used"):
        join(service, once, name="b", addresses=ADDRESS, folder=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_many_at_once_use_a_token_once(authority: Authority, service: str, tmp_path: Path) -> None:
    once = token(authority)

    def attempt(number: int) -> bool:
        try:
            join(service, once, name="a", addresses=ADDRESS, folder=tmp_path / str(number))
        except NotAllowed:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(16))) == 1


def test_a_token_expires(authority: Authority, service: str, tmp_path: Path) -> None:
    late = token(authority, seconds=-1.0)
    with pytest.raises(NotAllowed, match="expired"):
        join(service, late, name="a", addresses=ADDRESS, folder=tmp_path / "a")


def test_a_token_is_for_its_role(authority: Authority, service: str, tmp_path: Path) -> None:
    made = str(token(authority)).replace("gradwire.stage.", "gradwire.coordinator.")
    with pytest.raises(NotAllowed, match="made for the role stage"):
        join(service, JoinToken.parse(made), name="a", addresses=ADDRESS, folder=tmp_path / "a")


def test_a_token_may_be_for_one_name_and_some_addresses(authority: Authority, service: str, tmp_path: Path) -> None:
    bound = token(authority, name="gpu-1", addresses=["127.0.0.1"])
    with pytest.raises(NotAllowed, match="made for the name"):
        join(service, bound, name="gpu-2", addresses=ADDRESS, folder=tmp_path / "a")
    with pytest.raises(NotAllowed, match="not for coordinator"):
        join(service, bound, name="gpu-1", addresses=["coordinator"], folder=tmp_path / "a")
    join(service, bound, name="gpu-1", addresses=ADDRESS, folder=tmp_path / "a")


def test_wrong_requests_use_no_token_up(authority: Authority, service: str) -> None:
    once = token(authority)
    text = str(once)
    unsigned = bytearray(signing_request())
    unsigned[-1] ^= 1
    for changes, kind in (
        ({"token": ""}, SettingsError),
        ({"token": text[:-4]}, SettingsError),
        ({"token": "x" * 10_000}, LimitExceeded),
        ({"token": text, "signing_request": b""}, FrameError),
        ({"token": text, "signing_request": os.urandom(300)}, FrameError),
        ({"token": text, "signing_request": bytes(5000)}, LimitExceeded),
        ({"token": text, "signing_request": bytes(unsigned)}, FrameError),
        ({"token": text, "signing_request": signing_request(ed25519.Ed25519PrivateKey.generate())}, FrameError),
        ({"token": text, "signing_request": signing_request(rsa.generate_private_key(65537, 2048))}, FrameError),
        ({"token": text, "name": "../a"}, SettingsError),
        ({"token": text, "addresses": []}, SettingsError),
        ({"token": text, "addresses": ["a b"]}, SettingsError),
        ({"token": text, "addresses": ["1.coordinator-service.gradwire.invalid"]}, SettingsError),
        ({"token": text, "addresses": [f"a{number}" for number in range(40)]}, LimitExceeded),
        ({"token": text, "name": "x" * 100_000}, LimitExceeded),
    ):
        with pytest.raises(kind):
            enroll(authority, service, **changes)
    assert enroll(authority, service, token=text).certificate.startswith(b"-----BEGIN CERTIFICATE-----")


def test_long_messages_are_refused_unread(authority: Authority, service: str) -> None:
    """Whoever reaches it may call it: it takes far less than other services do."""
    made = token(authority)
    with pytest.raises(LimitExceeded, match="larger than max"):
        enroll(authority, service, token=str(made), signing_request=bytes(65 * 2**10))
    assert enroll(authority, service, token=str(made)).certificate


def test_a_joiner_chooses_no_role_by_its_signing_request(authority: Authority, service: str) -> None:
    names = [x509.UniformResourceIdentifier("spiffe://gradwire/role/coordinator"), x509.DNSName("coordinator")]
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(new_key(), hashes.SHA256())
    )
    reply = enroll(authority, service, token=str(token(authority)), signing_request=request.public_bytes(Encoding.DER))
    certificate = x509.load_pem_x509_certificate(reply.certificate)
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    shown = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert shown.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://gradwire/role/stage"]
    assert "coordinator" not in shown.get_values_for_type(x509.DNSName)


def test_attempts_are_limited(authority: Authority) -> None:
    with serving(authority.directory, attempts=Attempts(each=5, together=100)) as address:
        for _ in range(5):
            with pytest.raises(SettingsError, match="Not a join token"):
                enroll(authority, address, token="guess")
        with pytest.raises(LimitExceeded, match="Too many attempts"):
            enroll(authority, address, token="guess")


def test_another_authoritys_service_gets_no_token(authority: Authority, tmp_path: Path) -> None:
    """Whoever sits in between cannot make the authority's fingerprint."""
    stranger = Authority.create(tmp_path / "stranger")
    once = token(authority)
    with serving(stranger.directory) as address, pytest.raises(NotAllowed, match="another authority"):
        join(address, once, name="a", addresses=ADDRESS, folder=tmp_path / "a")
    with serving(authority.directory) as address:
        join(address, once, name="a", addresses=ADDRESS, folder=tmp_path / "a")


def test_a_copied_authority_certificate_does_not_help(authority: Authority, tmp_path: Path) -> None:
    """It is public: a stranger can show it, but not sign with its key."""
    stranger = Authority.create(tmp_path / "stranger")
    pretender = Authority(directory=stranger.directory, key=stranger.key, trusted=authority.trusted)
    certificate = pretender.sign(
        (key := new_key()).public_key(), role=Role.ENROLMENT, name="enrolment", addresses=(), life=timedelta(days=1)
    )
    from gradwire.certs.authority import key_pem

    server = grpc.server(ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials([(key_pem(key), certificate)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        with pytest.raises(Unreachable):
            join(f"127.0.0.1:{port}", token(authority), name="a", addresses=ADDRESS, folder=tmp_path / "a")
    finally:
        server.stop(None).wait()


def test_a_members_certificate_makes_no_enrolment_service(authority: Authority, tmp_path: Path) -> None:
    files = issue(authority, role=Role.STAGE, name="stage", addresses=ADDRESS)
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials([(files.key.read_bytes(), files.certificate.read_bytes())])
    )
    server.start()
    try:
        with pytest.raises(NotAllowed, match="no enrolment service"):
            join(f"127.0.0.1:{port}", token(authority), name="a", addresses=ADDRESS, folder=tmp_path / "a")
    finally:
        server.stop(None).wait()


def test_nobody_there_is_told(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="No enrolment service"):
        join("127.0.0.1:9", token(authority), name="a", addresses=ADDRESS, folder=tmp_path / "a")


def test_joining_after_the_authority_was_replaced(authority: Authority, service: str, tmp_path: Path) -> None:
    """A token of before is for another authority; one of after works, with a service that goes on."""
    before = token(authority)
    newer = Authority.open(authority.directory).renewed()
    join(service, before, name="a", addresses=ADDRESS, folder=tmp_path / "a")
    with serving(authority.directory) as address:
        with pytest.raises(NotAllowed, match="another authority"):
            join(address, token(authority), name="b", addresses=ADDRESS, folder=tmp_path / "b")
        join(address, token(newer), name="b", addresses=ADDRESS, folder=tmp_path / "b")


def test_the_commands(tmp_path: Path) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "gradwire", "certs", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "COLUMNS": "200"},
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    directory = str(tmp_path / "authority")
    run("init", directory, "--years", "2")
    assert "already" in run("init", directory, code=2)
    run("issue", directory, "--role", "coordinator", "--name", "c", "--address", "127.0.0.1", "--address", "c.lab")
    run("issue", directory, "--role", "client", "--name", "me", "--days", "2", "--out", str(tmp_path / "me"))
    assert "no such role" in run("issue", directory, "--role", "root", "--name", "x", code=2)
    assert "needs an address" in run("issue", directory, "--role", "stage", "--name", "x", code=2)
    shown = run("show", directory)
    assert "c.lab, 127.0.0.1" in shown
    assert "coordinator" in shown
    before = read_member(tmp_path / "me").info
    assert "none ends soon" in run("rotate", directory)
    assert "1 issued anew" in run("rotate", directory, "--all")
    assert "2 issued anew" in run("rotate", directory, "--authority", "--folder", str(tmp_path / "me"))
    assert read_member(tmp_path / "me").info.fingerprint != before.fingerprint
    assert len(x509.load_pem_x509_certificates((tmp_path / "me" / "authority.pem").read_bytes())) == 2
    run("rotate", directory, "--distrust-former", "--folder", str(tmp_path / "me"))
    assert len(x509.load_pem_x509_certificates((tmp_path / "me" / "authority.pem").read_bytes())) == 1

    command = [sys.executable, "-m", "gradwire", "certs", "serve", directory, "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[3].rstrip(";")
            made = run("token", directory, "--role", "parameter").strip()
            arguments = ("join", address, "--token", made, "--address", "127.0.0.1", "--name", "p1")
            run(*arguments, "--out", str(tmp_path / "p1"))
            assert "has been used" in run(*arguments, "--out", str(tmp_path / "p2"), code=1)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    assert read_member(tmp_path / "p1").info.role is Role.PARAMETER
    assert "expired" in run("show", str(_expired(tmp_path)))


def _expired(tmp_path: Path) -> Path:
    authority = Authority.open(tmp_path / "authority")
    files = issue(authority, role=Role.CLIENT, name="late", life=timedelta(seconds=-60), folder=tmp_path / "late")
    return files.certificate.parent
