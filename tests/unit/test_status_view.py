"""What `gradwire status` makes of a coordinator's answer: which stages a server has, of which replica and shard."""

from __future__ import annotations

import io

import pytest
from plan_samples import replicated_summary, sharded_summary, summary
from rich.console import Console

from gradwire.cli.status import _servers
from gradwire_protocol.v1 import coordinator_pb2 as pb
from gradwire_protocol.v1 import stage_pb2


def stages_of(plan: pb.PlanSummary) -> dict[str, str]:
    """The column of stages, by server, while a run with this plan is on."""
    reply = pb.GetStatusReply(runs=[pb.RunStatus(run="r", state=pb.RUN_STATE_ACTIVE, plan=plan)])
    for server in plan.prediction.servers:
        reply.servers.add(server=server.server, activity=stage_pb2.Activity(run="r", stages=server.stages))
    console = Console(file=io.StringIO(), width=200)
    table = _servers(reply)
    console.print(table)
    names, stages = (list(table.columns[place].cells) for place in (0, 4))
    return dict(zip(map(str, names), map(str, stages), strict=True))


@pytest.mark.parametrize(
    ("plan", "server", "stages"),
    [
        (summary(), "stage-1", "1"),
        (replicated_summary(), "stage-1-of-1", "1 of replica 1"),
        (sharded_summary(), "stage-1-b", "1 (shard 1)"),
        (sharded_summary(replicated_summary()), "stage-0-of-1-b", "0 (shard 1) of replica 1"),
    ],
)
def test_a_server_is_told_by_its_stages_its_shard_and_its_replica(
    plan: pb.PlanSummary, server: str, stages: str
) -> None:
    assert stages_of(plan)[server] == stages
