"""Which codec the values of each boundary travel under, where a plan leaves that open: what makes a step the fastest.

Pure: costs, links and programs come in. A codec that loses precision must pay for it: the least lossy one within
_TOLERANCE of the fastest is taken. Leaves to others: measuring links (`link_rates.py`), and doing it (the servers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradwire_coordinator.costs import Rates
from gradwire_coordinator.link_rates import LinkRate
from gradwire_coordinator.simulator import LinkSeconds, StageSeconds, step_seconds
from gradwire_protocol.codecs import AUTO, CODEC_NAMES, FLOATING, codec_for, encoded_bytes
from gradwire_protocol.errors import GradwireError
from gradwire_protocol.program import Action
from gradwire_protocol.v1 import tensors_pb2

# The least lossy first. Not fp16: activations and gradients can be beyond its range, and bf16 is as small.
_CANDIDATES = ("none", "bf16", "int8")
_TOLERANCE = 0.01
# What is best for a boundary depends on the others: the second time round they are nearly right.
_ROUNDS = 2
# Measured on a CPU, in copies of the tensor as it is in memory: (encoding, decoding).
_COPIES = {"none": (0.0, 0.0), "bf16": (0.4, 0.3), "fp16": (0.4, 0.3), "int8": (2.0, 0.8)}
# Calling a codec's operators costs this, however small the tensor.
_CALL_SECONDS = {"none": 0.0, "bf16": 10e-6, "fp16": 10e-6, "int8": 100e-6}


@dataclass(frozen=True)
class Travelling:
    """A value that a stage reads of stages on other servers, in one micro-batch; of one that is spread, a part."""

    data_type: int
    elements: int
    # Of a value that is no tensor, or of another type: it travels as it is.
    size_bytes: int
    has_gradient: bool
    exact: bool
    # Those that read it bring the parts of all shards together, as those do that get its gradient.
    spread: bool = False


@dataclass(frozen=True)
class Boundary:
    """What lies between a stage and the next; `link`: why it could not be measured, if so; None: both on one server."""

    values: tuple[Travelling, ...]
    link: LinkRate | GradwireError | None


@dataclass(frozen=True)
class Choice:
    """A boundary's codec by name, and why; no reason where the plan says which."""

    codec: str
    reason: str = ""


def travelling_bytes(value: Travelling, codec: str) -> int:
    """Return the bytes of payload of a value under a codec."""
    if value.exact or value.data_type not in FLOATING:
        return value.size_bytes
    chosen = codec_for(CODEC_NAMES[codec], value.data_type, value.elements)
    return (
        value.size_bytes if chosen == tensors_pb2.CODEC_NONE else encoded_bytes(chosen, value.data_type, value.elements)
    )


def choose_codecs(
    asked: Sequence[str],
    programs: Sequence[Sequence[Action]],
    seconds: Sequence[StageSeconds],
    rates: Sequence[Rates],
    boundaries: Sequence[Boundary],
) -> list[Choice]:
    """Return the choice for each boundary, between stage b and b + 1; within a server there is no codec.

    asked: a codec or "auto" for each. programs: a step's, by server. seconds: of one micro-batch on each stage. rates:
    of each stage's device. Starts with the smallest codec everywhere, and takes a better one where that costs no time.
    """
    asked = ["none" if boundary.link is None else codec for codec, boundary in zip(asked, boundaries, strict=True)]
    chosen = [_CANDIDATES[-1] if codec == AUTO else codec for codec in asked]
    open_ones = [place for place, codec in enumerate(asked) if codec == AUTO]
    for place in open_ones:
        if isinstance(boundaries[place].link, GradwireError):
            chosen[place] = "none"
    measured = [place for place in open_ones if isinstance(boundaries[place].link, LinkRate)]
    times: dict[tuple[str, ...], float] = {}

    def time_with(place: int, codec: str) -> float:
        codecs = (*chosen[:place], codec, *chosen[place + 1 :])
        if codecs not in times:
            times[codecs] = _step_seconds(codecs, programs, seconds, rates, boundaries)
        return times[codecs]

    for _ in range(_ROUNDS):
        for place in measured:
            own = {codec: time_with(place, codec) for codec in _CANDIDATES}
            # Of all that was tried: so that many boundaries do not add up to many times the tolerance.
            limit = min(*own.values(), *times.values()) * (1 + _TOLERANCE)
            chosen[place] = next((codec for codec in _CANDIDATES if own[codec] <= limit), min(own, key=own.__getitem__))
    return [
        Choice(chosen[place], _reason(place, boundaries[place].link, time_with) if place in open_ones else "")
        for place in range(len(asked))
    ]


def _reason(place: int, link: LinkRate | GradwireError | None, time_with: Callable[[int, str], float]) -> str:
    if isinstance(link, GradwireError):
        return f"the link could not be measured: {link.message}"
    estimates = ", ".join(f"{codec} {time_with(place, codec):.3g} s" for codec in _CANDIDATES)
    return f"{link}; estimate of a step: {estimates}"


def _step_seconds(
    codecs: Sequence[str],
    programs: Sequence[Sequence[Action]],
    seconds: Sequence[StageSeconds],
    rates: Sequence[Rates],
    boundaries: Sequence[Boundary],
) -> float:
    return step_seconds(programs, *with_transfers(codecs, seconds, rates, boundaries))


def with_transfers(
    codecs: Sequence[str],
    seconds: Sequence[StageSeconds],
    rates: Sequence[Rates],
    boundaries: Sequence[Boundary],
) -> tuple[list[StageSeconds], list[LinkSeconds]]:
    """Return what stages take with encoding and decoding, and what links between stage b and b + 1 take.

    A link that could not be measured counts as one that takes no time.
    """
    forward = [0.0] * len(seconds)
    backward = [0.0] * len(seconds)
    links = []
    for place, (codec, boundary) in enumerate(zip(codecs, boundaries, strict=True)):
        with_gradient = [value for value in boundary.values if value.has_gradient]
        # Values are encoded at the stage before, gradients at the stage behind; and the other way round.
        for stage, (first, second) in ((place, (0, 1)), (place + 1, (1, 0))):
            forward[stage] += sum(_codec_seconds(value, codec, rates[stage], first) for value in boundary.values)
            backward[stage] += sum(_codec_seconds(value, codec, rates[stage], second) for value in with_gradient)
        links.append(
            _link_seconds(
                boundary.link,
                sum(travelling_bytes(value, codec) for value in boundary.values),
                sum(travelling_bytes(value, codec) for value in with_gradient),
            )
        )
    loaded = [stage.plus(*both) for stage, *both in zip(seconds, forward, backward, strict=True)]
    return loaded, links


def _link_seconds(link: LinkRate | GradwireError | None, sent: int, returned: int) -> LinkSeconds:
    if not isinstance(link, LinkRate):
        return LinkSeconds(0.0, 0.0, 0.0)
    return LinkSeconds(sent / link.forward, returned / link.backward, link.round_trip_seconds / 2)


def _codec_seconds(value: Travelling, codec: str, rates: Rates, way: int) -> float:
    """Return the seconds of encoding (way 0) or decoding (way 1) a value."""
    if travelling_bytes(value, codec) == value.size_bytes:
        return 0.0
    return _CALL_SECONDS[codec] + _COPIES[codec][way] * 2 * value.size_bytes / rates.bytes_per_second
