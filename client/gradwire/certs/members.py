"""The folders of members, three files each: issued by an authority, found again, and issued anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from gradwire.certs.authority import EARLY, Authority, key_pem, new_key
from gradwire.certs.folders import write_together
from gradwire_protocol.certificates import CertificateInfo, checked_name, read_certificates
from gradwire_protocol.errors import SettingsError
from gradwire_protocol.roles import Role
from gradwire_protocol.tls_files import TlsFiles

_AUTHORITY, _CERTIFICATE, _KEY = "authority.pem", "certificate.pem", "key.pem"


@dataclass(frozen=True, kw_only=True)
class Member:
    """A folder, and what the certificate in it says."""

    folder: Path
    info: CertificateInfo


def write_member(folder: Path, *, authority: bytes, certificate: bytes, key: bytes) -> TlsFiles:
    """Put the three files into a folder, all at once. In PEM."""
    files = {_AUTHORITY: authority, _CERTIFICATE: certificate, _KEY: key}
    write_together(folder, files, private=frozenset({_KEY}))
    return TlsFiles.in_folder(folder)


def issue(
    authority: Authority,
    *,
    role: Role,
    name: str,
    addresses: Sequence[str] = (),
    life: timedelta = timedelta(days=365),
    folder: Path | None = None,
) -> TlsFiles:
    """Make a key and its certificate; folder: where to, the authority's directory and the name if None."""
    key = new_key()
    certificate = authority.sign(key.public_key(), role=role, name=name, addresses=addresses, life=life)
    return write_member(
        folder or authority.directory / checked_name(name),
        authority=authority.trusted_pem,
        certificate=certificate,
        key=key_pem(key),
    )


def reissue(authority: Authority, member: Member) -> TlsFiles:
    """Make another key and certificate with the same role, name and addresses, for as long a time."""
    info = member.info
    if info.role is None:
        raise SettingsError(f"The certificate in {member.folder} names no role", remedy="issue another one")
    return issue(
        authority,
        role=info.role,
        name=info.name,
        addresses=info.addresses,
        life=info.life - EARLY,
        folder=member.folder,
    )


def read_member(folder: Path) -> Member:
    """Return what is in a member's folder; SettingsError."""
    path = folder / _CERTIFICATE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"There is no certificate in {folder}", got=str(error)) from None
    return Member(folder=folder, info=CertificateInfo.of(read_certificates(content, str(path))[0]))


def members_of(directory: Path) -> Iterator[Member]:
    """Find the members whose folders are in an authority's directory."""
    for path in sorted(directory.glob(f"*/{_CERTIFICATE}")):
        if not path.parent.name.startswith("."):
            yield read_member(path.parent)
