"""The service that signs the keys of who holds a join token. It runs where the authority's directory is.

Its own certificate is made anew in memory, for a day at a time. Leaves to others: tokens (tokens.py), the caller's side
(join.py).
"""

from __future__ import annotations

import threading
from concurrent import futures
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from gradwire.certs.attempts import Attempts
from gradwire.certs.authority import Authority, check_addresses, key_pem, new_key
from gradwire.certs.tokens import MAXIMUM_CHARACTERS, JoinToken, TokenBook
from gradwire_protocol.certificates import (
    MAXIMUM_ADDRESSES,
    CertificateInfo,
    checked_host,
    checked_name,
    read_certificates,
)
from gradwire_protocol.channels import SERVER_OPTIONS, bind_with
from gradwire_protocol.connection_limit import connection_options
from gradwire_protocol.errors import ErrorInterceptor, FrameError, LimitExceeded
from gradwire_protocol.roles import Role
from gradwire_protocol.v1 import enrolment_pb2, enrolment_pb2_grpc

_MAXIMUM_REQUEST_BYTES = 4096
_MAXIMUM_MESSAGE_BYTES = 64 * 2**10
_OWN_LIFE = timedelta(days=1)
_WORKERS = 8
_WAITING_CALLS = 32

_log = structlog.get_logger(__name__)


class Enrolment(enrolment_pb2_grpc.EnrolmentServiceServicer):
    """The servicer. life: of the certificates that it issues."""

    def __init__(self, directory: Path, *, life: timedelta, attempts: Attempts | None = None) -> None:
        self._directory = directory
        self._tokens = TokenBook(directory)
        self._life = life
        self._attempts = attempts or Attempts()

    def Enroll(self, request: enrolment_pb2.EnrollRequest, context: Any) -> enrolment_pb2.EnrollReply:  # noqa: N802
        self._attempts.count(_host(context.peer()))
        if len(request.token) > MAXIMUM_CHARACTERS or len(request.signing_request) > _MAXIMUM_REQUEST_BYTES:
            raise LimitExceeded("A token, or a signing request, is too long")
        if len(request.addresses) > MAXIMUM_ADDRESSES:
            raise LimitExceeded("Too many addresses", expected=f"{MAXIMUM_ADDRESSES} at most")
        # All of it is checked before the token is used up.
        token = JoinToken.parse(request.token)
        name = checked_name(request.name)
        addresses = [checked_host(address) for address in request.addresses]
        public_key = _signed_key(request.signing_request)
        check_addresses(token.role, addresses)
        # Read anew: it may have been replaced since this process was started.
        authority = Authority.open(self._directory)
        role = self._tokens.use(token, name, addresses)
        certificate = authority.sign(public_key, role=role, name=name, addresses=addresses, life=self._life)
        _log.info("enrolled", role=str(role), name=name, addresses=addresses, peer=context.peer())
        return enrolment_pb2.EnrollReply(certificate=certificate, authority=authority.trusted_pem)


class EnrolmentServer:
    """The service at a port; a context manager. `address` is where it listens."""

    def __init__(
        self, directory: Path, listen: str, *, life: timedelta = timedelta(days=90), attempts: Attempts | None = None
    ) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._configuration, self._info = self._make_certificate()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(_WORKERS, thread_name_prefix="enrolment"),
            interceptors=(ErrorInterceptor(),),
            # Of two values for one option gRPC takes the first.
            options=[
                ("grpc.max_receive_message_length", _MAXIMUM_MESSAGE_BYTES),
                *SERVER_OPTIONS,
                *connection_options(),
            ],
            maximum_concurrent_rpcs=_WAITING_CALLS,
        )
        servicer = Enrolment(directory, life=life, attempts=attempts)
        enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server(servicer, self._server)  # type: ignore[no-untyped-call]
        credentials = grpc.dynamic_ssl_server_credentials(
            self._configuration, self._renewed, require_client_authentication=False
        )
        self.address = bind_with(self._server, listen, credentials)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.stop(1.0).wait()

    def _make_certificate(self) -> tuple[Any, CertificateInfo]:
        authority, key = Authority.open(self._directory), new_key()
        certificate = authority.sign(
            key.public_key(), role=Role.ENROLMENT, name="enrolment", addresses=(), life=_OWN_LIFE
        )
        configuration = grpc.ssl_server_certificate_configuration([(key_pem(key), certificate)])
        return configuration, CertificateInfo.of(read_certificates(certificate, "The new certificate")[0])

    def _renewed(self) -> Any:
        with self._lock:
            if not self._info.is_due():
                return None
            self._configuration, self._info = self._make_certificate()
            return self._configuration


def _signed_key(signing_request: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key of a signing request whose sender has proven to hold the private one."""
    try:
        request = x509.load_der_x509_csr(signing_request)
        key = request.public_key()
        if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1" and request.is_signature_valid:
            return key
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FrameError("Not a signing request", expected="PKCS #10 in DER", got=str(error)) from None
    raise FrameError("The signing request cannot be used", expected="one of a key on P-256, signed with it")


def _host(peer: str) -> str:
    """Return who calls, without the port: "ipv4:10.0.0.7"."""
    return peer.rpartition(":")[0]
