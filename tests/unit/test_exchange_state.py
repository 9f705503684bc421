"""What replicas keep to agree with each other is what plans count, and servers check."""

from __future__ import annotations

import pytest
import torch
from exchange_driver import Replicas
from graph_text import tensor

from gradwire_protocol.exchange_state import ALONE, ExchangeState, owed_name, parse_owed_name
from gradwire_protocol.frames import MAXIMUM_STATE_BYTES
from gradwire_protocol.gradient_codecs import parse_compression
from gradwire_protocol.optimizer_state import OptimizerState
from gradwire_protocol.torch_tensors import DATA_TYPES
from gradwire_protocol.v1 import graph_pb2, run_pb2
from gradwire_stage.exchange.reducers import restore_tensors, state_of_tensor

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


@pytest.mark.parametrize(
    ("replica", "what"),
    [(0, "residual"), (511, "local.codec.velocity"), (511, "local.optimizer.momentum_buffer_of_32_letters_")],
)
def test_names_say_whose_it_is(replica: int, what: str) -> None:
    name = owed_name(replica, what)
    assert parse_owed_name(name) == (replica, what)
    assert len(name.encode()) <= MAXIMUM_STATE_BYTES


@pytest.mark.parametrize(
    "name", ["exp_avg", "exchange", "exchange.x", "exchange-1.x", "exchange1.", "exchange1.x/y", "exchange1.local."]
)
def test_other_names_are_the_optimizers(name: str) -> None:
    assert parse_owed_name(name) is None


@pytest.mark.parametrize("data_type", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", ["int8", "topk(density=0.1, momentum=0.9)", "powersgd(rank=2)"])
def test_what_is_kept_of_each_tensor_is_kept_again(text: str, data_type: torch.dtype) -> None:
    """Tensor by tensor, and the bucket's next steps have the same bits; one without anything begins anew."""
    shapes = [(24, 40), (7,), (3, 8, 8)]
    group, other, without = (Replicas(text, 2, *shapes) for _ in range(3))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        group.reduce(group.draw(generator, data_type))
    for member, reducer in group.reducers.items():
        states = [
            {name: tensor.clone() for name, tensor in state_of_tensor(reducer, place, group.shapes).items()}
            for place in range(len(shapes))
        ]
        like = torch.zeros(1, dtype=data_type)
        restore_tensors(other.reducers[member], states, other.shapes, like)
        restore_tensors(without.reducers[member], [{}, *states[1:]], without.shapes, like)
    other.step = without.step = group.step
    gradients = group.draw(generator, data_type)
    expected = group.reduce(gradients)
    assert torch.equal(other.reduce(gradients), expected)
    assert not torch.equal(without.reduce(gradients), expected)
