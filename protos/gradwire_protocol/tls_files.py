"""Where one's own certificate, its key and the authority lie."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from gradwire_protocol.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files for mutual TLS: the authority that both sides trust, and one's own certificate and key.

    authority may hold several certificates, and certificate those that lead to the authority. The files may be replaced
    at any time: what is connected from then on uses the new ones.
    """

    authority: Path
    certificate: Path
    key: Path

    @classmethod
    def in_folder(cls, folder: Path | str) -> TlsFiles:
        """Return the files of a folder as `gradwire certs` makes it."""
        folder = Path(folder)
        return cls(authority=folder / "authority.pem", certificate=folder / "certificate.pem", key=folder / "key.pem")

    @property
    def all(self) -> tuple[Path, Path, Path]:
        return self.authority, self.certificate, self.key

    def key_exposure(self) -> str:
        """Return who else can read or write the key, and what to do; empty if nobody can, or it is not there.

        Its group may read it where somebody else owns it, as in a mounted secret.
        """
        try:
            status = self.key.stat()
        except OSError:
            return ""
        too_open = stat.S_IRWXO | (stat.S_IRWXG if status.st_uid == os.geteuid() else stat.S_IWGRP)
        if not status.st_mode & too_open:
            return ""
        mode = stat.S_IMODE(status.st_mode)
        return f"others than its owner can read or write the private key {self.key} (mode {mode:03o}): chmod 600 it"

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Return the contents (authority, certificate, key); SettingsError if one cannot be read."""
        contents = []
        for path in self.all:
            try:
                contents.append(path.read_bytes())
            except OSError as error:
                raise SettingsError(
                    f"Cannot read the TLS file {path}", got=str(error), remedy="check the path and its permissions"
                ) from error
        return contents[0], contents[1], contents[2]
