"""Kinds of models train on a cluster as in one process: loss, gradients, updated weights, changed buffers, in float64.

docs/models.md is the table of what is tried here. Dropout has its own test, in real processes (test_equivalence.py).
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import random
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import zoo_awkward
import zoo_huggingface
import zoo_refused
import zoo_torch
from cluster_in_process import cluster_in_process
from model_table import TABLE, table
from model_zoo import Batch, Kind, Refused
from torch import nn
from torch.utils import _pytree as pytree

import gradwire
from gradwire.graph import Unbatched, export_model
from gradwire_protocol.errors import ModelError

pytestmark = pytest.mark.model

TOLERANCE = 1e-10
FLOAT32 = 1e-5
# Rows of the steps' batches, in at most 5 micro-batches: one, two, five, and five of unequal sizes; then two.
FIVE, TWO = (1, 2, 5, 7), (7, 2)
KINDS = {kind.name: kind for kind in (*zoo_huggingface.KINDS, *zoo_torch.KINDS, *zoo_awkward.KINDS)}


@dataclasses.dataclass
class Trained:
    """What steps on batches gave."""

    losses: list[float] = dataclasses.field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = dataclasses.field(default_factory=list)
    state: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    # Of the train graph, on a cluster.
    allowed_cuts: list[int] = dataclasses.field(default_factory=list)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gradwire.Cluster]:
    with cluster_in_process(tmp_path_factory.mktemp("models"), stage_servers=3) as made:
        yield made


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def batches(kind: Kind, rows: tuple[int, ...]) -> list[Batch]:
    return [kind.batch(count, torch.Generator().manual_seed(number)) for number, count in enumerate(rows)]


def one_process(kind: Kind, model: nn.Module, rows: tuple[int, ...], micro_batches: int) -> Trained:
    """Steps on batches in so many micro-batches, as gradient accumulation takes them: sums, divided once."""
    model = copy.deepcopy(model).train()
    optimizer = make_optimizer(model)
    made = Trained()
    for count, batch in zip(rows, batches(kind, rows), strict=True):
        optimizer.zero_grad()
        total = total_weight = 0.0
        for part in torch.arange(count).tensor_split(min(micro_batches, count)):
            rows_of_part = rows_of(batch, part)
            weight = kind.float32_weight(rows_of_part) if kind.float32_weight else len(part)
            loss = mean_loss(kind, model, rows_of_part) * weight
            loss.backward()
            total, total_weight = total + loss.item(), total_weight + weight
        made.losses.append(total / total_weight)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= total_weight
        made.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    made.state = model.state_dict()
    return made


def rows_of(batch: Batch, rows: torch.Tensor) -> Any:
    def pick(leaf: Any) -> Any:
        if isinstance(leaf, Unbatched):
            return leaf.tensor
        return leaf[rows].clone() if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(pick, batch, is_leaf=lambda leaf: isinstance(leaf, Unbatched))


def mean_loss(kind: Kind, model: nn.Module, batch: Any) -> torch.Tensor:
    if kind.loss is None:
        return model(**batch).loss
    if isinstance(batch, dict):
        inputs = {name: value for name, value in batch.items() if name != "target"}
        loss = kind.loss(model(**inputs), batch["target"])
    else:
        loss = kind.loss(model(*batch[:-1]), batch[-1])
    return loss[0] / loss[1] if isinstance(loss, tuple) else loss


def on_cluster(
    cluster: gradwire.Cluster, kind: Kind, model: nn.Module, rows: tuple[int, ...], plan: gradwire.Plan
) -> Trained:
    made = Trained()
    data = batches(kind, rows)
    example = kind.batch(3, torch.Generator().manual_seed(99))
    with cluster.trainer(
        model, make_optimizer(model), loss=kind.loss, example=example, plan=plan, dynamic=kind.dynamic
    ) as trainer:
        for batch in data:
            arguments = (batch, {}) if isinstance(batch, tuple) else ((), batch)
            result, gradients = trainer.step_with_gradients(*arguments[0], **arguments[1])
            made.losses.append(result.loss)
            made.gradients.append(gradients)
        made.state = trainer.state_dict()
        made.allowed_cuts = list(trainer.exported.proto.train.allowed_cuts)
    return made


def check_kind(kind: Kind, model: nn.Module, made: Trained, rows: tuple[int, ...], micro_batches: int) -> None:
    """Compare with whole batches in one process, or with their micro-batches where these are another calculation."""
    by_parts = kind.rows_depend or kind.float32_weight is not None
    expected = one_process(kind, model, rows, micro_batches if by_parts else 1)
    check_equal(made, expected, loss_tolerance=FLOAT32 if kind.float32_weight else TOLERANCE)
    if kind.float32_weight:
        check_equal(made, one_process(kind, model, rows, 1), FLOAT32, loss_tolerance=FLOAT32)


def check_equal(
    made: Trained, expected: Trained, tolerance: float = TOLERANCE, *, loss_tolerance: float = TOLERANCE
) -> None:
    for step, (ours, theirs) in enumerate(zip(made.losses, expected.losses, strict=True)):
        assert abs(ours - theirs) <= loss_tolerance * max(abs(theirs), 1.0), f"step {step}: loss"
    for step, (mine, reference) in enumerate(zip(made.gradients, expected.gradients, strict=True)):
        assert mine.keys() == reference.keys()
        # Gradients that are zero but for rounding have no scale of their own.
        floor = 1e-3 * max(gradient.abs().max().item() for gradient in reference.values())
        for name, gradient in reference.items():
            off = (mine[name] - gradient).abs().max().item()
            assert off <= tolerance * max(gradient.abs().max().item(), floor), f"step {step}: gradient of {name}"
    assert made.state.keys() == expected.state.keys()
    for name, tensor in expected.state.items():
        torch.testing.assert_close(made.state[name], tensor, rtol=tolerance, atol=tolerance, msg=f"state: {name}")


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_model_trains_as_in_one_process(cluster: gradwire.Cluster, name: str) -> None:
    kind = KINDS[name]
    if "Hugging Face" in name and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed (it comes with the extra 'examples')")
    torch.manual_seed(0)
    model = kind.make().double()
    made = on_cluster(cluster, kind, model, FIVE, gradwire.Plan(stages=2, microbatches=5))
    check_kind(kind, model, made, FIVE, 5)
    cuts = tuple(sorted(random.Random(zlib.crc32(name.encode())).sample(made.allowed_cuts, 2)))
    made = on_cluster(cluster, kind, model, TWO, gradwire.Plan(stages=3, microbatches=2, cuts=cuts))
    check_kind(kind, model, made, TWO, 2)


@pytest.mark.parametrize("kind", zoo_refused.REFUSED, ids=lambda kind: kind.name)
def test_what_cannot_be_exported_says_what_where_and_what_to_do(kind: Refused) -> None:
    with pytest.raises(ModelError) as caught:
        export_model(kind.make(), kind.loss, kind.batch())
    message = str(caught.value)
    assert kind.message in message
    assert kind.line in message
    assert "module 'body" in message or "zoo_refused.py:" in message
    assert kind.way_out in caught.value.remedy


def test_the_table_in_the_documentation_is_what_is_tried_here() -> None:
    assert TABLE.read_text() == table(), "run: python tests/integration/model_table.py"
