"""Certificates that nobody should accept: expired, not valid yet, without a role, with somebody else's."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from gradwire.certs.authority import Authority, key_pem, new_key
from gradwire.certs.members import write_member
from gradwire_protocol.channels import CHANNEL_OPTIONS
from gradwire_protocol.roles import ROLE_PREFIX, Served
from gradwire_protocol.service_names import service_name
from gradwire_protocol.tls_files import TlsFiles

DAY = timedelta(days=1)


def odd(
    authority: Authority,
    folder: Path,
    *,
    uris: Sequence[str] = (ROLE_PREFIX + "client",),
    start: timedelta = -DAY,
    end: timedelta = DAY,
    serves: Served | None = None,
) -> TlsFiles:
    """Issue a certificate for 127.0.0.1 that is valid from now + start to now + end, with any URIs."""
    key, now = new_key(), datetime.now(UTC)
    names: list[x509.GeneralName] = [
        *map(x509.UniformResourceIdentifier, uris),
        x509.IPAddress(ip_address("127.0.0.1")),
    ]
    if serves is not None:
        names.append(x509.DNSName(service_name("127.0.0.1", serves)))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "odd")]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + start)
        .not_valid_after(now + end)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return write_member(
        folder, authority=authority.trusted_pem, certificate=certificate.public_bytes(Encoding.PEM), key=key_pem(key)
    )


def careless_channel(address: str, files: TlsFiles | None, authority: bytes, *, serves: Served = Served.STAGE) -> Any:
    """Return a channel as somebody else's program opens it: nothing is checked on this side but the authority."""
    certificate, key = (None, None) if files is None else (files.certificate.read_bytes(), files.key.read_bytes())
    options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", service_name("127.0.0.1", serves)))
    credentials = grpc.ssl_channel_credentials(authority, key, certificate)
    return grpc.secure_channel(address, credentials, options=options)
