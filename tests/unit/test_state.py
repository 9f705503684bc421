from __future__ import annotations

import torch
from torch import nn

from gradwire.state import StateNames
from gradwire_protocol.v1 import graph_pb2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 2)
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(2, 4, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(2, 2)
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


def spec(*names: str) -> graph_pb2.TensorSpec:
    return graph_pb2.TensorSpec(name=names[0], names=names)


def test_keys_are_the_models_own_and_ties_share_a_tensor() -> None:
    model = Model()
    specs = [
        spec("embedding.weight", "head.weight"),
        *(spec(f"norm.{name}") for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        spec("scratch"),
        spec("unused.weight"),
    ]
    held = [item.name for item in specs if item.name not in ("unused.weight", "scratch")]
    names = StateNames(model, specs, held)
    tensors = {name: torch.full((1,), float(index)) for index, name in enumerate(held)}
    state = names.assemble(tensors)
    assert list(state) == list(model.state_dict())
    assert state["embedding.weight"] is state["head.weight"] is tensors["embedding.weight"]
    assert state["norm.running_mean"] is tensors["norm.running_mean"]
    # What no server holds stays the module's own, live.
    assert state["unused.weight"].data_ptr() == model.unused.weight.data_ptr()
