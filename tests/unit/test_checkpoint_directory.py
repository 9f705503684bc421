"""A directory appears whole or not at all: replaced, failed, killed, without an exchange of names."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradwire_protocol.checkpoint import directory
from gradwire_protocol.checkpoint.directory import remove, replaced, settle

# Replaces the directory over and over: two files that belong together, each 300 kB of one digit.
_WRITER = """
import itertools, sys
from pathlib import Path
from gradwire_protocol.checkpoint.directory import replaced
print("ready", flush=True)
for number in itertools.count():
    with replaced(Path(sys.argv[1])) as stage:
        for name in ("first", "second"):
            (stage / name).write_text(str(number % 10) * 300_000)
"""


def write(path: Path, text: str) -> None:
    with replaced(path) as stage:
        (stage / "file").write_text(text)


def names(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir())


def test_a_directory_is_made_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a"
    write(path, "old")
    write(path, "new")
    assert (path / "file").read_text() == "new"
    assert names(path.parent) == ["a"]
    remove(path)
    assert names(path.parent) == []


def test_a_failure_leaves_the_old_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, "old")

    def fail() -> None:
        with replaced(path) as stage:
            (stage / "file").write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert (path / "file").read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_file_systems_that_cannot_exchange_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def cannot(first: Path, second: Path) -> None:
        raise OSError(number, "cannot")

    monkeypatch.setattr(directory, "_exchange", cannot)
    path = tmp_path / "a"
    write(path, "old")
    write(path, "new")
    assert (path / "file").read_text() == "new"
    assert names(tmp_path) == ["a"]
    # As a kill between the two renames leaves it.
    path.rename(tmp_path / ".a.previous")
    settle(path)
    assert (path / "file").read_text() == "new"


def test_a_living_writers_directory_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with replaced(path) as first:
        write(path, "second")
        assert first.is_dir()
        (first / "file").write_text("first")
    assert (path / "file").read_text() == "first"
    assert names(tmp_path) == ["a"]


def test_killed_at_any_moment_it_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for delay in (0.0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08):
        with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            while not path.exists():
                time.sleep(0.001)
            time.sleep(delay)
            writer.send_signal(signal.SIGKILL)
        first, second = ((path / name).read_text() for name in ("first", "second"))
        assert len(first) == 300_000
        assert first == second
    write(path, "last")
    assert names(tmp_path) == ["a"]
