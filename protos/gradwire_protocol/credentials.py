"""One's own certificate, as it is in its files now; and what gRPC needs of it to listen and to dial.

Files are looked at before each handshake of a server and each call of a client (rotating_channel.py). What cannot be
used, a file half written or a key of another certificate, leaves the last that could. Imports cryptography.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from gradwire_protocol.certificates import CertificateInfo, read_certificates
from gradwire_protocol.errors import GradwireError, SettingsError
from gradwire_protocol.tls_files import TlsFiles

# Whoever replaces three files one after the other needs this long at most.
_TRIES, _RETRY_SECONDS = 5, 0.05

_log = structlog.get_logger(__name__)

# Of each file: when and as what it was last written.
_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Contents of the files that belong together, in PEM, and what the certificate says."""

    authority: bytes
    certificate: bytes
    key: bytes
    info: CertificateInfo


class OwnCertificate:
    """The files' contents, read again when they have changed. Thread-safe.

    Making one raises SettingsError for files that cannot be used, or whose certificate is not valid now.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._stamp = _stamp(files)
        self._loaded = _load(files)
        self._loaded.info.check_valid(f"The certificate {files.certificate}")

    def current(self) -> Loaded:
        """Return what is in the files, or was when they could last be used."""
        with self._lock:
            stamp = _stamp(self._files)
            if stamp != self._stamp:
                try:
                    loaded = _load(self._files)
                    loaded.info.check_valid(f"The certificate {self._files.certificate}")
                except GradwireError as error:
                    _log.warning("the new TLS files cannot be used: the old ones stay", error=str(error))
                else:
                    self._loaded = loaded
                # Not again before they change again.
                self._stamp = stamp
            return self._loaded

    def server_credentials(self) -> Any:
        """Return grpc.ServerCredentials that ask for clients' certificates, and take new files for new connections."""
        used = self.current()

        def fetch() -> Any:
            nonlocal used
            current = self.current()
            if current is used:
                return None
            used = current
            return _configuration(current)

        return grpc.dynamic_ssl_server_credentials(_configuration(used), fetch, require_client_authentication=True)


def channel_credentials(loaded: Loaded) -> Any:
    """Return grpc.ChannelCredentials."""
    return grpc.ssl_channel_credentials(
        root_certificates=loaded.authority, private_key=loaded.key, certificate_chain=loaded.certificate
    )


def _configuration(loaded: Loaded) -> Any:
    return grpc.ssl_server_certificate_configuration([(loaded.key, loaded.certificate)], loaded.authority)


def _load(files: TlsFiles) -> Loaded:
    """Read the files; once more if they do not belong together, since they may be being replaced."""
    for attempt in range(_TRIES):
        try:
            return _load_once(files)
        except SettingsError:
            if attempt == _TRIES - 1:
                raise
        time.sleep(_RETRY_SECONDS)
    raise AssertionError  # not reached


def _load_once(files: TlsFiles) -> Loaded:
    authority, certificate, key = files.read()
    read_certificates(authority, f"The TLS file {files.authority}")
    own = read_certificates(certificate, f"The TLS file {files.certificate}")[0]
    try:
        public = load_pem_private_key(key, password=None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SettingsError(
            f"The TLS file {files.key} holds no usable key", expected="a private key in PEM, without a passphrase"
        ) from error
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if public.public_bytes(*form) != own.public_key().public_bytes(*form):
        raise SettingsError(
            "The certificate and the key do not belong together",
            got=f"{files.certificate} and {files.key}",
            remedy="give the two that were issued together",
        )
    return Loaded(authority=authority, certificate=certificate, key=key, info=CertificateInfo.of(own))


def _stamp(files: TlsFiles) -> _Stamp:
    stamps = []
    for path in files.all:
        try:
            status = path.stat()
        except OSError:
            stamps.append((0, 0, 0))
        else:
            stamps.append((status.st_mtime_ns, status.st_ino, status.st_size))
    return tuple(stamps)
