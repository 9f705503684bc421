"""The GPT in 2 stages on two hosts with a slow link between them: tokens a second per codec, beside torch over gloo.

Hosts are network namespaces of this machine, so that both share its processors as two hosts would not; only what the
stages send each other crosses the link. Without delay the kernel shapes it (tbf); with delay a process does, which
takes its part of the processors from all contenders alike (delayed_link.py). Payloads do not pass through shared memory
here. All contenders stand ready side by side and take turns, round after round; each row is the median of its rounds.
`auto` is planned anew for each link. TCP's congestion control is the machine's own, named below. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import gradwire
from delayed_link import delayed_link
from gradwire.boundaries import boundary_lines
from gradwire.job.gpt import next_byte_loss
from peers import BATCH, LEARNING_RATE, MICRO_BATCHES, TOKENS_A_STEP, Peer, make_batch, make_model
from report import Claim, add_arguments, finish

# The tests make the same networks.
sys.path.append(str(Path(__file__).parents[1] / "tests/integration"))
from network import LINK, NoNetwork, TwoHosts, bring_up, cluster_on, two_hosts

TORCH = "torch pipelining on gloo, 1F1B"
CODECS = ("none", "bf16", "int8")
AUTO = "auto"
MEGABITS = (1000.0, 100.0, 10.0)
# Each way.
DELAYS_MS = (0.0, 20.0)

Shape = Callable[[float], None]
Trainer = Any


def make_trainer(stack: contextlib.ExitStack, cluster: gradwire.Cluster, codec: str) -> Trainer:
    model = make_model()
    return stack.enter_context(
        cluster.trainer(
            model,
            torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE),
            loss=next_byte_loss,
            example=make_batch(),
            plan=gradwire.Plan(stages=2, microbatches=MICRO_BATCHES, activation_compression=codec),
        )
    )


def run(trainer: Trainer, steps: int) -> float:
    """Return the seconds that so many steps take."""
    started = time.perf_counter()
    for _ in trainer.run([make_batch()] * steps, progress=False):
        pass
    return time.perf_counter() - started


def measure(
    network: TwoHosts, shape: Shape, delay_ms: float, megabits: Sequence[float], rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Measure all contenders on links of these rates."""
    rows = []
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # For "auto" a pair of servers for each link: what a pair has measured is remembered.
        cluster = stack.enter_context(cluster_on(network, logs, pairs=len(CODECS) + len(megabits)))
        inside = [host.command("env", f"GLOO_SOCKET_IFNAME={LINK}") for host in network.hosts]
        contenders: dict[str, Callable[[int], float]] = {}
        for codec in CODECS:
            trainer = make_trainer(stack, cluster, codec)
            contenders[codec] = functools.partial(run, trainer)
        contenders[TORCH] = stack.enter_context(Peer(TORCH, inside=inside)).run
        for rate in megabits:
            shape(rate * 1e6)
            automatic = make_trainer(stack, cluster, AUTO)
            contenders[AUTO] = functools.partial(run, automatic)
            print(f"{rate:g} Mbit/s, {delay_ms:g} ms: {', '.join(boundary_lines(automatic.plan))}", flush=True)
            found: dict[str, list[float]] = {name: [] for name in contenders}
            for contender in contenders.values():
                contender(1)
            for number in range(rounds):
                # Forwards and backwards, so that no one always comes behind the same other.
                for name, contender in list(contenders.items())[:: 1 if number % 2 else -1]:
                    found[name].append(steps * TOKENS_A_STEP / contender(steps))
            plain = statistics.median(found["none"])
            rows += [
                {
                    "link, Mbit/s": rate,
                    "delay each way, ms": delay_ms,
                    "contender": f"gradwire, {name}" if name != TORCH else name,
                    "tokens a second": statistics.median(values),
                    "× none": statistics.median(values) / plain,
                    "slowest": min(values),
                    "fastest": max(values),
                }
                for name, values in found.items()
            ]
    return rows


def measure_all(megabits: Sequence[float], delays_ms: Sequence[float], rounds: int, steps: int) -> list[dict[str, Any]]:
    rows = []
    for delay in delays_ms:
        with two_hosts(linked=delay == 0) as network:
            if delay == 0:
                rows += measure(network, network.shape, delay, megabits, rounds, steps)
                continue
            first, second = network.hosts
            with delayed_link((first.namespace, second.namespace), LINK) as link:
                for host in network.hosts:
                    bring_up(host)
                rows += measure(
                    network,
                    functools.partial(link.shape, delay_seconds=delay / 1e3),
                    delay,
                    megabits,
                    rounds,
                    steps,
                )
    return rows


def claims_of(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    speeds = {
        (row["link, Mbit/s"], row["delay each way, ms"], row["contender"].removeprefix("gradwire, ")): row[
            "tokens a second"
        ]
        for row in rows
    }
    claims = []
    for rate, delay in dict.fromkeys((rate, delay) for rate, delay, _ in speeds):
        none, int8, auto = (speeds[rate, delay, name] for name in ("none", "int8", AUTO))
        where = f"{rate:g} Mbit/s" + (f", {delay:g} ms" if delay else "")
        if rate == 10:
            claims.append(Claim.at_least(f"{where}: int8 against none, tokens a second", int8 / none, 2.5))
        if rate == 100:
            name = f"{where}: auto against the better of none and int8, tokens a second"
            claims.append(Claim.at_least(name, auto / max(none, int8), 0.97))
    return claims


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw tokens a second of every contender, a group of bars for each link."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "gradwire", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    links = list(dict.fromkeys((row["link, Mbit/s"], row["delay each way, ms"]) for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    colours = ("#1f6feb", "#58a6ff", "#79c0ff", "#d1570a", "#2da44e")
    width = 0.8 / len(names)
    for place, (name, colour) in enumerate(zip(names, itertools.cycle(colours), strict=False)):
        mine = {
            (row["link, Mbit/s"], row["delay each way, ms"]): row["tokens a second"]
            for row in rows
            if row["contender"] == name
        }
        axes.bar(
            [group + (place - (len(names) - 1) / 2) * width for group in range(len(links))],
            [mine[link] for link in links],
            width,
            color=colour,
            label=name,
        )
    labels = [f"{rate:g} Mbit/s" + (f"\n{delay:g} ms" if delay else "") for rate, delay in links]
    axes.set_xticks(range(len(links)), labels)
    axes.set_ylabel("tokens a second")
    axes.set_title("A 6.5 M-parameter GPT in 2 stages, by link and codec")
    axes.grid(visible=True, axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    figure.savefig(file, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabits", type=float, nargs="+", default=list(MEGABITS), metavar="RATE")
    parser.add_argument("--delays", type=float, nargs="+", default=list(DELAYS_MS), metavar="MS", help="each way")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps a round")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rates, as SVG (needs matplotlib)")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib")
    torch.set_num_threads(1)
    control = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    print(f"TCP congestion control: {control}")
    try:
        rows = measure_all(arguments.megabits, arguments.delays, arguments.rounds, arguments.steps)
    except NoNetwork as reason:
        parser.exit(1, f"no network namespaces with a shaped link here: {reason}\n")
    if arguments.plot:
        draw(rows, arguments.plot)
    title = f"GPT, 8 layers of width 256, context 128, batch {BATCH}, {MICRO_BATCHES} micro-batches, TCP {control}"
    finish(title, rows, claims_of(rows), arguments)


if __name__ == "__main__":
    main()
