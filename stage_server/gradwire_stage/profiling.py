"""Measures what the nodes of a graph cost on this server's device, group after group, in little memory.

A group's weights are made up when it is reached and freed behind it, and groups that are alike are run once: the layers
of a deep model take no more time and memory than one of them. Leaves to others: one walk (`profiling_walk.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gradwire_protocol.errors import Aborted
from gradwire_protocol.torch_tensors import TORCH_TYPES
from gradwire_protocol.v1 import stage_pb2
from gradwire_stage import allocator
from gradwire_stage.device import Device
from gradwire_stage.optimizer import warm_up
from gradwire_stage.profiling_actions import measure_action
from gradwire_stage.profiling_checks import check_measure
from gradwire_stage.profiling_clock import open_clock
from gradwire_stage.profiling_groups import Grouping
from gradwire_stage.profiling_runs import GroupRunner
from gradwire_stage.profiling_values import Maker
from gradwire_stage.profiling_walk import Walk
from gradwire_stage.timeline import Clock


def measure_costs(
    request: stage_pb2.MeasureCostsRequest,
    *,
    device: Device,
    memory_bytes: int,
    operators: Mapping[str, Callable[..., Any]],
    cancelled: Callable[[], bool],
) -> stage_pb2.MeasureCostsReply:
    """Measure, on a thread of its own; nothing else may compute here meanwhile. Raises what is wrong with the request.

    memory_bytes: what it may take. cancelled: asked between groups; Aborted if it says so.
    """
    check_measure(request, operators)
    # A custom operator's first call would take as long, and be measured with it.
    warm_up()
    tensors = {spec.name: spec for spec in request.tensors}
    grouping = Grouping(request.graph, tensors)
    groups = grouping.groups(request.ends)

    def measure(clock: Clock[Any]) -> stage_pb2.MeasureCostsReply:
        started = time.perf_counter()
        runner = GroupRunner(
            device.torch_device, clock, TORCH_TYPES.get(request.precision), operators, max(1, request.tensor)
        )
        reply = stage_pb2.MeasureCostsReply(action=measure_action(device, clock))
        for number, rows in enumerate(request.rows, start=1):
            walk = Walk(
                *(request.graph, tensors, grouping, groups, runner, Maker(device.torch_device)),
                rows=rows,
                memory_bytes=memory_bytes,
                until=started + request.seconds * number / len(request.rows),
            )
            costs = []
            for group, end in zip(groups, request.ends, strict=True):
                if cancelled():
                    raise Aborted("The measurement of costs was cut off")
                costs.append(walk.measure(group, end))
            reply.measured.add(rows=rows, groups=costs)
        reply.seconds = time.perf_counter() - started
        return reply

    def on_thread() -> stage_pb2.MeasureCostsReply:
        device.enter_compute_thread()
        with open_clock(device) as clock:
            return measure(clock)

    with ThreadPoolExecutor(1, "profiling") as pool:
        try:
            return pool.submit(on_thread).result()
        finally:
            device.give_back_memory()
            allocator.give_back()
