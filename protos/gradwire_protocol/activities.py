"""What servers are doing, in words: the same in errors, in heartbeats and in `gradwire status`.

Knows activities only; whether a wait is too long is the coordinator's to say.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

from gradwire_protocol import program
from gradwire_protocol.errors import FrameError
from gradwire_protocol.program import Action, parse_action
from gradwire_protocol.v1 import stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb

# Of one line; a server could send any text.
_MAXIMUM_TEXT = 300


class KeyParts(Protocol):
    """What names a message within a run: the proto's MessageKey, or a mailbox's key."""

    @property
    def micro_batch(self) -> int: ...
    @property
    def value(self) -> str: ...
    @property
    def direction(self) -> pb.Direction: ...
    @property
    def source_stage(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def source_member(self) -> int: ...


def message_words(key: KeyParts) -> str:
    """Return a message in words: "forward of micro-batch 7 (value 'x') from stage 1"."""
    stage = f"from stage {key.source_stage}"
    match key.direction:
        case pb.DIRECTION_BATCH:
            return f"rows of micro-batch {key.micro_batch} (input {key.value!r}) from the client"
        case pb.DIRECTION_FORWARD:
            return f"forward of micro-batch {key.micro_batch} (value {key.value!r}) {stage}"
        case pb.DIRECTION_BACKWARD:
            return f"backward of micro-batch {key.micro_batch} (gradient of {key.value!r}) {stage}"
        case pb.DIRECTION_STATE if key.state:
            return f"the optimizer's {key.state!r} of {key.value!r} from the client"
        case pb.DIRECTION_STATE:
            return f"tensor {key.value!r} from the client"
        case pb.DIRECTION_TIED:
            return f"gradient of the tied tensor {key.value!r} {stage}"
        case pb.DIRECTION_MOVED if key.state:
            return f"the optimizer's {key.state!r} of {key.value!r} {stage}"
        case pb.DIRECTION_MOVED:
            return f"tensor {key.value!r} {stage}"
        case pb.DIRECTION_NORM:
            return f"sum of squared gradients {stage} of replica {key.source_member}"
        case pb.DIRECTION_WEIGHT:
            return f"weight of the loss {stage} of replica {key.source_member}"
        case pb.DIRECTION_WEIGHTS:
            return f"weights of {key.value!r} from its parameter server"
        case pb.DIRECTION_REDUCE:
            return f"part of the gradients ({key.value}) {stage} of replica {key.source_member}"
        case pb.DIRECTION_GROUP:
            return f"part of micro-batch {key.micro_batch} ({key.value}) from shard {key.source_member} of its stage"
    return f"{key.value!r} {stage}"


def wait_words(wait: stage_pb2.Wait, entry: int) -> str:
    """Return what is waited for, in words; `entry` is the one in progress."""
    match wait.kind:
        case stage_pb2.WAIT_KIND_MESSAGE:
            return message_words(wait.message)
        case stage_pb2.WAIT_KIND_ROOM:
            return f"stage {wait.stage} to take what was sent to it"
        case stage_pb2.WAIT_KIND_COLLECT:
            return f"the client to collect the results of entry {entry}"
        case stage_pb2.WAIT_KIND_DISK:
            return "the checkpoint before to be written to disk"
    return "something unknown"


def is_between_entries(activity: stage_pb2.Activity) -> bool:
    """Whether a server has finished the entries that it has begun."""
    return not activity.HasField("wait") and not activity.action and activity.phase in ("", "wait-step")


def doing_words(activity: stage_pb2.Activity) -> str:
    """Return what a server of a run does, to follow "is": "encoding (1F3, entry 7)"."""
    if is_between_entries(activity):
        return f"idle after entry {activity.entry}" if activity.entry else "idle before its first entry"
    try:
        action = parse_action(activity.action)
    except FrameError:
        # What an entry without a program does, in the server's own words.
        return f"{activity.action[:_MAXIMUM_TEXT] or 'ending'} (entry {activity.entry})"
    return f"{_phase_words(action, activity.phase)} ({action}, entry {activity.entry})"


def _phase_words(action: Action, phase: str) -> str:
    if phase in ("encode", "decode"):
        return f"{phase[:-1]}ing"
    match action.kind:
        case program.FORWARD:
            return f"running the forward of micro-batch {action.micro_batch}"
        case program.BACKWARD | program.INPUT_GRADIENT if phase == "forward":
            return f"running the forward of micro-batch {action.micro_batch} again"
        case program.BACKWARD:
            return f"running the backward of micro-batch {action.micro_batch}"
        case program.INPUT_GRADIENT:
            return f"running the input gradients of micro-batch {action.micro_batch}"
        case program.WEIGHT_GRADIENT:
            return f"running the weight gradients of micro-batch {action.micro_batch}"
        case program.REDUCE:
            return "adding the gradients of replicas and tied parameters"
        case program.NORM:
            return "clipping the gradients"
        case program.GATHER:
            return "bringing the weights of replicas together"
        case program.AVERAGE:
            return "averaging the weights of replicas"
    return "updating the weights"


def activity_words(
    activity: stage_pb2.Activity,
    owner: Callable[[str], stage_pb2.Activity | None] = lambda server: None,
    *,
    age_seconds: float = 0.0,
) -> str:
    """Return a server's state as a clause without its subject.

    "has waited 4.1 s for the forward of micro-batch 7 from stage 1, which is encoding (1F7, entry 3)". owner: what
    another server of the run does, if that is known. age_seconds: how old the activity is.
    """
    if not activity.HasField("wait"):
        return f"is {doing_words(activity)}"
    words = wait_words(activity.wait, activity.entry)[:_MAXIMUM_TEXT]
    article = "" if words.startswith(("the ", "stage ")) else "the "
    text = f"has waited {activity.waiting_seconds + age_seconds:.1f} s for {article}{words}"
    known = owner(activity.wait.server) if activity.wait.server else None
    if known is None:
        return text
    if known.HasField("wait"):
        return f"{text}, which waits for {wait_words(known.wait, known.entry)[:_MAXIMUM_TEXT]}"
    return f"{text}, which is {doing_words(known)}"


def stage_names(stages: Sequence[int], replica: int | None = None, shard: int | None = None) -> str:
    """Return "stage 2", or "stages 0, 4 (shard 1) of replica 1"; replica, shard: None where there is only one."""
    names = ("stage " if len(stages) == 1 else "stages ") + ", ".join(map(str, stages))
    names += "" if shard is None else f" (shard {shard})"
    return names if replica is None else f"{names} of replica {replica}"


def stage_lines(
    activities: Sequence[tuple[str, stage_pb2.Activity, float]],
    replica_of: Callable[[str], int | None] = lambda server: None,
    shard_of: Callable[[str], int | None] = lambda server: None,
) -> dict[str, list[str]]:
    """Return a line for each server of each run, in the order of their stages, from (server, activity, age in seconds).

    "stage 2 has waited 4.1 s for the forward of micro-batch 7 from stage 1, which is encoding (1F7, entry 3)".
    replica_of, shard_of: of a server, where its run has several.
    """
    of_run = sorted(
        (item for item in activities if item[1].run),
        key=lambda item: (item[1].run, replica_of(item[0]) or 0, list(item[1].stages)[:1], shard_of(item[0]) or 0),
    )
    lines: dict[str, list[str]] = {}
    for run, group in itertools.groupby(of_run, key=lambda item: item[1].run):
        members = list(group)
        known = {server: activity for server, activity, _ in members}
        lines[run] = [
            f"{_subject(activity, replica_of(server), shard_of(server))} "
            f"{activity_words(activity, known.get, age_seconds=age)}"
            for server, activity, age in members
        ]
    return lines


def _subject(activity: stage_pb2.Activity, replica: int | None, shard: int | None) -> str:
    return "parameter server" if activity.parameter_server else stage_names(activity.stages, replica, shard)
