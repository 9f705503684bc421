"""Operators of the user's own, on real servers: equal to one process, and refused with the reason where need be."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import operator_library
import pytest
import torch
from model_zoo import squared_loss
from torch import nn

import gradwire
from gradwire.service_process import ServiceProcess, end_all

LIBRARY = "operator_library"
SWISH = "gradwire_test.swish.default"
# The same operator with an argument less, as an older version of its module may have it.
OLDER = """
import torch

@torch.library.custom_op("gradwire_test::swish", mutates_args=())
def swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)
"""


class Model(nn.Module):
    """Each of the library's operators that servers admit, spread over the model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = operator_library.swish(self.first(x), 1.5)
        total, largest = operator_library.split_sum([hidden, self.second(hidden)], self.scale)
        return self.third(operator_library.swish(total, 0.5)) + largest[:, None]


class OnlySwish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(operator_library.swish(self.first(x), 1.5))


class Writing(OnlySwish):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).clone()
        operator_library.halve_in_place(hidden)
        return self.second(hidden)


class Noisy(OnlySwish):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) * operator_library.noise(x))


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def make_batch(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, rows, 6, generator=generator, dtype=torch.float64)
    return x, y


def make_trainer(cluster: gradwire.Cluster, model: nn.Module, **plan: Any) -> gradwire.Trainer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return cluster.trainer(
        model,
        optimizer,
        loss=squared_loss,
        example=make_batch(6),
        plan=gradwire.Plan(**{"stages": 2, "microbatches": 3, **plan}),
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[gradwire.LocalCluster]:
    with gradwire.local(stage_servers=3, operators=[LIBRARY]) as made:
        yield made


@pytest.mark.parametrize(("stages", "recompute"), [(1, False), (2, False), (3, False), (3, True)])
def test_training_equals_one_process(cluster: gradwire.LocalCluster, stages: int, recompute: bool) -> None:
    model = make(Model)
    one = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(one.parameters(), lr=0.01)
    with make_trainer(cluster, model, stages=stages, recompute=recompute) as trainer:
        for step in range(3):
            x, y = make_batch(7, step)
            result, gradients = trainer.step_with_gradients(x, y)
            optimizer.zero_grad()
            loss = squared_loss(one(x), y)
            loss.backward()
            optimizer.step()
            assert result.loss == pytest.approx(loss.item(), rel=1e-10)
            for name, parameter in one.named_parameters():
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-10)
        for name, tensor in trainer.state_dict().items():
            torch.testing.assert_close(tensor, one.state_dict()[name], rtol=1e-10, atol=1e-10)
        x, y = make_batch(5, 9)
        assert trainer.evaluate([(x, y)]) == pytest.approx(squared_loss(one(x), y).item(), rel=1e-10)
        torch.testing.assert_close(trainer.predict(x), one(x).detach(), rtol=1e-10, atol=1e-10)


def test_verification_passes(cluster: gradwire.LocalCluster) -> None:
    found = gradwire.verify(
        cluster,
        make(Model),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        loss=squared_loss,
        batch=make_batch(6),
        plan=gradwire.Plan(stages=2, microbatches=2),
    )
    assert found.equal, str(found)


def test_random_numbers_of_a_tagged_operator_are_the_same_on_every_layout(cluster: gradwire.LocalCluster) -> None:
    losses = []
    for stages in (1, 2):
        with make_trainer(cluster, make(Noisy), stages=stages) as trainer:
            losses.append([trainer.step(*make_batch(6)).loss for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0][0] != losses[0][1]


def test_an_operator_that_writes_to_its_argument_is_refused(cluster: gradwire.LocalCluster) -> None:
    with pytest.raises(gradwire.ModelError, match="writes to its arguments") as caught:
        make_trainer(cluster, make(Writing))
    assert "gradwire_test.halve_in_place.default" in str(caught.value)
    assert "operator_library.halve_in_place(hidden)" in str(caught.value)
    assert "mutates_args=()" in caught.value.remedy


def test_servers_without_the_module_refuse_the_model(four_processes: gradwire.Cluster) -> None:
    with pytest.raises(gradwire.ModelError, match=SWISH) as caught:
        make_trainer(four_processes, make(OnlySwish))
    message = str(caught.value)
    assert all(server.server in message for server in four_processes.status().servers)
    assert "no custom operators" in message
    assert "--operators MODULE" in caught.value.remedy
    # The servers are free again.
    with make_trainer(four_processes, nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()) as trainer:
        trainer.step(*make_batch(6))


def test_a_run_takes_the_servers_that_have_the_operators(tmp_path: Path) -> None:
    with gradwire.local(stage_servers=1) as cluster:
        able = _more_servers(cluster, 1, tmp_path, Path(operator_library.__file__))
        try:
            with make_trainer(cluster, make(OnlySwish), stages=1) as trainer:
                trainer.step(*make_batch(6))
            with pytest.raises(gradwire.ModelError, match="is not known to stage server ") as caught:
                make_trainer(cluster, make(OnlySwish), stages=2)
            first, second = cluster.status().servers
            assert first.server in str(caught.value)
            assert second.server not in str(caught.value)
        finally:
            end_all(able, 5.0)


def test_another_schema_is_told_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers have it of a module of a package."""
    package = tmp_path / "library_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "operators.py").write_text("from .inner import swish")
    (package / "inner.py").write_text(OLDER)
    monkeypatch.syspath_prepend(tmp_path)
    with gradwire.local(stage_servers=1, operators=["library_package.operators"]) as cluster:
        assert SWISH in (cluster.log_dir / "stage-0.log").read_text()
        with pytest.raises(gradwire.ModelError, match="has another schema") as caught:
            make_trainer(cluster, make(OnlySwish), stages=1)
        assert "swish(Tensor x, float slope)" in caught.value.expected
        assert "swish(Tensor x) -> Tensor" in caught.value.got
        assert "same version" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise ZeroDivisionError('broken library')", "ZeroDivisionError: broken library"),
        ("import torch", "define no operators"),
    ],
)
def test_a_module_that_cannot_be_used_ends_the_start(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "library_of_nothing.py").write_text(text)
    with (
        pytest.raises(gradwire.GradwireError) as caught,
        gradwire.local(stage_servers=1, operators=[str(tmp_path / "library_of_nothing.py")]),
    ):
        pass
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("operators", "message"),
    [
        (["no_such_module_anywhere"], "no module 'no_such_module_anywhere'"),
        (["./no/such/file.py"], "no such module"),
        (["__main__"], "script itself"),
        ("operator_library", "a list of modules"),
        ([7], "names or paths"),
    ],
)
def test_wrong_modules_are_told_before_anything_starts(operators: Any, message: str) -> None:
    with pytest.raises(gradwire.SettingsError) as caught:
        gradwire.local(operators=operators)
    assert message in str(caught.value)


def _more_servers(cluster: gradwire.LocalCluster, count: int, logs: Path, module: Path) -> list[ServiceProcess]:
    flags = ["--coordinator", cluster.address, "--metrics-listen", "", "--operators", str(module)]
    before = len(cluster.status().servers)
    started = [ServiceProcess("a server", "gradwire_stage", flags, logs / f"{i}.log") for i in range(count)]
    deadline = time.monotonic() + 60.0
    for process in started:
        process.wait_ready(deadline)
    while len(cluster.status().servers) < before + count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return started


class Holding(OnlySwish):
    """Keeps its operator as an attribute: such objects cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = operator_library.swish

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.activation(self.first(x), 1.5))


def test_a_module_may_hold_its_operator(cluster: gradwire.LocalCluster) -> None:
    expected = squared_loss(make(OnlySwish)(make_batch(6)[0]), make_batch(6)[1]).item()
    with make_trainer(cluster, make(Holding)) as trainer:
        assert trainer.step(*make_batch(6)).loss == pytest.approx(expected, rel=1e-10)


def test_a_library_with_operators_of_its_own() -> None:
    """Hugging Face's mixtures of experts call one that multiplies groups of rows."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    tokens = torch.randint(0, 64, (2, 4, 8))
    with gradwire.local(stage_servers=1, operators=["transformers.integrations.moe"]) as cluster:
        found = gradwire.verify(
            cluster,
            model,
            lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
            loss=None,
            batch={"input_ids": tokens[0], "labels": tokens[1]},
            plan=gradwire.Plan(stages=1, microbatches=2),
        )
    assert found.equal, str(found)
