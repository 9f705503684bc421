"""Random small partition problems, and what a partition of one costs, worked out from the definition."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from hypothesis import strategies as st

from gradwire_coordinator.costs import TravellingValue
from gradwire_coordinator.partition_problem import HeldTensor, PartitionProblem

LINK = 100.0
Judgement = tuple[float, float, int]


def reads(read: Sequence[int], start: int, end: int) -> bool:
    return any(start <= position < end for position in read)


def sent_bytes(problem: PartitionProblem, start: int, end: int) -> int:
    return sum(value.size_bytes for value in problem.values if start <= value.made < end <= value.read[-1])


def stage_seconds(problem: PartitionProblem, devices: Sequence[int], stage: int, start: int, end: int) -> float:
    of_stage = [devices[server] for server in problem.placement]
    device = of_stage[stage]
    seconds = float(problem.seconds[device, start:end].sum())
    if problem.recomputes and problem.recomputes[stage]:
        assert problem.forward_seconds is not None
        seconds += float(problem.forward_seconds[device, start:end].sum())
    returned = sum(v.gradient_bytes for v in problem.values if v.made < start and reads(v.read, start, end))
    sent = sent_bytes(problem, start, end)
    for size, neighbour in ((sent, stage + 1), (returned, stage - 1)):
        if size and of_stage[neighbour] != device:
            rate, delay = problem.link(device, of_stage[neighbour])
            seconds += size / rate + delay
    return seconds


def memory_bytes(problem: PartitionProblem, server: int, ends: Sequence[int]) -> int:
    segments = {stage: (ends[stage], ends[stage + 1]) for stage in problem.hosted[server]}
    total = sum(
        tensor.total_bytes
        for tensor in problem.tensors
        if any(reads(tensor.read, *segment) for segment in segments.values())
    )
    for stage, (start, end) in segments.items():
        live = problem.live[stage] if problem.live else 1
        held = int(problem.held_bytes[start:end].sum()) if problem.held_bytes is not None else 0
        incoming = sum(v.size_bytes for v in problem.values if v.made < start and reads(v.read, start, end))
        incoming += sum(v.size_bytes for v in problem.inputs if reads(v.read, start, end))
        total += live * incoming + (1 if problem.recomputes and problem.recomputes[stage] else live) * held
        total += int(problem.transient_bytes[start:end].max()) if problem.transient_bytes is not None else 0
    return total


def judge(problem: PartitionProblem, devices: Sequence[int], cuts: Sequence[int]) -> Judgement | None:
    """Return (seconds of the busiest server, of the largest stage, bytes sent); None if something does not fit."""
    ends = [0, *cuts, problem.seconds.shape[1]]
    if any(memory_bytes(problem, s, ends) > problem.limit(devices[s]) for s in range(problem.servers)):
        return None
    seconds = [stage_seconds(problem, devices, k, *pair) for k, pair in enumerate(itertools.pairwise(ends))]
    busiest = max(sum(seconds[stage] for stage in own) for own in problem.hosted)
    return busiest, max(seconds), sum(sent_bytes(problem, *pair) for pair in itertools.pairwise(ends))


def everything(problem: PartitionProblem) -> Iterator[Judgement]:
    """Yield what each partition that fits costs."""
    devices = range(len(problem.seconds))
    orders = [tuple(devices)[: problem.servers]] if problem.order_is_fixed else []
    for order in orders or itertools.permutations(devices, problem.servers):
        for cuts in itertools.combinations(problem.cuts, problem.stages - 1):
            found = judge(problem, order, cuts)
            if found is not None:
                yield found


@st.composite
def problems(draw: st.DrawFn, *, placements: Sequence[tuple[int, ...]] = ()) -> PartitionProblem:
    """Draw a problem; of these placements, or else with one stage a server."""
    placement = draw(st.sampled_from(placements)) if placements else ()
    nodes = draw(st.integers(max(1, len(placement)), 8))
    if placement:
        cuts = list(range(1, nodes))
    else:
        cuts = draw(st.lists(st.sampled_from(range(1, nodes)), unique=True).map(sorted)) if nodes > 1 else []
        placement = tuple(range(draw(st.integers(1, min(4, len(cuts) + 1)))))
    stages, servers = len(placement), 1 + max(placement)
    devices = min(4, servers + draw(st.integers(0, 1)))

    def of_nodes(most: int) -> list[int]:
        return draw(st.lists(st.integers(0, most), min_size=nodes, max_size=nodes))

    # Quarters add up exactly, so that equal sums are equal numbers. Devices are of two kinds at the most.
    rows = [of_nodes(12), of_nodes(12)]
    kinds = draw(st.lists(st.integers(0, 1), min_size=devices, max_size=devices))
    seconds = np.array([rows[kind] for kind in kinds]) / 4
    limited = draw(st.booleans())
    limits = [draw(st.sampled_from([0, 60, 120, 250])), draw(st.sampled_from([0, 60, 120, 250]))]
    recomputing = draw(st.booleans())

    def read_behind(first: int) -> tuple[int, ...]:
        some = st.lists(st.sampled_from(range(first, nodes)), unique=True, max_size=3)
        return tuple(draw(some.map(sorted)))

    values = []
    for made in range(nodes - 1):
        if read := read_behind(made + 1):
            size = draw(st.sampled_from([0, 25, 50, 100, 400]))
            values.append(TravellingValue(made, read, size, draw(st.sampled_from([0, size]))))
    tensors = [
        HeldTensor(read, draw(st.integers(1, 30)), draw(st.integers(0, 5)), draw(st.integers(0, 5)))
        for _ in range(draw(st.integers(0, 5)))
        if (read := read_behind(0))
    ]
    rate: float | np.ndarray = LINK
    delay: float | np.ndarray = draw(st.sampled_from([0.0, 0.25]))
    if draw(st.integers(0, 3)) == 0:
        rates = st.lists(st.sampled_from([25.0, 100.0, 400.0]), min_size=devices**2, max_size=devices**2)
        rate = np.array(draw(rates)).reshape(devices, devices)
    return PartitionProblem(
        seconds=seconds,
        cuts=cuts,
        placement=placement,
        values=values,
        inputs=[TravellingValue(0, read, 10, 0)] if (read := read_behind(0)) else [],
        tensors=tensors,
        held_bytes=np.array(of_nodes(20)),
        transient_bytes=np.array(of_nodes(20)) if draw(st.booleans()) else None,
        live=draw(st.lists(st.integers(1, 4), min_size=stages, max_size=stages)),
        recomputes=draw(st.lists(st.booleans(), min_size=stages, max_size=stages)) if recomputing else (),
        forward_seconds=seconds / 4 if recomputing else None,
        memory_bytes=[limits[kind] for kind in kinds] if limited else (),
        link_bytes_per_second=rate,
        link_delay_seconds=delay,
        order_is_fixed=draw(st.booleans()),
    )


def with_fields(problem: PartitionProblem, **fields: object) -> PartitionProblem:
    return dataclasses.replace(problem, **fields)  # type: ignore[arg-type]
