"""A plan as the SDK has it: what the coordinator said, in values, in a few lines, and as JSON."""

from __future__ import annotations

import json

import pytest
from plan_samples import MIB, replicated_summary, sharded_summary, summary, timeline

from gradwire.planned_tensor import SplitParameter, tensor_lines
from gradwire.run_plan import RunPlan, grid_lines, replica_lines
from gradwire.timeline_drawing import TimedAction
from gradwire_protocol.program import Action
from gradwire_protocol.v1 import coordinator_pb2 as pb

PLAN = RunPlan.from_proto(summary(), timeline())


def test_everything_is_a_value() -> None:
    assert PLAN.name == "auto"
    assert PLAN.virtual_stages == 1
    assert [stage.server for stage in PLAN.stages] == [0, 1]
    assert (PLAN.stages[0].codec, PLAN.stages[0].boundary_bytes, PLAN.stages[1].returned_bytes) == ("bf16", MIB, MIB)
    assert [server.device for server in PLAN.servers] == ["cpu, 1 thread", "cpu, 2 threads"]
    assert PLAN.servers[0].peak_bytes == 21 * MIB
    assert PLAN.predicted.seconds == 0.18
    assert [candidate.name for candidate in PLAN.candidates] == ["auto", "1f1b+1"]
    assert [candidate.fits for candidate in PLAN.candidates] == [True, False]
    assert PLAN.links[0].measured
    assert PLAN.timeline[0] == TimedAction(0, Action(0, "F", 0), 0.0, 0.02)
    assert len(PLAN.timeline) == 9
    assert RunPlan.from_proto(summary(), timeline()) == PLAN


def test_a_few_lines_tell_it() -> None:
    assert str(PLAN).splitlines() == [
        "auto, 2 stages on 2 servers, 2 micro-batches, a step of 180 ms with a bubble of 30.0% expected",
        "  stage 0 on server 0: the model's inputs … blocks.1, 40 nodes, 1,234,567 parameters; F 20.0 ms, B 40.0 ms a "
        "micro-batch; sends 1.00 MiB a step",
        "  stage 1 on server 1: blocks.2 … the loss, 30 nodes, 1,000 parameters; F 20.0 ms, B 40.0 ms a micro-batch",
        "  why: an order made for these costs takes 180 ms; costs are measured",
    ]
    assert repr(PLAN) == f"<RunPlan: {str(PLAN).splitlines()[0]}>"


def test_json_has_it_all() -> None:
    record = json.loads(json.dumps(PLAN.to_record()))
    assert record["schedule"] == "auto"
    assert record["predicted"] == {"seconds": 0.18, "bubble": 0.3, "lower_bound_seconds": 0.18}
    assert record["stages"][0]["parameters"] == 1_234_567
    assert record["servers"][1]["memory_bytes"] == 2**30
    assert record["candidates"][1]["schedule"] == "1f1b"
    assert record["timeline"][0] == [0, "0F0", 0.0, 0.02]
    assert set(record) >= {"links", "reason", "cost_source", "micro_batches", "theoretical_bubble_ratio"}


def test_a_plan_without_predictions_is_one_too() -> None:
    """A coordinator's status may have it of a run that an older one made."""
    plan = RunPlan.from_proto(pb.PlanSummary(schedule="1f1b", extra_warm_up=1, stages=[pb.StageSummary(stage=0)]))
    assert plan.name == "1f1b+1"
    assert str(plan).startswith("1f1b+1, 1 stage on 1 server")


def test_replicas_are_copies_of_the_pipeline() -> None:
    assert (PLAN.replicas, PLAN.replica_shares, PLAN.compression, PLAN.servers_each) == (1, (1.0,), "none", 2)
    made = RunPlan.from_proto(replicated_summary(), timeline())
    assert (made.replicas, made.servers_each, made.virtual_stages) == (2, 2, 1)
    assert [(server.replica, server.position) for server in made.servers] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [stage.server for stage in made.stages] == [0, 1]
    assert [made.micro_batches_of(replica, 4) for replica in (0, 1)] == [3, 1]
    text = str(made).splitlines()
    assert text[0].startswith("auto, 2 replicas of 2 stages on 2 servers, 4 micro-batches")
    assert text[-2] == (
        "  replicas: 2, which take 75.0%, 25.0% of the micro-batches; they exchange gradients in a ring, compression "
        "int8, in 5.00 ms a step at most"
    )
    assert json.loads(json.dumps(made.to_record()))["replica_shares"] == [0.75, 0.25]


def test_of_one_replica_there_is_nothing_to_tell() -> None:
    assert list(grid_lines(PLAN)) == []
    assert (PLAN.transport, PLAN.transport_reason) == ("", "")


@pytest.mark.parametrize(("every", "words"), [(50, "every 50 steps"), (1, "every 1 step")])
def test_local_steps_have_words(every: int, words: str) -> None:
    made = replicated_summary()
    made.exchange = f"local(every={every}, learning_rate=0.7, momentum=0.9)"
    made.zero_reason = "replicas that train alone need the whole of it each"
    plan = RunPlan.from_proto(made)
    assert list(replica_lines(plan)) == [
        f"replicas: 2, which take 75.0%, 25.0% of the micro-batches; they train alone, and agree {words}, compression "
        "int8, in 5.00 ms a step on average",
        "each has the whole of the optimizer's state: replicas that train alone need the whole of it each",
    ]
    assert plan.to_record()["exchange"] == made.exchange


def test_who_has_the_optimizers_state_is_told_with_the_reason() -> None:
    made = replicated_summary()
    made.shards_optimizer, made.zero_reason = True, "it costs neither precision nor traffic"
    plan = RunPlan.from_proto(made)
    assert list(replica_lines(plan))[1:] == ["they share the optimizer's state: it costs neither precision nor traffic"]
    assert (plan.shards_optimizer, plan.to_record()["zero_reason"]) == (True, made.zero_reason)


def test_what_moves_sums_is_told_once() -> None:
    for made in (replicated_summary(), sharded_summary(), sharded_summary(replicated_summary())):
        made.transport, made.transport_reason = "gloo", "the plan asks for it"
        plan = RunPlan.from_proto(made)
        assert [line for line in str(plan).splitlines() if "gloo" in line] == ["  transport gloo: the plan asks for it"]
        assert plan.to_record()["transport"] == "gloo"


def test_several_servers_share_a_stage() -> None:
    assert (PLAN.tensor, PLAN.shards, PLAN.positions, list(tensor_lines(PLAN.tensor))) == (None, 1, 2, [])
    assert PLAN.to_record()["tensor"] is None
    made = RunPlan.from_proto(sharded_summary(), timeline())
    assert made.tensor is not None
    assert (made.shards, made.positions, made.servers_each, made.virtual_stages) == (2, 2, 4, 1)
    assert [(server.position, server.shard) for server in made.servers] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [stage.server for stage in made.stages] == [0, 1]
    assert made.tensor.parameters[0] == SplitParameter(name="blocks.0.mlp.0.weight", split="column")
    # Layers are alike; numbers behind a layer's tell modules apart within it.
    assert made.tensor.kinds() == [("blocks.*.mlp.0.weight", "column", 3), ("blocks.*.mlp.2.weight", "row", 3)]
    text = str(made).splitlines()
    assert text[0].startswith("auto, 2 stages on 4 servers, 2 micro-batches")
    assert text[3:5] == [
        "  tensor: 2 servers a stage share parameters (3 by column, 3 by row); in a micro-batch they exchange 3 times "
        "forward and 4 times backward, 3.00 MiB from each",
        "  transport gloo: no server has a GPU",
    ]
    record = json.loads(json.dumps(made.to_record()))
    assert record["tensor"]["parameters"][1] == {"name": "blocks.0.mlp.2.weight", "split": "row"}
    assert record["servers"][1]["shard"] == 1


def test_replicas_of_shared_stages_are_told_apart() -> None:
    made = RunPlan.from_proto(sharded_summary(replicated_summary()), timeline())
    assert [(server.replica, server.position, server.shard) for server in made.servers] == [
        (replica, position, shard) for replica in (0, 1) for position in (0, 1) for shard in (0, 1)
    ]
    assert (made.replicas, made.servers_each, made.positions) == (2, 4, 2)
