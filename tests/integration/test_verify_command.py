"""`gradwire verify` and `trainer.verify`: equal is equal, a broken stage server is found, and the run goes on."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cluster_in_process import cluster_in_process
from torch import nn

import gradwire
import gradwire_stage.operators
import gradwire_stage.randomness
import gradwire_stage.rebuild
from gradwire.cli.app import run
from gradwire.job.subject import load_subject
from gradwire_protocol.randomness import draw_seed

SUBJECT = """
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (torch.nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return self.third(torch.nn.functional.gelu(self.second(torch.tanh(self.first(x)))))

def make_model():
    torch.manual_seed(0)
    return Model()

def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)

def make_batch():
    return torch.randn(8, 6), torch.randn(8, 6)

loss = torch.nn.functional.mse_loss
"""

WITH_DROPOUT = SUBJECT.replace("self.third(", "self.third(torch.nn.functional.dropout(x, 0.3) * ")


def verify(directory: Path, *arguments: str) -> tuple[int, str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADWIRE_")}
    done = subprocess.run(
        [sys.executable, "-m", "gradwire", "verify", *arguments],
        cwd=directory,
        env=environment | {"COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def verify_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """The same command in this process, which need not import torch for it. Return its exit code and its errors."""

    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["gradwire", "verify", *arguments])
        with pytest.raises(SystemExit) as ended:
            run()
        assert isinstance(ended.value.code, int)
        return ended.value.code, capsys.readouterr().err

    return command


@pytest.fixture
def subject(tmp_path: Path) -> Path:
    file = tmp_path / "subject.py"
    file.write_text(SUBJECT)
    return file


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gradwire.Cluster]:
    with cluster_in_process(tmp_path_factory.mktemp("sound"), stage_servers=4) as cluster:
        yield cluster


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[gradwire.Cluster]:
    """A cluster whose servers' gelu is a thousandth too large."""
    resolve = gradwire_stage.operators.resolve

    def resolve_wrongly(target: str) -> Callable[..., Any]:
        function = resolve(target)
        if target != "aten.gelu.default":
            return function
        return lambda *arguments, **keywords: function(*arguments, **keywords) * 1.001

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradwire_stage.rebuild, "resolve", resolve_wrongly)
        with cluster_in_process(tmp_path / "state", stage_servers=2) as cluster:
            yield cluster


@pytest.fixture(scope="module")
def processes() -> Iterator[gradwire.LocalCluster]:
    """In processes of their own, as dropout needs, and with the means to start more."""
    with gradwire.local(stage_servers=3) as cluster:
        yield cluster


def test_equal_on_a_cluster_of_its_own(subject: Path, tmp_path: Path) -> None:
    code, out, err = verify(tmp_path, str(subject), "--microbatches", "3", "--schedule", "gpipe", "--cuts", "second")
    assert code == 0, err
    assert "float64: equal to one process" in out
    assert "first.weight" in out
    assert "compared: the loss, 6 gradients, 6 weights and buffers" in out


def test_json_on_a_running_cluster(sound: gradwire.Cluster, subject: Path, tmp_path: Path) -> None:
    code, out, err = verify(
        tmp_path, str(subject), "--coordinator", sound.address, "--stages", "3", "--no-double", "--json", "--top", "2"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["equal"]
    assert found["data_type"] == "float32"
    assert not found["weights_judged"]
    assert [item.keys() for item in found["gradients"]] == [{"name", "relative", "absolute"}] * 2


def test_a_broken_stage_server_is_found(broken: gradwire.Cluster, subject: Path, tmp_path: Path) -> None:
    code, out, err = verify(tmp_path, str(subject), "--coordinator", broken.address, "--cuts", "second", "--json")
    assert code == 1, err
    found = json.loads(out)
    assert "NOT EQUAL" in found["text"]
    assert not found["equal"]
    assert found["loss_difference"] > 1e-7
    assert found["gradients"][0]["relative"] > 1e-5


def test_dropout_is_drawn_as_the_servers_draw_it(
    processes: gradwire.LocalCluster, subject: Path, tmp_path: Path
) -> None:
    subject.write_text(WITH_DROPOUT)
    made = load_subject(subject)
    found = gradwire.verify(
        processes,
        made.make_model(),
        made.make_optimizer,
        loss=made.loss,
        batch=made.make_batch(),
        plan=gradwire.Plan(stages=2, microbatches=4),
    )
    assert found.equal, str(found)
    arguments = ("--coordinator", processes.address, "--precision", "bf16", "--stages", "3")
    code, out, err = verify(tmp_path, str(subject), *arguments)
    assert code == 0, out + err
    assert "float32 under bfloat16 autocast: equal to one process" in out
    assert "weight (not judged)" in out


def test_a_wrongly_seeded_server_is_found(subject: Path, tmp_path: Path) -> None:
    """One that draws the same numbers in each micro-batch; of one stage, since servers here share the generator."""
    subject.write_text(WITH_DROPOUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradwire_stage.randomness, "draw_seed", lambda *key: draw_seed(*key[:2], 0, key[3]))
        with cluster_in_process(tmp_path / "state", stage_servers=1) as cluster:
            code, out, err = verify(tmp_path, str(subject), "--coordinator", cluster.address, "--stages", "1", "--json")
    assert code == 1, out + err
    assert json.loads(out)["gradient_difference"] > 1e-3


def test_wrong_input(
    sound: gradwire.Cluster, subject: Path, tmp_path: Path, verify_here: Callable[..., tuple[int, str]]
) -> None:
    code, out, err = verify(tmp_path, str(subject), "--coordinator", sound.address, "--double", "--precision", "bf16")
    assert code == 2, out + err
    assert "cannot be used together" in err
    subject.write_text(SUBJECT.replace("self.third(", "self.third(x if x.sum() > 0 else "))
    code, err = verify_here(str(subject), "--coordinator", sound.address)
    assert code == 2, err
    assert "Control flow or a size depends on the data" in err


def test_no_such_file(sound: gradwire.Cluster, verify_here: Callable[..., tuple[int, str]]) -> None:
    code, err = verify_here("nowhere.py", "--coordinator", sound.address)
    assert code == 2
    assert "nowhere.py" in err


class Model(nn.Module):
    """A buffer that training changes, and groups of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.second(F.gelu(self.norm(self.first(x))))
        return scores


def make_model() -> Model:
    torch.manual_seed(0)
    return Model()


def make_optimizer(model: Model) -> torch.optim.Optimizer:
    groups = [{"params": [model.first.weight], "lr": 0.2}, {"params": [*model.norm.parameters()]}]
    return torch.optim.AdamW([*groups, {"params": model.second.parameters(), "weight_decay": 0.3}], lr=0.1)


def make_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(12, 4, generator=generator), torch.randint(3, (12,), generator=generator)) for _ in range(4)]


PLAN = gradwire.Plan(stages=2, microbatches=3)


def train(cluster: gradwire.Cluster, *, verified: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = make_model()
    optimizer = make_optimizer(model)
    losses = []
    with cluster.trainer(
        model,
        optimizer,
        loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])),
        example=make_batches()[0],
        plan=PLAN,
        max_grad_norm=0.5,
    ) as trainer:
        for x, y in make_batches():
            result = trainer.step(x, y)
            losses.append(result.loss)
            assert result.step == len(losses)
            if verified:
                found = trainer.verify((x, y))
                assert found.equal, str(found)
                assert found.data_type == "float64"
        if verified:
            assert trainer.verify(make_batches()[0], double=False).data_type == "float32"
        return losses, trainer.state_dict()


def test_a_verified_run_goes_on_as_if_nothing_had_been(sound: gradwire.Cluster) -> None:
    losses, weights = train(sound, verified=False)
    again, weights_again = train(sound, verified=True)
    assert again == losses
    assert all(torch.equal(weights_again[name], weight) for name, weight in weights.items())


def test_a_run_on_a_broken_server_is_found(broken: gradwire.Cluster) -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    x, y = make_batches()[0]
    plan = gradwire.Plan(stages=1, microbatches=3)
    with broken.trainer(model, optimizer, loss=F.cross_entropy, example=(x, y), plan=plan) as trainer:
        found = trainer.verify((x, y))
    assert not found.equal
    assert found.gradient_difference > 1e-5


def test_verification_compares_with_the_current_weights_and_rates(sound: gradwire.Cluster) -> None:
    """From other weights the loss would be another; from another rate, the weights."""
    model = make_model()
    optimizer = make_optimizer(model)
    x, y = make_batches()[0]
    with sound.trainer(model, optimizer, loss=F.cross_entropy, example=(x, y), plan=PLAN) as trainer:
        first = trainer.step(x, y).loss
        optimizer.param_groups[0]["lr"] = 0.05
        found = trainer.verify((x, y), double=False)
        assert found.loss == trainer.step(x, y).loss != first


def test_what_is_gone_or_busy_is_told(sound: gradwire.Cluster) -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    x, y = make_batches()[0]
    with sound.trainer(model, optimizer, loss=F.cross_entropy, example=(x, y), plan=PLAN) as trainer:
        other = copy.deepcopy(model)
        with (
            sound.trainer(other, make_optimizer(other), loss=F.cross_entropy, example=(x, y), plan=PLAN),
            pytest.raises(gradwire.PlanError, match="are free"),
        ):
            trainer.verify((x, y))
        del optimizer
        gc.collect()
        with pytest.raises(gradwire.OptimizerError, match="optimizer is gone"):
            trainer.verify((x, y))
        del model
        gc.collect()
        with pytest.raises(gradwire.ModelError, match="model is gone"):
            trainer.verify((x, y))
        assert trainer.step(x, y).step == 1


def test_a_local_cluster_starts_the_servers_that_it_lacks(processes: gradwire.LocalCluster) -> None:
    """Two stages train on two of its three servers, and verification needs two more."""
    model = make_model()
    optimizer = make_optimizer(model)
    x, y = make_batches()[0]
    with processes.trainer(model, optimizer, loss=F.cross_entropy, example=(x, y), plan=PLAN) as trainer:
        trainer.step(x, y)
        before = processes.process_ids
        for _ in range(2):
            assert trainer.verify((x, y)).equal
            assert processes.process_ids == before
            assert len(processes.status().servers) == 3
        assert trainer.step(x, y).step == 2
