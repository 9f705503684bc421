from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gradwire.job.gpt import GPT, Shape, continue_text, make_optimizer, next_byte_loss
from gradwire_protocol.errors import SettingsError

SHAPE = Shape(layers=2, width=32, heads=4, context=16)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(SHAPE)


def test_parameters_are_those_of_the_shape(model: GPT) -> None:
    width = SHAPE.width
    block = 12 * width**2 + 13 * width
    assert sum(p.numel() for p in model.parameters()) == 256 * width + 16 * width + 2 * block + 2 * width
    assert model.head.weight is model.embedding.weight


def test_the_benchmark_model_has_the_stated_size() -> None:
    parameters = sum(p.numel() for p in GPT(Shape(layers=8, width=256, heads=8, context=128)).parameters())
    assert parameters == pytest.approx(6.5e6, rel=0.02)


def test_the_first_loss_is_that_of_guessing(model: GPT) -> None:
    tokens = torch.randint(256, (4, 17))
    loss = next_byte_loss(model(tokens[:, :-1]), tokens[:, 1:])
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)


def test_the_residual_projections_start_smaller(model: GPT) -> None:
    output = model.blocks[0].get_parameter("mlp.2.weight")
    assert output.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.1)
    assert model.blocks[0].get_parameter("mlp.0.weight").std().item() == pytest.approx(0.02, rel=0.1)


def test_no_position_sees_what_follows_it(model: GPT) -> None:
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-6)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-6)


def test_attention_equals_the_formula(model: GPT) -> None:
    attention = model.blocks[0].get_submodule("attention")
    x = torch.randn(2, 5, 32)
    query, key, value = (
        part.view(2, 5, 4, 8).transpose(1, 2) for part in attention.get_submodule("qkv")(x).chunk(3, dim=-1)
    )
    scores = query @ key.transpose(-2, -1) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    expected = attention.get_submodule("projection")((scores.softmax(-1) @ value).transpose(1, 2).reshape(2, 5, 32))
    assert torch.allclose(attention(x), expected, atol=1e-5)


def test_the_loss_is_the_mean_over_bytes() -> None:
    logits, target = torch.randn(2, 3, 256), torch.randint(256, (2, 3))
    by_hand = -F.log_softmax(logits, -1).gather(-1, target[..., None]).mean()
    assert torch.allclose(next_byte_loss(logits, target), by_hand)


def test_matrices_decay_and_vectors_do_not(model: GPT) -> None:
    decaying, others = make_optimizer(model, lr=1e-3, weight_decay=0.1).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decaying["params"]} == {2}
    assert {p.dim() for p in others["params"]} == {1}
    assert len(decaying["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_text_is_continued_by_the_seed_alone(model: GPT) -> None:
    first = continue_text(model, b"a prompt longer than the context", 8, temperature=1.0, seed=3)
    torch.manual_seed(99)
    assert continue_text(model, b"a prompt longer than the context", 8, temperature=1.0, seed=3) == first
    assert len(first) == 8
    assert continue_text(model, b"x", 4, temperature=0.0, seed=0) == continue_text(
        model, b"x", 4, temperature=0.0, seed=1
    )


def test_an_empty_prompt_is_refused(model: GPT) -> None:
    with pytest.raises(SettingsError, match="prompt is empty"):
        continue_text(model, b"", 4, temperature=1.0, seed=0)


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(SettingsError, match="cannot be divided"):
        Shape(layers=1, width=10, heads=4, context=8)
