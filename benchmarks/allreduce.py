"""Gradients added up over 2 and 4 processes, side by side: Gradwire's ring under each codec, and gloo's all-reduce.

From the gradients of a backward to their sums at every process, float32, one thread each; the ways take turns, round by
round, and ratios are medians over the rounds. First over loopback, where a stage server would send through shared
memory: that is a way of its own here. Then over links of 1 Gbit/s and 100 Mbit/s, as full-duplex as an Ethernet is,
between network namespaces of this machine (root); there gloo is uncompressed, too. TCP's congestion control is named.

GB/s: bytes of the gradients in float32, once, by the time. CPU: of one process, for each GiB of its gradients. MiB
sent: payload that one process sends, with scales and indices and what the exchange has to say beside, but no headers.
Pays below: on a link of fewer bits a second a codec saves more time in bytes than its processor time is beyond none's,
were nothing done at once; inf where it needs no more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from allreduce_ways import GLOO, GRADWIRE, MEMORY, PARAMETER_BYTES
from report import Claim, add_arguments, finish

# The tests make the same networks.
sys.path.append(str(Path(__file__).parents[1] / "tests/integration"))
from network import LINK, Host, NoNetwork, two_hosts

MIB = 2**20
SIZES = (1, 4, 16, 64)
PROCESSES = (2, 4)
NONE, TOPK, POWERSGD = "none", "topk(density=0.01)", "powersgd(rank=4)"
CODECS = (NONE, "fp16", "bf16", "int8", TOPK, POWERSGD)
MEGABITS = (1000.0, 100.0)
# Over links one size is enough: the rate is what counts.
LINK_SIZE = 16
LOOPBACK = "loopback"


class Contender(NamedTuple):
    """A way, and the codec of the gradients."""

    way: str
    codec: str = NONE

    @property
    def name(self) -> str:
        if self.way == GLOO:
            return "torch.distributed, gloo"
        return f"Gradwire, {self.codec}" + (", shared memory" if self.way == MEMORY else "")


class Case(NamedTuple):
    """What contenders are compared on."""

    link: str
    processes: int
    size: int  # MiB


class Measured(NamedTuple):
    """One contender in one round of a case."""

    seconds: float  # of the slowest process
    cpu_seconds: float  # of one process, on average


PLAIN, SHARED, THEIRS = Contender(GRADWIRE), Contender(MEMORY), Contender(GLOO)
Found = dict[tuple[Case, Contender], list[Measured]]
Sent = dict[tuple[Case, Contender], float | None]


class Members:
    """The processes of a way. inside: the hosts that they are on, by rank; empty: this machine's loopback."""

    def __init__(self, way: str, processes: int, rendezvous: str, inside: Sequence[Host] = ()) -> None:
        self._processes = [
            subprocess.Popen(
                _command(way, rank, processes, rendezvous, inside[rank] if inside else None),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        addresses = [answer["addresses"] for answer in self._answers()]
        self.do("connect", addresses=addresses)

    def do(self, job: str, **settings: Any) -> list[dict[str, Any]]:
        """Have all processes do a job at once; return their answers, by rank."""
        for process in self._processes:
            if process.stdin is None:
                raise RuntimeError("the process has no standard input")
            process.stdin.write(json.dumps({"do": job, **settings}) + "\n")
            process.stdin.flush()
        return self._answers()

    def close(self) -> None:
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def _answers(self) -> list[dict[str, Any]]:
        answers = []
        for process in self._processes:
            line = process.stdout.readline() if process.stdout is not None else ""
            if not line:
                raise RuntimeError(f"{process.args!r} has ended: its standard error says why")
            answers.append(json.loads(line))
        return answers


def _command(way: str, rank: int, processes: int, rendezvous: str, host: Host | None) -> list[str]:
    script = Path(__file__).with_name("allreduce_side.py")
    codecs = CODECS if way == GRADWIRE else (NONE,)
    command = [sys.executable, str(script), way, str(rank), str(processes)]
    command += ["--rendezvous", rendezvous, "--codecs", *codecs]
    if host is None:
        return command
    return host.command("env", f"GLOO_SOCKET_IFNAME={LINK}", *command, "--listen", f"{host.address}:0")


@contextmanager
def standing_by(ways: Sequence[str], processes: int, inside: Sequence[Host] = ()) -> Iterator[dict[str, Members]]:
    """Start the processes of all ways, and end them."""
    with ExitStack() as stack:
        members = {}
        for way in ways:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gradwire-allreduce-"))
            members[way] = Members(way, processes, f"file://{folder}/rendezvous", inside)
            stack.callback(members[way].close)
        yield members


def measure(
    members: dict[str, Members], case: Case, contenders: Sequence[Contender], rounds: int, count: int
) -> tuple[Found, Sent]:
    """Let contenders take turns, each first as often as the others; return what was measured, and bytes a call."""
    found: Found = defaultdict(list)
    for each in members.values():
        each.do("prepare", size=case.size * MIB)
    for number in range(-1, rounds):  # the first warms up
        shift = number % len(contenders)
        for contender in [*contenders[shift:], *contenders[:shift]]:
            answers = members[contender.way].do("measure", codec=contender.codec, count=count)
            if number >= 0:
                slowest = max(answer["seconds"] for answer in answers) / count
                cpu = statistics.mean(answer["cpu"] for answer in answers) / count
                found[case, contender].append(Measured(slowest, cpu))
    sent: Sent = {}
    for contender in contenders:
        # What has come is known as soon as a call ends; receipts for what was sent come later.
        totals = [answer["bytes"] for answer in members[contender.way].do("received", codec=contender.codec)]
        calls = (rounds + 1) * (count + 1)
        sent[case, contender] = None if None in totals else statistics.mean(totals) / calls
    return found, sent


def on_loopback(processes: Sequence[int], sizes: Sequence[int], rounds: int, amount: int) -> tuple[Found, Sent]:
    found: Found = {}
    sent: Sent = {}
    contenders = [*(Contender(GRADWIRE, codec) for codec in CODECS), SHARED, THEIRS]
    for number in processes:
        with standing_by((GRADWIRE, MEMORY, GLOO), number) as members:
            for size in sizes:
                case = Case(LOOPBACK, number, size)
                more = measure(members, case, contenders, rounds, max(2, amount // size))
                found |= more[0]
                sent |= more[1]
    return found, sent


def on_links(megabits: Sequence[float], rounds: int) -> tuple[Found, Sent]:
    """Measure between two hosts with a link of each rate. NoNetwork."""
    found: Found = {}
    sent: Sent = {}
    contenders = [*(Contender(GRADWIRE, codec) for codec in CODECS), THEIRS]
    with two_hosts() as network, standing_by((GRADWIRE, GLOO), 2, network.hosts) as members:
        for rate in megabits:
            network.shape(rate * 1e6)
            more = measure(members, Case(shown_rate(rate), 2, LINK_SIZE), contenders, rounds, 1)
            found |= more[0]
            sent |= more[1]
    return found, sent


def shown_rate(megabits: float) -> str:
    return f"{megabits / 1000:g} Gbit/s" if megabits >= 1000 else f"{megabits:g} Mbit/s"


def against_gloo(found: Found, case: Case, contender: Contender) -> float:
    """Return gloo's time by the contender's, the median over rounds; NaN where that was not measured."""
    ours, theirs = found.get((case, contender)), found.get((case, THEIRS))
    if not ours or not theirs:
        return math.nan
    return statistics.median(b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True))


def cpu_seconds(measured: Sequence[Measured]) -> float:
    return statistics.median(each.cpu_seconds for each in measured)


def pays_below(found: Found, sent: Sent, case: Case, contender: Contender) -> float | None:
    """Return the gigabits a second below which a codec pays; None where there is nothing to compare."""
    bytes_sent, plain_bytes = sent.get((case, contender)), sent.get((case, PLAIN))
    if contender.codec == NONE or case.link != LOOPBACK or bytes_sent is None or plain_bytes is None:
        return None
    more_seconds = cpu_seconds(found[case, contender]) - cpu_seconds(found[case, PLAIN])
    return 8e-9 * (plain_bytes - bytes_sent) / more_seconds if more_seconds > 0 else math.inf


def rows_of(found: Found, sent: Sent) -> list[dict[str, Any]]:
    rows = []
    for (case, contender), measured in found.items():
        seconds, cpu = statistics.median(each.seconds for each in measured), cpu_seconds(measured)
        size = case.size * MIB
        payload = sent[case, contender]
        rows.append(
            {
                "link": case.link,
                "processes": case.processes,
                "MiB": case.size,
                "way": contender.name,
                "ms": 1e3 * seconds,
                "GB/s": size / seconds / 1e9,
                "CPU s/GiB": cpu / (size / 2**30),
                "MiB sent": None if payload is None else payload / MIB,
                "pays below, Gbit/s": pays_below(found, sent, case, contender),
                "× gloo": against_gloo(found, case, contender),
            }
        )
    return rows


def claims_of(found: Found) -> list[Claim]:
    """Compare with gloo, round by round; what was not measured does not hold."""
    claims = []

    def claim(name: str, case: Case, contender: Contender, bar: float) -> None:
        claims.append(Claim.at_least(name, against_gloo(found, case, contender), bar))

    for contender, how in ((PLAIN, "over gRPC"), (SHARED, "through shared memory")):
        for processes, size, bar in ((2, 16, 0.65), (2, 64, 0.65), (2, 1, 1.0), (4, 16, 0.45), (4, 64, 0.45)):
            name = f"ring, {processes} processes, loopback {how}, fp32, {size} MiB: × gloo's all-reduce speed"
            claim(name, Case(LOOPBACK, processes, size), contender, bar)
    for rate, codec, bar in ((1000, "int8", 2.5), (100, "int8", 3.5), (100, TOPK, 15.0)):
        name = f"{LINK_SIZE} MiB, 2 processes, {shown_rate(rate)}: {codec} × uncompressed gloo"
        claim(name, Case(shown_rate(rate), 2, LINK_SIZE), Contender(GRADWIRE, codec), bar)
    return claims


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw × gloo of every way: by size on loopback, a picture for each number of processes, and by link."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "gradwire", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}
    from matplotlib import pyplot as plt

    pictures: dict[str, tuple[list[dict[str, Any]], Callable[[dict[str, Any]], str]]] = {}
    for row in rows:
        if row["link"] == LOOPBACK:
            title = f"loopback, {row['processes']} processes"
            pictures.setdefault(title, ([], lambda row: f"{row['MiB']} MiB"))[0].append(row)
        else:
            title = f"a link between 2 processes, {LINK_SIZE} MiB"
            pictures.setdefault(title, ([], lambda row: str(row["link"])))[0].append(row)
    figure, grid = plt.subplots(
        1, len(pictures), figsize=(4.5 * len(pictures), 4.8), layout="constrained", squeeze=False
    )
    ways = list(dict.fromkeys(row["way"] for row in rows))
    colours = dict(zip(ways, mpl.color_sequences["tab10"], strict=False))
    for axes, (title, (shown, label)) in zip(grid[0], pictures.items(), strict=True):
        groups = list(dict.fromkeys(map(label, shown)))
        mine = list(dict.fromkeys(row["way"] for row in shown))
        for number, way in enumerate(mine):
            ratios = {label(row): row["× gloo"] for row in shown if row["way"] == way}
            places = [place + (number - (len(mine) - 1) / 2) * 0.8 / len(mine) for place in range(len(groups))]
            axes.bar(places, [ratios[group] for group in groups], 0.8 / len(mine), label=way, color=colours[way])
        axes.set_xticks(range(len(groups)), groups)
        axes.set_yscale("log")
        axes.axhline(1.0, color="#888888", linewidth=0.8)
        axes.set_title(title)
        axes.grid(visible=True, axis="y", color="#dddddd")
        axes.set_axisbelow(True)
    grid[0][0].set_ylabel("speed of the all-reduce, × gloo")
    handles = {way: handle for axes in grid[0] for handle, way in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(file, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="*", default=list(PROCESSES), metavar="N", help="on loopback")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="MIB", help="on loopback")
    parser.add_argument("--megabits", type=float, nargs="*", default=list(MEGABITS), metavar="RATE", help="of links")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--amount", type=int, default=32, metavar="MIB", help="a round and way, on loopback")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw speeds beside gloo's, as SVG (needs matplotlib)"
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib")
    if not arguments.processes and not arguments.megabits:
        parser.error("nothing to measure: no number of processes on loopback, and no links")

    found, sent = on_loopback(arguments.processes, arguments.sizes, arguments.rounds, arguments.amount)
    control = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    if arguments.megabits:
        try:
            more = on_links(arguments.megabits, arguments.rounds)
        except NoNetwork as reason:
            parser.exit(1, f"no network namespaces with a shaped link here: {reason}\n")
        found |= more[0]
        sent |= more[1]
    rows = rows_of(found, sent)
    if arguments.plot:
        draw(rows, arguments.plot)
    title = f"Gradients of {PARAMETER_BYTES // MIB} MiB parameters added up over processes, TCP {control}"
    finish(title, rows, claims_of(found), arguments)


if __name__ == "__main__":
    main()
