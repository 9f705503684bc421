"""The sources of settings, in their order, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from gradwire_protocol.errors import SettingsError
from gradwire_protocol.settings import Settings, load_settings, tls_files


class Sample(Settings):
    model_config = SettingsConfigDict(env_prefix="SAMPLE_")

    a: int = 1
    b: int = 1
    c: int = 1
    d: int = 1
    e: int = Field(default=1, ge=1)


def test_flags_over_environment_over_file_over_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("a = 3\nb = 3\nc = 3\n")
    monkeypatch.setenv("SAMPLE_A", "4")
    monkeypatch.setenv("SAMPLE_B", "4")
    built_in = {"a": 2, "b": 2, "c": 2, "d": 2}
    settings = load_settings(Sample, {"a": 5, "b": None}, file, built_in)
    assert settings == Sample(a=5, b=4, c=3, d=2, e=1)
    monkeypatch.undo()
    assert load_settings(Sample, {}, None) == Sample()


def test_every_wrong_value_is_named(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("f = 1\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(Sample, {"e": 0, "a": "one"}, file)
    assert all(name in caught.value.got for name in ("e: ", "a: ", "f: "))
    assert "SAMPLE_" in caught.value.remedy


@pytest.mark.parametrize("content", [None, b"a = = 5", b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "settings.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match=r"settings\.toml cannot be read"):
        load_settings(Sample, {}, file)


def test_tls_takes_three_files_or_none(tmp_path: Path) -> None:
    assert tls_files(None, None, None) is None
    files = tls_files(tmp_path / "a", tmp_path / "c", tmp_path / "k")
    assert files is not None
    assert files.key == tmp_path / "k"
    with pytest.raises(SettingsError, match="three files"):
        tls_files(tmp_path / "a", None, None)
