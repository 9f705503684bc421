"""Prometheus' own programs, where they are installed, and the files that they read."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

DOCKER = Path(__file__).parents[1] / "docker"
CONFIGURATION = DOCKER / "prometheus/prometheus.yml"
ALERTS = DOCKER / "prometheus/alerts.yml"


def program(name: str) -> str:
    """The path of promtool or prometheus; skips the test where there is none."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian has it in the package prometheus)")
    return found


def promtool(*arguments: object, page: str | None = None) -> str:
    """What promtool says; the test fails with it if it is not content. page: its standard input."""
    done = subprocess.run(
        [program("promtool"), *map(str, arguments)], input=page, capture_output=True, text=True, timeout=60, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said
