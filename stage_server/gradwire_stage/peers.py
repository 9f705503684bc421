"""Sends messages to the other servers of a run, and keeps them at hand for stages on the same server.

One stream per peer and traffic class, so that an exchange of gradients never stalls an activation. Encoding, the
network and waiting for copies from the device happen on the streams' own threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import structlog
import torch

from gradwire_protocol.channels import OpenChannel
from gradwire_protocol.delivery import FrameSender, Payload
from gradwire_protocol.errors import GradwireError
from gradwire_protocol.torch_tensors import dense
from gradwire_protocol.unreceipted import Delivered
from gradwire_protocol.v1 import stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.arrivals import EXCHANGE
from gradwire_stage.codecs.registry import encode
from gradwire_stage.device import Arrived, Device
from gradwire_stage.headers import Headers, Number, Value, make_header
from gradwire_stage.keys import Key
from gradwire_stage.local_connector import LocalConnector
from gradwire_stage.mailbox import Mailbox
from gradwire_stage.shared_memory import SharedMemory, SharedSender, offers_to

# What lies in a mailbox: a tensor on its way to the device and whether its sender wants a gradient, a number, or
# `ABSENT`.
Incoming = tuple[Arrived, bool] | Number | pb.Absent
ABSENT = pb.Absent()

_NO_CODECS: Mapping[str, pb.Codec] = MappingProxyType({})
# Of payloads that one peer has not receipted, on each of the two streams to it, before `send` waits.
SEND_BYTES = 128 * 2**20
# Copying that much to a socket takes the compute thread less time than waking another thread to do it.
_AT_ONCE_BYTES = 64 * 2**10
# What a frame of the exchange waits, at most, while activations are held up; and how often it looks.
_GIVE_WAY_SECONDS = 0.1
_LOOK_SECONDS = 0.002

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WaitingForRoom:
    """A server that is to take what was sent to it, and since when this one waits (time.monotonic)."""

    server: str
    since: float


class Peers:
    """The servers of a run, as one of them sees them. `send` is for the compute thread only.

    `on_failure` gets the first failure of any stream, on that stream's thread; `on_frame` is called for each frame that
    the network takes, `on_sent` for each receipt.
    """

    def __init__(
        self,
        *,
        run: str,
        generation: int,
        own: str,
        addresses: Mapping[str, str],
        open_channel: OpenChannel,
        mailbox: Mailbox[Incoming],
        device: Device,
        shared_memory: SharedMemory,
        send_bytes: int,
        checksums: bool,
        pause: Callable[[], AbstractContextManager[None]],
        on_frame: Callable[[], None],
        on_sent: Callable[[str, Delivered], None],
        on_failure: Callable[[GradwireError], None],
    ) -> None:
        self._run = run
        self._generation = generation
        self._headers = Headers(run, generation)
        self._own = own
        self._addresses = addresses
        self._open_channel = open_channel
        self._mailbox = mailbox
        self._device = device
        self._shared_memory = shared_memory
        self._send_bytes = send_bytes
        self._checksums = checksums
        self._pause = pause
        self._waiting: WaitingForRoom | None = None
        self._on_frame = on_frame
        self._on_sent = on_sent
        self._on_failure = on_failure
        self._lock = threading.Lock()  # the table of streams: the compute thread opens, others close
        self._closed = False
        self._senders: dict[tuple[str, bool], FrameSender] = {}
        self._shared: list[SharedSender] = []
        self._channels: list[Any] = []

    def send(
        self, servers: Iterable[str], key: Key, value: Value | None, codecs: Mapping[str, pb.Codec] = _NO_CODECS
    ) -> None:
        """Send a tensor, a number or "there is none" to servers, this one included.

        Waits, within `pause`, while a server has not receipted so much that this would be above `send_bytes`.
        codecs: of floating tensors, by server; servers with the same one get the same bytes.
        """
        payloads: dict[int, Payload] = {}
        if isinstance(value, torch.Tensor):
            value = dense(value)
        for server in servers:
            if server == self._own:
                self._mailbox.put(key, self._local(value))
                continue
            sender = self._sender(server, key.direction)
            if not isinstance(value, torch.Tensor):
                sender.send(make_header(self._run, self._generation, key, value))
                continue
            kind = self._headers.of(key, value, codecs.get(server, pb.CODEC_NONE))
            payload = payloads.get(kind.codec)
            if payload is None:
                encoded = value if kind.codec == pb.CODEC_NONE else encode(kind.codec, value)
                payload = payloads[kind.codec] = self._device.payload(encoded)
            sender.send(kind.header, payload, kind)

    @property
    def waiting(self) -> WaitingForRoom | None:
        """What `send` waits for; None if it does not wait. Any thread."""
        return self._waiting

    def unreceipted(self) -> dict[str, tuple[int, int]]:
        """Return messages and bytes on their way, by server; those without any are left out. Any thread."""
        with self._lock:
            senders = list(self._senders.items())
        totals: dict[str, tuple[int, int]] = {}
        for (server, _), sender in senders:
            messages, size = sender.unreceipted
            if messages:
                before = totals.get(server, (0, 0))
                totals[server] = (before[0] + messages, before[1] + size)
        return totals

    def close(self, timeout_seconds: float) -> None:
        """Let what was sent arrive, for as long as the timeout, and end the streams. Idempotent."""
        for sender in self._take_senders():
            try:
                sender.flush(timeout_seconds)
            except GradwireError as error:
                _log.warning("a peer did not take everything", run=self._run, error=str(error))
            sender.close(timeout_seconds)
        self._close_channels()

    def cancel(self) -> None:
        """End the streams at once. Idempotent."""
        for sender in self._take_senders():
            sender.cancel()
        self._close_channels()

    def _local(self, value: Value | None) -> Incoming:
        if isinstance(value, torch.Tensor):
            return Arrived(value.detach()), value.requires_grad
        return ABSENT if value is None else value

    def _give_way(self) -> None:
        """Wait, before a frame of the exchange, while activations on their way take longer than they need to.

        Not for ever: they may be slow for another reason.
        """
        with self._lock:
            activations = [sender for (_, exchanges), sender in self._senders.items() if not exchanges]
        deadline = time.monotonic() + _GIVE_WAY_SECONDS
        while any(sender.is_held_up for sender in activations) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)

    @contextmanager
    def _waits(self, server: str) -> Iterator[None]:
        """Around a wait for a server to take what was sent to it."""
        self._waiting = WaitingForRoom(server, time.monotonic())
        try:
            with self._pause():
                yield
        finally:
            self._waiting = None

    def _sender(self, server: str, direction: int) -> FrameSender:
        traffic = (server, direction in EXCHANGE)
        sender = self._senders.get(traffic)
        if sender is not None:
            return sender
        with self._lock:
            exchanges = direction in EXCHANGE
            channel = self._open_channel(self._addresses[server], bulk=exchanges)
            self._channels.append(channel)
            about = stage_pb2.OfferSharedBlockRequest(run=self._run, generation=self._generation, server=self._own)
            shared = SharedSender(self._shared_memory, about, server, offers_to(channel))
            self._shared.append(shared)
            stream = stage_pb2.OfferStreamRequest(run=self._run, generation=self._generation, server=self._own)
            settings = self._shared_memory.settings
            sender = FrameSender(
                channel,
                f"stage server {server} at {self._addresses[server]}",
                place=shared.place,
                connect=None
                if settings is None
                else LocalConnector(self._shared_memory, shared, channel, stream, server),
                at_once_bytes=0 if settings is None else min(_AT_ONCE_BYTES, settings.threshold_bytes - 1),
                # Whoever exchanges gradients has little else to do; an activation is copied beside the next action.
                place_at_once=shared.place_at_once if exchanges else None,
                # Computing waits for activations now, and for gradients of replicas later.
                before_frame=self._give_way if exchanges else None,
                maximum_queued_bytes=self._send_bytes,
                checksums=self._checksums,
                waiting=partial(self._waits, server),
                on_frame=self._on_frame,
                on_delivered=lambda delivered: self._on_sent(server, delivered),
                on_failure=self._on_failure,
            )
            if self._closed:
                sender.cancel()
            else:
                self._senders[traffic] = sender
            return sender

    def _take_senders(self) -> list[FrameSender]:
        with self._lock:
            self._closed = True
            senders = list(self._senders.values())
            self._senders.clear()
            return senders

    def _close_channels(self) -> None:
        with self._lock:
            shared, self._shared = self._shared, []
            channels, self._channels = self._channels, []
        for memory in shared:
            memory.close()
        for channel in channels:
            channel.close()
