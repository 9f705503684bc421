"""Does one entry of the log on this server: a training step, a forward pass, taking or fetching state."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from gradwire_protocol import program as kinds
from gradwire_protocol.errors import FrameError, InternalError
from gradwire_protocol.exchange_state import parse_owed_name
from gradwire_protocol.program import Action
from gradwire_protocol.splits import whole_shape
from gradwire_protocol.torch_tensors import dense
from gradwire_protocol.v1 import graph_pb2, run_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage import timeline as phases
from gradwire_stage.exchange.state import SharedState
from gradwire_stage.gradients import Gradients
from gradwire_stage.group.parts import part_of_tensor
from gradwire_stage.group.whole import WholeTensors
from gradwire_stage.keys import Key
from gradwire_stage.optimizer import StateValue
from gradwire_stage.passes import Passes, put_result
from gradwire_stage.run_state import RunState
from gradwire_stage.snapshot import is_saved, save_state
from gradwire_stage.stored_state import StoredState
from gradwire_stage.takeover import take_over
from gradwire_stage.taking import take_state, take_tensor
from gradwire_stage.timeline import Timeline
from gradwire_stage.weights import ServerWeights


def run_entry(
    run: RunState,
    timeline: Timeline[Any],
    entry: run_pb2.Entry,
    program: list[Action],
    on_saved: Callable[[run_pb2.SavedPart], None],
) -> run_pb2.EntryReport:
    """Do a checked entry and its program; return the report, whose time ends here.

    on_saved: called, on another thread, when what a SaveState entry has copied is written, or could not be.
    """
    report = run_pb2.EntryReport(entry=entry.number, generation=entry.generation)
    kind = entry.WhichOneof("kind")
    if run.kept is not None and kind != "new_plan":
        raise FrameError("The state was not taken over yet", expected="a NewPlan entry first", got=str(kind))
    run.mailbox.begin(entry.number, training=kind == "train_step")
    if kind != "train_step":
        run.agreement.settle(timeline)
    match kind:
        case "load_state":
            _load_state(run, timeline, entry.number, entry.load_state)
        case "train_step":
            _train_step(run, timeline, entry, program, report)
        case "evaluate":
            _forward_only(run, timeline, entry, program, graph_pb2.GRAPH_KIND_EVALUATE, report)
        case "predict":
            _forward_only(run, timeline, entry, program, graph_pb2.GRAPH_KIND_PREDICT, report)
        case "fetch_state":
            _fetch_state(run, timeline, entry.number, optimizer_state=entry.fetch_state.optimizer_state)
        case "save_state":
            save_state(run, timeline, entry, on_saved)
        case "new_plan":
            take_over(run, timeline, entry.number, entry.new_plan)
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
    agreement = run.agreement
    agreement.begin(timeline, entry.number, step, program)
    gradients.send_weight()
    for action, following in itertools.zip_longest(program, program[1:]):
        run.check()
        run.progress.begin(action)
        if action.kind in kinds.OF_MICRO_BATCH:
            agreement.before(action)
        match action.kind:
            case kinds.FORWARD:
                # Where the backward comes next, keeping takes no more memory at the peak than running it again would.
                backwards = [action._replace(kind=kind) for kind in (kinds.BACKWARD, kinds.INPUT_GRADIENT)]
                keep = not run.recompute or following in backwards
                passes.forward(action.stage, action.micro_batch, keep=keep)
                if action.stage == loss_stage:
                    gradients.send_weight()
            case kinds.BACKWARD:
                passes.backward(action.stage, action.micro_batch)
            case kinds.INPUT_GRADIENT:
                passes.backward(action.stage, action.micro_batch, split=True)
            case kinds.WEIGHT_GRADIENT:
                passes.weight_gradients(action.stage, action.micro_batch)
            case kinds.REDUCE:
                gradients.reduce()
            case kinds.NORM:
                gradients.norm()
            case kinds.UPDATE:
                gradients.update()
            case kinds.GATHER:
                agreement.gather()
            case kinds.AVERAGE:
                agreement.average()
        if action.kind in kinds.OF_MICRO_BATCH:
            agreement.after(action)
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
        run.check()
        run.progress.begin(action)
        passes.forward(action.stage, action.micro_batch)
        run.progress.advance()
    timeline.switch(phases.ENCODE)
    report.losses.extend(passes.loss_parts())


def _load_state(run: RunState, timeline: Timeline[Any], entry: int, load: run_pb2.LoadState) -> None:
    """Fill the tensors that the segments use, from the client or from files, and give the optimizer its state."""
    run.progress.doing = "taking the model's state"
    timeline.switch(phases.DECODE)
    stored = StoredState(load.checkpoint, run.checkpoint_root) if load.HasField("checkpoint") else None
    weights = ServerWeights(load, run.weights_root, (placement.spec for placement in run.placements.values()))
    for name, placement in run.placements.items():
        run.check()
        received = weights.read(placement.spec) if stored is None else stored.read(placement.spec)
        if received is None:
            received = take_tensor(run, timeline, Key(entry, 0, name, pb.DIRECTION_STATE, 0))
        tensor, shape = run.tensors[name], whole_shape(placement.spec)
        if received is None or tuple(received.shape) != shape or received.dtype != tensor.dtype:
            raise FrameError(
                f"What came for {name!r} does not fit it",
                expected=f"shape {list(shape)}, {tensor.dtype}",
                got="nothing" if received is None else f"shape {list(received.shape)}, {received.dtype}",
            )
        with torch.no_grad():
            tensor.copy_(_own_part(run, name, received))
        del received  # the message's memory goes before the next tensor is taken
        run.progress.advance()
    states: dict[str, dict[str, StateValue]] = {}
    owed: dict[str, dict[str, StateValue]] = {}
    for item in load.optimizer_state:
        if item.parameter in run.parameters:
            of_exchange = parse_owed_name(item.state)
            is_own = of_exchange is None or run.agreement.takes(item.parameter, *of_exchange)
            if stored is not None and not is_own:
                continue
            key = Key(entry, 0, item.parameter, pb.DIRECTION_STATE, 0, item.state)
            value = take_state(run, timeline, key) if stored is None else stored.state(item)
            if of_exchange is not None:
                if is_own:
                    owed.setdefault(item.parameter, {})[of_exchange[1]] = value
                continue
            if isinstance(value, torch.Tensor):
                value = _own_part(run, item.parameter, value)
            own = run.agreement.own_state(item.parameter, value)
            if own is not None:
                states.setdefault(item.parameter, {})[item.state] = own
            run.progress.advance()
    if stored is not None:
        _pass_on(run, timeline, entry, stored)
    run.optimizer.restore(states)
    run.agreement.forget()
    run.agreement.owe(owed)
    run.weight_version = load.weight_version


def _own_part(run: RunState, name: str, whole: torch.Tensor) -> torch.Tensor:
    """Return what this shard has of a tensor of the model, or of something like it."""
    places = run.places
    return part_of_tensor(run.placements[name].spec, whole, shards=places.shards, shard=places.shard)


def _pass_on(run: RunState, timeline: Timeline[Any], entry: int, stored: StoredState) -> None:
    """Leave what no server holds for the client, if this server is the first; see that all was of one checkpoint."""
    if 0 in run.stages and run.places.answers:
        for name, tensor in stored.kept():
            put_result(run, timeline, entry, run.result(entry, 0, name, tensor, stage=run.first_stage))
    stored.check_unchanged()


def _fetch_state(run: RunState, timeline: Timeline[Any], entry: int, *, optimizer_state: bool) -> None:
    """Copy what the state dict holds and this server owns, for the client to collect; and the optimizer's state."""
    run.progress.doing = "copying the model's state"
    timeline.switch(phases.ENCODE)
    names = [name for name in run.tensors if is_saved(run.placements[name].spec) and run.owns(name)]
    shared = SharedState(run, timeline, entry)
    if not run.places.leads:
        if optimizer_state:
            shared.give(names)
        return
    whole = WholeTensors(run, timeline, entry, "state")
    for name in names:
        values: dict[str, StateValue] = {"": run.tensors[name]}
        if optimizer_state:
            values |= shared.of(name)
        for state, part in values.items():
            value = whole.of_state(name, state, part)
            if run.places.answers:
                copy = dense(value.detach()).clone() if isinstance(value, torch.Tensor) else value
                put_result(run, timeline, entry, run.result(entry, 0, name, copy, stage=run.first_stage, state=state))
            run.progress.advance()
