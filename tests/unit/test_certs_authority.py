"""A development authority: what it issues, and what it refuses."""

import stat
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from gradwire.certs.authority import Authority
from gradwire.certs.members import issue, members_of, read_member, reissue
from gradwire_protocol.certificates import read_certificates
from gradwire_protocol.errors import SettingsError
from gradwire_protocol.roles import MEMBERS, Role


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "authority")


def test_it_is_private_and_there_once(authority):
    directory = authority.directory
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "authority.key").stat().st_mode) == 0o600
    assert Authority.open(directory).fingerprint == authority.fingerprint
    with pytest.raises(SettingsError, match="already"):
        Authority.create(directory)


@pytest.mark.parametrize("role", MEMBERS)
def test_certificates_say_what_they_are_for(authority, role):
    addresses = [] if role is Role.CLIENT else ["gpu-1.lab", "10.0.0.7"]
    files = issue(authority, role=role, name="gpu-1", addresses=addresses, life=timedelta(days=3))
    info = read_member(files.certificate.parent).info
    assert (info.role, info.name, list(info.addresses)) == (role, "gpu-1", addresses)
    assert 2.9 < info.left() / timedelta(days=1) <= 3
    certificate = read_certificates(files.certificate.read_bytes(), "it")[0]
    certificate.verify_directly_issued_by(authority.certificate)
    usages = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert ExtendedKeyUsageOID.CLIENT_AUTH in usages
    assert (ExtendedKeyUsageOID.SERVER_AUTH in usages) is (role is not Role.CLIENT)


def test_a_server_needs_addresses(authority):
    with pytest.raises(SettingsError, match="needs an address"):
        issue(authority, role=Role.STAGE, name="a")
    with pytest.raises(SettingsError, match="Too many"):
        issue(authority, role=Role.STAGE, name="a", addresses=[f"10.0.0.{number}" for number in range(40)])
    with pytest.raises(SettingsError, match="Not a name"):
        issue(authority, role=Role.CLIENT, name="../a")


def test_issuing_anew_changes_the_key_and_nothing_else(authority):
    files = issue(authority, role=Role.STAGE, name="a", addresses=["gpu-1", "::1"], life=timedelta(days=30))
    before = read_member(files.certificate.parent)
    key = files.key.read_bytes()
    reissue(authority, before)
    after = read_member(files.certificate.parent).info
    assert files.key.read_bytes() != key
    assert (after.role, after.name, after.addresses) == (before.info.role, before.info.name, before.info.addresses)
    assert abs(after.life - before.info.life) < timedelta(seconds=2)
    assert [member.folder.name for member in members_of(authority.directory)] == ["a"]


def test_nothing_outlives_the_authority(tmp_path):
    short = Authority.create(tmp_path / "short", years=0.01)
    files = issue(short, role=Role.CLIENT, name="a", life=timedelta(days=365))
    assert read_member(files.certificate.parent).info.not_after == short.certificate.not_valid_after_utc


@pytest.mark.parametrize("damage", ["missing", "key", "certificate", "other"])
def test_one_that_cannot_be_used_is_told(authority, tmp_path, damage):
    directory = authority.directory
    if damage == "missing":
        directory = tmp_path / "nowhere"
    elif damage == "key":
        (directory / "authority.key").write_text("nothing")
    elif damage == "certificate":
        (directory / "authority.pem").write_text("nothing")
    else:
        other = Authority.create(tmp_path / "other")
        (directory / "authority.key").write_bytes((other.directory / "authority.key").read_bytes())
    with pytest.raises(SettingsError, match="authority"):
        Authority.open(directory)
