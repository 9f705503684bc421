"""Settings: flags over environment over a file, and errors that name the field."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gradwire_coordinator.settings import load_coordinator_settings
from gradwire_protocol.errors import SettingsError


def test_flags_go_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "coordinator.toml"
    config.write_text('listen = "127.0.0.1:1"\nadvertise = "127.0.0.1:2"\nlease_seconds = 30\n')
    monkeypatch.setenv("GRADWIRE_COORDINATOR_LISTEN", "127.0.0.1:3")
    monkeypatch.setenv("GRADWIRE_COORDINATOR_ADVERTISE", "127.0.0.1:4")
    settings = load_coordinator_settings({"listen": "127.0.0.1:5", "advertise": None}, config)
    assert (settings.listen, settings.advertise, settings.lease_seconds) == ("127.0.0.1:5", "127.0.0.1:4", 30)
    assert settings.heartbeat_seconds == 1


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("lease_seconds = 'long'", "lease_seconds"),
        ("lease_seconds = 0.1", "lease_seconds"),
        ("checkpoint_root = '/nowhere/at/all'", "checkpoint_root"),
        ("lease_seconds = 2\nheartbeat_seconds = 1.5", "twice heartbeat_seconds"),
        ("lisen = 'x'", "lisen"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, text: str, part: str) -> None:
    config = tmp_path / "coordinator.toml"
    config.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_coordinator_settings({}, config)
    assert part in str(caught.value)


def test_tls_files_are_taken_together(tmp_path: Path) -> None:
    files = {f"tls_{name}": tmp_path / name for name in ("authority", "certificate", "key")}
    tls = load_coordinator_settings(files, None).tls
    assert tls is not None
    assert tls.key == tmp_path / "key"
    assert load_coordinator_settings({}, None).tls is None


def test_the_coordinator_needs_no_torch() -> None:
    """Every module of it is imported with torch made impossible to import."""
    script = """
import importlib, pkgutil, sys
sys.modules["torch"] = None
import gradwire_coordinator
for module in pkgutil.iter_modules(gradwire_coordinator.__path__, "gradwire_coordinator."):
    importlib.import_module(module.name)
assert "gradwire_coordinator.service" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
