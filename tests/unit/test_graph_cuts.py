"""Wherever a graph may be cut, its segments together equal the model in one process (all traps at once)."""

from __future__ import annotations

import random

import pytest
import torch
from graph_driver import Chain, assert_equal, eager
from graph_models import cases

from gradwire.graph import export_model

CASES = cases()
ROWS = {"residual": (4, 2), "encoder": (3, 2)}


@pytest.mark.parametrize("name", CASES)
def test_every_cut_is_exact(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(1)
    exported = export_model(case.model, case.loss, case.batch(3))
    allowed = list(exported.proto.train.allowed_cuts)
    assert allowed
    rows, micro_batches = ROWS.get(name, (3, 2))
    batch = case.batch(rows)
    expected = eager(case.model, case.loss, batch, micro_batches)
    for cut in allowed[:: len(allowed) // 25 + 1]:
        assert_equal(Chain(exported, [cut]).train(batch, micro_batches), expected)
    picks = random.Random(0)
    for _ in range(min(6, len(allowed) // 2)):
        cuts = sorted(picks.sample(allowed, 2))
        assert_equal(Chain(exported, cuts).train(batch, micro_batches), expected)


# Batch normalisation of one row has no gradient.
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"residual"}))
def test_one_row_alone_is_exact(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(2)
    exported = export_model(case.model, case.loss, case.batch(1))
    allowed = exported.proto.train.allowed_cuts
    batch = case.batch(1)
    assert_equal(Chain(exported, [allowed[len(allowed) // 2]]).train(batch), eager(case.model, case.loss, batch))
