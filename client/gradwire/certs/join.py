"""The side of whoever joins a cluster with a token: its key is made here and stays here.

The authority is trusted because its fingerprint is the token's: what the first connection shows is compared with that,
and only then is the token sent, over a second one that gRPC verifies.
"""

from __future__ import annotations

import hmac
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from gradwire.certs.authority import AUTHORITY_INSIDE, key_pem, new_key
from gradwire.certs.members import write_member
from gradwire.certs.tokens import JoinToken
from gradwire_protocol.certificates import CertificateInfo, checked_host, checked_name, read_certificates
from gradwire_protocol.channels import CHANNEL_OPTIONS, parse_address
from gradwire_protocol.errors import NotAllowed, Unreachable, from_rpc_error
from gradwire_protocol.roles import Served
from gradwire_protocol.service_names import NEVER_RESOLVED
from gradwire_protocol.tls_files import TlsFiles
from gradwire_protocol.v1 import enrolment_pb2, enrolment_pb2_grpc

_CALL_SECONDS = 20.0


def join(address: str, token: JoinToken, *, name: str, addresses: Sequence[str], folder: Path) -> TlsFiles:
    """Get a certificate from the enrolment service at HOST:PORT into a folder.

    NotAllowed if the service is not the token's authority's, or refuses the token; Unreachable; SettingsError for a
    name, an address or a folder that cannot be.
    """
    name = checked_name(name)
    addresses = [checked_host(each) for each in addresses]
    authority = _pinned_authority(address, token)
    key = new_key()
    # The name in it is ignored: what counts is the signature.
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", Served.ENROLMENT + NEVER_RESOLVED))
    credentials = grpc.ssl_channel_credentials(root_certificates=authority.public_bytes(Encoding.PEM))
    with grpc.secure_channel(address, credentials, options=options) as channel:
        stub = enrolment_pb2_grpc.EnrolmentServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            reply = stub.Enroll(
                enrolment_pb2.EnrollRequest(
                    token=str(token),
                    signing_request=request.public_bytes(Encoding.DER),
                    name=name,
                    addresses=addresses,
                ),
                timeout=_CALL_SECONDS,
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, target=f"the enrolment service at {address}") from None
    certificate = read_certificates(reply.certificate, "The reply")[0]
    info = CertificateInfo.of(certificate)
    if certificate.public_key() != key.public_key() or info.role is not token.role:
        raise NotAllowed("The enrolment service has sent a certificate for another key, or another role")
    try:
        certificate.verify_directly_issued_by(read_certificates(reply.authority, "The reply")[0])
    except (ValueError, TypeError, InvalidSignature) as error:
        raise NotAllowed("The enrolment service has sent a certificate of another authority", got=str(error)) from None
    return write_member(folder, authority=reply.authority, certificate=reply.certificate, key=key_pem(key))


def _pinned_authority(address: str, token: JoinToken) -> x509.Certificate:
    """Return the authority that the service at an address shows, if the token names it."""
    host, port = parse_address(address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Nothing is known yet that it could be verified with, and nothing is sent.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=_CALL_SECONDS) as connection,
            context.wrap_socket(connection) as encrypted,
        ):
            shown = encrypted.getpeercert(binary_form=True) or b""
    except (OSError, ValueError) as error:
        raise Unreachable(
            f"No enrolment service answers at {address}",
            got=str(error),
            remedy="start one with `gradwire certs serve DIR --listen HOST:PORT`",
        ) from error
    try:
        inside = x509.load_der_x509_certificate(shown).extensions.get_extension_for_oid(AUTHORITY_INSIDE).value
        authority = x509.load_der_x509_certificate(getattr(inside, "value", b""))
    except (ValueError, x509.ExtensionNotFound) as error:
        raise NotAllowed(
            f"What answers at {address} is no enrolment service", got=str(error) or "another certificate"
        ) from None
    if not hmac.compare_digest(authority.fingerprint(hashes.SHA256()), token.fingerprint):
        raise NotAllowed(
            f"The service at {address} belongs to another authority than the token",
            expected=f"the fingerprint {token.fingerprint.hex()[:16]}…",
            got=f"{authority.fingerprint(hashes.SHA256()).hex()[:16]}…: another cluster, or somebody in between",
            remedy="check the address, and make a token where that service runs",
        )
    return authority
