"""Stage servers take a run over from its generation before: tensors change places, and what is wrong is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import pytest
import torch
from stage_cluster import Cluster, StageServer, Stream
from stage_model import HOLDERS, WIDTH

from gradwire_protocol.errors import FrameError, GradwireError, StaleGeneration
from gradwire_protocol.v1 import run_pb2, stage_pb2
from gradwire_stage.run_state import RunState

BEFORE = {"A": [0], "B": [1, 2]}
AFTER = {"A": [1, 2], "B": [0]}
Snapshot = dict[str, tuple[torch.Tensor, dict[str, object]]]


def run_of(cluster: Cluster, name: str) -> RunState:
    server = cluster.servers[name]
    assert isinstance(server, StageServer)
    held = server.stage_service.holder.current
    assert held is not None
    return held.run


def state_of(cluster: Cluster, name: str) -> Snapshot:
    run = run_of(cluster, name)
    return {
        tensor: (
            value.detach().clone(),
            {key: item.clone() if isinstance(item, torch.Tensor) else item for key, item in values.items()},
        )
        for tensor, value in run.tensors.items()
        for values in [run.optimizer.state_of(tensor)]
    }


def held(stages: list[int]) -> set[str]:
    return {name for name, holders in HOLDERS.items() if set(holders) & set(stages)}


def train(cluster: Cluster) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, WIDTH, dtype=torch.float64, generator=generator) for _ in range(2))
    cluster.submit_step(x, y, 2)
    cluster.reports()


def prepare(cluster: Cluster) -> dict[str, list[str]]:
    """Prepare the next generation with the servers in each other's places; return the names of the kept values."""
    cluster.layout = AFTER
    names: dict[str, list[str]] = {}
    for name, server in cluster.servers.items():
        request = cluster.request(name, generation=2)
        request.takes_over = True
        for item in server.call("Prepare", request).optimizer_state:
            known = names.setdefault(item.parameter, [])
            if item.state not in known:
                known.append(item.state)
    for name, server in cluster.servers.items():
        cluster.streams[name] = Stream(server)
    return names


def plan(names: dict[str, list[str]]) -> run_pb2.NewPlan:
    """The tensors change places, but for those that both have."""
    return run_pb2.NewPlan(
        moves=[
            run_pb2.Move(tensor=tensor, from_server=source, to_server=to, states=names.get(tensor, ()))
            for source, to in (("A", "B"), ("B", "A"))
            for tensor in sorted(held(AFTER[to]) - held(BEFORE[to]))
        ]
    )


def submit(cluster: Cluster, **kind: object) -> None:
    cluster.entry += 1
    for stream in cluster.streams.values():
        stream.submit(run_pb2.Entry(number=cluster.entry, generation=2, **kind))  # type: ignore[arg-type]


@pytest.mark.parametrize("limits", [{}, {"send_bytes": 1, "credit_bytes": 1}], ids=["roomy", "one message at a time"])
def test_tensors_and_the_optimizers_values_change_places(limits: dict[str, int]) -> None:
    with Cluster(BEFORE, **limits) as cluster:
        cluster.open()
        train(cluster)
        before = {**state_of(cluster, "A"), **state_of(cluster, "B")}
        kept = run_of(cluster, "B").tensors["w"]
        new_plan = plan(prepare(cluster))
        assert len(new_plan.moves) > 2
        assert run_of(cluster, "B").tensors["w"] is kept  # what stays is not even copied
        submit(cluster, new_plan=new_plan)
        assert {report.weight_version for report in cluster.reports().values()} == {1}
        for name, stages in AFTER.items():
            after = state_of(cluster, name)
            assert after.keys() == held(stages)
            for tensor, (value, values) in after.items():
                assert torch.equal(value, before[tensor][0])
                assert values.keys() == before[tensor][1].keys()
                for key, item in values.items():
                    assert torch.equal(torch.as_tensor(item), torch.as_tensor(before[tensor][1][key])), (tensor, key)
            assert run_of(cluster, name).kept is None


def all_failures(cluster: Cluster) -> list[GradwireError]:
    """Wait for the first server to fail, release all as a coordinator does, and return how each one ended."""
    with ThreadPoolExecutor(len(cluster.streams)) as pool:
        ends = [pool.submit(stream.failure) for stream in cluster.streams.values()]
        wait(ends, timeout=10, return_when=FIRST_COMPLETED)
        for server in cluster.servers.values():
            server.call("Release", stage_pb2.ReleaseRequest(run="r", generation=2))
        return [end.result() for end in ends]


def without_last(new_plan: run_pb2.NewPlan) -> run_pb2.NewPlan:
    del new_plan.moves[-1]
    return new_plan


def changed(**fields: object) -> Callable[[run_pb2.NewPlan], run_pb2.NewPlan]:
    def change(new_plan: run_pb2.NewPlan) -> run_pb2.NewPlan:
        for name, value in fields.items():
            if isinstance(value, list):
                getattr(new_plan.moves[0], name)[:] = value
            else:
                setattr(new_plan.moves[0], name, value)
        return new_plan

    return change


def twice(new_plan: run_pb2.NewPlan) -> run_pb2.NewPlan:
    new_plan.moves.append(new_plan.moves[0])
    return new_plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_last, "come from nowhere"),
        (changed(states=[]), "cannot be moved"),
        (changed(tensor="nonsense"), "come from nowhere|cannot be moved"),
        (changed(to_server="A"), "A wrong move"),
        (changed(states=["step", "step"]), "A wrong move"),
        (changed(tensor=""), "A wrong move"),
        (changed(states=["s" * 65]), "A wrong move"),
        (twice, "A wrong move"),
    ],
)
def test_wrong_moves_end_the_run(change: Callable[[run_pb2.NewPlan], run_pb2.NewPlan], message: str) -> None:
    with Cluster(BEFORE) as cluster:
        cluster.open()
        train(cluster)
        submit(cluster, new_plan=change(plan(prepare(cluster))))
        failures = all_failures(cluster)
        assert any(isinstance(error, FrameError) and re.search(message, str(error)) for error in failures), failures


def test_nothing_goes_on_before_the_state_was_taken_over() -> None:
    with Cluster(BEFORE) as cluster:
        cluster.open()
        prepare(cluster)
        submit(cluster, fetch_state=run_pb2.FetchState())
        assert "not taken over yet" in str(cluster.streams["A"].failure())


def test_without_a_generation_before_there_is_nothing_to_take_over() -> None:
    with Cluster(BEFORE) as cluster:
        request = cluster.request("A", generation=2)
        request.takes_over = True
        with pytest.raises(StaleGeneration, match="cannot be taken over"):
            cluster.servers["A"].call("Prepare", request)
        cluster.open()
        submitted = cluster.next_entry(new_plan=run_pb2.NewPlan())
        cluster.streams["A"].submit(submitted)
        assert "no state to take over" in str(cluster.streams["A"].failure())


def test_a_run_within_an_entry_is_not_taken_over() -> None:
    with Cluster(BEFORE) as cluster:
        cluster.open()
        cluster.streams["A"].submit(cluster.next_entry(load_state=run_pb2.LoadState()))
        while run_of(cluster, "A").progress.entry < 2:
            pass
        request = cluster.request("A", generation=2)
        request.takes_over = True
        with pytest.raises(StaleGeneration, match="between two entries"):
            cluster.servers["A"].call("Prepare", request)
        # It goes on, as if it had not been asked.
        assert run_of(cluster, "A").generation == 1
