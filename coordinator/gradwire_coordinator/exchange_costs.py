"""What the exchange of gradients between replicas takes: bytes that a server sends, and seconds on its ring.

Pure. Leaves to others: what a codec makes of a tensor (`gradwire_protocol.gradient_codecs`), and which servers are in a
ring (`replica_groups.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gradwire_coordinator.boundaries import ASSUMED_LINK
from gradwire_coordinator.costs import Rates
from gradwire_coordinator.sharing import ChosenCodec, Sharing
from gradwire_protocol.frames import ELEMENT_BYTES
from gradwire_protocol.gradient_codecs import GradientCodec, encoded_bytes, parse_compression
from gradwire_protocol.v1 import graph_pb2

# Of a codec that is left open, the least lossy first. Not those that need settings of their own, or more steps.
_CANDIDATES = ("none", "fp16", "int8")
# A lossy one must make a step faster by this share.
_TOLERANCE = 0.03
# What adding up, encoding and decoding takes on a CPU, in copies of the gradients.
_COPIES = {"none": 1.0, "fp16": 6.0, "int8": 7.0}
_EXACT = parse_compression("none")
# Of which each replica sends all it has to every other, in place of sums of parts.
_GATHERED = "topk"


@dataclass(frozen=True)
class Ring:
    """The servers of one position, one of each replica: each sends to the next, at the pace of the slowest link."""

    replicas: int
    bytes_per_second: float
    # From a server to the next.
    delay_seconds: float

    def sent_bytes(self, codec: GradientCodec, tensors: Iterable[graph_pb2.TensorSpec]) -> float:
        """Return what each of its servers sends of these tensors' gradients in a step, as encoded."""
        return _encoded_bytes(codec, tensors) * self._turns(codec) / (1 if codec.name == _GATHERED else self.replicas)

    def seconds(self, codec: GradientCodec, tensors: Iterable[graph_pb2.TensorSpec]) -> float:
        """Return what the exchange of these tensors' gradients takes, nothing of it hidden behind backwards."""
        sent = self.sent_bytes(codec, tensors)
        return sent / self.bytes_per_second + self._turns(codec) * self.delay_seconds if sent else 0.0

    def _turns(self, codec: GradientCodec) -> int:
        """Once around to gather what each has; once around to sum parts, and once to gather the sums."""
        return (self.replicas - 1) * (1 if codec.name == _GATHERED else 2)


def exchange_seconds(
    rings: Sequence[Ring], sharing: Sharing, tensors: Sequence[Sequence[graph_pb2.TensorSpec]], replicas: int
) -> list[float]:
    """Return the seconds of each server of a pipeline in a step, from the tensors that it holds; none without rings.

    Of local steps on average. With parameter servers, whose links are not known, those of an assumed one: each stage
    pushes and pulls all that it holds, and each parameter server does so for its share of all that all replicas hold.
    """
    if sharing.exchange.has_servers:
        sent = [2 * _encoded_bytes(sharing.codec, own) for own in tensors]
        shared = replicas * sum(sent) / sharing.exchange.servers
        slowest = [max(own, shared) / ASSUMED_LINK.forward + 2 * ASSUMED_LINK.round_trip_seconds for own in sent]
        return [seconds if own else 0.0 for seconds, own in zip(slowest, sent, strict=True)]
    if not rings:
        return []
    share = _rounds(sharing) / _steps(sharing)
    return [share * ring.seconds(sharing.codec, own) for ring, own in zip(rings, tensors, strict=True)]


def exchange_bytes(rings: Sequence[Ring], sharing: Sharing, tensors: Sequence[Sequence[graph_pb2.TensorSpec]]) -> int:
    """Return what all servers of a pipeline send in a step, from the tensors that each holds, and are sent.

    Of local steps on average.
    """
    if sharing.exchange.has_servers:
        return sum(2 * _encoded_bytes(sharing.codec, own) for own in tensors)
    if not rings:
        return 0
    sent = sum(ring.sent_bytes(sharing.codec, own) for ring, own in zip(rings, tensors, strict=True))
    return round(sent * _rounds(sharing) / _steps(sharing))


def choose_codec(
    rings: Sequence[Ring],
    sharing: Sharing,
    tensors: Sequence[Sequence[graph_pb2.TensorSpec]],
    rates: Sequence[Rates],
    compute_seconds: float,
) -> ChosenCodec:
    """Return the codec that makes a step the fastest; one that loses precision must pay for it.

    rings, tensors, rates: by position. compute_seconds: of a step without the exchange.
    """
    seconds: dict[str, float] = {}
    for name in _CANDIDATES:
        codec = parse_compression(name)
        each = (
            ring.seconds(codec, own) + 2 * _COPIES[name] * _encoded_bytes(_EXACT, own) / rate.bytes_per_second
            for ring, own, rate in zip(rings, tensors, rates, strict=True)
        )
        seconds[name] = max(each) / _steps(sharing)
    steps = {name: compute_seconds + value for name, value in seconds.items()}
    fastest = min(steps.values())
    chosen = next(name for name in _CANDIDATES if steps[name] <= fastest * (1 + _TOLERANCE))
    slowest = min(ring.bytes_per_second for ring in rings)
    shown = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
    link = f"replicas' links carry {8e-6 * slowest:.0f} Mbit/s or more"
    return ChosenCodec(parse_compression(chosen), f"{link}: the exchange is expected to take {shown} of a step")


def _encoded_bytes(codec: GradientCodec, tensors: Iterable[graph_pb2.TensorSpec]) -> int:
    return sum(
        encoded_bytes(codec, tuple(spec.shape), ELEMENT_BYTES[spec.data_type]) for spec in tensors if spec.requires_grad
    )


def _rounds(sharing: Sharing) -> float:
    """Return how often as much as a ring sends goes round: updated weights come on top of sums that are whole."""
    return 1.5 if sharing.sums_by and sharing.shards_optimizer else 1.0


def _steps(sharing: Sharing) -> int:
    """Return how many steps there are to one exchange."""
    return sharing.exchange.every if sharing.exchange.is_local else 1
