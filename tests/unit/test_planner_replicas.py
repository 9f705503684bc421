"""Plans with replicas: one pipeline for all, what they exchange, and shares by speed and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from planner_requests import (
    LINK,
    SECONDS,
    known,
    planned,
    request,
    servers,
    sharded,
)

from gradwire_coordinator.boundaries import ASSUMED_LINK
from gradwire_coordinator.cost_book import CostBook
from gradwire_coordinator.link_rates import LinkBook, LinkRate
from gradwire_coordinator.plan_summary import summarise
from gradwire_coordinator.planner import PlannedRun, Planner, plan_run
from gradwire_coordinator.ways import Servers
from gradwire_protocol.errors import GradwireError
from gradwire_protocol.program import action_from_proto
from gradwire_protocol.v1 import coordinator_pb2 as pb


def replicated(replicas: int, known_servers: Servers, **changes: Any) -> tuple[PlannedRun, pb.PlanSummary]:
    asked = request(2, replicas=replicas, schedule="1f1b", **changes)
    made = plan_run(asked, sharded(asked), servers(2 * replicas), known_servers)
    return made, summarise(asked.plan, made)


def test_like_replicas_are_planned_as_one_pipeline_with_its_part_of_the_micro_batches() -> None:
    """Four micro-batches over two replicas, as one pipeline with two of as many rows, and an exchange behind it."""
    made, summary = replicated(2, known(4))
    alone, _ = planned(2, schedule="1f1b", micro_batches=2, expected_rows=4)
    assert made.cut.way.cuts == alone.cut.way.cuts
    assert made.micro_batches == 2
    assert list(summary.replica_shares) == [0.5, 0.5]
    assert summary.micro_batches == 4
    assert summary.compression == "none"
    assert [(each.server, each.replica) for each in summary.prediction.servers] == [
        ("stage-0", 0),
        ("stage-1", 0),
        ("stage-2", 1),
        ("stage-3", 1),
    ]
    reduce = [each.reduce_seconds for each in summary.prediction.servers]
    # Two turns, each of half of the server's gradients and a delay.
    expected = [
        each.gradient_bytes / ASSUMED_LINK.forward + ASSUMED_LINK.round_trip_seconds
        for each in summary.prediction.servers
    ]
    assert reduce == pytest.approx(expected)
    assert reduce[:2] == reduce[2:]
    assert alone.prediction.seconds < summary.prediction.seconds <= alone.prediction.seconds + 2 * max(reduce)
    kinds = [[action_from_proto(item.action).kind for item in row.actions] for row in made.timeline]
    assert all(row[-2:] == ["REDUCE", "UPDATE"] for row in kinds)
    (chosen,) = [item for item in summary.prediction.candidates if item.chosen]
    exchanged = sum(each.gradient_bytes for each in summary.prediction.servers)
    stages = sum(stage.boundary_bytes + stage.returned_bytes for stage in summary.stages)
    assert chosen.traffic_bytes == 2 * stages + exchanged


def test_compression_shortens_the_exchange() -> None:
    _, plain = replicated(2, known(4))
    _, halved = replicated(2, known(4), compression="bf16")
    assert halved.compression == "bf16"
    saved = [
        before.reduce_seconds - after.reduce_seconds
        for before, after in zip(plain.prediction.servers, halved.prediction.servers, strict=True)
    ]
    sizes = [each.gradient_bytes / 2 / ASSUMED_LINK.forward for each in plain.prediction.servers]
    assert saved == pytest.approx(sizes)


def test_what_a_codec_keeps_counts_as_memory() -> None:
    def gradients(**changes: Any) -> list[int]:
        _, summary = replicated(2, known(4), zero="off", **changes)
        return [server.gradient_bytes for server in summary.prediction.servers]

    plain = gradients()
    assert gradients(compression="topk(density=0.01, momentum=0.9)") == [3 * size for size in plain]
    assert gradients(exchange="local") == [3 * size for size in plain]
    # Nobody is there to agree with.
    _, alone = planned(2, compression="int8")
    assert [server.gradient_bytes for server in alone.prediction.servers] == [
        stage.parameters * 4 for stage in alone.stages
    ]


def test_unlike_servers_make_like_replicas_and_a_faster_one_takes_more() -> None:
    fast = known(4).costs[0]
    slow = dataclasses.replace(fast, **dict.fromkeys(SECONDS, fast.forward * 3))
    mixed = dataclasses.replace(known(4), costs=[slow, fast, slow, fast])
    made, summary = replicated(2, mixed)
    # A fast and a slow one each, at the same positions.
    are_slow = [server.server in ("stage-0", "stage-2") for server in made.servers]
    assert are_slow[:2] == are_slow[2:]
    assert sorted(are_slow[:2]) == [False, True]
    assert list(summary.replica_shares) == [0.5, 0.5]
    # With cuts they stay in their order, and the first replica has both fast ones.
    made, summary = replicated(2, dataclasses.replace(known(4), costs=[fast, fast, slow, slow]), cuts=[6])
    assert [server.server for server in made.servers] == ["stage-0", "stage-1", "stage-2", "stage-3"]
    assert list(summary.replica_shares) == pytest.approx([0.75, 0.25])


def test_a_faster_replica_takes_no_more_than_it_has_memory_for() -> None:
    fast = known(4).costs[0]
    slow = dataclasses.replace(fast, **dict.fromkeys(SECONDS, fast.forward * 3))
    asked = request(2, replicas=2, schedule="gpipe", cuts=[6])

    def shares(memory: int) -> list[float]:
        of = dataclasses.replace(known(4, memory=memory), costs=[fast, fast, slow, slow])
        return list(plan_run(asked, sharded(asked), servers(4), of).shares)

    of_two = plan_run(asked, sharded(asked), servers(4), known(4)).prediction.servers
    held = max(
        each.weight_bytes + each.gradient_bytes + each.optimizer_bytes + each.activation_bytes for each in of_two
    )
    # GPipe holds all micro-batches of a step: here there is room for two of them, but not for three.
    assert shares(held) == [0.5, 0.5]
    assert shares(2 * held) == pytest.approx([0.75, 0.25])


def test_links_of_all_replicas_and_between_them_are_measured() -> None:
    measured: list[tuple[str, str]] = []

    class Links(LinkBook):
        def rates(self, links: Sequence[tuple[str, str]]) -> list[LinkRate | GradwireError]:
            measured.extend(links)
            return [LINK] * len(links)

    def refuse(address: str) -> Any:
        raise AssertionError(address)

    asked = request(2, replicas=2, activation_compression=["auto"])
    Planner(Links(refuse), CostBook(refuse, seconds=0)).measure(asked.plan, sharded(asked), servers(4))
    ports = {frozenset(int(address.rpartition(":")[2]) - 9000 for address in link) for link in measured}
    assert ports == {frozenset(pair) for pair in ((0, 1), (2, 3), (0, 2), (1, 3))}
