"""Sends a batch to the servers under an entry of the run's log: checked, flattened, cut into micro-batches.

Leaves what the entry asks for to the trainer, connections to session.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from gradwire.batches import Batch, as_arguments, micro_batches
from gradwire.graph import ExportedModel
from gradwire.outputs import join_outputs
from gradwire.session import Session
from gradwire_protocol.errors import DataError
from gradwire_protocol.v1 import coordinator_pb2, graph_pb2, run_pb2


@dataclass(frozen=True)
class Dispatched:
    """An entry on its way. rows: of its batch."""

    number: int
    rows: int
    parts: Sequence[run_pb2.MicroBatch]
    future: Future[run_pb2.EntryResult]


class Dispatcher:
    """Sends batches of one run. For the trainer's thread."""

    def __init__(self, session: Session, exported: ExportedModel, microbatches: int, shares: Sequence[float]) -> None:
        """microbatches: of a batch, at most. shares: of them, by replica."""
        self._session = session
        self._exported = exported
        self._microbatches = microbatches
        self._shares = tuple(shares)

    def deal_by(self, shares: Sequence[float]) -> None:
        """Deal micro-batches out to replicas by these shares from now on."""
        self._shares = tuple(shares)

    def send(
        self, batch: Batch, graph: graph_pb2.GraphKind, make_entry: Callable[[list[run_pb2.MicroBatch]], run_pb2.Entry]
    ) -> Dispatched:
        """Put an entry into the log and its batch on the way. BatchError, before anything is sent, if it is wrong."""
        flat = self._exported.flatten_batch(batch, graph)
        parts = micro_batches(flat.rows, self._microbatches, self._exported.batch.micro_batch_rows, self._shares)
        entry = make_entry(parts)
        entry.number = self._session.reserve()
        # The entry goes first: servers then take its rows, however many, as they come.
        future = self._session.submit(entry)
        try:
            self._session.send_batch(entry.number, graph, flat.values, flat.batched, parts)
        except BaseException:
            # Servers would wait for the rest in vain.
            self._session.abort()
            raise
        return Dispatched(entry.number, flat.rows, parts, future)


def evaluate(dispatcher: Dispatcher, batches: Iterable[Any], window: int) -> float:
    """Return the mean loss over all samples, with up to `window` batches in flight. DataError if there are none."""
    in_flight: deque[Future[run_pb2.EntryResult]] = deque()
    total = weight = 0.0

    def take() -> None:
        nonlocal total, weight
        result = in_flight.popleft().result()
        total, weight = total + result.loss * result.weight, weight + result.weight

    for batch in batches:
        if len(in_flight) == window:
            take()
        sent = dispatcher.send(
            as_arguments(batch),
            graph_pb2.GRAPH_KIND_EVALUATE,
            lambda parts: run_pb2.Entry(evaluate=run_pb2.Evaluate(micro_batches=parts)),
        )
        in_flight.append(sent.future)
    while in_flight:
        take()
    if weight == 0:
        raise DataError("There is nothing to evaluate", expected="batches whose loss has a weight above 0", got="0")
    return total / weight


def predict(
    dispatcher: Dispatcher,
    session: Session,
    exported: ExportedModel,
    servers: Iterable[coordinator_pb2.ServerLayout],
    batch: Batch,
) -> Any:
    """Return the model's output for one batch, collected from those of the servers that make parts of it."""
    sent = dispatcher.send(
        batch,
        graph_pb2.GRAPH_KIND_PREDICT,
        lambda parts: run_pb2.Entry(predict=run_pb2.Predict(micro_batches=parts)),
    )
    results = session.collect(sent.number, [server for server in servers if server.results])
    sent.future.result()
    return exported.unflatten_output(join_outputs(exported.proto.predict.outputs, results, len(sent.parts)))
