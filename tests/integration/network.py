"""Two hosts on one machine: network namespaces with a shaped link between them. Whoever made them reaches both freely.

Needs root, iproute2 and a kernel with tbf. Every test that asks for `two_hosts` skips itself, with the reason, where
that cannot be had. tbf shapes what leaves each end, so the link is full-duplex; it adds no delay. What runs inside is a
process like any other, begun with `nsenter` (`ip netns exec` would hide the control groups from it).
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gradwire.cluster import Cluster, connect

_STARTED_SECONDS = 60.0
# What may leave at once. The kernel's own coarseness needs some: a millisecond's worth, and a few large packets.
_LEAST_BURST_BYTES = 32 * 2**10
# A packet that would wait longer than this in the shaper is dropped.
_QUEUE = "50ms"
LINK = "link0"
# They do share a host's memory, where payloads would pass by the link.
_OVER_THE_LINK = ("--no-shared-memory",)
_COUNT = itertools.count()


class NoNetwork(Exception):
    """Namespaces and shaped links cannot be made here; the text says why."""


@dataclass(frozen=True)
class Host:
    """A network namespace."""

    namespace: str
    # On the link; whoever made the host reaches it there, too, on another way.
    address: str

    def command(self, *arguments: str) -> list[str]:
        """Return the command that runs a command there."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", "--", *arguments]

    def shape(self, bits_per_second: float | None) -> None:
        """Limit what leaves this host on the link; None: no limit."""
        base = ("tc", "qdisc")
        if bits_per_second is None:
            # There is none the first time.
            subprocess.run(self.command(*base, "del", "dev", LINK, "root"), capture_output=True, check=False)
            return
        burst = max(_LEAST_BURST_BYTES, int(bits_per_second / 8 * 1e-3))
        shaper = ("tbf", "rate", f"{bits_per_second:.0f}bit", "burst", str(burst), "latency", _QUEUE)
        _run(*self.command(*base, "replace", "dev", LINK, "root", *shaper))


@dataclass(frozen=True)
class TwoHosts:
    """Both hosts, and the address under which they reach whoever made them."""

    hosts: tuple[Host, Host]
    outside: str

    def shape(self, bits_per_second: float | None) -> None:
        """Limit the link, each way."""
        for host in self.hosts:
            host.shape(bits_per_second)


@contextmanager
def two_hosts(*, linked: bool = True) -> Iterator[TwoHosts]:
    """Make the hosts; take them down at the end. NoNetwork if that is not possible here.

    linked: with a link of the kernel's own between them; otherwise the caller makes one named LINK, with the addresses.
    """
    # The kernel takes its time to take the last ones down.
    count = next(_COUNT)
    number = (os.getpid() + 7 * count) % 200 + 20
    names = [f"gw{os.getpid()}{count}{end}" for end in "ab"]
    hosts = (Host(names[0], f"10.77.{number}.1"), Host(names[1], f"10.77.{number}.2"))
    with ExitStack() as stack:
        for place, host in enumerate(hosts):
            _run("ip", "netns", "add", host.namespace)
            stack.callback(_run, "ip", "netns", "del", host.namespace)
            _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
            _connect(host, f"10.78.{number}", 4 * place)
        # Both reach whoever made them under one address.
        _run("ip", "-n", names[1], "route", "add", f"10.78.{number}.1/32", "via", f"10.78.{number}.5")
        if linked:
            ends = ("name", LINK, "netns", names[0], "type", "veth", "peer", "name", LINK, "netns", names[1])
            _run("ip", "link", "add", *ends)
            for host in hosts:
                host.shape(1e9)  # fails where the kernel has no tbf
                host.shape(None)
                bring_up(host)
        yield TwoHosts(hosts, f"10.78.{number}.1")


def bring_up(host: Host) -> None:
    """Give a host's end of the link its address."""
    _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", LINK)
    _run("ip", "-n", host.namespace, "link", "set", LINK, "up")


def _connect(host: Host, network: str, first: int) -> None:
    """Connect a host to whoever makes it, on an unshaped link of its own."""
    outer = f"{host.namespace}o"
    _run("ip", "link", "add", "name", outer, "type", "veth", "peer", "name", "outside", "netns", host.namespace)
    _run("ip", "addr", "add", f"{network}.{first + 1}/30", "dev", outer)
    _run("ip", "link", "set", outer, "up")
    _run("ip", "-n", host.namespace, "addr", "add", f"{network}.{first + 2}/30", "dev", "outside")
    _run("ip", "-n", host.namespace, "link", "set", "outside", "up")
    _run("ip", "route", "add", f"{host.address}/32", "via", f"{network}.{first + 2}")


@contextmanager
def cluster_on(network: TwoHosts, log_dir: Path, *, pairs: int = 1) -> Iterator[Cluster]:
    """Start a coordinator here and stage servers on the hosts, first and second in turn; end them all afterwards.

    Runs take free servers in this order: of two stages each has one on each host, and so many fit side by side.
    """
    with ExitStack() as stack:

        def start(name: str, command: Sequence[str]) -> None:
            log = stack.enter_context((log_dir / f"{name}.log").open("wb"))
            stack.enter_context(_running(command, log))

        port = _free_port(network.outside)
        coordinator = f"{network.outside}:{port}"
        python = [sys.executable, "-m"]
        start("coordinator", [*python, "gradwire_coordinator", "--listen", coordinator, "--insecure"])
        cluster = _wait_for(coordinator)
        stack.enter_context(cluster)
        for count, host in enumerate(network.hosts * pairs, start=1):
            listening = ["--listen", f"{host.address}:0", "--metrics-listen", f"{host.address}:0", "--insecure"]
            stage = [*python, "gradwire_stage", *listening, "--coordinator", coordinator, *_OVER_THE_LINK]
            start(f"stage-{count}", host.command(*stage))
            deadline = time.monotonic() + _STARTED_SECONDS
            while len(cluster.status().servers) < count:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"stage server {count} did not register; see {log_dir}")
                time.sleep(0.05)
        yield cluster


def _wait_for(coordinator: str) -> Cluster:
    deadline = time.monotonic() + _STARTED_SECONDS
    while True:
        try:
            return connect(coordinator, insecure=True)
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextmanager
def _running(command: Sequence[str], log: IO[bytes]) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port(address: str) -> int:
    import socket

    with socket.socket() as listener:
        listener.bind((address, 0))
        return int(listener.getsockname()[1])


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise NoNetwork(f"{command[0]} is not installed") from error
    if done.returncode != 0:
        raise NoNetwork(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
