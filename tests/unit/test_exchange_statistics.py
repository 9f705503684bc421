"""Buffers that training changes, at replicas: as if one process had gone through all micro-batches in their order."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from exchange_driver import run_members, same_bits
from graph_driver import whole_segment
from torch import nn
from torch.nn import functional

from gradwire.graph import export_model
from gradwire_protocol.errors import FrameError, ModelError
from gradwire_protocol.v1 import run_pb2, stage_pb2
from gradwire_stage.exchange.statistics import ReplicaBuffers
from gradwire_stage.segment import BuiltSegment


class Twice(nn.Module):
    """A normalisation with another momentum, and one that a batch goes through twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(4, momentum=0.3)
        self.again = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(torch.tanh(self.again(self.first(x))))


def segment_of(model: nn.Module) -> stage_pb2.Segment:
    x = torch.randn(6, 4, dtype=torch.float64)
    return whole_segment(export_model(model, functional.mse_loss, (x, x)))


@pytest.mark.parametrize("owners", ["010", "0012", "1111", "20"])
def test_replicas_end_up_with_the_buffers_of_one_process(owners: str) -> None:
    """Owners: the replica of each micro-batch. One of three may have none of them."""
    torch.manual_seed(0)
    model = Twice().double()
    segment = segment_of(copy.deepcopy(model))
    batches = [torch.randn(rows, 4, dtype=torch.float64) for rows in (5, 3, 4, 2)[: len(owners)]]
    micro_batches = [run_pb2.MicroBatch(index=index, replica=int(owner), rows=1) for index, owner in enumerate(owners)]
    stores = []
    for _ in range(3):
        tensors = {name: value.detach().clone() for name, value in copy.deepcopy(model).state_dict().items()}
        stores.append(tensors)
    each = [ReplicaBuffers([segment], tensors) for tensors in stores]
    for _ in range(2):  # two steps: the second begins where the first has ended
        for batch in batches:
            model(batch)
        for replica, (buffers, tensors) in enumerate(zip(each, stores, strict=True)):
            buffers.begin()
            built = BuiltSegment(segment, tensors, torch.device("cpu"), 0)
            for index, batch in enumerate(batches):
                if int(owners[index]) == replica:
                    before = buffers.versions()
                    values = {item.value: batch for item in segment.incoming}
                    built.forward(values, step=1, micro_batch=index, record=True)
                    buffers.changed(index, before)
        run_members(lambda group: each[group.own].finish(group, micro_batches), range(3), seed=random.randrange(99))
    for name, value in model.state_dict().items():
        assert all(same_bits(tensors[name], stores[0][name]) for tensors in stores)
        torch.testing.assert_close(stores[0][name], value, rtol=1e-12, atol=1e-12)


class Assigns(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("seen", torch.zeros(4, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "assigns":
            self.seen = x.detach().amax(dim=0)
        else:
            self.seen.clamp_(min=1.0)
        return x * self.seen


@pytest.mark.parametrize("how", ["assigns", "clamps"])
def test_a_change_that_cannot_be_added_up_is_refused(how: str) -> None:
    with pytest.raises(ModelError, match="'seen'"):
        ReplicaBuffers([segment_of(Assigns(how))], {"seen": torch.zeros(4, dtype=torch.float64)})


def test_changes_that_do_not_fit_are_refused_with_their_replica() -> None:
    model = nn.BatchNorm1d(4).double()
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    buffers = ReplicaBuffers([segment_of(model)], tensors)
    buffers.begin()
    parts = [run_pb2.MicroBatch(index=0, replica=1, rows=1)]

    class Half:
        own, members = 0, (0, 1)

        def send(self, member: int, name: str, tensor: torch.Tensor) -> None:
            pass

    steps = buffers.finish(Half(), parts)
    next(steps)
    with pytest.raises(FrameError, match="replica 1"):
        steps.send(torch.zeros(1, 3, dtype=torch.float64))
