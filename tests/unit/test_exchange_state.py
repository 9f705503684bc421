"""What replicas keep to agree with each other is what plans count, and servers check."""

from __future__ import annotations

import pytest
import torch
from exchange_driver import Replicas
from graph_text import tensor

from gradwire_protocol.exchange_state import ALONE, ExchangeState
from gradwire_protocol.gradient_codecs import parse_compression
from gradwire_protocol.optimizer_state import OptimizerState
from gradwire_protocol.torch_tensors import DATA_TYPES
from gradwire_protocol.v1 import graph_pb2, run_pb2

ROWS, COLUMNS = 96, 64


def spec(data_type: torch.dtype) -> graph_pb2.TensorSpec:
    made = tensor("a")
    made.shape[:] = [ROWS, COLUMNS]
    made.data_type = DATA_TYPES[data_type]
    return made


@pytest.mark.parametrize("data_type", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", ["none", "int8", "topk(density=0.01)", "topk(density=0.01, momentum=0.9)", "powersgd"])
def test_it_is_what_reducers_keep(text: str, data_type: torch.dtype) -> None:
    group = Replicas(text, 2, (ROWS, COLUMNS))
    group.reduce(group.draw(torch.Generator().manual_seed(0), data_type))
    # The factor that powersgd starts from in the next step is small beside it.
    kept = sum(each.nbytes for name, each in group.reducers[0].state().items() if not name.startswith("right"))
    assert ExchangeState(parse_compression(text)).bytes_for(spec(data_type)) == kept


def test_local_steps_keep_weights_and_velocities() -> None:
    exact, rounded = (ExchangeState(parse_compression(text), local_steps=True) for text in ("none", "int8"))
    assert exact.bytes_for(spec(torch.float32)) == 2 * 4 * ROWS * COLUMNS
    assert rounded.bytes_for(spec(torch.float32)) == 3 * 4 * ROWS * COLUMNS


def test_it_counts_as_gradients_of_what_trains() -> None:
    state = OptimizerState(run_pb2.Optimizer(name="SGD"))
    frozen = spec(torch.float32)
    frozen.requires_grad = False
    specs, size = [spec(torch.float32), frozen], 4 * ROWS * COLUMNS
    assert state.held(specs, exchange=ALONE).gradients == size
    assert state.held(specs, exchange=ExchangeState(parse_compression("int8"))).gradients == 2 * size
