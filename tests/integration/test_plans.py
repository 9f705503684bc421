"""Plans of real clusters: asked for without a run, they say what a run is then given; the command shows them."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from coordinator_cluster import cluster as coordinator
from coordinator_cluster import create, free, refused, run_request, wait_until
from torch import nn
from torch.nn.functional import mse_loss

import gradwire
from gradwire.run_plan import RunPlan
from gradwire_protocol.errors import PlanError

SVG = "{http://www.w3.org/2000/svg}"
# A micro-batch takes long enough that its nodes and the link are measured.
WIDTH, ROWS = 384, 4096


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))


def arguments(plan: gradwire.Plan) -> dict[str, Any]:
    made = model()
    example = (torch.zeros(ROWS, WIDTH), torch.zeros(ROWS, WIDTH))
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)
    return {"model": made, "optimizer": optimizer, "loss": mse_loss, "example": example, "plan": plan}


@pytest.fixture(scope="module")
def cluster() -> Iterator[gradwire.LocalCluster]:
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            # Long enough for all of a model, on a busy machine too.
            patch.setenv("GRADWIRE_COORDINATOR_PROFILING_SECONDS", "5")
            made = stack.enter_context(gradwire.local(stage_servers=2, threads=1))
        yield made


def test_a_plan_takes_no_server_and_prepares_nothing(tmp_path: Path) -> None:
    with coordinator(tmp_path, stages=2) as made:
        reply = made.stub.Plan(run_request(2))
        assert [stage.nodes for stage in reply.plan.stages] == [3, 3]
        assert [server.server for server in reply.plan.prediction.servers] == ["stage-0", "stage-1"]
        assert len(reply.timeline) == 2
        assert free(made)
        assert made.status().runs == []
        # The same servers can be had at once, and plan of a run then says the same.
        run = create(made, 2)
        assert run.plan == reply.plan
        assert run.timeline == reply.timeline
        assert run.plan == made.status().runs[0].plan
        # They are busy now.
        error = refused(made.stub.Plan, run_request(2))
        assert isinstance(error, PlanError)
        assert "2" in error.expected


def test_wrong_plans_are_refused_as_by_a_run(tmp_path: Path) -> None:
    with coordinator(tmp_path, stages=2) as made:
        for changes in ({"schedule": "zigzag"}, {"virtual_stages": 40}, {"cuts": [2, 3]}):
            error = refused(made.stub.Plan, run_request(2, **changes))
            assert isinstance(error, PlanError)
            assert str(error) == str(refused(made.stub.CreateRun, run_request(2, **changes)))
        assert free(made)
        assert made.stub.Plan(run_request(2)).plan.schedule


@pytest.mark.parametrize(
    "asked",
    [
        gradwire.Plan(stages=2, microbatches=4),
        gradwire.Plan(stages=2, microbatches=4, schedule="1f1b"),
        gradwire.Plan(stages=2, microbatches=4, schedule="zb-v"),
    ],
    ids=lambda asked: asked.schedule,
)
def test_a_run_is_given_what_its_plan_said(cluster: gradwire.LocalCluster, asked: gradwire.Plan) -> None:
    planned = cluster.plan(**arguments(asked))
    assert isinstance(planned, RunPlan)
    assert planned.cost_source == "measured"
    assert all(link.measured for link in planned.links)
    with cluster.trainer(**arguments(asked)) as trainer:
        assert trainer.plan == planned
        assert trainer.step(torch.zeros(ROWS, WIDTH), torch.ones(ROWS, WIDTH)).loss > 0
        assert trainer.plan == planned
        # What was planned is what is executed.
        assert {server.server for server in planned.servers} == set(trainer.servers)
    assert planned.name in str(planned)
    assert json.loads(json.dumps(planned.to_record()))["predicted"]["seconds"] == planned.predicted.seconds
    wait_until(lambda: all(not server.activity.run for server in cluster.status().servers))


def test_a_plan_needs_no_weights(cluster: gradwire.LocalCluster) -> None:
    with gradwire.meta_parameters():
        made = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    planned = cluster.plan(
        made,
        torch.optim.SGD(made.parameters(), lr=0.1),
        loss=mse_loss,
        example=(torch.zeros(8, 64), torch.zeros(8, 64)),
        plan=gradwire.Plan(stages=2, microbatches=2),
    )
    assert sum(stage.parameters for stage in planned.stages) == 2 * 64 * 65
    # A step of it is over so soon that nobody is made to wait for measurements.
    assert planned.cost_source == "estimated"


def run(*words: str, directory: Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "gradwire", "plan", *words],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_shows_draws_and_writes_a_plan(cluster: gradwire.LocalCluster, tmp_path: Path) -> None:
    job = ("--layers", "2", "--width", "64", "--context", "64", "--batch", "16", "--microbatches", "4")
    where = ("--coordinator", cluster.address, "--svg", "step.svg", "--png", "step.png", "--json", "plan.json")
    code, out, err = run(*job, *where, directory=tmp_path)
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "plan.json").read_text())
    chosen = next(item for item in record["candidates"] if item["chosen"])
    assert record["predicted"]["seconds"] == chosen["seconds"]
    for text in (
        "GPT, 2 layers of 64: 2 servers, 4 micro-batches, schedule ",
        "Stages: what one micro-batch takes",
        "Servers: what they hold at the peak",
        "The step as expected",
        "server 0 │F0",
        "What was considered",
        f"why: {record['reason']}\n",
        "servers 0→1: ",
    ):
        assert text in out
    assert all(item["schedule"] in out for item in record["candidates"])
    root = ElementTree.fromstring((tmp_path / "step.svg").read_text())
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert len(titles) == len(record["timeline"])
    assert [title.partition(":")[0] for title in titles] == [action for _, action, _, _ in record["timeline"]]
    png = (tmp_path / "step.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">I", png[16:20])[0] > 1000


def test_a_users_own_file_on_a_cluster_of_the_moment(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "loss = nn.functional.mse_loss\n"
        "def make_model():\n"
        "    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())\n"
        "def make_optimizer(model):\n"
        "    return torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "def make_batch():\n"
        "    return torch.zeros(8, 8), torch.zeros(8, 8)\n"
    )
    words = ("mine.py", "--schedule", "zb-v", "--microbatches", "4", "--json", "-")
    code, out, err = run(*words, "--cuts", "1,2,3", directory=tmp_path)
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record["schedule"] == "zb-v"
    assert [stage["server"] for stage in record["stages"]] == [0, 1, 1, 0]
    assert [stage["first_node"] for stage in record["stages"]] == [0, 1, 2, 3]
    assert record["candidates"][0]["placement"] == [0, 1, 1, 0]


def test_the_best_grid_for_some_servers(cluster: gradwire.LocalCluster, tmp_path: Path) -> None:
    job = ("--layers", "2", "--width", "64", "--context", "32", "--batch", "8", "--microbatches", "2")
    words = ("--auto", "--coordinator", cluster.address, "--json", "plan.json")
    code, out, err = run(*job, *words, directory=tmp_path)
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "plan.json").read_text())
    grids = {(grid["stages"], grid["replicas"], grid["tensor"]): grid for grid in record["grids"]}
    assert grids.keys() == {(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)}
    assert all(grid["fits"] and grid["seconds"] > 0 and grid["peak_bytes"] for grid in grids.values())
    # Half of a stage's parameters, gradients and optimizer each.
    assert grids[1, 1, 2]["peak_bytes"] < grids[1, 1, 1]["peak_bytes"]
    chosen = record["grids"][0]
    assert record["plan"]["predicted"]["seconds"] == chosen["seconds"]
    assert chosen["seconds"] <= min(grid["seconds"] for grid in grids.values()) * 1.01
    assert "Grids: a step, the server that holds most" in out
    assert f"why: {record['reason']}\n" in out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--auto", "--tensor", "2"), "--auto finds the grid itself, so it cannot be told --tensor"),
        (("--servers", "2"), "--servers is for --auto"),
        (("mine.py", "--layers", "3"), "--layers is for the GPT"),
        (("--schedule", "zb-v", "--virtual-stages", "3"), "not made for 3 virtual stages"),
        (("--cuts", "1,2,3"), "number of cuts does not fit"),
    ],
)
def test_wrong_input_is_told_before_anything_starts(words: tuple[str, ...], part: str, tmp_path: Path) -> None:
    code, out, err = run(*words, directory=tmp_path)
    assert (code, out) == (2, "")
    assert part in err
