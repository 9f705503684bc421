"""Tensors from one process to another, side by side: Gradwire, gRPC with the generated classes, gloo, a bare socket.

Two processes for each way; the ways take turns, round by round, and ratios are medians over the rounds. Gradwire's
processes are stage servers with a prepared run: what is measured goes from `Peers.send` to what the compute thread
takes out of the mailbox. gloo and the socket receive into one buffer that they keep. Through shared memory the receiver
gets the tensor where the sender has put it: that is compared with gloo where both receivers then read all of it. "Bytes
alone" is what Python's gRPC carries at most: the same 1 MiB again and again, made beforehand, and never looked at.

Throughput: tensors one behind the other, until the last has arrived. Latency: one tensor, until a byte that says so is
back. CPU: of both processes. Stall: the longest time that a thread of the receiver or the sender which computes 0.2 ms
at a time was kept out of Python while one tensor came in; the median over tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from gradwire.certs.authority import Authority
from gradwire.certs.members import issue
from gradwire_protocol.roles import Role
from report import Claim, add_arguments, finish
from transport_ways import CAN_ENCRYPT, GENERATED, GLOO, GRADWIRE, MEMORY, WAYS

KIB, MIB = 2**10, 2**20
SIZES = (64 * KIB, MIB, 8 * MIB, 64 * MIB)
NAMES = {
    "gradwire": "Gradwire",
    "gradwire-memory": "Gradwire, shared memory",
    "grpc-bytes": "gRPC, bytes alone",
    "generated": "gRPC, generated classes, 1 MiB chunks",
    "generated-whole": "gRPC, generated classes, whole tensor",
    "gloo": "torch.distributed, gloo",
    "tcp": "TCP socket",
}
# Of gloo's throughput.
BARS = {MIB: 0.70, 8 * MIB: 0.58, 64 * MIB: 0.68}
GENERATED_BAR = 1.5
# Of gloo's throughput, where the receiver reads what it gets: in shared memory nobody else does.
MEMORY_BAR = 3.0
LATENCY_MS = 0.3
STALL_MS = 5.0


class Contender(NamedTuple):
    """A way, and how it is used: over TLS, with a receiver that reads every payload."""

    way: str
    tls: bool = False
    read: bool = False

    @property
    def name(self) -> str:
        return NAMES[self.way] + (", TLS" if self.tls else "") + (", payload read" if self.read else "")


class Pair:
    """The two processes of a way."""

    def __init__(self, way: str, tls: Sequence[Path]) -> None:
        options = ["--tls", *map(str, tls)] if tls else []
        self._sides = [
            subprocess.Popen(
                [sys.executable, Path(__file__).with_name("transport_side.py"), way, side, *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for side in ("receive", "send")
        ]
        receiver, sender = self._sides
        _give(sender, _take(receiver))
        _take(sender)

    def do(self, **job: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Have both sides do a job; return what the receiver and the sender measured."""
        for side in self._sides:
            _give(side, job)
        receiver, sender = self._sides
        # The sender notices when the receiver ends, and not the other way round.
        sent = _take(sender)
        return _take(receiver), sent

    def close(self) -> None:
        for side in self._sides:
            if side.stdin is not None:
                side.stdin.close()
        for side in self._sides:
            try:
                side.wait(10)
            except subprocess.TimeoutExpired:
                side.kill()
                side.wait()


def _give(side: subprocess.Popen[str], line: dict[str, Any]) -> None:
    if side.stdin is None:
        raise RuntimeError("the process has no standard input")
    side.stdin.write(json.dumps(line) + "\n")
    side.stdin.flush()


def _take(side: subprocess.Popen[str]) -> dict[str, Any]:
    line = side.stdout.readline() if side.stdout is not None else ""
    if not line:
        raise RuntimeError(f"{side.args!r} has ended: its standard error says why")
    found: dict[str, Any] = json.loads(line)
    return found


class Measured(NamedTuple):
    """One contender in one round, at one size."""

    gigabytes_per_second: float
    latency_ms: float
    cpu_seconds_per_gib: float
    stall_ms: float


def measure(pair: Pair, contender: Contender, size: int, amount: int) -> Measured:
    """Measure once; `amount`: bytes to send for the throughput."""
    job = {"size": size, "read": contender.read, "watch": False, "each": False}
    count = max(2, amount // size)
    receiver, sender = pair.do(**job, count=count)
    total = count * size
    _, single = pair.do(**job | {"each": True}, count=20 if size <= MIB else 5)
    stalled = pair.do(**job | {"each": True, "watch": True}, count=max(3, min(20, 32 * MIB // size)))
    return Measured(
        total / sum(sender["seconds"]) / 1e9,
        1e3 * statistics.median(single["seconds"]),
        (receiver["cpu"] + sender["cpu"]) / (total / 2**30),
        1e3 * max(statistics.median(side["stalls"]) for side in stalled),
    )


def certificates(directory: Path) -> list[Path]:
    """Make an authority and a certificate for this machine; return the files of authority, certificate and key."""
    authority = Authority.create(directory)
    return list(issue(authority, role=Role.STAGE, name="server", addresses=["localhost", "127.0.0.1"]).all)


def contenders_of(ways: Sequence[str], *, tls: bool, read: bool) -> list[Contender]:
    plain = [Contender(way) for way in ways if way != MEMORY]
    encrypted = [Contender(way, tls=True) for way in ways if tls and way in CAN_ENCRYPT]
    readers = (GRADWIRE, MEMORY, GLOO) if read else (MEMORY, GLOO) if MEMORY in ways else ()
    reading = [Contender(way, read=True) for way in ways if way in readers]
    return plain + encrypted + reading


def run_rounds(
    contenders: Sequence[Contender], sizes: Sequence[int], rounds: int, amount: int
) -> dict[tuple[Contender, int], list[Measured]]:
    """Let the contenders take turns, each first as often as the others; return what was measured, by round."""
    found: dict[tuple[Contender, int], list[Measured]] = defaultdict(list)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gradwire-transport-")))
        files = certificates(directory) if any(contender.tls for contender in contenders) else []
        pairs: dict[tuple[str, bool], Pair] = {}
        for way, tls, _ in contenders:
            if (way, tls) not in pairs:
                pairs[way, tls] = Pair(way, files if tls else [])
                stack.callback(pairs[way, tls].close)
        for size in sizes:
            for number in range(-1, rounds):  # the first warms up
                shift = number % len(contenders)
                for contender in [*contenders[shift:], *contenders[:shift]]:
                    measured = measure(pairs[contender.way, contender.tls], contender, size, amount)
                    if number >= 0:
                        found[contender, size].append(measured)
    return found


def shown(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def rows_of(found: dict[tuple[Contender, int], list[Measured]]) -> list[dict[str, Any]]:
    rows = []
    for (contender, size), measured in found.items():
        medians = [statistics.median(values) for values in zip(*measured, strict=True)]
        row = {"size": shown(size), "way": contender.name}
        names = ("GB/s", "latency ms", "CPU s/GiB", "stall ms")
        rows.append(row | dict(zip(names, medians, strict=True)))
    return rows


def claims_of(found: dict[tuple[Contender, int], list[Measured]]) -> list[Claim]:
    """Compare round by round."""

    def ratio(size: int, other: str, way: str = GRADWIRE, *, read: bool = False) -> float | None:
        ours, theirs = found.get((Contender(way, read=read), size)), found.get((Contender(other, read=read), size))
        if not ours or not theirs:
            return None
        return statistics.median(
            a.gigabytes_per_second / b.gigabytes_per_second for a, b in zip(ours, theirs, strict=True)
        )

    claims = []
    for size, bar in BARS.items():
        against_gloo, against_generated = ratio(size, GLOO), ratio(size, GENERATED)
        if against_gloo is not None:
            claims.append(Claim.at_least(f"Point to point over gRPC, {shown(size)}: × gloo", against_gloo, bar))
        if against_generated is not None:
            claims.append(
                Claim.at_least(
                    f"Point to point over gRPC, {shown(size)}: × the generated classes",
                    against_generated,
                    GENERATED_BAR,
                )
            )
    for size in SIZES:
        through_memory = ratio(size, GLOO, MEMORY, read=True)
        if size >= MIB and through_memory is not None:
            name = f"Same host, through shared memory, payload read, {shown(size)}: × gloo"
            claims.append(Claim.at_least(name, through_memory, MEMORY_BAR))
    smallest, largest = SIZES[0], SIZES[-1]
    ours, theirs = found.get((Contender(GRADWIRE), smallest)), found.get((Contender(GLOO), smallest))
    if ours and theirs:
        more = statistics.median(a.latency_ms - b.latency_ms for a, b in zip(ours, theirs, strict=True))
        claims.append(_at_most(f"latency at {shown(smallest)} beyond gloo's, ms", more, LATENCY_MS))
    if large := found.get((Contender(GRADWIRE), largest)):
        stall = statistics.median(measured.stall_ms for measured in large)
        claims.append(
            _at_most(f"A {shown(largest)} message stalls the compute thread's Python at a time, ms", stall, STALL_MS)
        )
    return claims


def _at_most(name: str, value: float, bar: float) -> Claim:
    return Claim(name, value, f"<= {bar}", value <= bar)


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the throughput over the size, a group of bars a size."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "gradwire", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    colours = plt.get_cmap("tab10")
    for number, way in enumerate(ways):
        rates = {row["size"]: row["GB/s"] for row in rows if row["way"] == way}
        places = [place + (number - (len(ways) - 1) / 2) * 0.8 / len(ways) for place in range(len(sizes))]
        colour = "#1f6feb" if way == NAMES[GRADWIRE] else colours(number)
        axes.bar(places, [rates.get(size, 0.0) for size in sizes], 0.8 / len(ways), label=way, color=colour)
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_ylabel("GB/s, one tensor behind the other")
    axes.set_title("Tensors from one process to another, loopback")
    axes.grid(visible=True, axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="BYTES")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--amount", type=int, default=256 * MIB, help="bytes a round and way, for the throughput")
    parser.add_argument("--no-tls", action="store_true", help="leave TLS out")
    parser.add_argument("--read", action="store_true", help="also with a receiver that sums what it gets")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the throughput, as SVG (needs matplotlib)")
    add_arguments(parser)
    arguments = parser.parse_args()

    contenders = contenders_of(arguments.ways, tls=not arguments.no_tls, read=arguments.read)
    found = run_rounds(contenders, arguments.sizes, arguments.rounds, arguments.amount)
    rows = rows_of(found)
    if arguments.plot:
        draw(rows, arguments.plot)
    finish("Tensors from one process to another, on one machine", rows, claims_of(found), arguments)


if __name__ == "__main__":
    main()
