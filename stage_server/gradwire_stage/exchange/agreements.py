"""Which way of agreeing a run has here: chosen once, when it is prepared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwire_protocol.gradient_codecs import parse_compression
from gradwire_protocol.optimizer_state import NEED_WHOLE_PARAMETERS
from gradwire_protocol.v1 import stage_pb2
from gradwire_stage.exchange.agreement import Agreement
from gradwire_stage.exchange.exchange import ReplicaExchange
from gradwire_stage.exchange.local_steps import LocalSteps
from gradwire_stage.exchange.parameter_shard import ParameterShard
from gradwire_stage.exchange.pushes import Pushes

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState


def make_agreement(run: RunState, request: stage_pb2.PrepareRequest) -> Agreement:
    """Return what a server agrees with others by. Errors are those of what the request asks for."""
    places = run.places
    if len(places.replica_servers) < 2 and not places.parameter_servers:
        return Agreement(run)
    codec = parse_compression(request.compression)
    if places.is_parameter_server:
        return ParameterShard(run, request, codec)
    if places.parameter_servers:
        return Pushes(run, request.segments, codec, request.staleness)
    if request.HasField("local_steps"):
        return LocalSteps(run, request.segments, codec, request.local_steps)
    whole = request.optimizer.name in NEED_WHOLE_PARAMETERS
    return ReplicaExchange(run, request.segments, codec, shard=request.shard_optimizer, whole=whole)
