"""What makes an entry of a run valid.

No threads, no sockets. Leaves to others: dispatch (`run.py`), programs (`programs.py`), keeping entries (`log.py`), and
reports (`window.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradwire_protocol.checkpoint.requests import check_save, check_stored
from gradwire_protocol.errors import (
    FrameError,
    LimitExceeded,
    ModelError,
    OptimizerError,
    StaleGeneration,
)
from gradwire_protocol.exchange_state import MAXIMUM_OWED
from gradwire_protocol.frames import MAXIMUM_STATE_BYTES, MAXIMUM_VALUE_BYTES
from gradwire_protocol.relative_paths import check_relative
from gradwire_protocol.v1 import run_pb2

_MAXIMUM_ROWS = 2**40
_MAXIMUM_STEP = 2**48
# Values of the optimizer's state for each parameter; torch.optim has at most four.
_MAXIMUM_STATES = 16


class EntryRules:
    """Checks the entries of one run, in the order in which they come."""

    def __init__(
        self, *, generation: int, plan: run_pb2.Plan, groups: Sequence[run_pb2.OptimizerGroup], has_predict: bool
    ) -> None:
        self._generation = generation
        self._window = plan.window
        self._micro_batches = plan.micro_batches
        self._replicas = plan.replicas
        self._parameter_groups = len(groups)
        self._trained = frozenset(name for group in groups for name in group.parameters)
        self._has_predict = has_predict
        self._last_number = 0
        self._last_step = 0
        # What must come next, where another layout has taken over.
        self._announced: run_pb2.NewPlan | None = None
        # Whether the state is yet to be loaded: at the beginning, and where another layout has none.
        self._empty = True

    def begin_generation(self, generation: int, announced: run_pb2.NewPlan) -> None:
        """Another layout has taken over: entries are of this generation from now on, and this is the first of them."""
        self._generation = generation
        self._announced = announced

    def check(self, entry: run_pb2.Entry, open_entries: int) -> None:
        """Take the next entry, with so many before it unfinished; a typed error if it is not valid."""
        if entry.generation != self._generation:
            raise StaleGeneration(
                "The entry belongs to another generation of the run",
                expected=f"generation {self._generation}",
                got=f"generation {entry.generation}",
            )
        if entry.number != self._last_number + 1:
            raise FrameError(
                "Entries are numbered without gaps",
                expected=f"entry {self._last_number + 1}",
                got=f"entry {entry.number}",
            )
        if open_entries >= self._window:
            raise LimitExceeded(
                "More entries are open than the plan's window allows",
                expected=f"at most {self._window} open",
                got=f"entry {entry.number} while {open_entries} are open",
                remedy="wait for a result, or plan a larger window",
            )
        self._check_kind(entry)
        self._last_number = entry.number

    def _check_kind(self, entry: run_pb2.Entry) -> None:
        kind = entry.WhichOneof("kind")
        if kind == "new_plan" or self._announced is not None:
            self._check_new_plan(entry)
        elif self._empty and kind != "load_state":
            raise FrameError(
                "A run loads its state first",
                expected=f"LoadState as entry {entry.number}",
                got=f"{kind} as entry {entry.number}",
            )
        elif kind == "load_state":
            self._check_load(entry.load_state)
            self._empty = False
        elif kind == "train_step":
            self._check_step(entry.train_step)
        elif kind == "evaluate":
            self._check_micro_batches(entry.evaluate.micro_batches)
        elif kind == "predict":
            if not self._has_predict:
                raise ModelError(
                    "The model has no prediction graph",
                    got="a model whose own output is the loss",
                    remedy="give the trainer a loss, and a model that returns predictions",
                )
            self._check_micro_batches(entry.predict.micro_batches)
        elif kind == "save_state":
            check_save(entry.save_state)
        elif kind is None:
            raise FrameError("An entry of no known kind", got=f"entry {entry.number}")

    def _check_new_plan(self, entry: run_pb2.Entry) -> None:
        if self._announced is None or entry.new_plan != self._announced:
            raise FrameError(
                "A new plan is the first entry of the generation that was prepared for it",
                expected="no NewPlan" if self._announced is None else "the NewPlan that Replan has answered",
                got=f"{entry.WhichOneof('kind')} as entry {entry.number}",
            )
        self._announced = None
        self._empty = entry.new_plan.reloads

    def _check_load(self, load: run_pb2.LoadState) -> None:
        _check_weights(load)
        if load.HasField("checkpoint"):
            check_stored(load.checkpoint)
            if load.weights_directory:
                raise FrameError("LoadState names weights and a checkpoint", expected="one of both")
        names = [(item.parameter, item.state) for item in load.optimizer_state]
        # Under local steps each replica has an optimizer of its own.
        of_replica = MAXIMUM_OWED + _MAXIMUM_STATES
        of_each = _MAXIMUM_STATES + (of_replica * self._replicas if self._replicas > 1 else 0)
        most = of_each * len(self._trained)
        if len(names) > most:
            raise LimitExceeded(
                "A checkpoint has too many values of the optimizer's state",
                expected=f"at most {most}: {of_each} for each of {len(self._trained)} parameters",
                got=str(len(names)),
            )
        if len(set(names)) < len(names):
            raise FrameError("A value of the optimizer's state is named twice", expected="unique names")
        for parameter, state in names:
            if parameter not in self._trained:
                raise OptimizerError(
                    "A checkpoint has state for a parameter that the optimizer does not have",
                    expected="parameters of the run's optimizer",
                    got=repr(parameter[:80]),
                )
            if not 1 <= len(state.encode()) <= MAXIMUM_STATE_BYTES:
                raise FrameError(
                    f"A value of the optimizer's state of {parameter!r} has a wrong name",
                    expected=f"1 to {MAXIMUM_STATE_BYTES} bytes",
                    got=str(len(state.encode())),
                )
        if load.weight_version > _MAXIMUM_STEP:
            raise FrameError(
                "A checkpoint has a wrong number of steps",
                expected=f"0 to {_MAXIMUM_STEP}",
                got=str(load.weight_version),
            )
        self._last_step = load.weight_version

    def _check_step(self, step: run_pb2.TrainStep) -> None:
        self._check_micro_batches(step.micro_batches)
        if step.step != self._last_step + 1:
            raise FrameError(
                "Training steps are numbered without gaps",
                expected=f"step {self._last_step + 1}",
                got=str(step.step),
            )
        groups = len(step.hyperparameters.groups)
        if groups != self._parameter_groups:
            raise OptimizerError(
                "A step's hyperparameters do not fit the optimizer",
                expected=f"{self._parameter_groups} parameter groups, as the run was made with",
                got=f"{groups} groups",
                remedy="parameter groups cannot be added to a running trainer: make a new one",
            )
        norm = step.max_gradient_norm
        if step.HasField("max_gradient_norm") and not (math.isfinite(norm) and norm > 0):
            raise OptimizerError("max_grad_norm must be above 0", expected="a number above 0, or none", got=str(norm))
        self._last_step = step.step

    def _check_micro_batches(self, parts: Sequence[run_pb2.MicroBatch]) -> None:
        if not 1 <= len(parts) <= self._micro_batches:
            raise FrameError(
                "Wrong number of micro-batches",
                expected=f"1 to {self._micro_batches}, as planned",
                got=str(len(parts)),
            )
        row = 0
        for index, part in enumerate(parts):
            if part.index != index or part.first_row != row or not 1 <= part.rows <= _MAXIMUM_ROWS:
                raise FrameError(
                    "Micro-batches must cover the rows of the batch in order, without gap or overlap",
                    expected=f"micro-batch {index} from row {row}, of at least 1 row",
                    got=f"micro-batch {part.index} from row {part.first_row}, of {part.rows} rows",
                )
            if part.replica >= self._replicas:
                raise FrameError(
                    "A micro-batch is for a replica that the run does not have",
                    expected=f"replica 0 to {self._replicas - 1}" if self._replicas > 1 else "replica 0",
                    got=f"micro-batch {part.index} for replica {part.replica}",
                )
            row += part.rows


def _check_weights(load: run_pb2.LoadState) -> None:
    """Check what is said of weights that servers read; whether they are there, only the servers can know."""
    if load.weights_directory:
        check_relative(load.weights_directory, "The directory of weights")
    size = len(load.weights_prefix.encode())
    if size > MAXIMUM_VALUE_BYTES or (size and not load.weights_directory):
        raise FrameError(
            "Wrong prefix of the weights' names",
            expected=f"{MAXIMUM_VALUE_BYTES} bytes at most, and a directory of weights",
            got=f"{size} bytes, directory {load.weights_directory!r}",
        )
