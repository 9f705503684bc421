"""A development authority: a key and a certificate in a directory, and what it issues.

For clusters that have no authority of their own. Whoever reads its directory can issue for any role: it belongs on one
machine that runs none of the services. Keys are on P-256: gRPC's TLS takes no Ed25519.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gradwire.certs.folders import write_together
from gradwire_protocol.certificates import (
    MAXIMUM_ADDRESSES,
    CertificateInfo,
    alternative_names,
    checked_host,
    checked_name,
    read_certificates,
)
from gradwire_protocol.errors import SettingsError
from gradwire_protocol.roles import Role

CERTIFICATES, KEY, BRIDGES = "authority.pem", "authority.key", "bridges.pem"
# In the certificate of the enrolment service: its authority's, which joiners compare with their token's fingerprint.
# TLS shows Python's clients the server's own certificate only. A UUID as an identifier is anybody's to take (X.667).
AUTHORITY_INSIDE = x509.ObjectIdentifier("2.25.198436212067413087514392086158473210455")
# Clocks differ.
EARLY = timedelta(minutes=5)
_YEAR = timedelta(days=365)


@dataclass(frozen=True, kw_only=True)
class Authority:
    """An authority as it is in its directory.

    trusted: certificates of this and of former authorities, this one's first. bridges: this authority's key, signed by
    the former ones, so that whoever trusts only those takes its certificates too.
    """

    directory: Path
    key: ec.EllipticCurvePrivateKey
    trusted: tuple[x509.Certificate, ...]
    bridges: tuple[x509.Certificate, ...] = ()

    @classmethod
    def create(cls, directory: Path, *, years: float = 10.0) -> Self:
        """Make a new one in a directory that has none; SettingsError."""
        if (directory / KEY).exists() or (directory / CERTIFICATES).exists():
            raise SettingsError(
                f"There is an authority in {directory} already",
                expected="a directory without one",
                remedy="use it, replace it with `gradwire certs rotate --authority`, or choose another directory",
            )
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise SettingsError(f"Cannot make the directory {directory}", got=str(error)) from error
        key = ec.generate_private_key(ec.SECP256R1())
        authority = cls(directory=directory, key=key, trusted=(_root(key, years * _YEAR),))
        authority._write()
        return authority

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read the one of a directory; SettingsError."""
        try:
            certificates = (directory / CERTIFICATES).read_bytes()
            key = load_pem_private_key((directory / KEY).read_bytes(), password=None)
            bridges = (directory / BRIDGES).read_bytes()
        except (OSError, ValueError, TypeError) as error:
            raise SettingsError(
                f"There is no authority in {directory} that can be used",
                expected=f"{CERTIFICATES}, {KEY} and {BRIDGES}",
                got=str(error),
                remedy=f"make one with `gradwire certs init {directory}`",
            ) from None
        trusted = tuple(read_certificates(certificates, str(directory / CERTIFICATES)))
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != trusted[0].public_key():
            raise SettingsError(f"Certificate and key of the authority in {directory} do not belong together")
        CertificateInfo.of(trusted[0]).check_valid("The authority's certificate")
        signed = tuple(x509.load_pem_x509_certificates(bridges)) if bridges else ()
        return cls(directory=directory, key=key, trusted=trusted, bridges=signed)

    @property
    def certificate(self) -> x509.Certificate:
        return self.trusted[0]

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate: what join tokens carry."""
        return self.certificate.fingerprint(hashes.SHA256())

    @property
    def trusted_pem(self) -> bytes:
        """What members get as `authority.pem`."""
        return _pem(self.trusted)

    def sign(
        self,
        public_key: ec.EllipticCurvePublicKey,
        *,
        role: Role,
        name: str,
        addresses: Sequence[str],
        life: timedelta,
    ) -> bytes:
        """Return a certificate in PEM, with the bridges behind it. SettingsError for a name or address that is none.

        It ends with the authority at the latest.
        """
        check_addresses(role, addresses)
        now = datetime.now(UTC)
        # A client cannot stand in for a server.
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if role is not Role.CLIENT:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        builder = (
            _builder(_subject(checked_name(name)), self.certificate.subject, public_key)
            .not_valid_before(now - EARLY)
            .not_valid_after(min(now + life, self.certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(alternative_names(role, addresses), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if role is Role.ENROLMENT:
            inside = x509.UnrecognizedExtension(AUTHORITY_INSIDE, self.certificate.public_bytes(Encoding.DER))
            builder = builder.add_extension(inside, critical=False)
        return _pem((builder.sign(self.key, hashes.SHA256()), *self.bridges))

    def renewed(self, *, years: float = 10.0) -> Authority:
        """Put a new key in place of this one, which is still trusted until its certificate ends, and return it."""
        key = ec.generate_private_key(ec.SECP256R1())
        root = _root(key, years * _YEAR)
        now = datetime.now(UTC)
        bridge = (
            _builder(root.subject, self.certificate.subject, key.public_key())
            .not_valid_before(now - EARLY)
            .not_valid_after(min(root.not_valid_after_utc, self.certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_SIGNS_CERTIFICATES, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        former = tuple(old for old in self.trusted if old.not_valid_after_utc > now)
        authority = Authority(directory=self.directory, key=key, trusted=(root, *former), bridges=(bridge,))
        authority._write()
        return authority

    def without_former(self) -> Authority:
        """Trust this one's certificates only, from now on: a former key is no longer safe."""
        authority = Authority(directory=self.directory, key=self.key, trusted=self.trusted[:1])
        authority._write()
        return authority

    def _write(self) -> None:
        files = {CERTIFICATES: self.trusted_pem, KEY: key_pem(self.key), BRIDGES: _pem(self.bridges)}
        write_together(self.directory, files, private=frozenset({KEY}))


def check_addresses(role: Role, addresses: Sequence[str]) -> None:
    """Raise SettingsError unless a certificate of a role can have these addresses."""
    if role not in (Role.CLIENT, Role.ENROLMENT) and not addresses:
        raise SettingsError(
            f"A certificate of the role {role} needs an address",
            expected="the host names and IP numbers at which it is dialled",
            remedy="give --address, once for each",
        )
    if len(addresses) > MAXIMUM_ADDRESSES:
        raise SettingsError("Too many addresses", expected=f"{MAXIMUM_ADDRESSES} at most", got=str(len(addresses)))
    for address in addresses:
        checked_host(address)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


_SIGNS_CERTIFICATES = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


def _root(key: ec.EllipticCurvePrivateKey, life: timedelta) -> x509.Certificate:
    now = datetime.now(UTC)
    # Names of their own: a chain of certificates is found by them.
    subject = _subject(f"Gradwire authority {secrets.token_hex(4)}")
    return (
        _builder(subject, subject, key.public_key())
        .not_valid_before(now - EARLY)
        .not_valid_after(now + life)
        # One between itself and what is issued: a bridge.
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_SIGNS_CERTIFICATES, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _builder(subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(certificates: Sequence[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)
