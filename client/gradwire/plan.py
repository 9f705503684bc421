"""The plan that a user asks for: how a run is laid out. The coordinator checks it again and fills what is open."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gradwire_protocol.errors import PlanError
from gradwire_protocol.v1 import run_pb2, tensors_pb2

MAXIMUM_WINDOW = 16
_SCHEDULES = ("auto", "gpipe", "1f1b")
_TRANSPORTS = ("auto", "grpc")
_ZERO = ("auto", "none")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run is laid out. Every field has a default that is right for most; PlanError for a value that is not valid.

    stages: pipeline stages, each on a stage server of its own.
    replicas: copies of the pipeline that see other data.
    tensor: servers that share one stage's operators.
    microbatches: parts that a batch is cut into, along dimension 0; fewer where the batch has fewer rows.
    schedule: "auto", "gpipe" or "1f1b".
    exchange: how replicas agree on gradients.
    compression, activation_compression: codec of gradients, and of boundary values.
    zero: sharding of the optimizer's state.
    recompute: run a stage's forward pass again before its backward pass, instead of keeping what that needs: for each
        micro-batch on its way a stage holds the values that it received, and no more.
    virtual_stages: stages that one server hosts.
    window: steps that may be open at once, 1 to 16.
    transport: what moves tensors between servers.
    cuts: where the stages end: stages − 1 positions in the training graph's node list, or module paths
        ("layers.4": that module's first node begins a new stage), in order. None: balanced by estimated cost.
    """

    stages: int = 1
    replicas: int = 1
    tensor: int = 1
    microbatches: int = 8
    schedule: str = "auto"
    exchange: str = "ring"
    compression: str = "none"
    activation_compression: str = "none"
    zero: str = "auto"
    recompute: bool = False
    virtual_stages: int = 1
    window: int = 2
    transport: str = "auto"
    cuts: Sequence[int | str] | None = None

    def __post_init__(self) -> None:
        for name in ("stages", "replicas", "tensor", "microbatches", "virtual_stages"):
            _check_count(name, getattr(self, name))
        _check_count("window", self.window, MAXIMUM_WINDOW)
        for name in ("replicas", "tensor", "virtual_stages"):
            _check_supported(name, getattr(self, name), (1,))
        if not isinstance(self.recompute, bool):
            raise PlanError("recompute is not valid", expected="True or False", got=repr(self.recompute))
        _check_supported("schedule", self.schedule, _SCHEDULES)
        _check_supported("exchange", self.exchange, ("ring",))
        _check_supported("compression", self.compression, ("none",))
        _check_supported("activation_compression", self.activation_compression, ("none",))
        _check_supported("zero", self.zero, _ZERO)
        _check_supported("transport", self.transport, _TRANSPORTS)
        if self.cuts is not None:
            object.__setattr__(self, "cuts", _checked_cuts(self.cuts, self.stages))

    def to_proto(
        self,
        *,
        rows: int,
        cut_before: Callable[[str], int],
        precision: tensors_pb2.DataType = tensors_pb2.DATA_TYPE_UNSPECIFIED,
    ) -> run_pb2.Plan:
        """Return the message for the coordinator.

        rows: of the example batch. cut_before: gives the node position at which a module begins. precision: the type
        that autocast takes.
        """
        positions = [cut if isinstance(cut, int) else cut_before(cut) for cut in self.cuts or ()]
        for earlier, later in itertools.pairwise(positions):
            if later <= earlier:
                raise PlanError(
                    "The cuts do not leave nodes for every stage",
                    expected="positions that rise from stage to stage",
                    got=f"{list(self.cuts or ())}, which are the positions {positions}",
                    remedy="leave out one of the cuts, or choose modules that are further apart",
                )
        return run_pb2.Plan(
            stages=self.stages,
            replicas=self.replicas,
            tensor=self.tensor,
            micro_batches=self.microbatches,
            schedule=self.schedule,
            window=self.window,
            cuts=positions,
            expected_rows=rows,
            recompute=self.recompute,
            precision=precision,
        )


def _check_count(name: str, value: Any, maximum: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (maximum is not None and value > maximum):
        limit = "1 or more" if maximum is None else f"1 to {maximum}"
        raise PlanError(f"{name} is not valid", expected=f"a whole number, {limit}", got=repr(value))


def _check_supported(name: str, value: Any, supported: tuple[Any, ...]) -> None:
    if value not in supported:
        raise PlanError(
            f"{name}={value!r} cannot be carried out by this version",
            expected=" or ".join(map(repr, supported)),
            got=repr(value),
            remedy=f"leave {name} out, or set it to {supported[0]!r}",
        )


def _checked_cuts(cuts: Any, stages: int) -> tuple[int | str, ...]:
    valid = not isinstance(cuts, str) and isinstance(cuts, Sequence)
    if not valid or any(isinstance(cut, bool) or not isinstance(cut, int | str) for cut in cuts):
        raise PlanError(
            "cuts is not valid", expected="a list of node positions (int) or module paths (str)", got=repr(cuts)
        )
    if len(cuts) != stages - 1:
        raise PlanError(
            "The number of cuts does not fit the number of stages",
            expected=f"{stages - 1} cuts for {stages} stages",
            got=f"{len(cuts)}: {list(cuts)}",
            remedy="set stages to the number of cuts + 1",
        )
    for cut in cuts:
        if isinstance(cut, int) and cut < 1:
            raise PlanError("A cut is not valid", expected="a node position of 1 or more", got=str(cut))
    return tuple(cuts)
