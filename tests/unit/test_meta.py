"""Models without memory for their parameters: how they are built, what they cost to export, what is refused."""

from __future__ import annotations

import threading

import psutil
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gradwire
from gradwire.graph import export_model
from gradwire_protocol.errors import ModelError


def make_llama(*, width: int = 32, layers: int = 1, words: int = 64, tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 32,
        vocab_size=words,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_batch(words: int = 64) -> dict[str, torch.Tensor]:
    tokens = torch.arange(32).reshape(2, 16) % words
    return {"input_ids": tokens, "labels": tokens}


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def test_only_parameters_are_emptied_and_ties_stay() -> None:
    real = make_llama(tied=True)
    with gradwire.meta_parameters():
        model = make_llama(tied=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, buffer in real.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in real.named_parameters()]
    assert not nn.Linear(2, 2).weight.is_meta  # outside of the block all is as before


def test_a_parameter_given_to_two_modules_stays_one_and_keeps_its_marks() -> None:
    shared = nn.Parameter(torch.zeros(2), requires_grad=False)
    shared.mark = "mine"  # type: ignore[attr-defined]
    with gradwire.meta_parameters():
        first, second = nn.Module(), nn.Module()
        first.weight, second.weight = shared, shared
    assert first.weight is second.weight
    assert (first.weight.is_meta, first.weight.requires_grad, first.weight.mark) == (True, False, "mine")


def test_other_threads_build_as_usual() -> None:
    made: list[nn.Linear] = []
    with gradwire.meta_parameters():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
    assert not made[0].weight.is_meta


def test_a_big_model_is_built_and_exported_in_a_small_part_of_its_size() -> None:
    export_model(make_llama(), None, make_batch())  # what torch itself loads for any export
    before = resident_bytes()
    with gradwire.meta_parameters():
        model = make_llama(width=2048, layers=1, words=48000)
    exported = export_model(model, None, make_batch())
    grown = resident_bytes() - before
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 800 * 2**20
    assert grown < 0.1 * size
    assert all(exported.tensors[name].is_meta for name, _ in model.named_parameters())
    assert exported.proto.ByteSize() < 2**20


def test_buffers_and_attributes_without_contents_are_refused_by_name() -> None:
    with torch.device("meta"):
        model = make_llama()
    with pytest.raises(ModelError, match=r"model\.rotary_emb\.inv_freq.*gradwire\.meta_parameters"):
        export_model(model, None, make_batch())

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(2, 2), torch.ones(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.linear(x) * self.scale).mean()

    with torch.device("meta"):
        keeps = Keeps()
    with pytest.raises(ModelError, match="empty ones: scale"):
        export_model(keeps, None, (torch.zeros(2, 2),))
