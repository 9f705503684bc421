"""Does one entry of the log on this server: a training step, a forward pass, taking or fetching state."""

from __future__ import annotations

from typing import Any

import torch

from gradwire_protocol import program as kinds
from gradwire_protocol.errors import FrameError, InternalError
from gradwire_protocol.program import Action
from gradwire_protocol.torch_tensors import dense
from gradwire_protocol.v1 import graph_pb2, run_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage import timeline as phases
from gradwire_stage.gradients import Gradients
from gradwire_stage.mailbox import Key
from gradwire_stage.passes import Passes, put_result, take_tensor
from gradwire_stage.run_state import RunState
from gradwire_stage.timeline import Timeline


def run_entry(
    run: RunState, timeline: Timeline[Any], entry: run_pb2.Entry, program: list[Action]
) -> run_pb2.EntryReport:
    """Do a checked entry and its program; return the report, whose time ends here."""
    report = run_pb2.EntryReport(entry=entry.number, generation=entry.generation)
    kind = entry.WhichOneof("kind")
    match kind:
        case "load_state":
            _load_state(run, timeline, entry.number)
        case "train_step":
            _train_step(run, timeline, entry, program, report)
        case "evaluate":
            _forward_only(run, timeline, entry, program, graph_pb2.GRAPH_KIND_EVALUATE, report)
        case "predict":
            _forward_only(run, timeline, entry, program, graph_pb2.GRAPH_KIND_PREDICT, report)
        case "fetch_state":
            _fetch_state(run, timeline, entry.number)
        case _:
            raise InternalError(f"An entry of kind {kind} passed the checks")
    run.mailbox.finish(entry.number)
    run.outbox.finish(entry.number)
    timeline.switch(phases.WAIT_STEP)
    window = timeline.cut()
    report.timing.CopyFrom(window.to_proto())
    report.weight_version = run.weight_version
    run.metrics.timing(report.timing, step=kind == "train_step")
    return report


def _rows(run: RunState, micro_batches: Any) -> dict[int, int]:
    return {item.index: item.rows for item in micro_batches if item.replica == run.replica}


def _train_step(
    run: RunState, timeline: Timeline[Any], entry: run_pb2.Entry, program: list[Action], report: run_pb2.EntryReport
) -> None:
    step = entry.train_step
    passes = Passes(
        run,
        timeline,
        entry=entry.number,
        graph=graph_pb2.GRAPH_KIND_TRAIN,
        rows=_rows(run, step.micro_batches),
        step=step.step,
    )
    gradients = Gradients(run, timeline, passes, entry=entry.number, step=step)
    loss_stage = run.loss_stage.get(graph_pb2.GRAPH_KIND_TRAIN)
    for action in program:
        run.progress.begin(action)
        match action.kind:
            case kinds.FORWARD:
                passes.forward(action.stage, action.micro_batch)
                if action.stage == loss_stage:
                    gradients.send_weight()
            case kinds.BACKWARD:
                passes.backward(action.stage, action.micro_batch)
            case kinds.REDUCE:
                gradients.reduce()
            case kinds.NORM:
                gradients.norm()
            case kinds.UPDATE:
                gradients.update()
        run.progress.advance()
    timeline.switch(phases.ENCODE)
    report.losses.extend(passes.loss_parts())
    norm = gradients.gradient_norm()
    if norm is not None:
        report.gradient_norm = norm
    weight = sum(part.weight for part in report.losses)
    if weight:
        run.metrics.loss(sum(part.sum for part in report.losses) / weight)


def _forward_only(
    run: RunState,
    timeline: Timeline[Any],
    entry: run_pb2.Entry,
    program: list[Action],
    graph: graph_pb2.GraphKind,
    report: run_pb2.EntryReport,
) -> None:
    micro_batches = (
        entry.evaluate.micro_batches if graph == graph_pb2.GRAPH_KIND_EVALUATE else entry.predict.micro_batches
    )
    passes = Passes(
        run, timeline, entry=entry.number, graph=graph, rows=_rows(run, micro_batches), step=run.weight_version
    )
    for action in program:
        run.progress.begin(action)
        passes.forward(action.stage, action.micro_batch)
        run.progress.advance()
    timeline.switch(phases.ENCODE)
    report.losses.extend(passes.loss_parts())


def _load_state(run: RunState, timeline: Timeline[Any], entry: int) -> None:
    """Copy what the client delivers into the tensors that the segments use."""
    run.progress.doing = "taking the model's state"
    for name, placement in run.placements.items():
        received = take_tensor(run, timeline, Key(entry, 0, name, pb.DIRECTION_STATE, 0))
        tensor = run.tensors[name]
        if received is None or received.shape != tensor.shape or received.dtype != tensor.dtype:
            raise FrameError(
                f"What came for {name!r} does not fit it",
                expected=f"shape {list(placement.spec.shape)}, {tensor.dtype}",
                got="nothing" if received is None else f"shape {list(received.shape)}, {received.dtype}",
            )
        with torch.no_grad():
            tensor.copy_(received)
        del received  # the message's memory goes before the next tensor is taken
        run.progress.advance()
    run.weight_version = 0


def _fetch_state(run: RunState, timeline: Timeline[Any], entry: int) -> None:
    """Copy what the state dict holds and this server owns, for the client to collect."""
    run.progress.doing = "copying the model's state"
    timeline.switch(phases.ENCODE)
    for name, tensor in run.tensors.items():
        spec = run.placements[name].spec
        kept = spec.kind == graph_pb2.TENSOR_KIND_PARAMETER or (
            spec.kind == graph_pb2.TENSOR_KIND_BUFFER and spec.persistent
        )
        if kept and run.owns(name):
            copy = dense(tensor.detach()).clone()
            put_result(run, timeline, entry, run.result(entry, 0, name, copy, stage=run.first_stage))
            run.progress.advance()
