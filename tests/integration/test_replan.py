"""Planning anew moves the cuts to a better place, and nothing else: on real servers, in float64 equal to one process.

Where time matters, servers take half a millisecond for each node, or more, so that what is slow is known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoint_subject import adamw, make_batches, make_model
from cluster_in_process import Rig
from equivalence_subject import (
    KINDS,
    OPTIMIZERS,
    TOLERANCE,
    allowed_cuts,
    batches,
    check_equal,
    kept_model,
    one_process,
)

import gradwire
from gradwire_coordinator.log import RunLog
from gradwire_protocol.errors import GradwireError, PlanError, SettingsError, StageFailed
from gradwire_stage.run_state import RunState

pytest_plugins = ("replan_rig",)


def nodes(trainer: gradwire.Trainer) -> list[int]:
    return [stage.nodes for stage in trainer.plan.stages]


@pytest.mark.parametrize(
    ("kind", "optimizer", "servers", "virtual_stages", "schedule", "max_grad_norm"),
    [
        ("gpt", "adamw", 2, 1, "1f1b", 0.05),
        ("regression", "sgd", 3, 1, "zb-h1", None),
        ("regression", "adamw", 2, 2, "interleaved-1f1b", None),
    ],
)
def test_training_goes_on_as_if_nothing_had_happened(
    rig: Rig,
    as_predicted: None,
    whatever_it_gains: None,
    kind: str,
    optimizer: str,
    servers: int,
    virtual_stages: int,
    schedule: str,
    max_grad_norm: float | None,
) -> None:
    """Gradients, losses, weights; AdamW's state and momentum; a scheduler; tied weights, elsewhere than before."""
    model = kept_model(kind)
    optimizer_of_user = OPTIMIZERS[optimizer](model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer_of_user, step_size=2, gamma=0.5)
    # Most of it on one server.
    cuts = allowed_cuts(kind)[: servers - 1] if virtual_stages == 1 else [2, 10, 12]
    plan = gradwire.Plan(
        stages=servers,
        virtual_stages=virtual_stages,
        microbatches=8,
        schedule=schedule,
        cuts=cuts,
    )
    losses, gradients = [], []
    with rig.cluster.trainer(
        model,
        optimizer_of_user,
        loss=KINDS[kind][2],
        example=batches(kind)[0],
        plan=plan,
        max_grad_norm=max_grad_norm,
    ) as trainer:
        before = nodes(trainer)
        for number, (x, y) in enumerate(batches(kind)):
            if number == 2:
                made = trainer.replan(minimum_gain=0.0)
                assert made.moved, str(made)
                assert made.tensors > 0
                assert nodes(trainer) != before
            result, gradient = trainer.step_with_gradients(x, y)
            scheduler.step()
            losses.append(result.loss)
            gradients.append(gradient)
        weights = trainer.state_dict()
    check_equal((losses, gradients, weights), one_process(kind, optimizer, 8, max_grad_norm))


def regression(rig: Rig, **changes: Any) -> gradwire.Trainer:
    model = kept_model("regression")
    plan = gradwire.Plan(stages=2, microbatches=8, schedule="1f1b", **changes)
    return rig.cluster.trainer(
        model, OPTIMIZERS["sgd"](model), loss=F.mse_loss, example=batches("regression")[0], plan=plan
    )


def test_a_slow_server_gets_less_to_do(rig: Rig, pace: dict[str, float]) -> None:
    """The second server takes three times as long for a node as the first: it should have a quarter of the nodes."""
    # Long beside what the machine takes for anything else.
    pace |= {"stage-0": 4.0, "stage-1": 12.0}
    with regression(rig) as trainer:
        assert trainer.servers[1] == "stage-1"
        even = nodes(trainer)
        slow = rig.cluster.status().runs[0]
        assert (slow.run, slow.generation) == (trainer.run_id, 1)
        for _ in range(3):
            trainer.step(*batches("regression")[0])
        report = trainer.report()
        assert report.steps == 2
        assert any("trainer.replan()" in finding and "server 1" in finding for finding in report.findings)
        before = trainer.report().seconds.measured

        made = trainer.replan()
        assert made.moved
        assert made.gain > 0.1
        assert "the cuts moved" in str(made)
        assert made.plan == trainer.plan
        assert nodes(trainer)[1] < even[1]
        assert nodes(trainer)[1] == pytest.approx(sum(even) / 4, abs=3)
        with pytest.raises(SettingsError, match="nothing to report"):
            trainer.report()  # what was measured was another layout

        for _ in range(3):
            trainer.step(*batches("regression")[0])
        after = trainer.report()
        assert after.seconds.measured < before
        assert after.cost_source == "measured"
        for server in after.servers:
            assert server.forward.ratio is not None
            assert 0.25 < server.forward.ratio < 4
        again = trainer.replan(minimum_gain=0.3)
        assert not again.moved
        assert "nothing moved" in str(again)

        status = rig.cluster.status()
        assert (status.runs[0].generation, status.runs[0].plan.stages[1].nodes) == (2, nodes(trainer)[1])
        with RunLog(rig.directory, read_only=True) as log:
            assert log.run(trainer.run_id).generation == 2
            entries = log.entries(trainer.run_id)
        (entry,) = [entry for entry in entries if entry.HasField("new_plan")]
        assert (entry.generation, entry.number) == (2, 5)
        assert list(entry.new_plan.cuts) == [trainer.plan.stages[1].first_node]
        assert list(entry.new_plan.servers) == list(trainer.servers)
        assert {entry.generation for entry in entries[:4]} == {1}
        assert {entry.generation for entry in entries[4:]} == {2}


def test_checkpoints_evaluation_and_predictions_work_as_before(
    rig: Rig, as_predicted: None, whatever_it_gains: None, tmp_path: Path
) -> None:
    """Also of buffers that change or are in no checkpoint, frozen and tied weights; against a run that never moved."""
    data = make_batches(6)

    def trainer(cuts: list[str] | None) -> gradwire.Trainer:
        model = MODEL
        return rig.cluster.trainer(
            model,
            adamw(model),
            loss=F.cross_entropy,
            example=data[0],
            plan=gradwire.Plan(stages=2, microbatches=4, schedule="1f1b", cuts=cuts),
            max_grad_norm=1.0,
        )

    with trainer(["head"]) as moving, trainer_of_one(rig, data) as whole:
        results = [moving.step(*batch).loss for batch in data[:3]]
        save = moving.save(tmp_path / "before", wait=False)
        assert moving.replan(minimum_gain=0.0).moved
        assert save.done
        assert moving.evaluate(data) == pytest.approx(whole_evaluation(whole, data[:3], data), rel=TOLERANCE)
        assert torch.allclose(moving.predict(data[0][0]), whole.predict(data[0][0]), rtol=TOLERANCE, atol=TOLERANCE)
        results += [moving.step(*batch).loss for batch in data[3:]]
        moving.save(tmp_path / "after")
        weights = moving.state_dict()
        expected = [whole.step(*batch).loss for batch in data[3:]]
        assert results[3:] == pytest.approx(expected, rel=TOLERANCE)
        equal(weights, whole.state_dict())
        # Back to where it was, in the new layout, and on again: the same.
        assert moving.load(tmp_path / "before") is None
        assert [moving.step(*batch).loss for batch in data[3:]] == pytest.approx(expected, rel=TOLERANCE)
        equal(moving.state_dict(), weights)
    with trainer(None) as other:
        other.load(tmp_path / "after")
        equal(other.state_dict(), weights)


MODEL = make_model(dropout=0.0)


def trainer_of_one(rig: Rig, data: Any) -> gradwire.Trainer:
    return rig.cluster.trainer(
        MODEL,
        adamw(MODEL),
        loss=F.cross_entropy,
        example=data[0],
        plan=gradwire.Plan(stages=1, microbatches=4),
        max_grad_norm=1.0,
    )


def whole_evaluation(trainer: gradwire.Trainer, trained: Any, data: Any) -> float:
    for batch in trained:
        trainer.step(*batch)
    return trainer.evaluate(data)


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Up to what AdamW makes of rounding: before a BatchNorm a weight's gradient has hardly any size."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=TOLERANCE, atol=10 * TOLERANCE), name


def test_within_a_loop_it_waits_for_what_is_in_flight(rig: Rig, as_predicted: None, whatever_it_gains: None) -> None:
    data = batches("regression")[:1] * 6
    with regression(rig, cuts=allowed_cuts("regression")[:1], window=3) as trainer:
        losses = []
        for result in trainer.run(data):
            losses.append(result.loss)
            if result.step == 2:
                assert trainer.replan().moved
        assert trainer.steps_done == 6
    with regression(rig) as trainer:
        assert losses == pytest.approx([result.loss for result in trainer.run(data)], rel=TOLERANCE)


def test_what_cannot_be_is_refused_and_the_run_goes_on(rig: Rig) -> None:
    with regression(rig) as trainer:
        trainer.step(*batches("regression")[0])
        with pytest.raises(PlanError, match="nothing to plan anew from"):
            trainer.replan()
        for wrong in (1.0, -0.1, float("nan"), True, "much"):
            with pytest.raises(SettingsError, match="minimum_gain is not valid"):
                trainer.replan(minimum_gain=wrong)  # type: ignore[arg-type]
        trainer.step(*batches("regression")[0])
        trainer.replan(minimum_gain=0.99)
        trainer.step(*batches("regression")[0])


def test_a_server_that_cannot_go_on_ends_the_run(
    rig: Rig, as_predicted: None, whatever_it_gains: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of it: one server has the new layout, the other one refuses it."""
    with regression(rig, cuts=allowed_cuts("regression")[:1]) as trainer:
        for _ in range(2):
            trainer.step(*batches("regression")[0])
        refusing = next(service for service in rig.services if service.activity().stages == [1])
        with monkeypatch.context() as patch:
            patch.setattr(refusing, "_build", _refuse)
            with pytest.raises(StageFailed, match="Cannot prepare stage 1") as failure:
                trainer.replan()
        for call in (lambda: trainer.step(*batches("regression")[0]), trainer.replan, trainer.state_dict):
            with pytest.raises(GradwireError) as later:
                call()
            assert failure.value.message in str(later.value)
    # The servers are free again.
    with regression(rig) as trainer:
        trainer.step(*batches("regression")[0])


def _refuse(*_: Any) -> RunState:
    raise StageFailed("no room")


def test_other_processes_take_over_what_they_share_memory_with(tmp_path: Path) -> None:
    """With dropout, which needs processes of their own: sockets and shared memory of the generation before are gone.

    Servers write checkpoints as before, too, and read those from before.
    """
    # Enough work for the move to pay beyond doubt.
    data = [tuple(part.repeat(64) for part in batch) for batch in make_batches(6)]

    def losses(cluster: gradwire.Cluster, cuts: list[str] | None, move: bool) -> list[float]:
        model = make_model(dropout=0.3, width=512)
        plan = gradwire.Plan(stages=2, microbatches=4, schedule="1f1b", cuts=cuts)
        with cluster.trainer(
            model, adamw(model), loss=F.cross_entropy, example=data[0], plan=plan, seed=3, max_grad_norm=1.0
        ) as trainer:
            found = [trainer.step(*batch).loss for batch in data[:3]]
            if move:
                trainer.save("before", storage="server")
                assert trainer.replan(minimum_gain=0.0).moved
                trainer.save("after", storage="server")
                trainer.step(*data[3])
                trainer.load("before", storage="server")
                trainer.load("after", storage="server")
            return found + [trainer.step(*batch).loss for batch in data[3:]]

    with gradwire.local(stage_servers=2, checkpoint_root=tmp_path) as cluster:
        moved = losses(cluster, ["head"], move=True)
        assert moved == pytest.approx(losses(cluster, None, move=False), rel=TOLERANCE)
