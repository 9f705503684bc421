"""Tensor plans: ready ones name the parameters of the models that they are for, and wrong ones are refused early."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

import pytest
from torch import nn

from gradwire.graph.tensors import TensorTable
from gradwire.job.gpt import GPT, Shape
from gradwire.tensor_plans import READY_PLANS, SPLITS, check_optimizer, checked_tensor_plan, split_of, tensor_rules
from gradwire_protocol.errors import PlanError
from gradwire_protocol.v1 import graph_pb2, run_pb2

transformers_only = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers comes with the extra 'examples'"
)
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def gpt() -> nn.Module:
    return GPT(Shape(layers=2, width=8, heads=2, context=4))


def gpt2(vocabulary: int) -> nn.Module:
    import transformers

    config = transformers.GPT2Config(vocab_size=vocabulary, n_positions=6, n_embd=8, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def relative_of_llama(kind: str, *, tied: bool) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model


class Wrapped(nn.Module):
    """A model inside of another, as a user's own loss or head has it: names have a prefix."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def specs(model: nn.Module) -> list[graph_pb2.TensorSpec]:
    return TensorTable(model, None).specs


def split_parameters(model: nn.Module, plan: str | Mapping[str, str], servers: int = 2) -> dict[str, str]:
    """What is split, and how: parameters of all layers that are called alike stand there once, without a number."""
    rules = tensor_rules(plan, [], specs(model), servers)
    splits = {spec.name: split_of(spec, rules) for spec in specs(model)}
    found: dict[str, set[str]] = {}
    for name, split in splits.items():
        found.setdefault(_LAYER.sub("N", name), set()).add(split)
    assert all(len(each) == 1 for each in found.values())
    return {name: each.pop() for name, each in found.items() if each != {"whole"}}


LLAMA_SPLITS = {
    "model.embed_tokens.weight": "vocab",
    **{f"model.layers.N.self_attn.{name}_proj.weight": "column" for name in "qkv"},
    "model.layers.N.self_attn.o_proj.weight": "row",
    "model.layers.N.mlp.gate_proj.weight": "column",
    "model.layers.N.mlp.up_proj.weight": "column",
    "model.layers.N.mlp.down_proj.weight": "row",
}


def test_the_plan_for_gradwires_gpt() -> None:
    rules = tensor_rules("gpt", [], specs(gpt()), 2)
    found = {spec.name: split_of(spec, rules) for spec in specs(gpt()) if split_of(spec, rules) != "whole"}
    assert found == {
        "embedding.weight": "vocab",  # the head's, too
        **{f"blocks.{layer}.attention.qkv.weight": "column" for layer in (0, 1)},
        **{f"blocks.{layer}.attention.projection.weight": "row" for layer in (0, 1)},
        **{f"blocks.{layer}.mlp.0.weight": "column" for layer in (0, 1)},
        **{f"blocks.{layer}.mlp.2.weight": "row" for layer in (0, 1)},
    }


@transformers_only
@pytest.mark.parametrize(("vocabulary", "splits"), [(50, True), (51, False)])
def test_the_plan_for_gpt2_splits_a_vocabulary_that_divides(vocabulary: int, splits: bool) -> None:
    assert split_parameters(gpt2(vocabulary), "gpt2") == {
        **({"transformer.wte.weight": "vocab"} if splits else {}),
        "transformer.h.N.attn.c_attn.weight": "column",
        "transformer.h.N.attn.c_proj.weight": "row",
        "transformer.h.N.mlp.c_fc.weight": "column",
        "transformer.h.N.mlp.c_proj.weight": "row",
    }


@transformers_only
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2"])
def test_the_plan_for_llama_is_one_for_its_relatives(kind: str) -> None:
    assert split_parameters(relative_of_llama(kind, tied=True), "llama") == LLAMA_SPLITS
    assert split_parameters(relative_of_llama(kind, tied=False), "llama") == {**LLAMA_SPLITS, "lm_head.weight": "vocab"}
    inner = split_parameters(Wrapped(relative_of_llama(kind, tied=True)), "llama")
    assert inner == {f"inner.{name}": split for name, split in LLAMA_SPLITS.items()}


@pytest.mark.parametrize("plan", ["gpt2", "llama"])
def test_a_ready_plan_is_not_for_every_model(plan: str) -> None:
    with pytest.raises(PlanError, match="is for another model") as caught:
        tensor_rules(plan, [], specs(gpt()), 2)
    assert "weight" in caught.value.expected
    assert "blocks.0.attention_norm.weight" in caught.value.got
    assert 'tensor_plan="auto"' in caught.value.remedy


def test_ready_plans_know_splits_only() -> None:
    for name, rules in READY_PLANS.items():
        assert checked_tensor_plan(name) == name
        assert {split for _, split in rules} <= set(SPLITS)


def rules_of(plan: str | Mapping[str, str], own: Any = (), servers: int = 2) -> list[tuple[str, str]]:
    return [(rule.pattern, rule.split) for rule in tensor_rules(plan, own, specs(gpt()), servers)]


def test_a_users_rules_stay_as_they_are() -> None:
    given = {"*.mlp.0.weight": "whole", "*.mlp.?.weight": "column", "head.weight": "vocab"}
    assert rules_of(given) == list(given.items())
    assert rules_of(given, servers=3) == list(given.items())  # 256 does not divide by 3: the coordinator says so
    made = tensor_rules(given, [], specs(gpt()), 2)
    found = {spec.name: split_of(spec, made) for spec in specs(gpt())}
    assert (found["blocks.0.mlp.0.weight"], found["blocks.0.mlp.2.weight"]) == ("whole", "column")
    assert found["embedding.weight"] == "vocab"  # by another of its names
    assert found["positions.weight"] == "whole"


def test_modules_rules_come_first_and_leave_the_rest_to_the_plan() -> None:
    own = [("blocks.0.mlp.0.weight", "column")]
    assert rules_of("auto") == []
    assert rules_of("auto", own) == [*own, ("*", "auto")]
    assert rules_of({"head.weight": "vocab"}, own) == [*own, ("head.weight", "vocab")]
    assert rules_of("gpt", own)[:2] == [*own, ("*.attention.qkv.weight", "column")]


def test_one_server_a_stage_needs_no_rules() -> None:
    assert rules_of({"nonsense": "column"}, [("blocks.0.mlp.0.weight", "column")], servers=1) == []


def test_a_pattern_without_a_parameter_is_refused() -> None:
    with pytest.raises(PlanError, match=r"'\*\.q_proj\.weight' of the tensor plan matches no parameter") as caught:
        rules_of({"*.mlp.0.weight": "column", "*.q_proj.weight": "column"})
    assert "embedding.weight" in caught.value.expected
    assert "more" in caught.value.expected
    with pytest.raises(PlanError, match="matches no parameter"):
        rules_of({"*.MLP.0.weight": "column"})


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("megatron", "is no plan that is ready"),
        (None, "tensor_plan is not valid"),
        ({}, "tensor_plan is not valid"),
        ([("*", "row")], "tensor_plan is not valid"),
        ({1: "row"}, "A pattern of tensor_plan is not valid"),
        ({"": "row"}, "A pattern of tensor_plan is not valid"),
        ({"x" * 513: "row"}, "A pattern of tensor_plan is not valid"),
        ({"*": "rows"}, "The split of '\\*' in tensor_plan"),
        ({"*": "auto"}, "The split of '\\*' in tensor_plan"),
        ({"*": None}, "The split of '\\*' in tensor_plan"),
    ],
)
def test_what_is_no_plan_is_refused(given: Any, problem: str) -> None:
    with pytest.raises(PlanError, match=problem) as caught:
        checked_tensor_plan(given)
    assert caught.value.expected
    assert caught.value.got


def test_an_optimizer_that_needs_whole_parameters_gets_no_parts() -> None:
    rules = [
        run_pb2.TensorRule(pattern="a", split="column"),
        run_pb2.TensorRule(pattern="b", split="whole"),
        run_pb2.TensorRule(pattern="*", split="auto"),
    ]

    def check(*trained: str, name: str = "Adafactor", frozen: str = "") -> None:
        made = [graph_pb2.TensorSpec(name=each, names=[each], requires_grad=each != frozen) for each in "abc"]
        check_optimizer(name, trained, rules, made)

    with pytest.raises(PlanError, match="Adafactor needs the whole of a parameter, and a is split"):
        check("a", "b")
    # What is found by itself is the coordinator's to judge.
    check("b", "c")
    check("a", "b", frozen="a")
    check("a", name="AdamW")
