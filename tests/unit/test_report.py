"""Predicted beside measured: numbers add up, the text says what differs most, and what to do."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import Future

import pytest
from plan_samples import MIB, replicated_summary, sharded_summary, summary, timeline

from gradwire.measured_steps import MOST_STEPS, MeasuredStep, MeasuredSteps
from gradwire.report import Report, make_report
from gradwire.report_values import Compared
from gradwire.run_plan import RunPlan
from gradwire_protocol.errors import Aborted, SettingsError
from gradwire_protocol.v1 import coordinator_pb2, run_pb2

PLAN = RunPlan.from_proto(summary(), timeline())
SERVERS = ["stage-0", "stage-1"]


def timing(busy: dict[str, float], idle: dict[str, float]) -> run_pb2.Timing:
    return run_pb2.Timing(window_seconds=sum(busy.values()) + sum(idle.values()), busy_seconds=busy, idle_seconds=idle)


def result(slow: float = 1.0, *, weight: float = 0.02, wait_step: float = 0.0) -> run_pb2.EntryResult:
    """Both servers as the plan expects them (F 40 ms, B 80 ms), the second `slow` times slower."""
    return run_pb2.EntryResult(
        seconds=0.2,
        timings={
            "stage-0": timing(
                {"forward": 0.04, "backward": 0.08, "update": 0.002, "encode": 0.003, "decode": 0.001},
                {"wait-gradient": 0.04, "wait-step": wait_step},
            ),
            "stage-1": timing(
                {"forward": 0.04 * slow, "backward": (0.08 - weight) * slow, "weight": weight * slow},
                {"wait-activation": 0.03, "wait-step": wait_step},
            ),
        },
    )


def report(*results: run_pb2.EntryResult, rows: int = 8, recompute: bool = False, plan: RunPlan = PLAN) -> Report:
    steps = [MeasuredStep.of(number, 8, each) for number, each in enumerate(results, 2)]
    return make_report(plan, steps, SERVERS, rows=rows, recompute=recompute)


def test_numbers_add_up() -> None:
    made = report(result(1.0), result(2.0), result(1.5))
    assert (made.first_step, made.last_step, made.steps) == (2, 4, 3)
    assert made.seconds == Compared(0.18, pytest.approx(0.2))
    first, second = made.servers
    assert first.forward == Compared(pytest.approx(0.04), pytest.approx(0.04))
    assert first.backward == Compared(pytest.approx(0.08), pytest.approx(0.08))
    assert first.transfer_seconds == pytest.approx(0.004)
    # One of its two backwards is in two parts, which take as long here.
    assert second.backward == Compared(pytest.approx(0.08), pytest.approx(0.12))
    assert second.compute.ratio == pytest.approx(1.5)
    for server in made.servers:
        phases = (server.forward, server.backward, server.update)
        total = sum(each.measured for each in phases) + server.transfer_seconds + server.idle_seconds
        assert total == pytest.approx(server.window_seconds)
    idle = [0.04 / 0.166, sum(0.03 / (0.03 + 0.12 * slow) for slow in (1.0, 2.0, 1.5)) / 3]
    assert made.bubble == Compared(0.3, pytest.approx(sum(idle) / 2))
    assert made.traffic_bytes == 2 * MIB


def test_it_says_what_differs_most_and_what_to_do() -> None:
    slow = report(result(1.4))
    assert slow.findings == (
        "the backward of server 1 (stage 1) differs most: 80.0 ms a step predicted, 112 ms measured (1.40 ×)",
        "server 1 (stage 1) is 1.40 × slower than the fastest one, each compared with its prediction: "
        "trainer.replan() would weigh the work accordingly, and move the cuts if that pays",
    )
    assert report(result(1.0)).findings == (
        "servers compute as long as predicted, within 1 % of a step",
        "all servers are off by about the same factor: trainer.replan() has little to gain",
    )


def test_it_says_where_servers_wait() -> None:
    waiting = report(result(wait_step=0.1))
    assert any("39% of the time for the next step" in finding for finding in waiting.findings)
    assert any("larger than simulated" in finding for finding in waiting.findings)


def test_it_says_what_cannot_be_compared() -> None:
    assert report(result(), rows=4).findings[0] == (
        "batches had 8.0 rows on average, and the plan is for 4: what was predicted is for those"
    )
    assert "run again" in report(result(), recompute=True).findings[-1]


def test_it_prints_as_a_table_and_has_a_record() -> None:
    made = report(result(1.4))
    lines = str(made).splitlines()
    assert lines[0] == ("step 2: 200 ms a step, 180 ms predicted; bubble 19.6%, 30.0% simulated, 33.3% in theory")
    assert lines[1].split() == [
        "server", "stages", "forward", "backward", "update", "other", "work", "waits", "waits", "most", "for",
    ]  # fmt: skip
    assert "80.0 → 112 (1.40×)" in lines[3]
    assert lines[3].endswith("activation")
    assert "2.00 MiB travel" in lines[4]
    assert repr(made) == f"<Report: {lines[0]}>"
    record = json.loads(json.dumps(made.to_record()))
    assert record["servers"][1]["forward"] == {"predicted": 0.04, "measured": pytest.approx(0.056)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.steps = 1  # type: ignore[misc]


def test_a_plan_without_predictions_is_reported_too() -> None:
    bare = RunPlan.from_proto(without_predictions())
    made = report(result(), plan=bare)
    assert made.servers[0].forward.ratio is None
    assert "0 → 40.0" in str(made)


def without_predictions() -> coordinator_pb2.PlanSummary:
    made: coordinator_pb2.PlanSummary = summary()
    made.ClearField("prediction")
    for stage in made.stages:
        stage.server = stage.stage
        for field in ("forward_seconds", "backward_seconds"):
            stage.ClearField(field)
    return made


def test_there_must_be_something_to_report() -> None:
    with pytest.raises(SettingsError, match="nothing to report yet"):
        report()


def finished(made: run_pb2.EntryResult) -> Future[run_pb2.EntryResult]:
    future: Future[run_pb2.EntryResult] = Future()
    future.set_result(made)
    return future


def test_the_first_step_of_a_layout_does_not_count() -> None:
    steps = MeasuredSteps()
    for number in range(1, 4):
        steps.follow(number, 8, finished(result()))
    failed: Future[run_pb2.EntryResult] = Future()
    steps.follow(4, 8, failed)
    failed.set_exception(Aborted("ended"))
    assert [step.step for step in steps.last(10)] == [2, 3]
    assert [step.step for step in steps.last(1)] == [3]
    steps.begin_anew()
    for number in range(5, 8 + MOST_STEPS):
        steps.follow(number, 8, finished(result()))
    kept = steps.last(2 * MOST_STEPS)
    assert len(kept) == MOST_STEPS
    assert kept[-1].step == 7 + MOST_STEPS


def test_servers_of_replicas_are_told_apart_and_their_shares_counted() -> None:
    plan = RunPlan.from_proto(replicated_summary(), timeline())
    half = timing({"forward": 0.02, "backward": 0.04}, {"wait-exchange": 0.05})
    of_all = result()
    for name in SERVERS:
        of_all.timings[f"{name}-of-1"].CopyFrom(half)
    names = [server.server for server in plan.servers]
    made = make_report(plan, [MeasuredStep.of(2, 8, of_all)], names, rows=8)
    assert [(server.replica, server.position) for server in made.servers] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert made.servers[2].name == "server 0 (stage 0) of replica 1"
    # Three micro-batches of the first replica, one of the second.
    assert [server.forward.predicted for server in made.servers] == pytest.approx([0.06, 0.06, 0.02, 0.02])
    assert not any("replan" in finding for finding in made.findings)
    table = [line.split() for line in str(made).splitlines()]
    assert table[1][:3] == ["server", "replica", "stages"]
    assert [row[:3] for row in table[2:6]] == [
        [name, str(place // 2), str(place % 2)] for place, name in enumerate(names)
    ]
    (finding,) = [text for text in made.findings if "end of a step" in text]
    # 100 of 536 ms; the plan has a codec already.
    assert finding.startswith("servers wait 19% of the time for what others send at the end of a step")
    assert "compression" not in finding
    plain = make_report(dataclasses.replace(plan, compression="none"), [MeasuredStep.of(2, 8, of_all)], names, rows=8)
    assert any('compression="int8"' in text for text in plain.findings)


def shared_stages(plan: coordinator_pb2.PlanSummary, waits: float) -> Report:
    """A step of a plan with two servers a stage, all of which compute as long, and wait so long for each other."""
    made = RunPlan.from_proto(sharded_summary(plan), timeline())
    names = [server.server for server in made.servers]
    each = timing({"forward": 0.04, "backward": 0.08}, {"wait-exchange": waits})
    step = run_pb2.EntryResult(seconds=0.2, timings=dict.fromkeys(names, each))
    return make_report(made, [MeasuredStep.of(2, 8, step)], names, rows=8)


def test_servers_of_a_stage_are_told_apart() -> None:
    made = shared_stages(summary(), 0.01)
    assert [(server.position, server.shard) for server in made.servers] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [server.stages for server in made.servers] == [(0,), (0,), (1,), (1,)]
    assert made.servers[3].name == "server 1 (stage 1, shard 1)"
    assert [server.forward.predicted for server in made.servers] == pytest.approx([0.04] * 4)
    table = [line.split() for line in str(made).splitlines()]
    assert table[1][:3] == ["server", "shard", "stages"]
    assert table[5][:3] == ["stage-1-b", "1", "1"]
    assert not any("replan" in finding or "wait" in finding for finding in made.findings)

    both = shared_stages(replicated_summary(), 0.01)
    assert both.servers[7].name == "server 1 (stage 1, shard 1) of replica 1"
    assert str(both).splitlines()[1].split()[:4] == ["server", "replica", "shard", "stages"]


def test_too_much_waiting_within_a_stage_is_said() -> None:
    (finding,) = [text for text in shared_stages(summary(), 0.12).findings if "wait" in text]
    assert finding == (
        "servers wait 50% of the time for what the other servers of their stage send: fewer servers a stage (tensor), "
        "and more stages, exchange less"
    )
    (finding,) = [text for text in shared_stages(replicated_summary(), 0.12).findings if "wait" in text]
    assert "of their stage or other replicas send" in finding
