"""A rewritten graph, run by several servers, gives what the model gives: outputs, loss, and every gradient, whole."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_driver import Chain, assert_equal, eager
from sharded_driver import ShardedChain, group_operators, sharded
from sharded_models import MIDDLES, RULES, WIDTH, Pair, pair_batch
from torch import nn

from gradwire.graph import ExportedModel, export_model
from gradwire_coordinator.tensor.sharded_model import ShardedModel
from gradwire_protocol.errors import PlanError


def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((output - target) ** 2).mean()


def checked(
    model: nn.Module,
    shards: int,
    rules: Mapping[str, str] | None,
    *,
    loss: Any = squared,
    batch: Any = None,
    random: bool = False,
    every_cut: bool = False,
    **options: Any,
) -> ShardedModel:
    """Compare with the model; where it draws random numbers, with one server that has all of it."""
    model = model.double()
    batch = batch or pair_batch()
    exported = export_model(model, loss, batch, check=False)
    of = sharded(exported, shards, rules)
    expected = Chain(exported, ()).train(batch, 2) if random else eager(model, loss, batch, 2)
    chain = ShardedChain(exported, of, **options)
    assert_equal(chain.train(batch, 2), expected)
    if every_cut:
        cuts = of.indexed.train.usable_cuts(of.indexed.mutated)
        assert cuts
        for cut in cuts:
            assert_equal(ShardedChain(exported, of, [cut]).train(batch, 2), expected)
            assert cut == of.new_cut(of.old_cut(cut))
    with torch.no_grad():
        output = copy.deepcopy(model).eval()(*batch[:-1])
    torch.testing.assert_close(chain.predict(batch[:-1]), output, rtol=1e-10, atol=1e-10)
    assert chain.evaluate(batch) == pytest.approx(float(loss(output, batch[-1])), rel=1e-10)
    return of


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", MIDDLES)
def test_what_is_between_two_products(name: str) -> None:
    middle = MIDDLES[name]
    of = checked(Pair(middle.make, middle.out), 2, RULES, random=middle.random)
    assert Counter(group_operators(of)) == Counter({"copy": 1, "sum": 1}) + Counter(middle.further)
    assert of.splits == {"up.weight": "column", "up.bias": "column", "down.weight": "row"}


@pytest.mark.parametrize("name", ["chunk", "grouped queries", "in place", "dropout", "sum over parts", "no gradient"])
def test_every_allowed_cut_is_exact(name: str) -> None:
    """With what a segment has whole looked at, on its way there and back."""
    middle = MIDDLES[name]
    checked(Pair(middle.make, middle.out), 2, RULES, random=middle.random, every_cut=True)


@pytest.mark.parametrize("name", ["fused by head", "permute", "eager attention", "dropped in attention", "rotated"])
@pytest.mark.parametrize("options", [{"recompute": True}, {"split": (0, 1)}], ids=["recompute", "split"])
def test_four_servers(name: str, options: dict[str, Any]) -> None:
    middle = MIDDLES[name]
    checked(Pair(middle.make, middle.out), 4, RULES, random=middle.random, **options)


@pytest.mark.parametrize("name", ["stale view", "written view"])
def test_a_view_of_the_whole_and_a_part_that_is_written_are_refused(name: str) -> None:
    """Each would not see what is written into the other."""

    def stale(m: Pair, h: torch.Tensor) -> torch.Tensor:
        h = h * 1
        first = h[..., 3]
        h.mul_(2)
        return h * first.unsqueeze(-1)

    def written(m: Pair, h: torch.Tensor) -> torch.Tensor:
        h = h * 1
        h.flatten().mul_(2)
        return h

    model = Pair({"stale view": stale, "written view": written}[name])
    with pytest.raises(PlanError, match="of which another one is a view") as caught:
        checked(model, 2, RULES)
    assert "mul_" in caught.value.got
    assert "write into a copy" in caught.value.remedy
    # What nobody reads under its other names may be written.
    checked(Pair(lambda m, h: F.relu_(h.flatten()).view(h.shape)), 2, RULES)


def test_what_is_written_must_be_a_part_that_an_operator_can_work_on() -> None:
    with pytest.raises(PlanError, match="writes into a split value"):
        checked(Pair(lambda m, h: F.dropout(h * 1, 0.5, True, inplace=True)), 2, RULES, random=True)


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        # Outputs are brought together.
        ({"up.weight": "column"}, {"copy": 1, "gather": 1}),
        # The inputs are split first.
        ({"down.weight": "row"}, {"split": 1, "sum": 1}),
        # What is added to a part is split, too.
        ({"down.weight": "column"}, {"copy": 1, "gather": 1, "split": 1}),
        ({"up.weight": "row", "down.weight": "column"}, {"split": 2, "sum": 1, "copy": 1, "gather": 1}),
        ({"up.weight": "column", "down.weight": "column"}, {"copy": 2, "gather": 2, "split": 1}),
        ({"up.weight": "row", "down.weight": "row"}, {"split": 2, "sum": 2}),
        (None, {"copy": 1, "sum": 1}),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_columns_and_rows(rules: dict[str, str] | None, found: dict[str, int], bias: bool) -> None:
    of = checked(Pair(lambda m, h: F.gelu(h), bias=bias), 2, rules, every_cut=True)
    assert group_operators(of) == found


class Matrices(nn.Module):
    """Products that have their weights as (inputs, outputs)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Parameter(torch.randn(WIDTH, 12)), nn.Parameter(torch.randn(12, WIDTH))
        self.c, self.d = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        if self.kind == "addmm":
            made = torch.addmm(self.d, torch.addmm(self.c, flat, self.a).tanh(), self.b)
        elif self.kind == "mm":
            made = torch.mm(torch.mm(flat, self.a) + self.c, self.b) + self.d
        elif self.kind == "matmul":
            made = ((x @ self.a + self.c).tanh() @ self.b + self.d).view(-1, WIDTH)
        elif self.kind == "transposed":
            made = F.linear(F.linear(flat, self.a.t(), self.c).tanh(), self.b.t(), self.d)
        else:
            made = (torch.einsum("ri,io->ro", flat, self.a) + self.c) @ self.b + self.d
        return made.view(x.shape)


@pytest.mark.parametrize("kind", ["addmm", "mm", "matmul", "transposed", "einsum"])
@pytest.mark.parametrize("looks", [True, False])
def test_products_of_every_form(kind: str, looks: bool) -> None:
    if kind == "einsum":
        # No product that a weight can be split by; the other one takes its inputs apart.
        of = checked(Matrices(kind), 2, {"b": "row"})
        assert group_operators(of) == {"split": 1, "sum": 1}
        return
    if kind == "transposed" and looks:
        return  # Whoever looks for what to split finds rows only where a product reads the weight itself.
    of = checked(Matrices(kind), 2, None if looks else {"a": "column", "b": "row"})
    assert dict(of.splits).items() >= {"a": "column", "b": "row"}.items()
    # Nobody asks for the gradient of what comes from a batch.
    assert "copy" not in group_operators(of)
    assert group_operators(of)["sum"] == 1


class Words(nn.Module):
    """A table of words that gives the scores, too."""

    def __init__(self, words: int = 12, *, tied: bool = True, padding: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(words, WIDTH, padding_idx=padding)
        self.head = nn.Linear(WIDTH, words, bias=not tied)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(torch.tanh(self.table(words)))
        return made


def words_batch(rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    words, targets = torch.randint(12, (rows, 4)), torch.randint(12, (rows, 4))
    targets[:, 0] = 3
    return words, targets


LOSSES = {
    "plain": {},
    "ignored": {"ignore_index": 3},
    "weights": {"weight": torch.linspace(0.5, 2, 12, dtype=torch.float64)},
    "smooth": {"label_smoothing": 0.1, "reduction": "sum"},
}


@pytest.mark.parametrize("options", LOSSES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary(options: str, tied: bool) -> None:
    """A prediction is whole, under its own name; the loss needs no more than what servers know of their classes."""

    def loss(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), **LOSSES[options])

    # Weights that are no batch's rows: one micro-batch, or the same sums.
    model = Words(tied=tied, padding=None if tied else 2).double()
    batch = words_batch()
    exported = export_model(model, loss, batch, check=False)
    of = sharded(exported, 2, {"*table.weight": "vocab", "*head.weight": "vocab"})
    assert group_operators(of) == {"embedding": 1, "sum": 1, "copy": 1, "cross_entropy": 1}
    assert group_operators(of, "predict") == {"embedding": 1, "sum": 1, "copy": 1, "gather": 1}
    chain, expected = ShardedChain(exported, of), Chain(exported, ()).train(batch, 2)
    assert_equal(chain.train(batch, 2), expected)
    with torch.no_grad():
        torch.testing.assert_close(chain.predict(batch[:1]), model.eval()(batch[0]), rtol=1e-10, atol=1e-10)
    for cut in of.indexed.train.usable_cuts([]):
        assert_equal(ShardedChain(exported, of, [cut]).train(batch, 2), expected)


@pytest.mark.parametrize("split", ["column", "vocab"])
def test_a_table_alone(split: str) -> None:
    def loss(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten())

    of = checked(Words(tied=True), 2, {"*table.weight": split}, loss=loss, batch=words_batch())
    assert of.splits == {"table.weight": split}


class Split(nn.Module):
    """Gives a parameter that is split as one of its outputs, beside a part."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = self.up(x)
        return self.down(h), h, self.up.weight


def test_outputs_that_are_parts_are_given_whole() -> None:
    def loss(outputs: tuple[torch.Tensor, ...], target: torch.Tensor) -> torch.Tensor:
        return squared(outputs[0], target)

    model, batch = Split().double(), pair_batch()
    exported = export_model(model, loss, batch, check=False)
    of = sharded(exported, 2)
    chain = ShardedChain(exported, of)
    assert_equal(chain.train(batch), eager(model, loss, batch))
    with torch.no_grad():
        torch.testing.assert_close(chain.predict(batch[:1]), model(batch[0]), rtol=1e-10, atol=1e-10)


def exported_pair(middle: Any = None, out: int = 24) -> ExportedModel:
    return export_model(Pair(middle or (lambda m, h: F.gelu(h)), out).double(), squared, pair_batch(), check=False)


@pytest.mark.parametrize(
    ("shards", "rules", "message", "remedy"),
    [
        (
            2,
            {"*.q_proj.weight": "column"},
            r"'\*\.q_proj\.weight' of tensor_plan matches no parameter",
            "name parameters",
        ),
        (5, {"up.weight": "column"}, "The 24 outputs of up.weight cannot be shared equally by 5", "divides 24"),
        (5, {"down.weight": "row"}, "The 24 inputs of down.weight cannot be shared equally by 5", "divides 24"),
        (3, {"head.weight": "vocab"}, "The 8 rows of head.weight cannot be shared equally by 3", "divides 8"),
        (2, {"norm.weight": "column"}, "norm.weight cannot be split", "leave it out"),
        (2, {"up.weight": "whole", "*": "whole"}, "nothing that 2 tensor-parallel servers could share", "tensor at 1"),
    ],
)
def test_what_cannot_be_is_told(shards: int, rules: dict[str, str], message: str, remedy: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        sharded(exported_pair(), shards, rules)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("unflattens", [True, False])
def test_heads_that_do_not_divide_are_told_with_their_place(unflattens: bool) -> None:
    def attended(m: Pair, h: torch.Tensor) -> torch.Tensor:
        parts = h.chunk(3, -1)
        if unflattens:
            heads = [part.unflatten(-1, (4, 2)).transpose(1, 2) for part in parts]
        else:
            heads = [part.view(part.shape[0], 3, 4, 2).transpose(1, 2) for part in parts]
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(h.shape[0], 3, 8)

    with pytest.raises(PlanError, match=r"4 heads.* cannot be shared by 8 servers") as caught:
        sharded(exported_pair(attended, 8), 8, RULES)
    assert "divides 4" in caught.value.remedy
    assert "sharded_models.py" in caught.value.message or "test_tensor_rules.py" in caught.value.message


def test_a_model_without_products_has_nothing_to_split() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    exported = export_model(Scaled().double(), squared, pair_batch(), check=False)
    with pytest.raises(PlanError, match="nothing that 2") as caught:
        sharded(exported, 2)
    assert "stages and replicas" in caught.value.remedy
