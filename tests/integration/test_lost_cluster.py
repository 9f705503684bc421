"""`gradwire train` on a cluster whose processes die or are stopped: it waits, and ends as if nothing had happened."""

from __future__ import annotations

import itertools
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from services import Services, code_of, send
from test_command_line import Commands
from test_resume import FLAGS, assert_same

from gradwire.cli.resuming import Needs, Resuming
from gradwire.cluster import Cluster
from gradwire_protocol.errors import DataError, GradwireError, PlanError, StageFailed, Unreachable
from gradwire_protocol.v1 import coordinator_pb2, stage_pb2

pytestmark = pytest.mark.fault


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    folder = tmp_path / "services"
    folder.mkdir()
    with Services(folder) as services:
        yield services


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    commands = Commands(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300)
    yield commands
    commands.close()


def flags(services: Services, out: str) -> list[str]:
    return ["--no-check", "--data", "text.txt", "--out", out, *FLAGS, "--coordinator", services.coordinator_address]


def test_a_job_outlives_its_coordinator_and_a_server(commands: Commands, services: Services) -> None:
    services.connect().close()
    code, _, err = commands.run("train", "--json", *flags(services, "whole"))
    assert code == 0, err
    process = commands.start("train", "--json", *flags(services, "lost"))
    assert process.stdout is not None
    steps = []
    killed = set()
    for line in process.stdout:
        step = json.loads(line).get("step")
        if step is None:
            continue
        steps.append(step)
        # Checkpoints are written while training goes on.
        if "coordinator" not in killed and (commands.directory / "lost/checkpoints/step-4").is_dir():
            killed.add("coordinator")
            send(services.coordinator, signal.SIGKILL)
            services.coordinator.wait_ended(time.monotonic() + 5)
            services.restart_coordinator()
        elif step >= 18 and "stage" not in killed:
            killed.add("stage")
            stage = services.stages[1]
            send(stage, signal.SIGKILL)
            stage.wait_ended(time.monotonic() + 5)
            services.replace_stage(stage)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert killed == {"coordinator", "stage"}
    # It went back twice.
    assert sum(after <= before for before, after in itertools.pairwise(steps)) >= 2
    assert_same(commands.directory / "lost", commands.directory / "whole")


def test_a_job_whose_server_is_stopped_goes_on_with_another(commands: Commands, services: Services) -> None:
    services.connect().close()
    process = commands.start("train", "--json", *flags(services, "job"))
    assert process.stdout is not None
    steps = []
    for line in process.stdout:
        step = json.loads(line).get("step")
        steps += [] if step is None else [step]
        if step == 6 and len(steps) == 6:
            stage = services.stages[0]
            send(stage, signal.SIGTERM)
            assert code_of(stage, 20) == 0
            services.replace_stage(stage)
    _, err = process.communicate()
    assert process.returncode == 0, err
    # Nothing was done twice: the state was saved when the server was to leave.
    assert steps == sorted(set(steps)), steps
    assert steps[-1] == 30


def test_a_job_that_is_stopped_says_how_to_go_on(commands: Commands, services: Services) -> None:
    services.connect().close()
    process = commands.start("train", *flags(services, "job"))
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("after step 7"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert "this process was asked to stop" in rest
    assert "gradwire train --resume job" in rest
    code, out, err = commands.run("train", "--resume", "job", "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["steps"] == 30


def test_a_job_waits_for_servers_if_it_is_told_to(commands: Commands, tmp_path: Path) -> None:
    folder = tmp_path / "services"
    folder.mkdir()
    with Services(folder, stages=1) as services:
        services.connect(1).close()
        few = [*flags(services, "job"), "--steps", "2", "--save-every", "2"]
        code, _, err = commands.run("train", *few)
        assert code == 2
        assert "There are fewer stage servers than the plan takes" in err
        process = commands.start("train", *few, "--wait-seconds", "60")
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting for 2 stage servers …\n"
        services.stages.append(services.start_stage())
        _, err = process.communicate()
        assert process.returncode == 0, err


def status(*servers: tuple[coordinator_pb2.ServerRole, str]) -> coordinator_pb2.GetStatusReply:
    return coordinator_pb2.GetStatusReply(
        servers=[coordinator_pb2.ServerStatus(role=role, activity=stage_pb2.Activity(run=run)) for role, run in servers]
    )


STAGE, PARAMETER = coordinator_pb2.SERVER_ROLE_STAGE, coordinator_pb2.SERVER_ROLE_PARAMETER


def test_what_a_job_needs() -> None:
    needs = Needs(stage_servers=2, parameter_servers=1)
    assert needs.met_by(status((STAGE, ""), (STAGE, ""), (PARAMETER, "")))
    assert not needs.met_by(status((STAGE, ""), (STAGE, "another"), (PARAMETER, "")))
    assert not needs.met_by(status((STAGE, ""), (STAGE, "")))
    leaving = status((STAGE, ""), (STAGE, ""), (PARAMETER, ""))
    leaving.servers[0].leaving = True
    assert not needs.met_by(leaving)
    assert str(needs) == "2 stage servers and 1 parameter server"
    assert str(Needs(stage_servers=1, parameter_servers=0)) == "1 stage server"


class Found(Cluster):
    """A cluster with everything, without a coordinator."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1:1")

    def status(self) -> coordinator_pb2.GetStatusReply:
        return status((STAGE, ""), (STAGE, ""))


def attempts(*outcomes: Exception | str, step: int | None = 4, seconds: float = 5.0) -> tuple[list[bool], object]:
    """Run attempts with these outcomes; return whether each was to resume, and what came of it."""
    left, resumed = list(outcomes), []

    def attempt(cluster: Cluster, resume: bool) -> dict[str, object]:
        resumed.append(resume)
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return {"outcome": outcome}

    resuming = Resuming(
        Found,
        Needs(stage_servers=2, parameter_servers=0),
        seconds=seconds,
        last_step=lambda: step,
        note=lambda text: None,
    )
    try:
        return resumed, resuming.run(attempt, resume=False)
    except GradwireError as error:
        return resumed, error


def test_which_failures_are_gone_on_from() -> None:
    lost, early, wrong = StageFailed("lost"), PlanError("too few"), DataError("wrong")
    assert attempts(lost, Unreachable("gone"), "done") == ([False, True, True], {"outcome": "done"})
    # Trying too early may fail; the first time it is the plan that is wrong.
    assert attempts(lost, early, "done") == ([False, True, True], {"outcome": "done"})
    assert attempts(early) == ([False], early)
    assert attempts(lost, wrong) == ([False, True], wrong)
    # No checkpoint, and no time.
    assert attempts(lost, step=None) == ([False], lost)
    assert attempts(lost, seconds=0) == ([False], lost)
    # Always at the same step: it is not the cluster.
    assert attempts(*[lost] * 9) == ([False, True, True, True], lost)
