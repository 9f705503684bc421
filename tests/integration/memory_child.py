"""One side of a shared block as a process of its own, which stands still at a given moment: for tests that kill it.

sender DIRECTORY MOMENT, or receiver DIRECTORY SOCKET TICKET SLOTS SLOT_BYTES MOMENT. Prints one JSON line when it is
there, and sleeps.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from gradwire_protocol.handover import Directory, Handover, take_over
from gradwire_protocol.shared_block import OwnBlock, PeerBlock

PAYLOAD = bytes(range(256)) * 256
SLOTS, SLOT_BYTES = 4, 2**16


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def stand_still() -> None:
    time.sleep(120)


def send(directory: Path, moment: str) -> None:
    block = OwnBlock(SLOTS, SLOT_BYTES)
    with Handover(directory) as handover:
        say(socket=handover.name, ticket=block.ticket.hex())
        if moment == "listening":
            stand_still()

        def descriptor() -> int:
            if moment == "asked":
                stand_still()
            made = block.allocate()
            if moment == "allocated":
                stand_still()
            return made

        handover.serve(block.ticket, descriptor, lambda: False)
        if moment == "given":
            stand_still()
    placed = block.put(memoryview(PAYLOAD))
    say(placed=placed)
    stand_still()


def receive(directory: Path, socket_name: str, ticket: str, slots: int, slot_bytes: int, moment: str) -> None:
    with Directory(directory):
        pass
    if moment == "before":
        say()
        stand_still()
    descriptor = take_over(directory, socket_name, bytes.fromhex(ticket), 5)
    if moment == "holding":
        say()
        stand_still()
    block = PeerBlock(descriptor, bytes.fromhex(ticket), slots, slot_bytes)
    if moment == "mapped":
        say()
        stand_still()
    payload = block.take(0, 1, len(PAYLOAD))
    while payload != PAYLOAD:  # it is copied now
        time.sleep(0.001)
    say()
    stand_still()


if __name__ == "__main__":
    role, directory, *rest = sys.argv[1:]
    if role == "sender":
        send(Path(directory), *rest)
    else:
        receive(Path(directory), rest[0], rest[1], int(rest[2]), int(rest[3]), rest[4])
