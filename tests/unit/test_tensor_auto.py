"""Looking for what to split finds what Megatron-LM splits, and no more is exchanged than a layer's four sums."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sharded_driver import group_operators, sharded
from test_tensor_plans import gpt, gpt2, relative_of_llama, specs
from torch import nn

from gradwire.graph import export_model
from gradwire.job.gpt import next_byte_loss
from gradwire.tensor_plans import tensor_rules
from gradwire_coordinator.tensor.sharded_model import ShardedModel
from gradwire_protocol.v1 import graph_pb2

LAYERS, LENGTH = 2, 4
transformers_only = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers comes with the extra 'examples'"
)


class Scores(nn.Module):
    """One of Hugging Face's models, of which only the scores are asked for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.inner(input_ids=words, use_cache=False).logits
        return scores


def word_loss(scores: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scores.flatten(0, 1), words.flatten())


KINDS: dict[str, tuple[Callable[[], nn.Module], str, Any]] = {
    "gpt": (gpt, "gpt", next_byte_loss),
    "gpt2": (lambda: Scores(gpt2(50)), "gpt2", word_loss),
    "llama": (lambda: Scores(relative_of_llama("Llama", tied=False)), "llama", word_loss),
    "qwen2": (lambda: Scores(relative_of_llama("Qwen2", tied=True)), "llama", word_loss),
}
MODELS = [pytest.param(name, marks=() if name == "gpt" else transformers_only) for name in KINDS]


def rewritten(name: str, plan: str) -> ShardedModel:
    make, ready, loss = KINDS[name]
    model = make()
    words = torch.randint(16, (2, LENGTH))
    exported = export_model(model, loss, (words, words), check=False)
    rules = tensor_rules(ready, [], specs(model), 2) if plan == "ready" else []
    return sharded(exported, 2, {rule.pattern: rule.split for rule in rules})


def exchanged(of: ShardedModel, graph: str = "train") -> dict[str, int]:
    """Without what has no exchange of its own: dropout and attention with it."""
    return {name: count for name, count in group_operators(of, graph).items() if name not in ("dropout", "attention")}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_found_is_what_the_ready_plan_says(name: str) -> None:
    found, ready = rewritten(name, "auto"), rewritten(name, "ready")
    whole = {parameter for parameter, split in ready.splits.items() if split == "vocab"}
    assert found.splits == {key: split for key, split in ready.splits.items() if key not in whole}
    assert exchanged(found) == {"sum": 2 * LAYERS, "copy": 2 * LAYERS}
    # A look-up, and the scores.
    vocabulary = {"embedding": 1, "sum": 2 * LAYERS + 1, "copy": 2 * LAYERS + 1}
    assert exchanged(ready) == {**vocabulary, "cross_entropy": 1}
    assert exchanged(ready, "predict") == {**vocabulary, "gather": 1}
    for of in (found, ready):
        positions = range(len(of.starts))
        assert all(of.old_cut(of.new_cut(cut)) == cut for cut in positions)
        train = graph_pb2.GRAPH_KIND_TRAIN
        assert not of.parts[train] & of.spread[train].keys()
        # Nothing is cut between a copy, whose gradient is made of shares, and who reads it.
        nodes = of.indexed.train.graph.nodes
        copies = {node.name for node in nodes if node.target == "gradwire.group_copy"}
        for cut in of.indexed.train.graph.allowed_cuts:
            for value in copies:
                made, readers = of.indexed.train.producers[value], of.indexed.train.readers[value]
                assert not made < cut <= max(readers)
