"""A link with a rate and a delay between two network namespaces, through the host's user space: two TUN devices.

For kernels without netem. Run as `delayed_link.py NAMESPACE NAMESPACE DEVICE`: it makes a device of that name in each,
says "ready", and then takes lines "BITS_PER_SECOND SECONDS" (the delay each way) until its input ends. Large segments
pass whole, as they do through a veth pair, so that 1 Gbit/s costs little; what would wait longer than _QUEUE_SECONDS
for its turn is dropped. Needs root, iproute2 and /dev/net/tun.
"""

from __future__ import annotations

import fcntl
import os
import selectors
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
# Checksums are left out, and segments of TCP over IPv4 left whole.
_OFFLOAD_CHECKSUM, _OFFLOAD_TCP4 = 0x01, 0x02
_LARGEST = 2**16 + 64
_BATCH = 32
_QUEUE_SECONDS = 0.2
_IDLE_SECONDS = 0.2


class DelayedLink:
    """The process that carries the packets, seen from the one that asked for it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def shape(self, bits_per_second: float, delay_seconds: float) -> None:
        """Set rate and delay, each way."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{bits_per_second} {delay_seconds}\n")
        self._process.stdin.flush()


@contextmanager
def delayed_link(namespaces: tuple[str, str], device: str) -> Iterator[DelayedLink]:
    """Connect two namespaces; the devices have no addresses yet."""
    command = [sys.executable, __file__, *namespaces, device]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{' '.join(command)} ended with {process.wait()}")
        yield DelayedLink(process)


@dataclass
class _End:
    """One end: its device, and what is on the way to it."""

    file: int
    coming: deque[tuple[float, bytes]] = field(default_factory=deque)  # when it arrives, in order
    free_at: float = 0.0  # when the way to it has carried all that


def _open_end(number: int, namespace: str, device: str) -> _End:
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    name = f"gw{os.getpid()}t{number}"
    fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR))
    fcntl.ioctl(file, _TUNSETOFFLOAD, _OFFLOAD_CHECKSUM | _OFFLOAD_TCP4)
    subprocess.run(["ip", "link", "set", "dev", name, "netns", namespace, "name", device], check=True)
    return _End(file)


def _take(source: _End, target: _End, bytes_per_second: float, delay: float) -> None:
    """Read packets that leave one end, and give each its time of arrival at the other."""
    for _ in range(_BATCH):
        try:
            packet = os.read(source.file, _LARGEST)
        except BlockingIOError:
            return
        now = time.monotonic()
        begins = max(now, target.free_at)
        if begins - now > _QUEUE_SECONDS:
            continue
        target.free_at = begins + len(packet) / bytes_per_second
        target.coming.append((target.free_at + delay, packet))


def _deliver(end: _End) -> None:
    """Hand over what has arrived."""
    while end.coming and end.coming[0][0] <= time.monotonic():
        try:
            os.write(end.file, end.coming.popleft()[1])
        except (BlockingIOError, OSError):
            # A device that is down, or full, loses packets as any does.
            continue


def main() -> None:
    *namespaces, device = sys.argv[1:]
    ends = [_open_end(number, namespace, device) for number, namespace in enumerate(namespaces)]
    bytes_per_second, delay = 1.25e8, 0.0
    with selectors.DefaultSelector() as selector:
        for end, other in (ends, ends[::-1]):
            selector.register(end.file, selectors.EVENT_READ, (end, other))
        selector.register(sys.stdin, selectors.EVENT_READ, None)
        print("ready", flush=True)
        while True:
            next_arrival = min((end.coming[0][0] for end in ends if end.coming), default=None)
            wait = _IDLE_SECONDS if next_arrival is None else max(0.0, next_arrival - time.monotonic())
            for key, _ in selector.select(wait):
                if key.data is not None:
                    source, target = key.data
                    _take(source, target, bytes_per_second, delay)
                    continue
                line = sys.stdin.readline()
                if not line:
                    return
                bits, seconds = map(float, line.split())
                bytes_per_second, delay = bits / 8, seconds
            for end in ends:
                _deliver(end)


if __name__ == "__main__":
    main()
