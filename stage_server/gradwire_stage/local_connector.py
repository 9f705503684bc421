"""Connects a stream of messages to a server of the same host over a unix socket, in place of a Deliver call.

A message of a few kilobytes passes through gRPC in a millisecond of processors' time, most of it changes of threads;
through a socket in a tenth of that. Whatever stands in the way of one, the outcome is the same: the frames go over
gRPC, and a counter and a log line say why. Leaves to others: who takes it (local_streams.py), what is sent and when
(peers.py), and large payloads (shared_memory.py).
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path
from typing import Any

import grpc
import structlog

from gradwire_protocol.handover import Handover
from gradwire_protocol.local_stream import connected_pair
from gradwire_protocol.shared_block import TICKET_BYTES, BlockError, unsupported
from gradwire_protocol.v1 import stage_pb2
from gradwire_stage.shared_memory import SharedMemory, SharedSender

_OFFER_SECONDS = 5.0

_log = structlog.get_logger(__name__)


class LocalConnector:
    """Connects one stream to a peer, if that is on this host. `shared`: the same stream's shared memory.

    Called once, on a thread that may wait. `about` is what the offer says.
    """

    def __init__(
        self,
        memory: SharedMemory,
        shared: SharedSender,
        channel: Any,
        about: stage_pb2.OfferStreamRequest,
        peer: str,
    ) -> None:
        self._memory = memory
        self._shared = shared
        self._about = about
        self._peer = peer
        self._offer = channel.unary_unary(
            "/gradwire_protocol.v1.StageService/OfferStream",
            request_serializer=stage_pb2.OfferStreamRequest.SerializeToString,
            response_deserializer=stage_pb2.OfferStreamReply.FromString,
        )

    def __call__(self) -> socket.socket | None:
        settings = self._memory.settings
        if settings is None:
            return None
        try:
            connection = self._connect(settings.directory)
        except BlockError as error:
            # Where there is no way for a socket there is none for memory either.
            self._shared.refused(error)
            return None
        except OSError as error:  # no descriptors left, say
            self._shared.refused(BlockError("failed", f"no socket could be made: {error}"))
            return None
        _log.info("messages go to a server over a socket of this host", peer=self._peer)
        return connection

    def _connect(self, directory: Path) -> socket.socket:
        reason = unsupported()
        if reason is not None:
            raise BlockError("unsupported", reason)
        own, other = connected_pair()
        ticket = secrets.token_bytes(TICKET_BYTES)
        try:
            with other, Handover(directory) as handover:
                request = stage_pb2.OfferStreamRequest()
                request.CopyFrom(self._about)
                request.socket, request.ticket = handover.name, ticket
                call = self._offer.future(request, timeout=_OFFER_SECONDS, wait_for_ready=True)
                handover.serve(ticket, lambda: os.dup(other.fileno()), call.done)
                reply = call.result()
            if not reply.accepted:
                raise BlockError(reply.reason, reply.explanation)
        except grpc.RpcError as error:
            own.close()
            unknown = error.code() is grpc.StatusCode.UNIMPLEMENTED
            raise BlockError("unsupported" if unknown else "failed", f"the offer failed: {error.details()}") from error
        except grpc.FutureCancelledError as error:
            own.close()
            raise BlockError("failed", "the offer was cut off") from error
        except BaseException:
            own.close()
            raise
        return own
