"""Micro-batches are dealt out to replicas by their shares, evenly over the step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwire_protocol.dealing import deal


@given(count=st.integers(0, 200), replicas=st.integers(1, 60))
def test_equal_shares_take_turns(count: int, replicas: int) -> None:
    assert deal(count, [1.0 / replicas] * replicas) == [index % replicas for index in range(count)]


@given(count=st.integers(0, 300), speeds=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9))
def test_each_gets_its_share_up_to_rounding_and_evenly(count: int, speeds: list[float]) -> None:
    shares = [speed / sum(speeds) for speed in speeds]
    dealt = deal(count, shares)
    assert len(dealt) == count
    for replica, share in enumerate(shares):
        own = dealt.count(replica)
        assert math.floor(count * share - 1e-6) <= own <= math.ceil(count * share + 1e-6)
        for behind in range(count + 1):
            # As many as belong to this part of the step, give or take what others need to have a turn.
            assert abs(dealt[:behind].count(replica) - own * behind / max(1, count)) <= len(shares)


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [
        (8, (0.75, 0.25), [0, 0, 1, 0, 0, 0, 1, 0]),
        (5, (0.5, 0.5), [0, 1, 0, 1, 0]),
        # Too few for the slow one.
        (2, (0.9, 0.1), [0, 0]),
        (1, (0.2, 0.5, 0.3), [1]),
        (0, (0.5, 0.5), []),
    ],
)
def test_examples(count: int, shares: tuple[float, ...], expected: list[int]) -> None:
    assert deal(count, shares) == expected
