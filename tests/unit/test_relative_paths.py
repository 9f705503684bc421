"""Paths from the wire stay below their root."""

from __future__ import annotations

import pytest

from gradwire_protocol.errors import SettingsError
from gradwire_protocol.relative_paths import MAXIMUM_NAME_BYTES, check_inside, check_relative


@pytest.mark.parametrize("path", ["a", "a/b-1.2/..c", ".", "é", "a" * MAXIMUM_NAME_BYTES, "a/" * 511 + "bc"])
def test_relative_paths_are_taken(path):
    check_relative(path, "It")


@pytest.mark.parametrize(
    "path",
    ["", "/", "/a", "..", "a/../b", "./a", "a//b", "a/", "a\\b", "a\0b", "a\n", "a/" * 512 + "b", "a/" + "b" * 256],
)
def test_other_paths_are_refused(path):
    with pytest.raises(SettingsError, match="It is not a relative path"):
        check_relative(path, "It")


def test_links_may_lead_anywhere_below_the_root(tmp_path):
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (root / "link").symlink_to("real")
    assert check_inside(root / "link", root, "It") == (root / "real").resolve()
    assert check_inside(root / ".", root, "It") == root.resolve()
    (root / "up").symlink_to("..")
    for path in ("up", "up/root/../other"):
        (tmp_path / "other").mkdir(exist_ok=True)
        with pytest.raises(SettingsError, match="It leads out of its root"):
            check_inside(root / path, root, "It")
    with pytest.raises(SettingsError, match="It is not there"):
        check_inside(root / "nothing", root, "It")
