"""Which files a job reads as text. Imports no torch, so that a wrong path is told before anything is started."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from gradwire_protocol.errors import DataError

# Not sources that people wrote for reading: tests hold long tables of data.
_EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})
# As grep does: a file with a zero byte near its start is not text.
_PROBE_BYTES = 8192


def standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def text_files(path: Path | None) -> list[Path]:
    """Return the file, or all files below the folder but hidden ones, sorted; None: the standard library's sources.

    DataError if there are none.
    """
    if path is None:
        root = standard_library()
        return [file for file in sorted(root.rglob("*.py")) if not _EXCLUDED & {*file.relative_to(root).parts}]
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError("There is no such file or folder", expected="a file or folder with text", got=str(path))
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise DataError(
            "The data folder is empty",
            expected="text files, in it or in folders below; hidden ones do not count",
            got=f"none in {path}",
            remedy="give --data a folder with text, or leave it out for the standard library's sources",
        )
    return files


def read_text(file: Path) -> bytes:
    """Return the file's bytes; none if it is not text."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read", got=str(error), remedy="check its permissions") from error
    return b"" if b"\0" in content[:_PROBE_BYTES] else content
