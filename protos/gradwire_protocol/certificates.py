"""What stands in a certificate: role, name, addresses, life. Written by the authority, read by everyone else.

The role is a URI, `spiffe://gradwire/role/stage`: no host name can look like one, and nobody who may name hosts can
name a role. Whoever dials checks names of hosts only, as TLS does. So a server's certificate says each of its addresses
twice: as it is, and as a name below `.gradwire.invalid` that holds the address and what is served there. No resolver
knows these names (RFC 2606); they are what `channels.py` has gRPC compare.

Imports cryptography: only for processes that use TLS.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from gradwire_protocol.errors import SettingsError
from gradwire_protocol.roles import ROLE_PREFIX, SERVED_BY, Role, Served, role_of
from gradwire_protocol.service_names import NEVER_RESOLVED, service_name

MAXIMUM_ADDRESSES = 32
# Fits a certificate's common name, and a file's.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(\*\.)?({_LABEL}\.)*{_LABEL}")
# A certificate is due for another when less is left of it: a tenth of its life or a week, but never above a quarter.
_DUE_SHARE, _DUE_LEAST, _DUE_LARGEST_SHARE = 0.1, timedelta(days=7), 0.25


@dataclass(frozen=True, kw_only=True)
class CertificateInfo:
    """A certificate as people and checks see it. role: None if it names none of ours, or several. fingerprint: SHA-256,
    in hexadecimal."""

    role: Role | None
    name: str
    addresses: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    fingerprint: str

    @classmethod
    def of(cls, certificate: x509.Certificate) -> CertificateInfo:
        names = _alternative_names(certificate)
        common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        hosts = names.get_values_for_type(x509.DNSName) if names else []
        numbers = names.get_values_for_type(x509.IPAddress) if names else []
        return cls(
            role=role_of(names.get_values_for_type(x509.UniformResourceIdentifier) if names else []),
            name=str(common[0].value) if common else "",
            addresses=(*(host for host in hosts if not host.endswith(NEVER_RESOLVED)), *map(str, numbers)),
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        )

    @property
    def life(self) -> timedelta:
        return self.not_after - self.not_before

    def left(self, now: datetime | None = None) -> timedelta:
        """Return how long it is still valid; negative when it has ended."""
        return self.not_after - (now or datetime.now(UTC))

    @property
    def due_at(self) -> datetime:
        """From when it is time for another one."""
        return self.not_after - max(_DUE_SHARE * self.life, min(_DUE_LEAST, _DUE_LARGEST_SHARE * self.life))

    def is_due(self, now: datetime | None = None) -> bool:
        """Whether it is time for another one."""
        return (now or datetime.now(UTC)) > self.due_at

    def check_valid(self, what: str, now: datetime | None = None) -> None:
        """Raise SettingsError if it has ended, or does not hold yet. what: how the message names it."""
        now = now or datetime.now(UTC)
        if self.left(now) <= timedelta():
            raise SettingsError(
                f"{what} has expired",
                expected="one that is valid now",
                got=f"valid until {self.not_after:%Y-%m-%d %H:%M} UTC",
                remedy="issue another with `gradwire certs rotate`, or check this machine's clock",
            )
        if now < self.not_before:
            raise SettingsError(
                f"{what} is not valid yet",
                expected="one that is valid now",
                got=f"valid from {self.not_before:%Y-%m-%d %H:%M} UTC",
                remedy="check the clocks of this machine and of the authority's",
            )


def alternative_names(role: Role, addresses: Sequence[str]) -> x509.SubjectAlternativeName:
    """Return what a certificate of a role, at some addresses, says of both. SettingsError for what is no address."""
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(ROLE_PREFIX + role)]
    served = SERVED_BY.get(role)
    for address in dict.fromkeys(map(checked_host, addresses)):
        number = _as_number(address)
        names.append(x509.DNSName(address) if number is None else x509.IPAddress(number))
        if served is not None:
            names.append(x509.DNSName(service_name(address, served)))
    if served is Served.ENROLMENT:
        # It proves itself by the authority's fingerprint in a token: wherever it is reached.
        names.append(x509.DNSName(served + NEVER_RESOLVED))
    return x509.SubjectAlternativeName(names)


def checked_host(address: str) -> str:
    """Return a host name or IP number as it stands in certificates; SettingsError if it is neither."""
    number = _as_number(address.strip("[]"))
    if number is not None:
        return str(number)
    if len(address) > 200 or not _HOST.fullmatch(address) or address.lower().endswith(NEVER_RESOLVED):
        raise SettingsError(
            "Not an address for a certificate",
            expected='a host name or an IP number, without a port, such as "gpu-1.lab" or "10.0.0.7"',
            got=repr(address[:80]),
        )
    return address.lower()


def checked_name(name: str) -> str:
    """Return a name that a certificate may have; SettingsError."""
    if not _NAME.fullmatch(name):
        raise SettingsError(
            "Not a name for a certificate",
            expected="1 to 64 letters, digits, dots, hyphens or underscores, with a letter or digit first",
            got=repr(name[:80]),
        )
    return name


def read_certificates(pem: bytes, what: str) -> list[x509.Certificate]:
    """Return the certificates of a PEM file, one at least; SettingsError. what: how the message names the file."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise SettingsError(
            f"{what} holds no certificate", expected="one or more certificates in PEM", got=str(error)
        ) from None


def _alternative_names(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return None


def _as_number(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(address)
    except ValueError:
        return None
