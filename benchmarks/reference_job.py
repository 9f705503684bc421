"""Runs the reference job, `gradwire train`, as a user would, and returns its summary."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any


def train(*options: str, seed: int, steps: int | None) -> dict[str, Any]:
    """Train it to its end, or for so many steps, but for the check at the end. CalledProcessError if it fails."""
    with tempfile.TemporaryDirectory(prefix="gradwire-reference-job-") as directory:
        command = [
            *(sys.executable, "-m", "gradwire", "train", "--json", "--no-check", "--out", f"{directory}/run"),
            *("--seed", str(seed), *options),
            *(() if steps is None else ("--steps", str(steps))),
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary
