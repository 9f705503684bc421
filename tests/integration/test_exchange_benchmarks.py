"""The benchmarks of the exchange measure what they say: sums over real processes, true bytes, and every claim named."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import allreduce
import exchange
from allreduce import LOOPBACK, MIB, PLAIN, THEIRS, TOPK, Case, Contender, Measured, measure, standing_by
from allreduce_ways import GRADWIRE


@pytest.mark.benchmark
def test_two_processes_add_up_and_count_what_they_send() -> None:
    case, contenders = Case(LOOPBACK, 2, 2), [PLAIN, Contender(GRADWIRE, "int8"), Contender(GRADWIRE, TOPK)]
    with standing_by((GRADWIRE,), 2) as members:
        found, sent = measure(members, case, contenders, rounds=1, count=1)
    rows = {row["way"]: row for row in allreduce.rows_of(found, sent)}
    assert rows.keys() == {contender.name for contender in contenders}
    assert all(row["ms"] > 0 and row["CPU s/GiB"] > 0 for row in rows.values())
    # Of two parameters, a byte each says whether there was a gradient.
    assert sent[case, PLAIN] == 2 * MIB + 2
    # A byte for each element, and a scale of four bytes for 256 of them.
    assert sent[case, Contender(GRADWIRE, "int8")] == 2 * MIB * (1 + 1 / 64) / 4 + 2
    # Four bytes and a place in two for one in a hundred, and four for each block of places.
    assert sent[case, Contender(GRADWIRE, TOPK)] == pytest.approx(6 * 2 * MIB / 400, rel=0.25)


def test_claims_of_the_all_reduce_are_those_of_the_issue() -> None:
    def speeds(case: Case, ratio: float, contender: Contender) -> dict[tuple[Case, Contender], list[Measured]]:
        return {(case, THEIRS): [Measured(ratio, 0.1)], (case, contender): [Measured(1.0, 0.1)]}

    found = (
        speeds(Case(LOOPBACK, 2, 16), 0.66, PLAIN)
        | speeds(Case(LOOPBACK, 2, 1), 0.9, PLAIN)
        | speeds(Case("100 Mbit/s", 2, 16), 15.0, Contender(GRADWIRE, TOPK))
    )
    claims = {claim.name: claim for claim in allreduce.claims_of(found)}
    assert [claim.bar for claim in claims.values()] == [
        *([">= 0.65", ">= 0.65", ">= 1.0", ">= 0.45", ">= 0.45"] * 2),
        *(">= 2.5", ">= 3.5", ">= 15.0"),
    ]
    assert [name for name, claim in claims.items() if claim.holds] == [
        "ring, 2 processes, loopback over gRPC, fp32, 16 MiB: × gloo's all-reduce speed",
        "16 MiB, 2 processes, 100 Mbit/s: topk(density=0.01) × uncompressed gloo",
    ]
    # What was not measured is there, and does not hold.
    assert sum(math.isnan(claim.value) for claim in claims.values()) == 10


def test_claims_of_the_exchange_are_those_of_the_issue() -> None:
    loopback = {"gradwire, none": [182.0], exchange.ALONE: [190.0], exchange.ONE: [100.0]}
    slow = {"gradwire, none": [50.0], "gradwire, int8": [150.0], "torch DDP": [60.0], exchange.NO_NETWORK: [180.0]}
    slow[exchange.LOCAL] = [172.0]
    added, ratio, kept, local = exchange.claims_of({LOOPBACK: loopback, "100 Mbit/s": slow})
    assert (added.value, added.bar, added.holds) == (pytest.approx(190 / 182 - 1), "< 0.1", True)
    assert (ratio.value, ratio.bar, ratio.holds) == (pytest.approx(1.82), ">= 1.8", True)
    assert (kept.value, kept.bar, kept.holds) == (pytest.approx(150 / 180), ">= 0.85", False)
    assert "gradwire, int8" in kept.name
    assert (local.value, local.bar, local.holds) == (pytest.approx(172 / 180), ">= 0.95", True)
    assert not any(claim.holds for claim in exchange.claims_of({}))
