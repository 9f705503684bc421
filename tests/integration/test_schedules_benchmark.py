"""The benchmark of schedules runs as printed, on layers that only sleep: all schedules, a table, a JSON file, plot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "schedules.py"
OURS = ("gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v", "auto", "auto, v = 2")
TORCHS = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
# Of 2 servers, 16 micro-batches: one in a bubble of its schedule.
THEORY = {"gpipe": 3, "1f1b": 3, "interleaved-1f1b": 1.5, "zb-h1": 1, "zb-v": 0.5}


@pytest.mark.benchmark
def test_it_measures_every_schedule_and_writes_down_what_it_finds(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = {flag: tmp_path / flag for flag in ("json", "plot")}
    flags = ["sleeping", "--milliseconds", "5", "--processes", "2", "--rounds", "1", "--steps", "1"]
    # Not in this process: it puts a kernel of its own in the place of torch's.
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *flags, "--json", str(files["json"]), "--plot", str(files["plot"])],
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(files["json"].read_text())
    rows = {row["contender"]: row for row in found["rows"]}
    assert list(rows) == [*(f"gradwire, {name}" for name in OURS), *(f"torch, {name}" for name in TORCHS)]
    for name, row in rows.items():
        # Two stages of 5 ms, or four of 2.5 ms: the second server waits for its first input.
        several = any(name.endswith(each) for each in (*OURS[2::2], OURS[-1], *TORCHS[2:]))
        assert row["bound, ms"] == pytest.approx(16 * 15 + (2.5 if several else 5))
        # No schedule can be faster, if all parts of a backward sleep; on a busy machine much is slower.
        assert 0.2 < row["share of bound"] <= 1.005
    for name, units in THEORY.items():
        assert rows[f"gradwire, {name}"]["theory"] == pytest.approx(units / (3 * 16 + units))
    for name in OURS:
        row = rows[f"gradwire, {name}"]
        assert row["off by"] == pytest.approx(abs(row["simulated, ms"] / row["step, ms"] - 1))
    (claim,) = found["claims"]
    assert claim["name"] == "2 sleeping stages: simulated and measured step time, most off"
    assert claim["value"] == max(rows[f"gradwire, {name}"]["off by"] for name in OURS)
    assert files["plot"].read_text().lstrip().startswith("<?xml")
