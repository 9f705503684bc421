"""The run log: order, permanence, the death of its writer, and readers beside it."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from gradwire_coordinator.log import FILE_NAME, RunLog
from gradwire_protocol.errors import FrameError, RunNotFound, SettingsError
from gradwire_protocol.v1 import coordinator_pb2, run_pb2

REQUEST = coordinator_pb2.CreateRunRequest(seed=5, description="a run")


def entry(number: int) -> run_pb2.Entry:
    return run_pb2.Entry(number=number, generation=1, train_step=run_pb2.TrainStep(step=number))


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    with RunLog(tmp_path / "new") as log:
        log.create_run("r", 1, REQUEST)
        for number in (1, 2, 3):
            log.append("r", entry(number))
            log.record_result("r", run_pb2.EntryResult(entry=number, loss=0.5))
        log.finish_run("r", coordinator_pb2.RUN_STATE_ENDED, "done")
    with RunLog(tmp_path / "new") as log:
        assert log.entries("r") == [entry(1), entry(2), entry(3)]
        assert log.entries("r", first=3) == [entry(3)]
        assert [result.entry for result in log.results("r", first=2)] == [2, 3]
        run = log.run("r")
        assert (run.request, run.state, run.reason) == (REQUEST, coordinator_pb2.RUN_STATE_ENDED, "done")
        assert run.ended_at is not None
        assert run.ended_at >= run.created_at


def test_a_run_goes_on_as_another_generation(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.create_run("r", 1, REQUEST)
        log.append("r", entry(1))
        log.begin_generation("r", 2)
        log.append("r", run_pb2.Entry(number=2, generation=2, new_plan=run_pb2.NewPlan(cuts=[7])))
        assert log.run("r").generation == 2
        assert [(found.generation, found.WhichOneof("kind")) for found in log.entries("r")] == [
            (1, "train_step"),
            (2, "new_plan"),
        ]


@pytest.mark.parametrize("number", [0, 2, 4])
def test_numbers_have_no_gaps(tmp_path: Path, number: int) -> None:
    with RunLog(tmp_path) as log:
        log.create_run("r", 1, REQUEST)
        log.append("r", entry(1))
        log.append("r", entry(2))
        with pytest.raises(FrameError, match="without gaps") as caught:
            log.append("r", entry(number))
        assert caught.value.expected == "entry 3"
        log.append("r", entry(3))  # a refused entry leaves no trace
        assert [found.number for found in log.entries("r")] == [1, 2, 3]


def test_runs_are_numbered_each_for_itself_and_listed_newest_first(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for run in ("a", "b", "c"):
            log.create_run(run, 1, REQUEST)
            log.append(run, entry(1))
        assert [run.run for run in log.runs(2)] == ["c", "b"]
        with pytest.raises(RunNotFound):
            log.run("d")


def test_nothing_that_is_written_changes(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.create_run("r", 1, REQUEST)
        log.append("r", entry(1))
        log.record_result("r", run_pb2.EntryResult(entry=1))
    database = sqlite3.connect(tmp_path / FILE_NAME)
    for statement in (
        "UPDATE entries SET entry = x'00'",
        "DELETE FROM entries",
        "UPDATE results SET result = x'00'",
        "DELETE FROM results",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            database.execute(statement)
    database.close()


def test_a_result_needs_its_entry(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.create_run("r", 1, REQUEST)
        with pytest.raises(sqlite3.IntegrityError):
            log.record_result("r", run_pb2.EntryResult(entry=1))


WRITER = """
import sys
from pathlib import Path
from gradwire_coordinator.log import RunLog
from gradwire_protocol.v1 import coordinator_pb2, run_pb2
log = RunLog(Path(sys.argv[1]))
log.create_run("r", 1, coordinator_pb2.CreateRunRequest())
number = 0
while True:
    number += 1
    log.append("r", run_pb2.Entry(number=number))
    print(number, flush=True)
"""


def test_what_was_appended_survives_kill_9_and_is_read_meanwhile(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    told = [int(writer.stdout.readline()) for _ in range(50)]
    with RunLog(tmp_path, read_only=True) as reader:
        numbers = [found.number for found in reader.entries("r")]
        assert len(numbers) >= 50
        assert numbers == list(range(1, len(numbers) + 1))
    os.kill(writer.pid, signal.SIGKILL)
    told += [int(line) for line in writer.stdout.read().split()]
    writer.wait()
    writer.stdout.close()
    with RunLog(tmp_path) as log:
        numbers = [found.number for found in log.entries("r")]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) >= told[-1]
        assert log.fail_unfinished("the coordinator was stopped") == ["r"]
        assert log.run("r").state == coordinator_pb2.RUN_STATE_FAILED
        assert log.fail_unfinished("again") == []


def test_one_writer_a_directory(tmp_path: Path) -> None:
    with RunLog(tmp_path), pytest.raises(SettingsError, match="Another coordinator"):
        RunLog(tmp_path)
    RunLog(tmp_path).close()


def test_another_versions_log_is_refused(tmp_path: Path) -> None:
    RunLog(tmp_path).close()
    database = sqlite3.connect(tmp_path / FILE_NAME)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(SettingsError, match="another version") as caught:
        RunLog(tmp_path)
    assert (caught.value.expected, caught.value.got) == ("schema 2", "schema 99")


def test_a_file_that_is_no_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("nothing of the kind" * 100)
    with pytest.raises(SettingsError, match="not a run log"):
        RunLog(tmp_path)


def test_a_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="Cannot open the run log"):
        RunLog(tmp_path / "file" / "below")


def test_a_log_of_the_first_version_is_taken_over(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.create_run("r", 1, REQUEST)
        log.append("r", entry(1))
    database = sqlite3.connect(tmp_path / FILE_NAME)
    # What the second version has added.
    database.execute("DROP TABLE checkpoints")
    database.execute("PRAGMA user_version = 1")
    database.close()
    with pytest.raises(SettingsError, match="another version"):
        RunLog(tmp_path, read_only=True)
    stored = coordinator_pb2.StoredCheckpoint(directory="a/b", step=1, written_at=2.0)
    with RunLog(tmp_path) as log:
        assert log.entries("r") == [entry(1)]
        log.record_checkpoint("r", 1, stored)
    with RunLog(tmp_path, read_only=True) as log:
        assert log.last_checkpoint("r") == stored


def test_the_newest_of_everything_is_found(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.create_run("r", 1, REQUEST)
        assert log.last_numbers("r") == (0, 0)
        assert log.last_checkpoint("r") is None
        for number in range(1, 6):
            log.append("r", entry(number))
        for number in (1, 2, 3):
            log.record_result("r", run_pb2.EntryResult(entry=number, loss=float(number)))
        for number in (2, 3):
            log.record_checkpoint("r", number, coordinator_pb2.StoredCheckpoint(directory=f"at-{number}", step=number))
        assert log.last_numbers("r") == (5, 3)
        assert [(found.number, result.loss) for found, result in log.last_finished("r", limit=2)] == [
            (3, 3.0),
            (2, 2.0),
        ]
        last = log.last_checkpoint("r")
        assert last is not None
        assert last.directory == "at-3"
