"""A certificate in files that change: taken up whole, or not at all."""

import stat
from datetime import timedelta

import pytest
from structlog.testing import capture_logs

from gradwire.certs.authority import Authority
from gradwire.certs.members import issue
from gradwire_protocol.credentials import OwnCertificate
from gradwire_protocol.errors import SettingsError
from gradwire_protocol.roles import Role
from gradwire_protocol.tls_files import TlsFiles


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "authority")


def issued(authority, **changes):
    arguments = {"role": Role.STAGE, "name": "a", "addresses": ["127.0.0.1"], **changes}
    return issue(authority, **arguments)


def test_new_files_are_taken_up(authority):
    files = issued(authority)
    own = OwnCertificate(files)
    first = own.current()
    assert own.current() is first
    issued(authority)
    second = own.current()
    assert second.info.fingerprint != first.info.fingerprint
    assert own.current() is second


def test_what_cannot_be_used_leaves_the_last(authority, tmp_path):
    files = issued(authority)
    own = OwnCertificate(files)
    first = own.current()
    other = issued(authority, folder=tmp_path / "other")
    files.key.unlink()
    files.key.write_bytes(other.key.read_bytes())
    with capture_logs() as logs:
        assert own.current() is first
        assert own.current() is first
    assert [log["event"] for log in logs] == ["the new TLS files cannot be used: the old ones stay"]
    files.certificate.unlink()
    files.certificate.write_bytes(other.certificate.read_bytes())
    assert own.current().info.fingerprint != first.info.fingerprint
    files.certificate.unlink()
    assert own.current().info.fingerprint != first.info.fingerprint


def test_files_that_cannot_be_used_are_refused_at_the_start(authority, tmp_path):
    files = issued(authority)
    other = issued(authority, folder=tmp_path / "other")
    cases = {
        "do not belong together": TlsFiles(authority=files.authority, certificate=files.certificate, key=other.key),
        "holds no usable key": TlsFiles(
            authority=files.authority, certificate=files.certificate, key=files.certificate
        ),
        "holds no certificate": TlsFiles(authority=files.key, certificate=files.certificate, key=files.key),
        "Cannot read": TlsFiles(authority=tmp_path / "none", certificate=files.certificate, key=files.key),
        "has expired": issued(authority, folder=tmp_path / "old", life=timedelta(seconds=-1)),
    }
    for message, case in cases.items():
        with pytest.raises(SettingsError, match=message):
            OwnCertificate(case)


def test_a_key_that_others_can_read_is_told(authority):
    files = issued(authority)
    assert stat.S_IMODE(files.key.stat().st_mode) == 0o600
    assert files.key_exposure() == ""
    for mode in (0o644, 0o640, 0o602):
        files.key.chmod(mode)
        assert f"mode {mode:03o}" in files.key_exposure()
        assert str(files.key) in files.key_exposure()
