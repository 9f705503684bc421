"""What a report makes of its numbers: what differs most from the prediction, and what a user can do about it.

Pure. Leaves the numbers to report.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradwire.report_values import Compared, ServerReport
from gradwire.run_plan import RunPlan
from gradwire.units import shown_seconds

# Servers that are off by factors this far apart are worth another plan.
_UNEVEN = 1.1
# Shares of a server's time that are worth a word.
_NOTABLE_WAIT = 0.1
_NOTABLE_BATCH_WAIT = 0.05
_NOTABLE_EXCHANGE_WAIT = 0.1
# In every layer, and not only at the end of a step: some of it there always is.
_NOTABLE_TENSOR_WAIT = 0.3
# How far the idle share may be above what was simulated.
_NOTABLE_BUBBLE = 0.05
# Of a step; below this a difference is not worth naming.
_NOTABLE_SHARE = 0.01


def find(
    plan: RunPlan,
    servers: Sequence[ServerReport],
    *,
    seconds: Compared,
    bubble: Compared,
    rows: Compared,
    recompute: bool,
) -> Iterator[str]:
    """Yield sentences, the most important first. Arguments as in `Report`."""
    if rows.measured != rows.predicted:
        yield (
            f"batches had {rows.measured:,.1f} rows on average, and the plan is for {rows.predicted:,.0f}: what was "
            "predicted is for those"
        )
    yield from _largest(servers, seconds)
    if plan.replicas == plan.shards == 1:
        yield from _balance(servers)
    yield from _waits(servers)
    yield from _exchange(plan, servers)
    if bubble.difference > _NOTABLE_BUBBLE:
        assumed = [link.stage for link in plan.links if not link.measured]
        why = " Links were assumed, not measured." if assumed else ""
        yield f"the bubble is {bubble.difference:.1%} of a step larger than simulated.{why}"
    if recompute:
        yield (
            "forwards that are run again for their backwards count as forward where measured, and as backward where "
            "predicted"
        )


def _largest(servers: Sequence[ServerReport], seconds: Compared) -> Iterator[str]:
    parts = [
        (pair, f"the {what} of {server.name}")
        for server in servers
        for what, pair in (("forward", server.forward), ("backward", server.backward), ("update", server.update))
        if pair.predicted > 0
    ]
    if not parts:
        return
    pair, what = max(parts, key=lambda part: abs(part[0].difference))
    if abs(pair.difference) < _NOTABLE_SHARE * seconds.measured:
        yield "servers compute as long as predicted, within 1 % of a step"
        return
    yield (
        f"{what} differs most: {shown_seconds(pair.predicted)} a step predicted, {shown_seconds(pair.measured)} "
        f"measured ({pair.measured / pair.predicted:.2f} ×)"
    )


def _balance(servers: Sequence[ServerReport]) -> Iterator[str]:
    """Whether another cut could help: only if servers are off by different factors."""
    ratios = [(server.compute.ratio, server) for server in servers if server.compute.ratio]
    if len(servers) < 2 or len(ratios) < len(servers):
        return
    least = min(ratio for ratio, _ in ratios)
    most, slowest = max(ratios, key=lambda item: item[0])
    if most / least >= _UNEVEN:
        yield (
            f"{slowest.name} is {most / least:.2f} × slower than the fastest one, each compared with its prediction: "
            "trainer.replan() would weigh the work accordingly, and move the cuts if that pays"
        )
    else:
        yield "all servers are off by about the same factor: trainer.replan() has little to gain"


def _share(servers: Sequence[ServerReport], wait: str) -> float:
    """Return the share of all servers' time that they waited for something."""
    windows = sum(server.window_seconds for server in servers)
    return sum(server.waits.get(wait, 0.0) for server in servers) / windows if windows > 0 else 0.0


def _exchange(plan: RunPlan, servers: Sequence[ServerReport]) -> Iterator[str]:
    share = _share(servers, "wait-exchange")
    if plan.shards > 1:
        # Waits for the one and for the other are not told apart.
        others = " or other replicas" if plan.replicas > 1 else ""
        if share > _NOTABLE_TENSOR_WAIT:
            yield (
                f"servers wait {share:.0%} of the time for what the other servers of their stage{others} send: fewer "
                "servers a stage (tensor), and more stages, exchange less"
            )
        return
    if plan.replicas > 1 and share > _NOTABLE_EXCHANGE_WAIT:
        remedy = "larger batches exchange less often"
        if plan.compression == "none":
            remedy = f'gradients are not compressed (compression="int8"), and {remedy}'
        yield f"servers wait {share:.0%} of the time for what others send at the end of a step: {remedy}"


def _waits(servers: Sequence[ServerReport]) -> Iterator[str]:
    if (between := _share(servers, "wait-step")) > _NOTABLE_WAIT:
        yield (
            f"servers wait {between:.0%} of the time for the next step: keep steps in flight with trainer.run(loader), "
            "or load batches faster"
        )
    if (late := _share(servers, "wait-batch")) > _NOTABLE_BATCH_WAIT:
        yield f"servers wait {late:.0%} of the time for rows of the batch: they come slowly from this process"
