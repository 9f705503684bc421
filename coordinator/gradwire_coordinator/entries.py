"""What makes an entry of a run valid.

No threads, no sockets. Leaves to others: dispatch (`run.py`), programs (`programs.py`), keeping entries (`log.py`), and
reports (`window.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradwire_protocol.errors import FrameError, LimitExceeded, ModelError, OptimizerError, StaleGeneration
from gradwire_protocol.v1 import run_pb2

_MAXIMUM_ROWS = 2**40


class EntryRules:
    """Checks the entries of one run, in the order in which they come."""

    def __init__(self, *, generation: int, plan: run_pb2.Plan, parameter_groups: int, has_predict: bool) -> None:
        self._generation = generation
        self._window = plan.window
        self._micro_batches = plan.micro_batches
        self._parameter_groups = parameter_groups
        self._has_predict = has_predict
        self._last_number = 0
        self._last_step: int | None = None

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
        if entry.number == 1 and kind != "load_state":
            raise FrameError(
                "A run loads its state first",
                expected="LoadState as entry 1",
                got=f"{kind} as entry {entry.number}",
            )
        if kind == "train_step":
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
        elif kind is None:
            raise FrameError("An entry of no known kind", got=f"entry {entry.number}")

    def _check_step(self, step: run_pb2.TrainStep) -> None:
        self._check_micro_batches(step.micro_batches)
        if step.step < 1 or (self._last_step is not None and step.step != self._last_step + 1):
            expected = "1 or more" if self._last_step is None else str(self._last_step + 1)
            raise FrameError(
                "Training steps are numbered without gaps", expected=f"step {expected}", got=str(step.step)
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
            if part.index != index or part.first_row != row or not 1 <= part.rows <= _MAXIMUM_ROWS or part.replica:
                raise FrameError(
                    "Micro-batches must cover the rows of the batch in order, without gap or overlap",
                    expected=f"micro-batch {index} from row {row}, of at least 1 row, for replica 0",
                    got=f"micro-batch {part.index} from row {part.first_row}, of {part.rows} rows, "
                    f"for replica {part.replica}",
                )
            row += part.rows
