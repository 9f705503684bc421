"""Paths that come over the wire: which are well-formed, and where they lie below a root directory.

Pure text and the file system's own answers; who has which root is the settings' business.
"""

from __future__ import annotations

import os
from pathlib import Path

from gradwire_protocol.errors import SettingsError

MAXIMUM_PATH_BYTES = 1024
# Of one of its names: more than any common file system takes.
MAXIMUM_NAME_BYTES = 255


def check_relative(path: str, what: str) -> None:
    """SettingsError unless a path is relative, stays below where it starts, and is of bounded length."""
    parts = path.split("/")
    well_formed = (
        0 < len(path.encode(errors="replace")) <= MAXIMUM_PATH_BYTES
        and path.isprintable()
        and "\\" not in path
        and (path == "." or not {"", ".", ".."} & set(parts))
        and all(len(part.encode(errors="replace")) <= MAXIMUM_NAME_BYTES for part in parts)
    )
    if not well_formed:
        raise SettingsError(
            f"{what} is not a relative path",
            expected=f"names of up to {MAXIMUM_NAME_BYTES} bytes joined by '/', without '..', "
            f"{MAXIMUM_PATH_BYTES} bytes at most",
            got=repr(path[:200]),
            remedy="name it as seen from the server's root directory; '.' is the root itself",
        )


def check_inside(path: Path, root: Path, what: str) -> Path:
    """Return where a path really lies; SettingsError if that is not below root, or not to be found out."""
    try:
        real, real_root = Path(os.path.realpath(path, strict=True)), Path(os.path.realpath(root, strict=True))
    except OSError as error:
        raise SettingsError(f"{what} is not there", expected="an existing path", got=str(error)) from error
    if not real.is_relative_to(real_root):
        raise SettingsError(
            f"{what} leads out of its root directory through a link",
            expected=f"a path below {real_root}",
            got=f"{path}, which is {real}",
            remedy="put the files themselves below the root, or start the server with a root above both",
        )
    return real
