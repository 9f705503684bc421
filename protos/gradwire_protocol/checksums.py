"""CRC-32C of chunks, from a library that uses the processor's own instruction. Optional: nothing needs it but
`Plan(checksums=True)`."""

from __future__ import annotations

import importlib.util
from typing import Any

from gradwire_protocol.errors import SettingsError

_LIBRARY = "google_crc32c"
_loaded: Any = None


def check_available(where: str) -> None:
    """Refuse a run with checksums where they cannot be made. `where` names this process: "stage server s1"."""
    if importlib.util.find_spec(_LIBRARY) is None:
        raise SettingsError(
            f"{where} cannot make checksums",
            expected="the package google-crc32c",
            got="it is not installed",
            remedy='install "gradwire[checksums]" there, or leave checksums out of the plan',
        )


def crc32c(data: memoryview) -> int:
    """Return the CRC-32C of bytes. For processes that `check_available` has passed."""
    global _loaded
    if _loaded is None:
        _loaded = importlib.import_module(_LIBRARY)
    # The library takes nothing but bytes.
    checksum: int = _loaded.value(bytes(data))
    return checksum
