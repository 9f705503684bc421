"""How the replicas of a plan agree, with all that the plan leaves open filled in. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from gradwire_protocol.errors import PlanError
from gradwire_protocol.exchange_state import ALONE, ExchangeState
from gradwire_protocol.exchanges import Exchange, parse_exchange
from gradwire_protocol.gradient_codecs import AUTO, GradientCodec, parse_compression
from gradwire_protocol.optimizer_state import NEED_WHOLE_PARAMETERS
from gradwire_protocol.transports import AUTO as ANY_TRANSPORT
from gradwire_protocol.transports import DEVICE_OF_TORCHS, GRPC
from gradwire_protocol.v1 import run_pb2, stage_pb2

_ZERO = ("auto", "on", "off")
# Pushes and pulls are of single tensors, one way: what goes by element does for these.
_OF_PARAMETER_SERVERS = ("none", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class ChosenCodec:
    """A codec of gradients, and why it was chosen."""

    codec: GradientCodec
    reason: str


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What replicas exchange, how it is encoded, and whether they share the optimizer's state (ZeRO, stage 1)."""

    exchange: Exchange
    codec: GradientCodec
    shards_optimizer: bool
    # Why it does or does not; empty with one replica.
    reason: str
    # Whether the codec is still to be chosen (`exchange_costs.choose_codec`); and why it was, if it was left open.
    codec_is_open: bool
    codec_reason: str
    # Which of torch's backends makes the sums of replicas; empty: they go as messages.
    sums_by: str
    replicas: int
    # Among which the optimizer's state is spread.
    sharers: int

    @classmethod
    def of(cls, plan: run_pb2.Plan, optimizer: str, chosen: ChosenCodec | None = None) -> Sharing:
        """Return that of a plan, with an optimizer of this name; PlanError for what does not go together.

        chosen: the codec of a plan that leaves it open. Until it is known, nothing is taken to be shared.
        """
        exchange = parse_exchange(plan.exchange or "ring")
        is_open = plan.compression == AUTO and plan.replicas > 1
        codec = parse_compression("none" if plan.compression in ("", AUTO) else plan.compression)
        if is_open and chosen is not None:
            codec = chosen.codec
        asked = plan.zero or "auto"
        if asked not in _ZERO:
            raise PlanError("zero is not valid", expected=" or ".join(map(repr, _ZERO)), got=repr(asked[:40]))
        if exchange.has_servers and (codec.name not in _OF_PARAMETER_SERVERS or plan.compression == AUTO):
            raise PlanError(
                "Parameter servers cannot work with this codec of gradients",
                expected=" or ".join(map(repr, _OF_PARAMETER_SERVERS)),
                got=repr(plan.compression[:80]),
                remedy='use exchange="ring" for it',
            )
        if exchange.has_servers and plan.transport in DEVICE_OF_TORCHS:
            raise PlanError(
                "What goes to parameter servers and comes from them goes as messages",
                expected=f'transport="{ANY_TRANSPORT}" or "{GRPC}"',
                got=f"transport={plan.transport!r} with exchange={plan.exchange[:80]!r}",
                remedy='leave transport out, or use exchange="ring"',
            )
        by_torch = plan.transport in DEVICE_OF_TORCHS and plan.replicas > 1 and not codec.lossy
        obstacle = _obstacle(exchange, codec)
        if is_open and asked == "on":
            obstacle = "a compression that is left open"
        if asked == "on" and obstacle and plan.replicas > 1:
            raise PlanError(
                "Replicas cannot share the optimizer's state",
                expected='zero="off" or "auto", or an exchange in a ring without compression',
                got=obstacle,
            )
        if plan.replicas < 2 or (is_open and chosen is None):
            shards, reason = False, ""
        elif asked == "auto" and not obstacle and optimizer in NEED_WHOLE_PARAMETERS:
            shards, reason = False, f"{optimizer} looks at whole matrices, whose owners would have unequal shares"
        elif asked == "auto" and not obstacle and by_torch:
            shards = False
            reason = f"{plan.transport} adds up the whole at each replica, so that gathering would be traffic on top"
        elif asked == "off":
            shards, reason = False, "the plan does not want it"
        elif obstacle:
            shards, reason = False, obstacle
        else:
            shards, reason = True, "it costs neither precision nor traffic" if asked == "auto" else "the plan wants it"
        return cls(
            exchange=exchange,
            codec=codec,
            shards_optimizer=shards,
            reason=reason,
            codec_is_open=is_open and chosen is None,
            codec_reason=chosen.reason if is_open and chosen is not None else "",
            sums_by=plan.transport if by_torch else "",
            replicas=plan.replicas,
            sharers=plan.replicas if shards else 1,
        )

    @property
    def parameter_servers(self) -> int:
        """How many servers the run takes besides those of its stages."""
        return self.exchange.servers if self.exchange.has_servers else 0

    @property
    def state(self) -> ExchangeState:
        """What each server keeps to agree with other replicas."""
        return ExchangeState(self.codec, self.exchange.is_local) if self.replicas > 1 else ALONE

    def local_steps(self) -> stage_pb2.LocalSteps | None:
        """Return what servers must know of local steps; None where replicas agree in every step."""
        if not self.exchange.is_local:
            return None
        return stage_pb2.LocalSteps(learning_rate=self.exchange.learning_rate, momentum=self.exchange.momentum)


def _obstacle(exchange: Exchange, codec: GradientCodec) -> str:
    if exchange.has_servers:
        return "parameter servers have it"
    if exchange.is_local:
        return "replicas that train alone need the whole of it each"
    if codec.lossy:
        return f"the weights would travel as they are, and undo what {codec} saves"
    return ""
