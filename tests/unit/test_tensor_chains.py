"""Any chain of operators between a product by columns and one by rows: several servers give what the model gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graph_driver import assert_equal, eager
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sharded_driver import ShardedChain, sharded
from sharded_models import LENGTH, WIDTH
from torch import nn

from gradwire.graph import export_model
from gradwire_protocol.errors import PlanError

INNER = 8
Tensor = torch.Tensor
# What an operator makes of a value with the rows in front; `n` is any number. None: it is not for this shape.
Link = Callable[["Chained", Tensor, int], Tensor | None]


def _dim(x: Tensor, n: int) -> int:
    """One of the dimensions behind the rows, counted from the front or from the end."""
    dim = 1 + n % (x.dim() - 1)
    return dim if n % 2 else dim - x.dim()


def _split_dimension(m: Chained, x: Tensor, n: int) -> Tensor | None:
    dim = 1 + n % (x.dim() - 1)
    if x.shape[dim] % 2 or x.dim() > 5:
        return None
    sizes = (2, x.shape[dim] // 2) if n % 3 else (x.shape[dim] // 2, 2)
    return x.unflatten(dim, sizes) if n % 5 else x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def _joined_dimensions(m: Chained, x: Tensor, n: int) -> Tensor | None:
    if x.dim() < 3:
        return None
    dim = 1 + n % (x.dim() - 2)
    return x.flatten(dim, dim + 1) if n % 2 else x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])


def _permuted(m: Chained, x: Tensor, n: int) -> Tensor:
    order = list(range(1, x.dim()))
    order = order[n % len(order) :] + order[: n % len(order)]
    return x.permute(0, *order)


def _cut(m: Chained, x: Tensor, n: int) -> Tensor | None:
    dim = _dim(x, n)
    if x.shape[dim] % 2:
        return None
    first, second = x.chunk(2, dim) if n % 3 else x.split(x.shape[dim] // 2, dim)
    return first * second.sigmoid() if n % 4 else torch.cat([second, first.tanh()], dim)


def _sliced(m: Chained, x: Tensor, n: int) -> Tensor:
    dim = _dim(x, n)
    size = x.shape[dim]
    return x.narrow(dim, 0, max(1, size // 2)) if n % 2 else x.index_select(dim, torch.arange(size).flip(0))


def _reduced(m: Chained, x: Tensor, n: int) -> Tensor:
    dim = _dim(x, n)
    made = (x.sum(dim, keepdim=True), x.mean(dim, keepdim=True), x.amax(dim, keepdim=True))[n % 3]
    return x - made / 2


def _gone(m: Chained, x: Tensor, n: int) -> Tensor | None:
    if x.dim() < 3:
        return None
    dim = _dim(x, n)
    return (x.select(dim, 0), x.mean(dim), x.unbind(dim)[-1])[n % 3]


def _squeezed(m: Chained, x: Tensor, n: int) -> Tensor:
    made = x.unsqueeze(_dim(x, n))
    return made.expand(-1, *made.shape[1:]).squeeze() if n % 3 else made


def _stacked(m: Chained, x: Tensor, n: int) -> Tensor | None:
    return torch.stack([x, x.cos()], 1 + n % x.dim()) if x.dim() < 5 and x[0].numel() < 100 else None


def _scaled(m: Chained, x: Tensor, n: int) -> Tensor:
    learned = m.numbers[: x.shape[-1]] if n % 2 else m.numbers[: x.shape[1]].view(-1, *[1] * (x.dim() - 2))
    return x * learned if n % 3 else torch.maximum(x, learned)


def _written(m: Chained, x: Tensor, n: int) -> Tensor:
    x = x * 1
    part = x.select(_dim(x, n), 0)
    part.mul_(2) if n % 2 else x.add_(1)
    return x + part.sum()


def _multiplied(m: Chained, x: Tensor, n: int) -> Tensor | None:
    if x.dim() < 3:
        return None
    scores = x @ x.transpose(-1, -2) / 4
    return (scores.softmax(-1) if n % 2 else scores) @ x


def _normed(m: Chained, x: Tensor, n: int) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], m.numbers[: x.shape[-1]])


def _quiet(m: Chained, x: Tensor, n: int) -> Tensor:
    with torch.no_grad():
        scale = x.flip(-1) if n % 2 else x.mean(_dim(x, n), keepdim=True) * m.numbers[0]
    return x.flip(-1) * scale


def _softmax(m: Chained, x: Tensor, n: int) -> Tensor:
    return x.softmax(_dim(x, n)) + x


LINKS: tuple[Link, ...] = (
    *(_split_dimension, _joined_dimensions, _permuted, _cut, _sliced, _reduced, _gone, _squeezed, _stacked, _scaled),
    *(_written, _multiplied, _normed, _quiet, _softmax, lambda m, x, n: F.gelu(x)),
    # What is most often there is most often drawn.
    *(_split_dimension, _joined_dimensions, _permuted, _cut),
)


class Chained(nn.Module):
    def __init__(self, chain: list[tuple[int, int]]) -> None:
        super().__init__()
        self.chain = chain
        self.up = nn.Linear(WIDTH, INNER)
        self.numbers = nn.Parameter(torch.randn(512))
        with torch.no_grad():
            self.down = nn.Linear(self.middle(torch.randn(5, LENGTH, WIDTH)).shape[-1], WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        x = self.up(x)
        for link, n in self.chain:
            made = LINKS[link](self, x, n)
            x = x if made is None else made
        return x

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(self.middle(x))
        return made.flatten(1).mean(1, keepdim=True) + made.flatten(1)[:, :1]


def loss(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).mean()


@given(
    chain=st.lists(st.tuples(st.integers(0, len(LINKS) - 1), st.integers(0, 59)), max_size=8),
    shards=st.sampled_from([2, 2, 4]),
)
@settings(max_examples=12, suppress_health_check=list(HealthCheck))
def test_any_chain(chain: list[tuple[int, int]], shards: int) -> None:
    check_chain(chain, shards)


def check_chain(chain: list[tuple[int, int]], shards: int) -> None:
    torch.manual_seed(0)
    model = Chained(chain).double()
    batch = torch.randn(5, LENGTH, WIDTH).double(), torch.randn(5, 1).double()
    exported = export_model(model, loss, batch, check=False)
    rules = {"up.weight": "column"}
    if model.down.in_features % shards == 0:
        rules["down.weight"] = "row"
    try:
        of = sharded(exported, shards, rules)
    except PlanError as error:
        refused = ("cannot be shared by", "of which another one is a view", "writes into a split value")
        if any(text in error.message for text in refused):
            return
        raise
    assert_equal(ShardedChain(exported, of).train(batch, 2), eager(model, loss, batch, 2), 1e-8)


@pytest.mark.parametrize("shards", [2, 4])
def test_no_chain(shards: int) -> None:
    check_chain([], shards)
