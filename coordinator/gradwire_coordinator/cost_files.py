"""Keeps measured costs in a directory, one file each, from one start of the coordinator to the next.

They are a cache: what cannot be read is measured again, and what cannot be written is not kept.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import structlog

from gradwire_coordinator.measured_costs import ActionSeconds, Cost, MeasuredGroups

# The oldest go.
MAXIMUM_FILES = 256
_SUFFIX = ".npz"

_log = structlog.get_logger(__name__)


class CostFiles:
    """The files below a directory, which is made when it is needed. One writer."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, name: str) -> MeasuredGroups | None:
        """Return what was kept under a name; None if there is nothing that makes sense."""
        path = self._directory / f"{name}{_SUFFIX}"
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                ends, rows = stored["ends"].tolist(), stored["rows"].tolist()
                fixed, per_row = stored["fixed"].astype(np.float64), stored["per_row"].astype(np.float64)
                is_measured = stored["is_measured"].astype(np.bool_)
                action = ActionSeconds(*stored["action"].astype(np.float64).tolist())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            _log.warning("a file of measured costs cannot be read", path=str(path), error=str(error))
            return None
        shape = (len(Cost), len(ends))
        if fixed.shape != shape or per_row.shape != shape or is_measured.shape != shape[1:] or not rows:
            _log.warning("a file of measured costs makes no sense", path=str(path))
            return None
        return MeasuredGroups(tuple(ends), tuple(rows), fixed, per_row, is_measured, action)

    def write(self, name: str, groups: MeasuredGroups) -> None:
        """Keep something under a name, in place of what was there."""
        unfinished = self._directory / f"{name}.unfinished"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                np.savez(
                    file,
                    ends=np.array(groups.ends),
                    rows=np.array(groups.rows),
                    fixed=groups.fixed,
                    per_row=groups.per_row,
                    is_measured=groups.is_measured,
                    action=np.array(groups.action),
                )
            os.replace(unfinished, self._directory / f"{name}{_SUFFIX}")
            files = sorted(self._directory.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime)
            for path in files[: max(0, len(files) - MAXIMUM_FILES)]:
                path.unlink()
        except OSError as error:
            _log.warning("measured costs could not be kept", path=str(unfinished), error=str(error))
