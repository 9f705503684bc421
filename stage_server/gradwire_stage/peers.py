"""Sends messages to the other servers of a run, and keeps them at hand for stages on the same server.

One stream per peer and traffic class, so that an exchange of gradients never stalls an activation. Encoding, the
network and waiting for copies from the device happen on the streams' own threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import structlog
import torch

from gradwire_protocol.delivery import Delivered, FrameSender
from gradwire_protocol.errors import GradwireError
from gradwire_protocol.torch_tensors import dense, tensor_info
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.device import Arrived, Device
from gradwire_stage.mailbox import Key, Mailbox

Number = int | float | bool
Value = torch.Tensor | Number
# What lies in a mailbox: a tensor on its way to the device and whether its sender wants a gradient, a number, or
# `ABSENT`.
Incoming = tuple[Arrived, bool] | Number | pb.Absent
ABSENT = pb.Absent()

_EXCHANGE = frozenset({pb.DIRECTION_TIED, pb.DIRECTION_NORM, pb.DIRECTION_WEIGHT})

_log = structlog.get_logger(__name__)


def make_header(run: str, generation: int, key: Key, value: Value | None) -> pb.TensorHeader:
    """Return the header that carries a dense tensor, a number, or the statement that there is none."""
    header = pb.TensorHeader(
        key=pb.MessageKey(
            run=run,
            generation=generation,
            entry=key.entry,
            micro_batch=key.micro_batch,
            value=key.value,
            direction=key.direction,
            source_stage=key.source_stage,
            state=key.state,
        )
    )
    if isinstance(value, torch.Tensor):
        header.tensor.CopyFrom(tensor_info(value))
    elif value is None:
        header.absent.SetInParent()
    elif isinstance(value, bool):  # a bool is an int too
        header.boolean = value
    elif isinstance(value, int):
        header.integer = value
    else:
        header.real = value
    return header


class Peers:
    """The servers of a run, as one of them sees them. `send` is for the compute thread only.

    `on_failure` gets the first failure of any stream, on that stream's thread; `on_sent` is called for each receipt.
    """

    def __init__(
        self,
        *,
        run: str,
        generation: int,
        own: str,
        addresses: Mapping[str, str],
        open_channel: Callable[[str], Any],
        mailbox: Mailbox[Incoming],
        device: Device,
        on_sent: Callable[[str, Delivered], None],
        on_failure: Callable[[GradwireError], None],
    ) -> None:
        self._run = run
        self._generation = generation
        self._own = own
        self._addresses = addresses
        self._open_channel = open_channel
        self._mailbox = mailbox
        self._device = device
        self._on_sent = on_sent
        self._on_failure = on_failure
        self._lock = threading.Lock()  # the table of streams: the compute thread opens, others close
        self._closed = False
        self._senders: dict[tuple[str, bool], FrameSender] = {}
        self._channels: list[Any] = []

    def send(self, servers: Iterable[str], key: Key, value: Value | None) -> None:
        """Send a tensor, a number or "there is none" to servers, this one included. Does not wait."""
        payload = None
        if isinstance(value, torch.Tensor):
            value = dense(value)
        for server in servers:
            if server == self._own:
                self._mailbox.put(key, self._local(value))
                continue
            if payload is None and isinstance(value, torch.Tensor):
                payload = self._device.payload(value)
            # A header of its own for each: it carries the position on the stream.
            self._sender(server, key.direction).send(make_header(self._run, self._generation, key, value), payload)

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

    def _sender(self, server: str, direction: int) -> FrameSender:
        traffic = (server, direction in _EXCHANGE)
        sender = self._senders.get(traffic)
        if sender is not None:
            return sender
        with self._lock:
            channel = self._open_channel(self._addresses[server])
            self._channels.append(channel)
            sender = FrameSender(
                channel,
                f"stage server {server} at {self._addresses[server]}",
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
            channels, self._channels = self._channels, []
        for channel in channels:
            channel.close()
