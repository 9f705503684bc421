"""Files that are replaced together: whoever reads them sees all old ones or all new ones, also after a crash.

A folder has links to `.current/…`, which is a link to the newest of some folders itself: replacing that one link
replaces all files. Kubernetes does the same for mounted secrets.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from gradwire_protocol.errors import SettingsError

_CURRENT = ".current"
_VERSIONS = ".versions"
# The one before stays for whoever is reading it.
_KEPT = 2


def write_together(folder: Path, files: Mapping[str, bytes], *, private: frozenset[str] = frozenset()) -> None:
    """Put files into a folder, in place of those of the same names. private: names that only their owner may read."""
    try:
        versions = folder / _VERSIONS
        versions.mkdir(parents=True, exist_ok=True)
        version = versions / f"{time.time_ns():020d}-{secrets.token_hex(2)}"
        version.mkdir()
        for name, content in files.items():
            mode = 0o600 if name in private else 0o644
            descriptor = os.open(version / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _link(folder / _CURRENT, Path(_VERSIONS) / version.name)
        for name in files:
            target = Path(_CURRENT) / name
            if not (folder / name).is_symlink() or (folder / name).readlink() != target:
                _link(folder / name, target)
        for old in sorted(versions.iterdir())[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise SettingsError(
            f"Cannot write certificates to {folder}", got=str(error), remedy="check the path and its permissions"
        ) from error


def _link(place: Path, target: Path) -> None:
    made = place.with_name(f"{place.name}.{secrets.token_hex(4)}")
    made.symlink_to(target)
    made.replace(place)
