"""Local steps, in real processes: as torch's own optimizers have them, resumed exactly, and alike on all holders."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cluster_processes import wait_until_free
from replica_subject import (
    check_replicas_are_one,
    check_weights,
    make_batch,
    make_model,
    make_optimizer,
    make_tied_model,
    train,
)
from safetensors.torch import load_file, save_file
from torch import nn

import gradwire
from gradwire_protocol.checkpoint.files import record_of
from gradwire_protocol.checkpoint.reader import check


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gradwire.LocalCluster]:
    with gradwire.local(stage_servers=4, checkpoint_root=tmp_path_factory.mktemp("checkpoints")) as made:
        yield made


def local_reference(steps: int, every: int, rate: float, momentum: float) -> tuple[nn.Module, list[float]]:
    """Two models that train alone on every other micro-batch, and agree as torch's own SGD would have it."""
    agreed = make_model()
    outer = torch.optim.SGD(agreed.parameters(), lr=rate, momentum=momentum, nesterov=True)
    models = [copy.deepcopy(agreed) for _ in range(2)]
    updates = [make_optimizer(model) for model in models]
    losses = []
    for step in range(1, steps + 1):
        x, y = make_batch(step)
        total = 0.0
        for replica, (model, update) in enumerate(zip(models, updates, strict=True)):
            update.zero_grad()
            parts = list(zip(x.tensor_split(4), y.tensor_split(4), strict=True))[replica::2]
            xs, ys = (torch.cat(values) for values in zip(*parts, strict=True))
            loss = F.mse_loss(model(xs), ys)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            update.step()
            total += loss.item() / 2
        losses.append(total)
        if step % every == 0:
            for parameter, *each in zip(agreed.parameters(), *(model.parameters() for model in models), strict=True):
                parameter.grad = sum((parameter.detach() - own.detach() for own in each), torch.zeros(())) / 2
            outer.step()
            for model in models:
                model.load_state_dict(agreed.state_dict())
    return agreed, losses


def test_local_steps_agree_every_so_often_as_the_outer_optimizer_says(cluster: gradwire.Cluster) -> None:
    exchange = "local(learning_rate=0.6, momentum=0.5)"
    with train(cluster, exchange=exchange, every=3) as trainer:
        losses = [trainer.step(*make_batch(seed)).loss for seed in range(1, 7)]
        check_replicas_are_one(trainer)
        made = trainer.state_dict()
        trainer.step(*make_batch(7))
        with pytest.raises(AssertionError):
            check_replicas_are_one(trainer)  # they are on their own again
    model, expected = local_reference(6, 3, 0.6, 0.5)
    assert losses == pytest.approx(expected, rel=1e-10)
    check_weights(made, model)


def test_local_steps_go_with_a_codec(cluster: gradwire.Cluster) -> None:
    with train(cluster, exchange="local", every=2, compression="int8", stages=1, cuts=None) as trainer:
        first = trainer.step(*make_batch(0)).loss
        for _ in range(7):
            last = trainer.step(*make_batch(0)).loss
        check_replicas_are_one(trainer)
        assert last < first


def make_twice_tied_model() -> nn.Module:
    """Two weights that the second half uses in the other order."""
    torch.manual_seed(0)
    one, two, two_again, one_again = (nn.Linear(17, 17, bias=False) for _ in range(4))
    one_again.weight, two_again.weight = one.weight, two.weight
    layers = (nn.Linear(6, 17), one, two, two_again, one_again, nn.Linear(17, 3))
    return nn.Sequential(*(nn.Sequential(layer, nn.Tanh()) for layer in layers)).double()


@pytest.mark.parametrize("codec", ["int8", "topk(density=0.1)", "powersgd(rank=2)"])
def test_what_is_tied_over_stages_stays_so(cluster: gradwire.Cluster, codec: str) -> None:
    """The second stage averages its copies beside other parameters than the first does."""
    asked = {"cuts": ["3"], "exchange": "local", "every": 2, "compression": codec}
    with train(cluster, model=make_twice_tied_model(), **asked) as trainer:
        for seed in range(4):
            trainer.step(*make_batch(seed))
        x, _ = make_batch(9)
        model = make_twice_tied_model()
        model.load_state_dict(trainer.state_dict())
        torch.testing.assert_close(trainer.predict(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("steps", "codec", "optimizer", "storage"),
    [
        (3, "none", "AdamW", "server"),
        (5, "int8", "SGD", "client"),
        (4, "topk(density=0.2)", "AdamW", "client"),
    ],
)
def test_local_steps_are_resumed_exactly(
    cluster: gradwire.Cluster, tmp_path: Path, steps: int, codec: str, optimizer: str, storage: Any
) -> None:
    """Between two averages and right after one: each replica's weights and optimizer, and what they agreed on; tied."""
    path = tmp_path / "a" if storage == "client" else Path(f"local-{steps}")
    asked = {"cuts": ["4"], "exchange": "local(momentum=0.8)", "every": 2, "compression": codec}
    with train(cluster, optimizer, model=make_tied_model(), **asked) as trainer:
        for seed in range(steps):
            trainer.step(*make_batch(seed))
        trainer.save(path, storage=storage)
        losses = [trainer.step(*make_batch(seed)).loss for seed in range(steps, steps + 5)]
        state = trainer.state_dict()
    with train(cluster, optimizer, model=make_tied_model(), **asked) as trainer:
        # Whatever it has learned by itself is gone.
        trainer.step(*make_batch(7))
        trainer.load(path, storage=storage)
        assert [trainer.step(*make_batch(seed)).loss for seed in range(steps, steps + 5)] == losses
        for name, weight in trainer.state_dict().items():
            assert torch.equal(weight, state[name]), name
    # Others take what is of use to them.
    whole = {"stages": 1, "cuts": None}
    for other in ({"cuts": ["4"], "compression": "int8"}, asked | whole, {"cuts": ["4"], "replicas": 1}):
        with train(cluster, optimizer, model=make_tied_model(), **other) as trainer:
            trainer.load(path, storage=storage)
            assert trainer.step(*make_batch(steps)).step == steps + 1


def test_what_was_agreed_on_must_fit_the_model(cluster: gradwire.Cluster, tmp_path: Path) -> None:
    """A file that its manifest vouches for, and that is of no run."""
    path = tmp_path / "a"
    with train(cluster, exchange="local", every=2, stages=1, cuts=None) as trainer:
        trainer.step(*make_batch(0))
        trainer.save(path)
        file, manifest = path / "optimizer.safetensors", check(path)
        values = load_file(file)
        values["0.weight/exchange0.local.agreed"] = torch.zeros(3, 2, dtype=torch.float64)
        save_file(values, file)
        files = manifest.files | {file.name: record_of(file)}
        (path / "manifest.json").write_text(manifest.model_copy(update={"files": files}).to_text())
        with pytest.raises(gradwire.GradwireError, match=r"'0.weight', local.agreed, does not fit it") as caught:
            trainer.load(path)
    assert "[17, 6]" in caught.value.expected
    wait_until_free(cluster)
