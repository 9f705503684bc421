"""What the benchmark of slow networks stands on: a link with a delay, and claims that are its rows' own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from network import LINK, Host, NoNetwork, bring_up, two_hosts

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from delayed_link import delayed_link
from slow_network import AUTO, CODECS, TORCH, claims_of

# Sends a byte and waits for it to come back; then sends many, and waits for the last to come back.
_ASK = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 5000)) as link:
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    def ask(size):
        started = time.perf_counter()
        link.sendall(bytes(size - 1) + b"!")
        link.recv(1)
        return time.perf_counter() - started
    print(min(ask(1) for _ in range(5)), ask(int(sys.argv[2])))
"""
_ANSWER = """
import socket, sys
with socket.create_server((sys.argv[1], 5000)) as listener:
    print("ready", flush=True)
    link, _ = listener.accept()
    with link:
        while data := link.recv(2**20):
            link.sendall(b"!" * data.count(b"!"))
"""


def ask(first: Host, second: Host, size: int) -> tuple[float, float]:
    """Return the seconds of a round trip, and of so many bytes with their answer."""
    answering = second.command(sys.executable, "-c", _ANSWER, second.address)
    with subprocess.Popen(answering, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        asking = first.command(sys.executable, "-c", _ASK, second.address, str(size))
        done = subprocess.run(asking, capture_output=True, text=True, timeout=60, check=True)
    round_trip, seconds = map(float, done.stdout.split())
    return round_trip, seconds


@pytest.mark.benchmark
@pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="no TUN devices here")
def test_a_delayed_link_has_its_rate_and_its_delay() -> None:
    try:
        with two_hosts(linked=False) as network:
            first, second = network.hosts
            with delayed_link((first.namespace, second.namespace), LINK) as link:
                for host in network.hosts:
                    bring_up(host)
                link.shape(10e6, 0.02)
                round_trip, seconds = ask(first, second, 2**20)
                # 40 ms; 1 MiB at 10 Mbit/s takes 0.84 s and a little more for headers.
                assert 0.04 <= round_trip < 0.2
                assert 0.84 <= seconds < 3
                link.shape(1e9, 0.0)
                assert ask(first, second, 2**20)[0] < 0.02
    except NoNetwork as reason:
        pytest.skip(f"no network namespaces here: {reason}")


def rows(speeds: dict[tuple[float, float], dict[str, float]]) -> list[dict[str, Any]]:
    return [
        {
            "link, Mbit/s": rate,
            "delay each way, ms": delay,
            "contender": name if name == TORCH else f"gradwire, {name}",
            "tokens a second": speed,
        }
        for (rate, delay), by_name in speeds.items()
        for name, speed in by_name.items()
    ]


def test_claims_are_about_the_links_that_they_name() -> None:
    equal = dict.fromkeys((*CODECS, TORCH, AUTO), 100.0)
    found = claims_of(
        rows(
            {
                (1000.0, 0.0): equal,
                (100.0, 0.0): equal | {"int8": 110.0, AUTO: 108.0},
                (10.0, 0.0): equal | {"int8": 249.0},
                (10.0, 20.0): equal | {"int8": 251.0},
            }
        )
    )
    assert [(claim.holds, round(claim.value, 3)) for claim in found] == [(True, 0.982), (False, 2.49), (True, 2.51)]
    assert "10 Mbit/s, 20 ms" in found[2].name
