"""SIGTERM at any process of a run: the step is finished, the state saved, everybody ends with 0; nothing is lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from services import Services, code_of, send
from torch import nn

import gradwire
from gradwire_protocol.v1 import coordinator_pb2

pytestmark = pytest.mark.fault

STEPS = 12
PLAN = gradwire.Plan(stages=2, microbatches=4, schedule="1f1b", cuts=["2"])


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    with Services(tmp_path) as services:
        yield services


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)).double()


def batches(first: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for step in range(first, STEPS):
        generator = torch.Generator().manual_seed(step)
        yield (
            torch.randn(16, 8, generator=generator, dtype=torch.float64),
            torch.randn(16, 1, generator=generator, dtype=torch.float64),
        )


def make_trainer(cluster: gradwire.Cluster, **more: object) -> gradwire.Trainer:
    model = make_model()
    return cluster.trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        loss=nn.functional.mse_loss,
        example=next(batches()),
        plan=PLAN,
        **more,  # type: ignore[arg-type]
    )


def weights_of_one_process() -> dict[str, torch.Tensor]:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x, y in batches():
        optimizer.zero_grad()
        for part_x, part_y in zip(x.tensor_split(4), y.tensor_split(4), strict=True):
            (nn.functional.mse_loss(model(part_x), part_y) / 4).backward()
        optimizer.step()
    return model.state_dict()


def run_until_stopped(trainer: gradwire.Trainer, after: int, stop: Callable[[], None]) -> tuple[int, gradwire.Stopping]:
    """Train; call `stop` after some steps, and go on until the run is to end. Return the last step and the error."""
    done = 0
    endless = (batch for _ in range(10_000) for batch in batches())
    try:
        for result in trainer.run(endless, progress=False):
            assert result.step == done + 1, "the results of steps in flight are given before the end"
            done = result.step
            if done == after:
                stop()
    except gradwire.Stopping as error:
        return done, error
    raise AssertionError("the run has not ended")


def finish(services: Services, stages: int, checkpoint: str) -> None:
    """Go on from a checkpoint to the last step, and compare with one process that nothing interrupted."""
    with services.connect(stages) as cluster, make_trainer(cluster) as trainer:
        trainer.load(checkpoint, storage="server")
        for _ in trainer.run(batches(trainer.steps_done), progress=False):
            pass
        assert trainer.steps_done == STEPS
        state = trainer.state_dict()
    for name, expected in weights_of_one_process().items():
        torch.testing.assert_close(state[name], expected, rtol=0, atol=1e-12)


def stopped(trainer: gradwire.Trainer, after: int, stop: Callable[[], None]) -> gradwire.Stopping:
    """Train step by step on the batches of the job; call `stop` after some, and wait until the run is to end."""
    for x, y in batches():
        if trainer.steps_done == after:
            stop()
            deadline = time.monotonic() + 10
            while not trainer.is_stopping:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        try:
            trainer.step(x, y)
        except gradwire.Stopping as error:
            return error
    raise AssertionError("the run has not ended")


def test_a_stage_server_that_is_stopped_costs_nothing(services: Services) -> None:
    with services.connect() as cluster, make_trainer(cluster) as trainer:
        run, leaving = trainer.run_id, services.stage_of(trainer.servers[1])
        error = stopped(trainer, 5, lambda: send(leaving, signal.SIGTERM))
        assert f"server {trainer.servers[1]} was asked to stop" in str(error)
        assert f"{run}/step-5" in error.got
        # Everything but steps goes on for now; a step gives the same error.
        assert trainer.state_dict().keys() == make_model().state_dict().keys()
        with pytest.raises(gradwire.Stopping):
            trainer.step(*next(batches()))
        # No other run gets a server that leaves, which is to be seen.
        assert [server.server for server in cluster.status().servers if server.leaving] == [trainer.servers[1]]
        with pytest.raises(gradwire.PlanError, match="0 stage servers are free"):
            make_trainer(cluster)
    assert code_of(leaving, 10) == 0
    services.replace_stage(leaving)
    with services.connect() as cluster:
        (known,) = cluster.status().runs
        assert known.state == coordinator_pb2.RUN_STATE_ENDED
        assert "as it was asked to" in known.reason
        assert (known.checkpoint.directory, known.checkpoint.step) == (f"{run}/step-5", 5)
    finish(services, 2, f"{run}/step-5")


def test_a_coordinator_that_is_stopped_and_started_again(services: Services) -> None:
    with services.connect() as cluster, make_trainer(cluster) as trainer:
        run = trainer.run_id
        error = stopped(trainer, 4, lambda: send(services.coordinator, signal.SIGTERM))
        assert "the coordinator was asked to stop" in str(error)
        with pytest.raises(gradwire.Unreachable, match="takes in no run any more"):
            make_trainer(cluster)
    assert code_of(services.coordinator, 10) == 0
    services.restart_coordinator()
    # The servers find it by themselves, and it knows what was.
    with services.connect() as cluster:
        (known,) = cluster.status().runs
        assert (known.run, known.state, known.step) == (run, coordinator_pb2.RUN_STATE_ENDED, 4)
        assert known.HasField("loss")
        assert (known.last_entry, known.finished_entry) == (6, 6)  # the first weights, four steps, a save
        assert known.checkpoint.directory == f"{run}/step-4"
    finish(services, 2, known.checkpoint.directory)


def test_a_coordinator_that_is_killed_knows_its_runs_and_their_checkpoints(services: Services) -> None:
    with services.connect() as cluster, make_trainer(cluster) as trainer:
        run = trainer.run_id
        for x, y in batches():
            trainer.step(x, y)
            if trainer.steps_done == 3:
                trainer.save("mine/third", storage="server")
            if trainer.steps_done == 6:
                send(services.coordinator, signal.SIGKILL)
                break
        services.coordinator.wait_ended(time.monotonic() + 5)
        with pytest.raises(gradwire.Unreachable):
            trainer.step(x, y)
    services.restart_coordinator()
    with services.connect() as cluster:
        (known,) = cluster.status().runs
        assert (known.run, known.state) == (run, coordinator_pb2.RUN_STATE_FAILED)
        assert known.reason == "the coordinator ended while it ran"
        assert known.step >= 6
        assert (known.checkpoint.directory, known.checkpoint.step) == ("mine/third", 3)
    finish(services, 2, "mine/third")


def test_servers_are_free_again_whatever_they_did_when_the_coordinator_was_killed(services: Services) -> None:
    """Between two entries, in the middle of one, waiting for each other: wherever it strikes."""
    for round_number in range(4):
        with services.connect() as cluster, make_trainer(cluster) as trainer:
            endless = (batch for _ in range(10_000) for batch in batches())
            results = trainer.run(endless, progress=False)
            for _ in range(3 + round_number):
                next(results)
            send(services.coordinator, signal.SIGKILL)
            services.coordinator.wait_ended(time.monotonic() + 5)
            with pytest.raises(gradwire.Unreachable):
                list(results)
        services.restart_coordinator()
        with services.connect() as cluster:
            deadline = time.monotonic() + 10
            while any(server.activity.run for server in cluster.status().servers):
                assert time.monotonic() < deadline, cluster.status()
                time.sleep(0.1)


def test_a_client_that_does_not_listen_is_not_waited_for(tmp_path: Path) -> None:
    with Services(tmp_path, grace_seconds=5.0) as services, services.connect() as cluster:
        trainer = make_trainer(cluster)
        trainer.step(*next(batches()))
        began = time.monotonic()
        send(services.stages[0], signal.SIGTERM)
        # Nothing is called until the server has gone.
        assert code_of(services.stages[0], 8) == 0
        assert 2.0 < time.monotonic() - began < 5.5
        with pytest.raises((gradwire.Aborted, gradwire.Stopping)) as caught:
            trainer.step(*next(batches()))
        assert "was asked to stop" in str(caught.value)
        (known,) = cluster.status().runs
        assert "its client has not ended it in time" in known.reason


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT])
def test_who_insists_is_not_kept_waiting(services: Services, again: signal.Signals) -> None:
    with services.connect() as cluster:
        trainer = make_trainer(cluster)
        trainer.step(*next(batches()))
        send(services.stages[0], signal.SIGTERM)
        time.sleep(0.5)
        assert services.stages[0].is_running()
        send(services.stages[0], again)
        assert code_of(services.stages[0], 5) == 0


def test_services_without_a_run_go_at_once(services: Services) -> None:
    services.connect().close()
    for process in (*services.stages, services.coordinator):
        send(process, signal.SIGTERM)
    began = time.monotonic()
    assert [code_of(process, 5) for process in (*services.stages, services.coordinator)] == [0, 0, 0]
    assert time.monotonic() - began < 5


def test_steps_in_flight_are_given_and_saved_by_ones_own_means(services: Services, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    with (
        services.connect() as cluster,
        make_trainer(cluster, on_stop=lambda trainer: trainer.save(mine, data_position={"of": "mine"})) as trainer,
    ):
        done, error = run_until_stopped(trainer, 5, lambda: trainer.request_stop("it is late"))
        assert done == trainer.steps_done >= 5
        assert str(error).startswith(f"Run {trainer.run_id} is to end after step {done}: it is late")
    with services.connect() as cluster, make_trainer(cluster) as trainer:
        assert trainer.load(mine) == {"of": "mine"}
        assert trainer.steps_done == done
        (latest, _) = cluster.status().runs
    assert not list(services.checkpoints.iterdir())
    assert latest.step in (0, done)


def test_without_a_root_of_checkpoints_the_error_says_so() -> None:
    with gradwire.local(stage_servers=2) as cluster, make_trainer(cluster) as trainer:
        trainer.step(*next(batches()))
        trainer.request_stop()
        with pytest.raises(gradwire.Stopping) as caught:
            trainer.step(*next(batches()))
        assert "--checkpoint-root" in caught.value.got
        assert "on_stop" in caught.value.remedy
        # What the loop could not do by itself can still be done.
        assert trainer.state_dict()
