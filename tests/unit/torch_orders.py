"""The orders that torch.distributed.pipelining's generators make, without starting its process groups."""

from __future__ import annotations

from gradwire_coordinator.schedules import Programs


def torchs(kind: type, p: int, m: int, v: int = 1) -> list[list[str]]:
    """Return the actions of each rank as text; p ranks with v stages each, m micro-batches."""
    schedule = object.__new__(kind)
    schedule.pp_group_size, schedule.n_local_stages = p, v
    schedule._num_stages = schedule.num_stages = p * v
    schedule._n_microbatches = m
    if hasattr(schedule, "_calculate_single_rank_operations"):
        schedule.microbatches_per_round = m // max(1, m // p)
        orders = {rank: schedule._calculate_single_rank_operations(rank) for rank in range(p)}
    else:
        orders = schedule._get_pipeline_order()
    return [[str(action) for action in orders[rank] if action and "REDUCE" not in str(action)] for rank in range(p)]


def texts(programs: Programs) -> list[list[str]]:
    return [list(map(str, program)) for program in programs]
