"""Measured costs kept in files: a cache, that nothing wrong with it can stop."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from gradwire_coordinator import cost_files
from gradwire_coordinator.cost_files import CostFiles
from gradwire_coordinator.measured_costs import ActionSeconds, Cost, MeasuredGroups


def groups(seconds: float = 1.0) -> MeasuredGroups:
    numbers = np.arange(2.0 * len(Cost)).reshape(len(Cost), 2) * seconds
    action = ActionSeconds(*numbers[0], 3.0, 4.0, 5.0)
    return MeasuredGroups((3, 5), (2, 4), numbers, numbers + 1, np.array([True, False]), action)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    files = CostFiles(tmp_path / "costs")
    assert files.read("a") is None
    files.write("a", groups(7.0))
    files.write("a", groups())
    for found in (files.read("a"), CostFiles(tmp_path / "costs").read("a")):
        assert found is not None
        assert (found.ends, found.rows) == ((3, 5), (2, 4))
        for field in ("fixed", "per_row", "is_measured"):
            assert np.array_equal(getattr(found, field), getattr(groups(), field))
        assert found.action == groups().action
    assert files.read("b") is None
    assert [path.name for path in (tmp_path / "costs").iterdir()] == ["a.npz"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY\x01\x00v\x00nothing"])
def test_a_file_that_cannot_be_read_counts_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    files = CostFiles(tmp_path)
    assert files.read("a") is None
    files.write("a", groups())
    assert files.read("a") is not None


@pytest.mark.parametrize(
    "change",
    [
        {"ends": np.array([1, 2, 3])},
        {"rows": np.array([], int)},
        {"fixed": np.zeros((3, 2))},
        {"is_measured": np.array([True])},
        {"action": np.array([1.0])},
        {"fixed": np.array(["text"] * 8).reshape(4, 2)},
        {"fixed": np.array([None] * 8).reshape(4, 2)},  # would be a pickle
    ],
)
def test_a_file_of_something_else_counts_as_none(tmp_path: Path, change: dict[str, np.ndarray]) -> None:
    files = CostFiles(tmp_path)
    files.write("a", groups())
    with np.load(tmp_path / "a.npz") as stored:
        content = dict(stored) | change
    np.savez(tmp_path / "a.npz", **content)
    assert files.read("a") is None


def test_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_files, "MAXIMUM_FILES", 2)
    files = CostFiles(tmp_path)
    for number in range(4):
        files.write(str(number), groups())
        os.utime(tmp_path / f"{number}.npz", (number, number))
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["2", "3"]


def test_a_directory_that_cannot_be_used_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    files = CostFiles(tmp_path / "file")
    files.write("a", groups())
    assert files.read("a") is None
