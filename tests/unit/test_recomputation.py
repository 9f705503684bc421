"""Forwards that are run again for their backward: exact, and without what the first run made."""

from __future__ import annotations

import pytest
import torch
from graph_driver import Chain, assert_equal
from graph_models import Case, Dropping, cases, squared_loss
from live_memory import Live
from torch import nn

from gradwire.graph import export_model
from gradwire_protocol.errors import InternalError
from gradwire_protocol.v1 import graph_pb2


def models() -> dict[str, Case]:
    torch.manual_seed(0)
    batch = cases()["counting"].batch
    return {**cases(), "dropping": Case(Dropping().double(), squared_loss, batch)}


@pytest.mark.parametrize(
    "kind", ["gpt", "residual", "recurrent", "regions", "in_place", "masked", "counting", "dropping"]
)
def test_nothing_changes(kind: str) -> None:
    case = models()[kind]
    torch.manual_seed(1)
    batch = case.batch(5)
    exported = export_model(case.model, case.loss, batch)
    allowed = list(exported.proto.train.allowed_cuts)
    for cuts in ([], [allowed[len(allowed) // 2]], [allowed[0], allowed[-1]]):
        kept = Chain(exported, cuts, seed=3).train(batch, micro_batches=3)
        again = Chain(exported, cuts, seed=3, recompute=True).train(batch, micro_batches=3)
        assert again.loss == kept.loss
        assert_equal(again, kept, tolerance=0.0)
        assert again.buffers.keys() == kept.buffers.keys()


def test_nothing_changes_under_autocast() -> None:
    case = models()["residual"]
    model = case.model.float()
    batch = tuple(item.float() if item.is_floating_point() else item for item in case.batch(5))
    exported = export_model(model, case.loss, batch, precision=torch.bfloat16)
    cuts = [exported.proto.train.allowed_cuts[5]]
    outcomes = [
        Chain(exported, cuts, precision=torch.bfloat16, recompute=recompute).train(batch, micro_batches=2)
        for recompute in (False, True)
    ]
    assert_equal(outcomes[1], outcomes[0], tolerance=0.0)


def test_outputs_say_whether_they_need_a_gradient() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[0].requires_grad_(False)
    batch = (torch.randn(3, 6), torch.randn(3, 6))
    exported = export_model(model, squared_loss, batch)
    values = exported.flatten_batch(batch, graph_pb2.GRAPH_KIND_TRAIN).values
    for cut, expected in ((2, False), (3, True)):
        chain = Chain(exported, [cut])
        segment = chain.built(chain.segments[graph_pb2.GRAPH_KIND_TRAIN][0])
        made = segment.forward(values, step=1, micro_batch=0, record=True, keep=False)
        sent = [value for value in made.outgoing.values() if isinstance(value, torch.Tensor)]
        assert [value.requires_grad for value in sent] == [expected]
        assert all(value.grad_fn is None for value in sent)


def test_running_again_leaves_the_buffers_alone() -> None:
    case = models()["counting"]
    batch = case.batch(4)
    exported = export_model(case.model, case.loss, batch)
    chain = Chain(exported, [])
    segment = chain.built(chain.segments[graph_pb2.GRAPH_KIND_TRAIN][0])
    values = exported.flatten_batch(batch, graph_pb2.GRAPH_KIND_TRAIN).values
    passes = [segment.forward(values, step=1, micro_batch=number, record=True, keep=False) for number in range(3)]
    before = {name: (tensor, tensor.detach().clone()) for name, tensor in chain.stores[0].items()}
    assert before["count"][1] == 3
    assert passes[1].inputs is not None
    made = segment.again(passes[1].inputs)
    assert made.loss is not None
    assert passes[1].loss is not None
    assert torch.equal(made.loss, passes[1].loss)
    for name, (tensor, value) in before.items():
        assert chain.stores[0][name] is tensor
        assert torch.equal(tensor, value)


def test_a_backward_without_running_again_is_refused() -> None:
    batch = (torch.randn(3, 6), torch.randn(3, 6))
    exported = export_model(nn.Linear(6, 6), squared_loss, batch)
    chain = Chain(exported, [])
    (segment,) = chain.segments[graph_pb2.GRAPH_KIND_TRAIN]
    values = exported.flatten_batch(batch, graph_pb2.GRAPH_KIND_TRAIN).values
    made = chain.built(segment).forward(values, step=1, micro_batch=0, record=True, keep=False)
    with pytest.raises(InternalError, match="before its forward pass was run again"):
        made.backward({}, {}, 1.0)


def test_activations_are_not_kept() -> None:
    layers: list[nn.Module] = [nn.Linear(4, 64)]
    for _ in range(7):
        layers += [nn.GELU(), nn.Linear(64, 64)]
    layers += [nn.GELU(), nn.Linear(64, 4)]
    batch = (torch.randn(512, 4), torch.randn(512, 4))
    exported = export_model(nn.Sequential(*layers), squared_loss, batch, check=False)
    peaks = []
    for recompute in (False, True):
        chain = Chain(exported, [], recompute=recompute)
        with Live() as live:
            chain.train(batch, micro_batches=8)
        peaks.append(live.peak)
    # Kept: what 16 layers made of 512 rows. Again: of the 64 rows of one micro-batch, beside gradients and inputs.
    activations, gradients = 16 * 512 * 64 * 4, sum(parameter.nbytes for parameter in exported.tensors.values())
    assert peaks[0] > activations
    assert peaks[1] < activations / 8 + 2 * gradients + 5 * sum(item.nbytes for item in batch)
    assert peaks[1] < peaks[0] / 3
