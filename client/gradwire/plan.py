"""The plan that a user asks for: how a run is laid out. The coordinator checks it again and fills what is open."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradwire.tensor_plans import AUTO as AUTO_SPLITS
from gradwire.tensor_plans import checked_tensor_plan
from gradwire_protocol.checksums import check_available
from gradwire_protocol.codecs import AUTO, CODEC_NAMES
from gradwire_protocol.errors import PlanError
from gradwire_protocol.exchanges import LOCAL, PARAMETER_SERVER, parse_exchange
from gradwire_protocol.gradient_codecs import AUTO as AUTO_GRADIENTS
from gradwire_protocol.gradient_codecs import parse_compression
from gradwire_protocol.transports import AUTO as ANY_TRANSPORT
from gradwire_protocol.transports import DEVICE_OF_TORCHS, GRPC, TRANSPORTS
from gradwire_protocol.v1 import run_pb2, tensors_pb2

MAXIMUM_WINDOW = 16
SHORTEST_STALL_SECONDS = 1.0
SHORTEST_STEP_SECONDS = 0.001
LONGEST_LIMIT_SECONDS = 1e6
# How many stages a server can have under each schedule: (least, most). The coordinator has the same table.
_VIRTUAL_STAGES = {
    "auto": (1, 16),
    "gpipe": (1, 1),
    "1f1b": (1, 1),
    "interleaved-1f1b": (2, 16),
    "zb-h1": (1, 1),
    "zb-v": (2, 2),
}
_ZERO = ("auto", "on", "off")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run is laid out. Every field has a default that is right for most; PlanError for a value that is not valid.

    stages: stage servers of the pipeline, one stage on each, or several with virtual_stages.
    replicas: copies of the pipeline that see other data.
    tensor: servers of each stage: they share its weights and its work, and exchange values in the middle of it. A run
        takes stages · replicas · tensor servers.
    tensor_plan: how they split parameters: "auto": the coordinator looks for pairs of products that need one exchange;
        the name of a ready plan: "gpt", "gpt2", "llama" (gradwire/tensor_plans.py); or a mapping of patterns of
        parameters' names (fnmatch) to "column", "row", "vocab" or "whole", of which the first that matches counts.
        `ColumnParallelLinear` and `RowParallelLinear` in the model come before it.
    microbatches: parts that a batch is cut into, along dimension 0, over all replicas; fewer where the batch has fewer
        rows. Replicas take them in proportion to their speed.
    schedule: "gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v" (docs/schedules.md), or "auto": what a simulation
        finds the fastest, one of these or an order made for the run's costs.
    exchange: how replicas agree: "ring": on the gradients of every step, sums of parts that go around; or "local": each
        trains alone, and every so many steps (`every`, 50 if left out) they go on from the average of what they have
        learned, by an outer optimizer: "local(learning_rate=0.7, momentum=0.9)"; or "parameter-server": so many servers
        (`parameter_servers`, 1 if left out) hold weights and optimizer, and a step may begin with weights that lack so
        many updates (`staleness`, 0 if left out; `window` becomes larger than it).
    compression: codec of the gradients that replicas exchange, with its settings: "none", "fp16", "bf16", "int8",
        "topk(density=0.01)", "powersgd(rank=4)"; or "auto": measured on the links between replicas, and lossy only
        where that makes a step faster.
    activation_compression: codec of the values between stages and of their gradients: "none", "bf16", "fp16", "int8"
        (blocks with a scale each), or "auto": measured on the links, and lossy only where that makes a step faster. One
        for all boundaries, or a list with one for each, stages · virtual_stages − 1 of them, for what the stage behind
        it reads. Within a server nothing is encoded.
    zero: whether replicas share the optimizer's state, each updating a part of the weights (ZeRO, stage 1): "on",
        "off", or "auto": with an exchange in a ring, compression "none", and an optimizer that works by elements.
    recompute: run a stage's forward pass again before its backward pass, instead of keeping what that needs: for each
        micro-batch on its way a stage holds the values that it received, and no more.
    virtual_stages: stages on each server. Left at 1 under "interleaved-1f1b" and "zb-v", which need more, it becomes 2.
        Under "auto" one stage on each is tried too, unless cuts or codecs are given for each stage.
    window: steps that may be open at once, 1 to 16.
    transport: what moves sums, those of tensor-parallel servers and those of replicas: "grpc", "gloo", "nccl" (each
        server has a GPU of its own), or "auto": what the coordinator takes for these servers. What goes from one server
        to another (values between stages, what a codec makes of gradients, parameter servers, state) are messages
        under each of them: named, so that nobody need have been told to receive them and none blocks another, within
        bounds, encoded, guarded by checksums and TLS. gloo and NCCL have none of these, and open ports of their own.
    cuts: where the stages end: stages · virtual_stages − 1 positions in the training graph's node list, or module
        paths ("layers.4": that module's first node begins a new stage), in order. None: balanced by estimated cost.
    stall_seconds: the run fails with Stalled when what a step waits for has made no progress for this long: a server in
        the middle of one action, a message that does not come, this process. Longer than the longest single action.
    step_seconds: the run fails with Stalled when a step takes longer than this. None: no limit.
    checksums: guard all tensors on their way with CRC-32C; every process needs the extra "checksums".
    """

    stages: int = 1
    replicas: int = 1
    tensor: int = 1
    # A mapping has no hash.
    tensor_plan: str | Mapping[str, str] = dataclasses.field(default=AUTO_SPLITS, hash=False)
    microbatches: int = 8
    schedule: str = "auto"
    exchange: str = "ring"
    every: int | None = None
    parameter_servers: int | None = None
    staleness: int | None = None
    compression: str = "none"
    activation_compression: str | Sequence[str] = "none"
    zero: str = "auto"
    recompute: bool = False
    virtual_stages: int = 1
    window: int = 2
    transport: str = "auto"
    cuts: Sequence[int | str] | None = None
    stall_seconds: float = 60.0
    step_seconds: float | None = None
    checksums: bool = False

    def __post_init__(self) -> None:
        for name in ("stages", "replicas", "tensor", "microbatches", "virtual_stages"):
            _check_count(name, getattr(self, name))
        _check_count("window", self.window, MAXIMUM_WINDOW)
        object.__setattr__(self, "tensor_plan", checked_tensor_plan(self.tensor_plan))
        _check_replicas(self.replicas, self.microbatches)
        for name in ("recompute", "checksums"):
            if not isinstance(getattr(self, name), bool):
                raise PlanError(f"{name} is not valid", expected="True or False", got=repr(getattr(self, name)))
        _check_supported("schedule", self.schedule, tuple(_VIRTUAL_STAGES))
        object.__setattr__(self, "virtual_stages", _checked_virtual_stages(self.virtual_stages, self.schedule))
        stages = self.stages * self.virtual_stages
        object.__setattr__(self, "exchange", _checked_exchange(self))
        _check_tensor(self.tensor, self.exchange)
        # A replica can be ahead of another by no more steps than are open.
        object.__setattr__(self, "window", max(self.window, 1 + parse_exchange(self.exchange).staleness))
        object.__setattr__(self, "compression", _checked_compression(self.compression))
        codecs = _checked_codecs(self.activation_compression, stages)
        object.__setattr__(self, "activation_compression", codecs)
        _check_supported("zero", self.zero, _ZERO)
        _check_supported("transport", self.transport, (ANY_TRANSPORT, *TRANSPORTS))
        _check_transport(self.transport, self.exchange)
        _check_seconds("stall_seconds", self.stall_seconds, SHORTEST_STALL_SECONDS)
        if self.step_seconds is not None:
            _check_seconds("step_seconds", self.step_seconds, SHORTEST_STEP_SECONDS)
        if self.cuts is not None:
            object.__setattr__(self, "cuts", _checked_cuts(self.cuts, stages))

    @property
    def activation_codecs(self) -> tuple[str, ...]:
        """The codecs of the boundaries, or the one of all of them."""
        codecs = self.activation_compression
        return (codecs,) if isinstance(codecs, str) else tuple(codecs)

    def to_proto(
        self,
        *,
        rows: int,
        cut_before: Callable[[str], int],
        precision: tensors_pb2.DataType = tensors_pb2.DATA_TYPE_UNSPECIFIED,
        rules: Sequence[run_pb2.TensorRule] = (),
    ) -> run_pb2.Plan:
        """Return the message for the coordinator; SettingsError if this process lacks what the plan needs.

        rows: of the example batch. cut_before: gives the node position at which a module begins. precision: the type
        that autocast takes. rules: what tensor_plan comes to for the model's parameters.
        """
        if self.checksums:
            check_available("This process")
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
            virtual_stages=self.virtual_stages,
            replicas=self.replicas,
            tensor=self.tensor,
            micro_batches=self.microbatches,
            schedule=self.schedule,
            window=self.window,
            cuts=positions,
            expected_rows=rows,
            recompute=self.recompute,
            precision=precision,
            activation_compression=self.activation_codecs,
            stall_seconds=self.stall_seconds,
            step_seconds=self.step_seconds or 0.0,
            checksums=self.checksums,
            exchange=self.exchange,
            compression=self.compression,
            zero=self.zero,
            tensor_plan=rules,
            transport=self.transport,
        )


def _check_count(name: str, value: Any, maximum: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (maximum is not None and value > maximum):
        limit = "1 or more" if maximum is None else f"1 to {maximum}"
        raise PlanError(f"{name} is not valid", expected=f"a whole number, {limit}", got=repr(value))


def _check_seconds(name: str, value: Any, shortest: float) -> None:
    valid = isinstance(value, int | float) and not isinstance(value, bool)
    # Written so that it refuses NaN, too.
    if not valid or not shortest <= value <= LONGEST_LIMIT_SECONDS:
        limit = f"a number of seconds, {shortest:g} to {LONGEST_LIMIT_SECONDS:g}"
        raise PlanError(f"{name} is not valid", expected=limit, got=repr(value))


def _check_supported(name: str, value: Any, supported: tuple[Any, ...]) -> None:
    if value not in supported:
        raise PlanError(
            f"{name}={value!r} cannot be carried out by this version",
            expected=" or ".join(map(repr, supported)),
            got=repr(value),
            remedy=f"leave {name} out, or set it to {supported[0]!r}",
        )


def _check_replicas(replicas: int, microbatches: int) -> None:
    if replicas > microbatches:
        raise PlanError(
            "There are fewer micro-batches than replicas, so some would have nothing to do",
            expected=f"microbatches of {replicas} or more: they are those of all replicas",
            got=f"replicas={replicas}, microbatches={microbatches}",
            remedy="use more micro-batches, or fewer replicas",
        )


def _check_tensor(tensor: int, exchange: str) -> None:
    if tensor > 1 and parse_exchange(exchange).has_servers:
        raise PlanError(
            "Parameter servers hold whole parameters, and tensor-parallel servers have parts of them",
            expected='exchange="ring" or "local", or tensor=1',
            got=f"exchange={exchange!r}, tensor={tensor}",
            remedy='leave exchange out for "ring"',
        )


def _check_transport(transport: str, exchange: str) -> None:
    if transport in DEVICE_OF_TORCHS and parse_exchange(exchange).has_servers:
        raise PlanError(
            "What goes to parameter servers and comes from them goes as messages",
            expected=f'transport="{ANY_TRANSPORT}" or "{GRPC}"',
            got=f"transport={transport!r}, exchange={exchange!r}",
            remedy='leave transport out, or use exchange="ring"',
        )


def _checked_exchange(plan: Plan) -> str:
    """Return the exchange of a plan with all that belongs to its name."""
    text: Any = plan.exchange
    if not isinstance(text, str):
        raise PlanError("exchange is not valid", expected="a text, such as 'ring' or 'local'", got=repr(text))
    exchange = parse_exchange(text)
    for field, setting, least, name in (
        ("every", "every", 1, LOCAL),
        ("parameter_servers", "servers", 1, PARAMETER_SERVER),
        ("staleness", "staleness", 0, PARAMETER_SERVER),
    ):
        value = getattr(plan, field)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise PlanError(f"{field} is not valid", expected=f"a whole number, {least} or more", got=repr(value))
        if exchange.name != name:
            raise PlanError(
                f"{field} is of no use to this exchange",
                expected=f'exchange="{name}"',
                got=f"exchange={text!r}, {field}={value}",
            )
        exchange = dataclasses.replace(exchange, **{setting: value})  # type: ignore[arg-type]
    return str(parse_exchange(str(exchange)))


def _checked_compression(text: Any) -> str:
    """Return a codec of gradients with all that belongs to its name."""
    if not isinstance(text, str):
        raise PlanError(
            "compression is not valid",
            expected="a text, such as 'int8'",
            got=repr(text),
            remedy='write it as in compression="int8" or compression="topk(density=0.01)"',
        )
    return AUTO_GRADIENTS if text.strip() == AUTO_GRADIENTS else str(parse_compression(text))


def _checked_virtual_stages(virtual_stages: int, schedule: str) -> int:
    """Return how many stages each server has: the fewest that the schedule needs, where the plan does not say."""
    least, most = _VIRTUAL_STAGES[schedule]
    if virtual_stages == 1:
        return least
    if virtual_stages > most:
        raise PlanError(
            f"The schedule {schedule} is not made for {virtual_stages} virtual stages",
            expected=f"{least}" if least == most else f"{least} to {most}",
            got=str(virtual_stages),
            remedy=f"set virtual_stages to {most}, or take another schedule",
        )
    return virtual_stages


def _checked_codecs(codecs: Any, stages: int) -> str | tuple[str, ...]:
    """Return one codec for all boundaries, or one for each."""
    several = not isinstance(codecs, str) and isinstance(codecs, Sequence)
    if several and len(codecs) != stages - 1:
        raise PlanError(
            "The number of codecs in activation_compression does not fit the number of stages",
            expected=f"one name, or {stages - 1} for the boundaries of {stages} stages",
            got=f"{len(codecs)}: {list(codecs)}",
        )
    for codec in codecs if several else (codecs,):
        _check_supported("activation_compression", codec, (*CODEC_NAMES, AUTO))
    return tuple(codecs) if several else str(codecs)


def _checked_cuts(cuts: Any, stages: int) -> tuple[int | str, ...]:
    valid = not isinstance(cuts, str) and isinstance(cuts, Sequence)
    if not valid or any(isinstance(cut, bool) or not isinstance(cut, int | str) for cut in cuts):
        raise PlanError(
            "cuts is not valid", expected="a list of node positions (int) or module paths (str)", got=repr(cuts)
        )
    if len(cuts) != stages - 1:
        raise PlanError(
            "The number of cuts does not fit the number of stages",
            expected=f"{stages - 1} cuts for {stages} stages (stages · virtual_stages)",
            got=f"{len(cuts)}: {list(cuts)}",
            remedy="set stages and virtual_stages so that their product is the number of cuts + 1",
        )
    for cut in cuts:
        if isinstance(cut, int) and cut < 1:
            raise PlanError("A cut is not valid", expected="a node position of 1 or more", got=str(cut))
    return tuple(cuts)
