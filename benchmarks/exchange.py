"""The GPT in 2 replicas, one thread each: tokens a second per codec, beside torch DDP over gloo and its hooks.

First on one machine's loopback, where our servers share memory, or let gloo add up; then on two hosts with a link of
10 Gbit/s, 1 Gbit/s and 100 Mbit/s between them. Hosts are network namespaces of this machine, so that both share its
processors as two hosts would not; only what replicas exchange crosses the link. All contenders stand ready side by side
and take turns, round after round; ratios are medians over rounds. Beside them: one process with one thread, two that
exchange nothing, and for links our replicas without a network; at 100 Mbit/s also replicas that train alone between
averages. TCP's congestion control is the machine's own, named below. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import gradwire
from allreduce import CODECS, LOOPBACK, NONE, shown_rate
from exchange_peers import ALONE, DDP, DDP_FP16, DDP_POWERSGD, REPLICAS
from exchange_peers import __file__ as PEERS_SCRIPT
from gradwire.job.gpt import next_byte_loss
from peers import BATCH, LEARNING_RATE, MICRO_BATCHES, Peer, make_batch, make_model
from report import Claim, add_arguments, finish
from turns import Contender, Speeds, speed_ratio, take_turns

# The tests make the same networks.
sys.path.append(str(Path(__file__).parents[1] / "tests/integration"))
from network import LINK, NoNetwork, TwoHosts, cluster_on, two_hosts

MEGABITS = (10_000.0, 1000.0, 100.0)
ONE = "one process, 1 thread"
GLOO = "gradwire, gloo"
NO_NETWORK = "gradwire, none, without a network"
SLOW = 100.0
# Steps between two averages of replicas that train alone. A turn has them all, and the average among them.
EVERY = 20
LOCAL = f"gradwire, local steps, every={EVERY}, int8"

# Tokens a second, by link, contender and round.
Found = dict[str, Speeds]


def ours(codec: str) -> str:
    return f"gradwire, {codec}"


def make_contender(stack: contextlib.ExitStack, cluster: gradwire.Cluster, codec: str, **how: Any) -> Contender:
    model = make_model()
    trainer = stack.enter_context(
        cluster.trainer(
            model,
            torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE),
            loss=next_byte_loss,
            example=make_batch(),
            plan=gradwire.Plan(stages=1, replicas=REPLICAS, microbatches=MICRO_BATCHES, compression=codec, **how),
        )
    )

    def run(steps: int) -> float:
        started = time.perf_counter()
        for _ in trainer.run([make_batch()] * steps, progress=False):
            pass
        return time.perf_counter() - started

    return run


def make_local(stack: contextlib.ExitStack, cluster: gradwire.Cluster) -> Contender:
    run = make_contender(stack, cluster, "int8", exchange="local", every=EVERY)
    return lambda steps: run(EVERY) * steps / EVERY


def make_peer(stack: contextlib.ExitStack, name: str, inside: Sequence[Sequence[str]] = ()) -> Contender:
    peer = Peer(name, processes=REPLICAS, script=PEERS_SCRIPT, inside=inside)
    return stack.enter_context(peer).run


def on_loopback(codecs: Sequence[str], rounds: int, steps: int) -> Found:
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(gradwire.local(stage_servers=REPLICAS * (len(codecs) + 1), threads=1))
        contenders = {ours(codec): make_contender(stack, cluster, codec) for codec in codecs}
        contenders[GLOO] = make_contender(stack, cluster, NONE, transport="gloo")
        contenders |= {name: make_peer(stack, name) for name in (DDP, DDP_FP16, DDP_POWERSGD, ALONE)}
        contenders[ONE] = stack.enter_context(Peer(ONE)).run
        return {LOOPBACK: take_turns(contenders, rounds, steps)}


def on_links(network: TwoHosts, codecs: Sequence[str], megabits: Sequence[float], rounds: int, steps: int) -> Found:
    found: Found = {}
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = stack.enter_context(cluster_on(network, logs, pairs=len(codecs) + 1))
        contenders = {ours(codec): make_contender(stack, cluster, codec) for codec in codecs}
        inside = [host.command("env", f"GLOO_SOCKET_IFNAME={LINK}") for host in network.hosts]
        contenders |= {name: make_peer(stack, name, inside) for name in (DDP, DDP_FP16, DDP_POWERSGD)}
        beside = stack.enter_context(gradwire.local(stage_servers=REPLICAS, threads=1))
        contenders[NO_NETWORK] = make_contender(stack, beside, NONE)
        contenders[ALONE] = make_peer(stack, ALONE)
        contenders[ONE] = stack.enter_context(Peer(ONE)).run
        for rate in megabits:
            network.shape(rate * 1e6)
            if rate == SLOW:
                contenders[LOCAL] = make_local(stack, cluster)
            found[shown_rate(rate)] = take_turns(contenders, rounds, steps)
    return found


def ratio(found: Found, link: str, name: str, to: str) -> float:
    """Return the median over rounds of one contender's speed by another's; NaN where that was not measured."""
    return speed_ratio(found.get(link, {}), name, to)


def rows_of(found: Found) -> list[dict[str, Any]]:
    return [
        {
            "link": link,
            "contender": name,
            "tokens a second": statistics.median(speeds),
            "× one process": ratio(found, link, name, ONE),
            "× without exchange": ratio(found, link, name, ALONE),
            "× without network": None if link == LOOPBACK else ratio(found, link, name, NO_NETWORK),
            "slowest": min(speeds),
            "fastest": max(speeds),
        }
        for link, by_name in found.items()
        for name, speeds in by_name.items()
    ]


def claims_of(found: Found) -> list[Claim]:
    """What was not measured does not hold."""
    slow = shown_rate(SLOW)
    kept = {name: ratio(found, slow, name, NO_NETWORK) for name in found.get(slow, {}) if name in map(ours, CODECS)}
    best = max(kept, key=lambda name: kept[name], default="none measured")
    return [
        Claim.below(
            "With overlap, exchange adds less than 10 % to the step on loopback for the GPT (2 replicas × 1 stage)",
            1 / ratio(found, LOOPBACK, ours(NONE), ALONE) - 1,
            0.10,
        ),
        Claim.at_least(
            "GPT on loopback, 2 replicas × 1 stage: ≥ 1.80 × one thread in the same run",
            ratio(found, LOOPBACK, ours(NONE), ONE),
            1.80,
        ),
        Claim.at_least(
            f"GPT, 2 replicas over {slow} with the best codec ({best}): of its speed without a network",
            kept.get(best, math.nan),
            0.85,
        ),
        Claim.at_least(
            f"GPT, 2 replicas over {slow}, local steps: of its speed without a network",
            ratio(found, slow, LOCAL, NO_NETWORK),
            0.95,
        ),
    ]


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw tokens a second of every contender, a group of bars for each link."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "gradwire", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 5.5), layout="constrained")
    links = list(dict.fromkeys(row["link"] for row in rows))
    # What needs no network is the same everywhere, but for the machine's mood.
    names = [name for name in dict.fromkeys(row["contender"] for row in rows) if name not in (NO_NETWORK, ALONE, ONE)]
    colours = mpl.color_sequences["tab10"]
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        mine = {row["link"]: row["tokens a second"] for row in rows if row["contender"] == name}
        places = [group + (place - (len(names) - 1) / 2) * width for group in range(len(links))]
        axes.bar(
            places, [mine.get(link, 0.0) for link in links], width, color=colours[place % len(colours)], label=name
        )
    for group, link in enumerate(links):
        alone = {row["contender"]: row["tokens a second"] for row in rows if row["link"] == link}
        for name, style in ((ONE, ":"), (ALONE, "--")):
            label = name if group == 0 else ""
            axes.hlines(alone[name], group - 0.45, group + 0.45, color="#555555", linestyle=style, label=label)
    axes.set_xticks(range(len(links)), links)
    axes.set_ylabel("tokens a second")
    axes.set_title("A 6.5 M-parameter GPT in 2 replicas, by link and codec of gradients")
    axes.grid(visible=True, axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(file, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), metavar="CODEC", help="with none")
    parser.add_argument("--megabits", type=float, nargs="*", default=list(MEGABITS), metavar="RATE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps a round")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rates, as SVG (needs matplotlib)")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib")
    torch.set_num_threads(1)
    codecs = list(dict.fromkeys((NONE, *arguments.codecs)))
    found = on_loopback(codecs, arguments.rounds, arguments.steps)
    if arguments.megabits:
        try:
            with two_hosts() as network:
                found |= on_links(network, codecs, arguments.megabits, arguments.rounds, arguments.steps)
        except NoNetwork as reason:
            parser.exit(1, f"no network namespaces with a shaped link here: {reason}\n")
    rows = rows_of(found)
    if arguments.plot:
        draw(rows, arguments.plot)
    control = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    title = f"GPT, 8 layers of width 256, context 128, batch {BATCH}, {MICRO_BATCHES} micro-batches, TCP {control}"
    finish(title, rows, claims_of(found), arguments)


if __name__ == "__main__":
    main()
