"""The benchmark of tensor parallelism compares with what it says, and every claim is named."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import tensor_parallel
from peers import Peer
from tensor_peers import DTENSOR, SERVERS
from tensor_peers import __file__ as PEERS_SCRIPT


@pytest.mark.benchmark
def test_torchs_own_tensor_parallelism_takes_steps() -> None:
    with Peer(DTENSOR, processes=SERVERS, script=PEERS_SCRIPT) as peer:
        assert peer.run(1) > 0


def test_claims_are_those_of_the_issue() -> None:
    found = {tensor_parallel.GLOO: [85.0, 90.0], tensor_parallel.GRPC: [60.0, 60.0], DTENSOR: [100.0, 100.0]}
    gloo, grpc = tensor_parallel.claims_of(found)
    assert (gloo.value, gloo.bar, gloo.holds) == (pytest.approx(0.875), ">= 0.9", False)
    assert (grpc.value, grpc.bar, grpc.holds) == (pytest.approx(0.6), ">= 0.5", True)
    # What was not measured is there, and does not hold.
    assert [(math.isnan(claim.value), claim.holds) for claim in tensor_parallel.claims_of({})] == [(True, False)] * 2
    assert [row["× torch"] for row in tensor_parallel.rows_of(found)] == pytest.approx([0.875, 0.6, 1.0])
