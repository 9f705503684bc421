"""Every stream of a step through a proxy that drops, delays, cuts or duplicates it: same result, or one named error.

The whole cluster is in this process, with real connections; each stage server is dialled through a proxy of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cluster_in_process import cluster_in_process
from tcp_proxy import Fault, TcpProxy, has_bytes, has_message, proxies
from torch import nn

import gradwire
from gradwire_protocol.errors import GradwireError, Stalled
from gradwire_protocol.v1 import tensors_pb2 as pb

pytestmark = pytest.mark.fault

STALL_SECONDS = 1.5
# The client's wait for the coordinator to say why a connection broke, which it cannot here: 15 s otherwise.
VERDICT_SECONDS = 3.0
# Of all that the trainer does, whatever happens.
LIMIT_SECONDS = 12.0
PLAN = gradwire.Plan(stages=2, microbatches=3, stall_seconds=STALL_SECONDS)
# Entry 1 takes the weights, 2 and 3 are steps, 4 is a prediction.
STEP, PREDICTION = 3, 4


class Tied(nn.Module):
    """Something to say in every direction: a tied weight, and a loss with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.middle(self.embedding(tokens))))


def make_model() -> Tied:
    torch.manual_seed(0)
    return Tied().double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(10, (7,), generator=generator), torch.randint(10, (7,), generator=generator)


@dataclass
class Outcome:
    losses: list[float]
    prediction: torch.Tensor | None
    error: GradwireError | None
    seconds: float


@dataclass
class Proxied:
    cluster: gradwire.Cluster
    before: list[TcpProxy]

    @contextmanager
    def struck(self, fault: Fault) -> Iterator[Fault]:
        """Have one thing go wrong, once, at whichever proxy it is time first."""
        for proxy in self.before:
            proxy.fault = fault
        try:
            yield fault
        finally:
            for proxy in self.before:
                proxy.fault = None

    def train(self) -> Outcome:
        """Two steps and a prediction; whatever goes wrong, the servers must be free afterwards."""
        model = make_model()
        began, outcome = time.monotonic(), Outcome([], None, None, 0.0)
        try:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with self.cluster.trainer(
                model, optimizer, loss=F.cross_entropy, example=batch(0), plan=PLAN, max_grad_norm=0.5
            ) as trainer:
                outcome.losses += [trainer.step(*batch(step)).loss for step in (1, 2)]
                outcome.prediction = trainer.predict(batch(3)[0])
        except GradwireError as error:
            outcome.error = error
        outcome.seconds = time.monotonic() - began
        return outcome

    def wait_free(self) -> None:
        """Wait until both servers are there, and hold no run by their own word.

        One that was taken for lost registers again with its next heartbeat.
        """
        end = time.monotonic() + LIMIT_SECONDS
        while [server.activity.run for server in self.cluster.status().servers] != ["", ""]:
            assert time.monotonic() < end, "a server was not released, or has not registered again"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    before: list[TcpProxy] = []
    with proxies() as put_before, pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradwire.collecting._VERDICT_SECONDS", VERDICT_SECONDS)

        def advertise(address: str) -> str:
            before.append(put_before(address))
            return before[-1].address

        directory: Path = tmp_path_factory.mktemp("coordinator")
        with cluster_in_process(directory, 2, advertise=advertise, heartbeat_seconds=0.25) as cluster:
            yield Proxied(cluster, before)


@pytest.fixture(scope="module")
def whole(proxied: Proxied) -> Outcome:
    """What comes out when nothing is wrong."""
    outcome = proxied.train()
    assert outcome.error is None
    return outcome


# What goes by when it happens.
MOMENTS: dict[str, dict[str, Any]] = {
    "weights": {"when": has_message(pb.DIRECTION_STATE, 1)},
    "entry": {"when": has_bytes(b"\x08%c\x10\x01\x22" % STEP)},
    "rows": {"when": has_message(pb.DIRECTION_BATCH, STEP)},
    "forward": {"when": has_message(pb.DIRECTION_FORWARD, STEP)},
    "backward": {"when": has_message(pb.DIRECTION_BACKWARD, STEP)},
    "weight": {"when": has_message(pb.DIRECTION_WEIGHT, STEP)},
    "tied gradient": {"when": has_message(pb.DIRECTION_TIED, STEP)},
    "norm": {"when": has_message(pb.DIRECTION_NORM, STEP)},
    "report": {"when": has_bytes(b"\x08%c\x10\x01" % STEP), "down": True},
    "result": {"when": has_message(pb.DIRECTION_RESULT, PREDICTION), "down": True},
}


@pytest.mark.parametrize("kind", ["drop", "delay", "cut", "duplicate"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_fault_gives_the_same_result_or_one_named_error(
    proxied: Proxied, whole: Outcome, moment: str, kind: str
) -> None:
    with proxied.struck(Fault(kind, **MOMENTS[moment])) as fault:
        outcome = proxied.train()
    assert fault.happened.is_set(), outcome
    assert outcome.seconds < LIMIT_SECONDS, outcome
    if kind == "delay":
        assert outcome.error is None
    if kind == "drop":
        assert isinstance(outcome.error, Stalled), outcome
    if kind == "cut":
        assert outcome.error is not None
    if outcome.error is None:
        assert outcome.losses == whole.losses
        torch.testing.assert_close(outcome.prediction, whole.prediction, rtol=0, atol=0)
    else:
        assert "Stage" in str(outcome.error) or "stage" in str(outcome.error)
    proxied.wait_free()
