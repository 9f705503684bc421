"""What does not fit is said by the byte, with what would fit."""

from __future__ import annotations

import numpy as np
import pytest

from gradwire_coordinator.fit_errors import Alternative, in_units
from gradwire_coordinator.partition import find_partition
from gradwire_coordinator.partition_problem import HeldTensor, PartitionProblem
from gradwire_protocol.errors import PlanError


def problem(stages: int, memory: int, *, live: int = 1) -> PartitionProblem:
    """Twelve nodes with a parameter each: 100 bytes, with gradient and state 400; each keeps 10 bytes."""
    return PartitionProblem(
        seconds=np.ones((stages, 12)),
        cuts=range(1, 12),
        placement=tuple(range(stages)),
        tensors=[HeldTensor((node,), 100, 100, 200) for node in range(12)],
        held_bytes=np.full(12, 10),
        live=[live] * stages,
        memory_bytes=[memory] * stages,
    )


def test_the_missing_bytes_are_named() -> None:
    with pytest.raises(PlanError) as caught:
        find_partition(problem(2, 2400))
    error = caught.value
    assert "lacks 60 bytes" in error.message
    assert error.expected == "2.3 KiB at most on its device (number 0)"
    assert error.got == (
        "2.4 KiB: 600 bytes of weights, 600 bytes of gradients, 1.2 KiB of optimizer state, 60 bytes of activations"
    )
    assert error.remedy == "use servers with more memory"


def test_what_would_fit_is_tried() -> None:
    tried: list[str] = []

    def alternative(what: str, remedy: str, other: PartitionProblem) -> Alternative:
        def made() -> PartitionProblem:
            tried.append(remedy)
            return other

        return Alternative(what, remedy, made)

    alternatives = [
        alternative("smaller micro-batches", "use 8 micro-batches", problem(2, 2400)),
        alternative("more stages", "use 13 stages", problem(13, 2400)),
        alternative("more stages", "use 3 stages", problem(3, 2400)),
        alternative("more stages", "use 4 stages", problem(4, 2400)),
    ]
    with pytest.raises(PlanError) as caught:
        find_partition(problem(2, 2400), alternatives)
    assert caught.value.remedy == "this would fit: use 3 stages"
    # Of more stages, more than suffice are not tried.
    assert tried == ["use 8 micro-batches", "use 13 stages", "use 3 stages"]
    with pytest.raises(PlanError) as caught:
        find_partition(problem(2, 2400), alternatives[:2])
    assert (
        caught.value.remedy == "use servers with more memory; neither smaller micro-batches, nor more stages would do"
    )


def test_a_server_with_several_stages_is_named_with_them() -> None:
    several = PartitionProblem(
        seconds=np.ones((2, 12)),
        cuts=range(1, 12),
        placement=(0, 1, 1, 0),
        tensors=[HeldTensor((node,), 100) for node in range(12)],
        memory_bytes=[100, 500],
    )
    with pytest.raises(PlanError, match=r"server [01] with stages (0, 3|1, 2) lacks [0-9]+ bytes"):
        find_partition(several)


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (2**21, "2.0 MiB"), (2**33, "8.00 GiB")],
)
def test_bytes_are_shown_in_units(size: int, shown: str) -> None:
    assert in_units(size) == shown
