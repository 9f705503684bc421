"""The benchmark of partitions finds the slow server, and its claims are its rows' own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import partition as benchmark


def test_the_optimum_is_where_both_servers_take_equally_long() -> None:
    # 16 micro-batches of 9 layers at 12 ms; before them and after them the other server's 3 layers, which take as long.
    seconds, slowness = benchmark.CASES[benchmark.SLOW_DEVICE]
    assert benchmark.optimum_seconds(seconds, slowness) == pytest.approx(17 * 9 * 0.012)


@pytest.mark.benchmark
def test_a_slow_server_is_found_and_gets_fewer_layers() -> None:
    even, planned = benchmark.measure(benchmark.SLOW_DEVICE, rounds=1, steps=1)
    assert {even["layers"], planned["layers"]} <= {"6 + 6 slow", "6 slow + 6", "9 + 3 slow", "3 slow + 9"}
    assert "6" in even["layers"]
    assert "9" in planned["layers"]
    for row in (even, planned):
        # Nothing is faster than the optimum; on a busy machine much is slower.
        assert 1 / 1.005 <= row["× optimum"] < 5


def test_claims_are_about_the_rows_that_they_name() -> None:
    rows = [
        {"what": case, "split": split, "throughput × even": gain, "× optimum": of_optimum, "planning, s": None}
        for case in benchmark.CASES
        for split, gain, of_optimum in (
            (benchmark.EVEN, 1.0, 2.0),
            (benchmark.PLANNED, *((1.6, 1.06) if case == benchmark.SLOW_DEVICE else (1.0, 1.0))),
        )
    ]
    rows += [{"what": f"{kinds} kinds", "split": "planned: exact", "planning, s": kinds} for kinds in (1.0, 4.0)]
    found = benchmark.claims_of(rows)
    assert [(round(claim.value, 3), claim.holds) for claim in found] == [(1.6, True), (0.06, False), (4.0, True)]
