"""Reads all frames of a local stream, waiting for them as a stage server's threads do."""

from __future__ import annotations

import select
from collections.abc import Iterator

from gradwire_protocol.local_stream import QUIET_SECONDS, ReceivingEnd


def local_frames(end: ReceivingEnd) -> Iterator[bytes]:
    """Yield frames until the sender ends the stream; receipts go when nothing comes."""
    while not end.ended:
        if not select.select([end], [], [], QUIET_SECONDS)[0]:
            end.send_receipts()
        yield from (frame for _, frame in end.read())
