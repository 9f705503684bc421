"""Files that are replaced together: readers never see some old and some new."""

import stat
import threading

import pytest

from gradwire.certs.folders import write_together
from gradwire_protocol.errors import SettingsError


def test_readers_in_between_see_one_version(tmp_path):
    """Read by way of a descriptor of the folder, each file once: what belongs together is read together, or again."""
    folder = tmp_path / "a"
    write_together(folder, {"x": b"0", "y": b"0"}, private=frozenset({"y"}))
    assert stat.S_IMODE((folder / "y").stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "x").stat().st_mode) == 0o644
    ended = threading.Event()
    bad = []

    def read():
        while not ended.is_set():
            version = (folder / ".current").resolve()
            try:
                if (version / "x").read_bytes() != (version / "y").read_bytes():
                    bad.append(version)
                (folder / "x").read_bytes()
            except FileNotFoundError as error:
                # Two versions went by while this thread read.
                if ".versions" not in str(error.filename):
                    bad.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(1, 200):
        write_together(folder, {"x": b"%d" % number, "y": b"%d" % number}, private=frozenset({"y"}))
    ended.set()
    for reader in readers:
        reader.join()
    assert not bad
    assert (folder / "x").read_bytes() == (folder / "y").read_bytes() == b"199"
    assert len(list((folder / ".versions").iterdir())) == 2


def test_files_of_the_same_names_are_replaced(tmp_path):
    (tmp_path / "x").write_bytes(b"a copy that somebody made")
    write_together(tmp_path, {"x": b"1"})
    assert (tmp_path / "x").read_bytes() == b"1"


def test_a_folder_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="Cannot write certificates"):
        write_together(tmp_path / "file" / "folder", {"x": b"1"})
