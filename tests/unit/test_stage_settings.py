"""Settings of a stage server: flags over environment over file, and one message for what is wrong."""

from __future__ import annotations

import pytest

from gradwire_protocol.errors import SettingsError
from gradwire_stage.settings import load_stage_settings

ADDRESS = "127.0.0.1:7070"


def test_flags_win_over_environment_over_file(monkeypatch, tmp_path) -> None:
    file = tmp_path / "stage.toml"
    file.write_text(f'coordinator = "{ADDRESS}"\ndevice = "cuda:1"\nthreads = 3\nserver = "file"\n')
    monkeypatch.setenv("GRADWIRE_STAGE_THREADS", "2")
    monkeypatch.setenv("GRADWIRE_STAGE_SERVER", "environment")
    settings = load_stage_settings({"server": "flag", "threads": None, "listen": "127.0.0.1:9"}, file)
    assert (settings.server, settings.threads, settings.device) == ("flag", 2, "cuda:1")
    assert settings.coordinator == ADDRESS
    assert settings.service().listen == "127.0.0.1:9"
    assert load_stage_settings({"coordinator": "127.0.0.1:1"}, None).threads == 2


def test_memory_is_shared_unless_it_is_switched_off(monkeypatch, tmp_path) -> None:
    settings = load_stage_settings({"coordinator": ADDRESS}, None)
    assert settings.shared_memory
    assert settings.shared_memory_threshold_bytes == 256 * 2**10
    assert not load_stage_settings({"coordinator": ADDRESS, "shared_memory": False}, None).shared_memory
    monkeypatch.setenv("GRADWIRE_STAGE_SHARED_MEMORY", "false")
    assert not load_stage_settings({"coordinator": ADDRESS}, None).shared_memory
    with pytest.raises(SettingsError, match="shared_memory_directory"):
        load_stage_settings({"coordinator": ADDRESS, "shared_memory_directory": tmp_path / "missing"}, None)


def test_tls_takes_all_three_files(tmp_path) -> None:
    files = {f"tls_{name}": tmp_path / name for name in ("authority", "certificate", "key")}
    tls = load_stage_settings({"coordinator": ADDRESS, **files}, None).tls
    assert tls is not None
    assert tls.key == tmp_path / "key"
    assert load_stage_settings({"coordinator": ADDRESS}, None).tls is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "coordinator: Field required"),
        ({"coordinator": "nowhere"}, "HOST:PORT"),
        ({"coordinator": ADDRESS, "advertise": "host"}, "HOST:PORT"),
        ({"coordinator": ADDRESS, "threads": 0}, "threads"),
        ({"coordinator": ADDRESS, "server": "x" * 65}, "server"),
        ({"coordinator": ADDRESS, "unknown": 1}, "unknown"),
        ({"coordinator": ADDRESS, "checkpoint_root": "/nowhere/at/all"}, "checkpoint_root"),
    ],
)
def test_wrong_settings_are_named(flags, message) -> None:
    with pytest.raises(SettingsError, match=message):
        load_stage_settings(flags, None)
