"""The ordered log of every run, in one SQLite file: what was asked for, each entry, each result.

Append-only: an entry's number is one more than the last, and nothing of it changes afterwards. It is written ahead
(WAL) and survives the death of the process; after a power cut the newest entries may be missing, never one between.
Leaves to others: what entries mean.
"""

from __future__ import annotations

import fcntl
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from gradwire_protocol.errors import FrameError, RunNotFound, SettingsError
from gradwire_protocol.v1 import coordinator_pb2, run_pb2

FILE_NAME = "runs.sqlite"
_LOCK_NAME = "coordinator.lock"
SCHEMA_VERSION = 2
# Checkpoints that servers have written. Since version 2.
_CHECKPOINTS = """
CREATE TABLE checkpoints (
    run TEXT NOT NULL,
    number INTEGER NOT NULL,    -- of the SaveState entry
    checkpoint BLOB NOT NULL,   -- StoredCheckpoint
    PRIMARY KEY (run, number),
    FOREIGN KEY (run, number) REFERENCES entries (run, number)
) STRICT, WITHOUT ROWID;
"""
_SCHEMA = f"""
CREATE TABLE runs (
    run TEXT PRIMARY KEY,
    generation INTEGER NOT NULL,  -- the newest
    request BLOB NOT NULL,      -- CreateRunRequest: model, plan, optimizer, seed
    created_at REAL NOT NULL,   -- Unix time, seconds
    ended_at REAL,
    state TEXT NOT NULL,        -- name of a RunState
    reason TEXT NOT NULL
) STRICT;
CREATE TABLE entries (
    run TEXT NOT NULL REFERENCES runs (run),
    number INTEGER NOT NULL,
    entry BLOB NOT NULL,        -- Entry
    appended_at REAL NOT NULL,
    PRIMARY KEY (run, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE results (
    run TEXT NOT NULL,
    number INTEGER NOT NULL,
    result BLOB NOT NULL,       -- EntryResult
    finished_at REAL NOT NULL,
    PRIMARY KEY (run, number),
    FOREIGN KEY (run, number) REFERENCES entries (run, number)
) STRICT, WITHOUT ROWID;
{_CHECKPOINTS}
CREATE TRIGGER entries_stay BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER entries_remain BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER results_stay BEFORE UPDATE ON results BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER results_remain BEFORE DELETE ON results BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
"""


@dataclass(frozen=True)
class LoggedRun:
    """A run as the log has it."""

    run: str
    generation: int
    request: coordinator_pb2.CreateRunRequest
    created_at: float
    ended_at: float | None
    state: int
    reason: str


class RunLog:
    """The log in one state directory. Thread-safe. One writer a directory; any number of readers beside it.

    SettingsError if the directory cannot be used, another coordinator writes there, or another version wrote it.
    """

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        self._lock = threading.Lock()
        self._guard = None
        path = directory / FILE_NAME
        try:
            if not read_only:
                directory.mkdir(parents=True, exist_ok=True)
                self._guard = (directory / _LOCK_NAME).open("a")
                fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
            self._database = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
        except BlockingIOError as error:
            self._close_guard()
            raise SettingsError(
                f"Another coordinator uses the state directory {directory}",
                remedy="stop it, or give this one a --state-dir of its own",
            ) from error
        except (OSError, sqlite3.Error) as error:
            self._close_guard()
            raise SettingsError(
                f"Cannot open the run log {path}", got=str(error), remedy="check --state-dir and its permissions"
            ) from error
        try:
            self._prepare(path, read_only)
        except BaseException:
            self.close()
            raise

    def _prepare(self, path: Path, read_only: bool) -> None:
        try:
            if not read_only:
                self._database.execute("PRAGMA journal_mode = WAL")
                # A commit survives the death of this process without waiting for the disk.
                self._database.execute("PRAGMA synchronous = NORMAL")
                self._database.execute("PRAGMA foreign_keys = ON")
            version = self._database.execute("PRAGMA user_version").fetchone()[0]
            if version == 0 and not read_only:
                version = self._change(_SCHEMA)
            elif version == 1 and not read_only:
                version = self._change(_CHECKPOINTS)
        except sqlite3.Error as error:
            raise SettingsError(f"{path} is not a run log", got=str(error), remedy="check --state-dir") from error
        if version != SCHEMA_VERSION:
            raise SettingsError(
                f"The run log {path} was written by another version of Gradwire",
                expected=f"schema {SCHEMA_VERSION}",
                got=f"schema {version}",
                remedy="use that version, or another --state-dir",
            )

    def _change(self, script: str) -> int:
        """Bring the file to the present schema; return its version."""
        self._database.executescript(f"BEGIN;{script}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
        return SCHEMA_VERSION

    def create_run(self, run: str, generation: int, request: coordinator_pb2.CreateRunRequest) -> None:
        """Begin a run's log."""
        with self._writing() as database:
            database.execute(
                "INSERT INTO runs VALUES (?, ?, ?, ?, NULL, ?, '')",
                (
                    run,
                    generation,
                    request.SerializeToString(),
                    time.time(),
                    coordinator_pb2.RunState.Name(coordinator_pb2.RUN_STATE_PREPARED),
                ),
            )

    def append(self, run: str, entry: run_pb2.Entry) -> None:
        """Append an entry; FrameError unless its number is one more than the last."""
        with self._writing() as database:
            (last,) = database.execute("SELECT COALESCE(MAX(number), 0) FROM entries WHERE run = ?", (run,)).fetchone()
            if entry.number != last + 1:
                raise FrameError(
                    "Entries are numbered without gaps", expected=f"entry {last + 1}", got=f"entry {entry.number}"
                )
            database.execute(
                "INSERT INTO entries VALUES (?, ?, ?, ?)", (run, entry.number, entry.SerializeToString(), time.time())
            )
            if last == 0:
                state = coordinator_pb2.RunState.Name(coordinator_pb2.RUN_STATE_ACTIVE)
                database.execute("UPDATE runs SET state = ? WHERE run = ?", (state, run))

    def record_result(self, run: str, result: run_pb2.EntryResult) -> None:
        """Add the result of an entry that all servers have finished."""
        with self._writing() as database:
            database.execute(
                "INSERT INTO results VALUES (?, ?, ?, ?)", (run, result.entry, result.SerializeToString(), time.time())
            )

    def record_checkpoint(self, run: str, number: int, checkpoint: coordinator_pb2.StoredCheckpoint) -> None:
        """Add that servers have written the checkpoint of a SaveState entry."""
        with self._writing() as database:
            database.execute("INSERT INTO checkpoints VALUES (?, ?, ?)", (run, number, checkpoint.SerializeToString()))

    def begin_generation(self, run: str, generation: int) -> None:
        """Note that a run goes on as another generation; the NewPlan entry that comes next says how."""
        with self._writing() as database:
            database.execute("UPDATE runs SET generation = ? WHERE run = ?", (generation, run))

    def finish_run(self, run: str, state: coordinator_pb2.RunState, reason: str) -> None:
        """Note how a run came to its end."""
        with self._writing() as database:
            database.execute(
                "UPDATE runs SET state = ?, reason = ?, ended_at = ? WHERE run = ?",
                (coordinator_pb2.RunState.Name(state), reason, time.time(), run),
            )

    def fail_unfinished(self, reason: str) -> list[str]:
        """Mark the runs that an earlier coordinator left open as failed; return their identifiers."""
        failed = coordinator_pb2.RunState.Name(coordinator_pb2.RUN_STATE_FAILED)
        with self._writing() as database:
            rows = database.execute(
                "UPDATE runs SET state = ?, reason = ?, ended_at = ? WHERE ended_at IS NULL RETURNING run",
                (failed, reason, time.time()),
            )
            return [run for (run,) in rows.fetchall()]

    def run(self, run: str) -> LoggedRun:
        """Return a run; RunNotFound."""
        with self._lock:
            row = self._database.execute("SELECT * FROM runs WHERE run = ?", (run,)).fetchone()
        if row is None:
            raise RunNotFound("The log has no such run", got=repr(run[:80]))
        return _logged_run(row)

    def runs(self, limit: int) -> list[LoggedRun]:
        """Return the newest runs, newest first."""
        with self._lock:
            rows = self._database.execute("SELECT * FROM runs ORDER BY created_at DESC LIMIT ?", (limit,)).fetchall()
        return [_logged_run(row) for row in rows]

    def entries(self, run: str, first: int = 1) -> list[run_pb2.Entry]:
        """Return the entries of a run from number `first` on, in order."""
        with self._lock:
            rows = self._database.execute(
                "SELECT entry FROM entries WHERE run = ? AND number >= ? ORDER BY number", (run, first)
            ).fetchall()
        return [run_pb2.Entry.FromString(entry) for (entry,) in rows]

    def results(self, run: str, first: int = 1) -> list[run_pb2.EntryResult]:
        """Return the results of a run from entry `first` on, in order."""
        with self._lock:
            rows = self._database.execute(
                "SELECT result FROM results WHERE run = ? AND number >= ? ORDER BY number", (run, first)
            ).fetchall()
        return [run_pb2.EntryResult.FromString(result) for (result,) in rows]

    def last_numbers(self, run: str) -> tuple[int, int]:
        """Return the numbers of the last entry, and of the last one that has a result; 0 for none."""
        with self._lock:
            (entry,) = self._database.execute("SELECT MAX(number) FROM entries WHERE run = ?", (run,)).fetchone()
            (result,) = self._database.execute("SELECT MAX(number) FROM results WHERE run = ?", (run,)).fetchone()
        return entry or 0, result or 0

    def last_finished(self, run: str, *, limit: int = 1000) -> Iterator[tuple[run_pb2.Entry, run_pb2.EntryResult]]:
        """Yield the newest finished entries with their results, newest first, so many at most."""
        with self._lock:
            rows = self._database.execute(
                "SELECT entry, result FROM results JOIN entries USING (run, number) WHERE run = ? "
                "ORDER BY number DESC LIMIT ?",
                (run, limit),
            ).fetchall()
        for entry, result in rows:
            yield run_pb2.Entry.FromString(entry), run_pb2.EntryResult.FromString(result)

    def last_checkpoint(self, run: str) -> coordinator_pb2.StoredCheckpoint | None:
        """Return the newest checkpoint that servers have written; None if there is none."""
        with self._lock:
            row = self._database.execute(
                "SELECT checkpoint FROM checkpoints WHERE run = ? ORDER BY number DESC LIMIT 1", (run,)
            ).fetchone()
        return None if row is None else coordinator_pb2.StoredCheckpoint.FromString(row[0])

    def close(self) -> None:
        """Close the file and give up the directory. Idempotent."""
        with self._lock:
            self._database.close()
        self._close_guard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _close_guard(self) -> None:
        if self._guard is not None:
            self._guard.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")


def _logged_run(row: tuple[str, int, bytes, float, float | None, str, str]) -> LoggedRun:
    run, generation, request, created_at, ended_at, state, reason = row
    return LoggedRun(
        run=run,
        generation=generation,
        request=coordinator_pb2.CreateRunRequest.FromString(request),
        created_at=created_at,
        ended_at=ended_at,
        state=coordinator_pb2.RunState.Value(state),
        reason=reason,
    )
