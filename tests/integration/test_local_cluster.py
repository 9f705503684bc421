"""The SDK on real processes: what a script gets equals one process, and nothing is left behind."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradwire
from gradwire.certs.authority import Authority
from gradwire.certs.members import issue
from gradwire.service_process import ServiceProcess, end_all
from gradwire_protocol.roles import Role

PLAN = gradwire.Plan(stages=2, microbatches=4)


class Model(nn.Module):
    """Tied weights, a buffer that training changes, a parameter that no graph reads, an output with two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.first = nn.Linear(8, 8, bias=False)  # a bias before normalisation has no gradient but rounding
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.tanh(self.norm(self.first(self.embedding(tokens))))
        hidden = hidden + torch.tanh(self.second(hidden))
        return {"logits": self.head(hidden), "hidden": hidden}


def loss(output: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output["logits"], target)


def make_model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [{"params": parameters[:3], "weight_decay": 0.1}, {"params": parameters[3:], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.05)


def make_batches(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(12, (size,), generator=generator), torch.randint(12, (size,), generator=generator))
        for size in sizes
    ]


class OneProcess:
    """The same training, in plain torch."""

    def __init__(self, model: Model, max_grad_norm: float | None = None) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = make_optimizer(self.model)
        self.max_grad_norm = max_grad_norm

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        self.model.train()
        self.optimizer.zero_grad()
        total = 0.0
        for x_part, y_part in zip(x.tensor_split(4), y.tensor_split(4), strict=True):
            if len(x_part):
                part = loss(self.model(x_part), y_part) * len(x_part) / len(x)
                part.backward()
                total += part.item()
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        return total

    def assert_equal_state(self, state: dict[str, Any]) -> None:
        expected = self.model.state_dict()
        assert list(state) == list(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[gradwire.LocalCluster]:
    with gradwire.local(stage_servers=2, threads=1) as cluster:
        yield cluster


def make_trainer(cluster: gradwire.Cluster, model: nn.Module, **changes: Any) -> gradwire.Trainer:
    arguments: dict[str, Any] = {"loss": loss, "example": make_batches(8)[0], "plan": PLAN} | changes
    optimizer = arguments.pop("optimizer", None) or make_optimizer(model)
    return cluster.trainer(model, optimizer, **arguments)


def test_training_evaluating_and_predicting_equal_one_process(cluster: gradwire.LocalCluster) -> None:
    model = make_model()
    one = OneProcess(model, max_grad_norm=0.5)
    with make_trainer(cluster, model, max_grad_norm=0.5) as trainer:
        assert [stage.stage for stage in trainer.plan.stages] == [0, 1]
        # The last ones do not divide by the micro-batches (two rows each at least: batch normalisation needs them).
        for step, (x, y) in enumerate(make_batches(8, 8, 9, 11), 1):
            result = trainer.step(x, y)
            assert result.step == step
            assert result.loss == pytest.approx(one.step(x, y), rel=1e-10)
            assert result.seconds > 0
            assert 0 <= result.bubble <= 1
            assert result.samples_per_second == pytest.approx(len(x) / result.seconds)
            assert result.gradient_norm is not None
        one.assert_equal_state(trainer.state_dict())

        one.model.eval()
        held_out = make_batches(8, 3)
        expected = sum(loss(one.model(x), y).item() * len(x) for x, y in held_out) / 11
        assert trainer.evaluate(held_out) == pytest.approx(expected, rel=1e-10)

        (x, _) = make_batches(7)[0]
        predicted, reference = trainer.predict(x), one.model(x)
        assert predicted.keys() == reference.keys()
        for name, tensor in reference.items():
            torch.testing.assert_close(predicted[name], tensor.detach(), rtol=1e-10, atol=1e-10)
        # None of this changed the weights.
        one.assert_equal_state(trainer.state_dict())


def test_run_keeps_the_order_of_steps_and_of_the_scheduler(cluster: gradwire.LocalCluster) -> None:
    model = make_model()
    one = OneProcess(model)
    optimizer = make_optimizer(model)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (optimizer, one.optimizer)]
    batches = make_batches(8, 9, 8)
    with make_trainer(cluster, model, optimizer=optimizer) as trainer:
        losses = []
        for result in trainer.run(batches, steps=7, scheduler=schedulers[0]):
            losses.append(result.loss)
            if result.step == 4:
                # Goes into the log behind the steps in flight.
                trainer.evaluate(batches)
        expected = []
        for index in range(7):
            expected.append(one.step(*batches[index % 3]))
            schedulers[1].step()
        assert losses == pytest.approx(expected, rel=1e-10)
        assert optimizer.param_groups[0]["lr"] == one.optimizer.param_groups[0]["lr"]
        assert [result.step for result in trainer.run(batches)] == [8, 9, 10]


def test_tied_keys_share_one_tensor(cluster: gradwire.LocalCluster) -> None:
    model = make_model()
    with make_trainer(cluster, model) as trainer:
        state = trainer.state_dict()
    assert state["embedding.weight"] is state["head.weight"]
    model.load_state_dict(state)
    state["second.bias"].add_(1.0)  # the user's own memory


def test_the_client_keeps_no_weights(cluster: gradwire.LocalCluster) -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    references = [weakref.ref(parameter) for name, parameter in model.named_parameters() if "unused" not in name]
    with make_trainer(cluster, model, optimizer=optimizer) as trainer:
        x, y = make_batches(8)[0]
        trainer.step(x, y)
        del model, optimizer
        gc.collect()
        assert [reference() for reference in references] == [None] * len(references)
        assert trainer.step(x, y).step == 2
        assert "head.weight" in trainer.state_dict()


def test_verification_finds_equality(cluster: gradwire.LocalCluster) -> None:
    found = gradwire.verify(
        cluster, make_model(), make_optimizer, loss=loss, batch=make_batches(9)[0], plan=PLAN, max_grad_norm=0.1
    )
    assert found.equal, str(found)
    assert found.data_type == "float64"
    assert "equal to one process" in str(found)


def test_verification_finds_a_difference(cluster: gradwire.LocalCluster) -> None:
    rates = iter([0.05, 0.06])
    found = gradwire.verify(
        cluster,
        make_model(),
        lambda model: torch.optim.SGD(model.parameters(), lr=next(rates)),
        loss=loss,
        batch=make_batches(8)[0],
        plan=PLAN,
    )
    assert found.gradient_difference <= 1e-10
    assert found.weight_difference > 1e-4
    assert not found.equal


def test_verification_draws_as_the_servers_do(cluster: gradwire.LocalCluster) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = (torch.ones(4, 4), torch.zeros(4, dtype=torch.int64))
    with cluster.trainer(model, optimizer, loss=F.cross_entropy, example=batch, plan=PLAN, seed=5) as trainer:
        first = trainer.step(*batch).loss
        before = torch.get_rng_state()
        found = trainer.verify(batch)
        assert found.equal, str(found)
        assert torch.equal(torch.get_rng_state(), before)
        assert trainer.step(*batch).loss != first


def test_a_wrong_batch_is_refused_and_the_run_goes_on(cluster: gradwire.LocalCluster) -> None:
    with make_trainer(cluster, make_model()) as trainer:
        x, y = make_batches(8)[0]
        for wrong in ((x.float(), y), (x[:, None], y), (x, y[:3]), (x,), (x[:0], y[:0])):
            with pytest.raises(gradwire.BatchError):
                trainer.step(*wrong)
        assert trainer.step(x, y).step == 1
        with pytest.raises(gradwire.BatchError):
            trainer.evaluate([(x.int(), y)])
        with pytest.raises(gradwire.DataError, match="nothing to evaluate"):
            trainer.evaluate([])
        assert trainer.step(x, y).step == 2


class NotAllowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(self.linear(x)[:, None] * self.linear(x)[..., None]).real


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"plan": gradwire.Plan(stages=3)}, gradwire.PlanError, "3"),
        ({"plan": gradwire.Plan(stages=500)}, gradwire.PlanError, "500"),
        ({"plan": gradwire.Plan(stages=2, cuts=["nowhere"])}, gradwire.PlanError, "nowhere"),
        ({"precision": "fp16"}, gradwire.PlanError, "loss is scaled"),
        ({"max_grad_norm": 0.0}, gradwire.SettingsError, "max_grad_norm"),
        ({"seed": -1}, gradwire.SettingsError, "seed"),
        ({"plan": "two stages"}, gradwire.PlanError, "not a plan"),
        ({"loss": lambda output, target: output["logits"]}, gradwire.ModelError, "scalar"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(
    cluster: gradwire.LocalCluster, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_trainer(cluster, make_model(), **changes)


def test_an_operator_that_is_not_allowed_is_named(cluster: gradwire.LocalCluster) -> None:
    batch = (torch.ones(4, 4), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(gradwire.ModelError, match="eigvals"):
        make_trainer(cluster, NotAllowed(), loss=F.cross_entropy, example=batch)


def test_cuts_by_module_are_kept_to(cluster: gradwire.LocalCluster) -> None:
    with make_trainer(cluster, make_model(), plan=gradwire.Plan(stages=2, cuts=["second"])) as trainer:
        assert trainer.plan.stages[1].first_module == "second"


def test_the_servers_are_free_after_all_of_this(cluster: gradwire.LocalCluster) -> None:
    # What a heartbeat says of a run can be a second older than its end.
    deadline = time.monotonic() + 10
    while any(server.activity.run for server in cluster.status().servers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(cluster.status().servers) == 2
    with make_trainer(cluster, make_model()) as trainer:
        # Two runs cannot share servers.
        with pytest.raises(gradwire.GradwireError, match=r"(?i)free|busy|server"):
            make_trainer(cluster, make_model())
        trainer.step(*make_batches(8)[0])


def test_an_unreachable_coordinator_is_told_in_seconds() -> None:
    began = time.monotonic()
    with pytest.raises(gradwire.Unreachable, match=r"127\.0\.0\.1:9"):
        gradwire.connect("127.0.0.1:9")
    assert time.monotonic() - began < 6.0
    with pytest.raises(gradwire.SettingsError, match="Not an address"):
        gradwire.connect("coordinator")
    with pytest.raises(gradwire.SettingsError, match="loopback"):
        gradwire.connect("192.0.2.1:7070")


def test_a_busy_port_is_told_with_the_log(cluster: gradwire.LocalCluster) -> None:
    with (
        pytest.raises(gradwire.SettingsError, match=cluster.address),
        gradwire.local(stage_servers=1, listen=cluster.address),
    ):
        pass


def test_the_quickstart_runs_as_printed() -> None:
    script = Path(__file__).parents[2] / "examples" / "quickstart.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[3].rstrip(",")) for line in done.stdout.splitlines()]
    assert len(losses) == 5
    assert losses[-1] < losses[0] / 2


def test_mutual_tls_reaches_a_coordinator_and_plaintext_does_not(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "authority")
    files = issue(authority, role=Role.COORDINATOR, name="coordinator", addresses=["127.0.0.1"])
    client = issue(authority, role=Role.CLIENT, name="client")
    arguments = ["--listen", "127.0.0.1:0", "--state-dir", str(tmp_path / "state")]
    for name in ("authority", "certificate", "key"):
        arguments += [f"--tls-{name}", str(getattr(files, name))]
    coordinator = ServiceProcess("the coordinator", "gradwire_coordinator", arguments, tmp_path / "log")
    try:
        address = coordinator.wait_ready(time.monotonic() + 30.0).address
        with gradwire.connect(address, tls=client) as cluster:
            assert not cluster.status().servers
        with pytest.raises(gradwire.Unreachable, match="TLS"):
            gradwire.connect(address)
    finally:
        end_all([coordinator], 5.0)
