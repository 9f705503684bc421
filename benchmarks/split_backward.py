"""A backward in one piece beside one in two (I: input gradients, W: weight gradients), on the GPT of the main job.

The two stages of the pipeline benchmark run in one process, as stage servers run them. Whole and split backwards take
turns, step after step; each figure is the median over the rounds, and the ratio is the median of the rounds' own
ratios. Seconds are those of the one thread that computes, so that what else the machine does counts little. What memory
a process happens to get makes a difference of some percent, for as long as it runs: so several processes measure, one
after the other, and their median counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping

import torch

from gradwire.graph import export_model
from gradwire.job.gpt import next_byte_loss
from gradwire_coordinator.costs import Rates
from gradwire_coordinator.model_checks import check_model
from gradwire_coordinator.segments import make_segments
from gradwire_protocol.v1 import graph_pb2, stage_pb2
from gradwire_stage import allocator
from gradwire_stage.segment import BuiltSegment, SegmentPass, Value
from peers import BATCH, MICRO_BATCHES, SHAPE, make_batch, make_model
from report import Claim, add_arguments, finish

# W comes later than I by so many micro-batches.
DELAY = 1
SPLIT = ("I", "W")
ACTIONS = ("F, before B", "F, before I", "B", *SPLIT, "I + W")


class Stages:
    """Both stages of the GPT, with tensors of their own, and how long each kind of action took in the last step."""

    def __init__(self) -> None:
        batch = make_batch()
        exported = export_model(make_model(), next_byte_loss, batch)
        made = make_segments(
            check_model(exported.proto),
            [exported.cut_before(f"blocks.{SHAPE.layers // 2}")],
            rows=BATCH // MICRO_BATCHES,
            rates=Rates(1e9, 1e9),
        )
        self.parameters: list[torch.nn.Parameter] = []
        self._stages: list[tuple[stage_pb2.Segment, BuiltSegment]] = []
        for stage, segments in enumerate(made.stages):
            store: dict[str, torch.Tensor] = {}
            for item in made.placements:
                if stage in item.holder_stages:
                    tensor = exported.tensors[item.spec.name].detach().clone()
                    store[item.spec.name] = torch.nn.Parameter(tensor) if item.spec.requires_grad else tensor
            self.parameters += [tensor for tensor in store.values() if isinstance(tensor, torch.nn.Parameter)]
            segment = next(segment for segment in segments if segment.graph == graph_pb2.GRAPH_KIND_TRAIN)
            self._stages.append((segment, BuiltSegment(segment, store, torch.device("cpu"), seed=0)))
        flat = exported.flatten_batch(batch, graph_pb2.GRAPH_KIND_TRAIN)
        self._micro_batches: list[dict[str, Value]] = [{} for _ in range(MICRO_BATCHES)]
        for name, value in flat.values.items():
            for values, part in zip(
                self._micro_batches, torch.as_tensor(value).tensor_split(MICRO_BATCHES), strict=True
            ):
                values[name] = part
        self.seconds: dict[str, float] = {}

    def step(self, *, split: bool) -> list[torch.Tensor | None]:
        """Run the forwards and backwards of a step; return the gradients."""
        self.seconds = dict.fromkeys(("F", *SPLIT) if split else ("F", "B"), 0.0)
        for parameter in self.parameters:
            parameter.grad = None
        waiting: deque[list[SegmentPass]] = deque()
        for number, values in enumerate(self._micro_batches):
            passes = self._forward(values, number)
            self._backward(passes, split=split)
            if split:
                waiting.append(passes)
            if len(waiting) > DELAY:
                self._weights(waiting.popleft())
        while waiting:
            self._weights(waiting.popleft())
        return [parameter.grad for parameter in self.parameters]

    def _forward(self, batch: Mapping[str, Value], number: int) -> list[SegmentPass]:
        passes = []
        sent = dict(batch)
        started = time.thread_time()
        for segment, built in self._stages:
            values = {item.value: _received(sent[item.value]) for item in segment.incoming}
            passes.append(built.forward(values, step=1, micro_batch=number, record=True))
            sent.update(passes[-1].outgoing)
        self.seconds["F"] += time.thread_time() - started
        return passes

    def _backward(self, passes: list[SegmentPass], *, split: bool) -> None:
        gradients: dict[str, torch.Tensor | None] = {}
        started = time.thread_time()
        for made in reversed(passes):
            gradients = (made.backward_input if split else made.backward)(gradients, {}, BATCH / MICRO_BATCHES)
        self.seconds["I" if split else "B"] += time.thread_time() - started

    def _weights(self, passes: list[SegmentPass]) -> None:
        started = time.thread_time()
        for made in reversed(passes):
            made.backward_weight()
        self.seconds["W"] += time.thread_time() - started


def _received(value: Value) -> Value:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def measure(rounds: int) -> dict[str, tuple[float, float, float]]:
    """Return, by action: seconds of a step, the median and the fastest, and the median of its share of B's."""
    # As a stage server does once it has imported all.
    gc.freeze()
    stages = Stages()
    expected = stages.step(split=False)
    for got, gradient in zip(stages.step(split=True), expected, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-5)
    measured: list[dict[str, float]] = []
    for number in range(rounds):
        times: dict[str, float] = {}
        for split in (True, False) if number % 2 else (False, True):
            stages.step(split=split)
            times |= stages.seconds
            times[f"F, before {'I' if split else 'B'}"] = times.pop("F")
        times["I + W"] = sum(times[kind] for kind in SPLIT)
        measured.append(times)
    return {
        kind: (
            statistics.median(times[kind] for times in measured),
            min(times[kind] for times in measured),
            statistics.median(times[kind] / times["B"] for times in measured),
        )
        for kind in ACTIONS
    }


def measure_apart(rounds: int) -> dict[str, tuple[float, float, float]]:
    """Do the same in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--rounds", str(rounds), "--alone"], stdout=subprocess.PIPE, check=True
    )
    return {kind: tuple(figures) for kind, figures in json.loads(done.stdout).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=7, help="of each process")
    parser.add_argument("--alone", action="store_true", help="measure in this process, and print figures as JSON")
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.alone:
        print(json.dumps(measure(arguments.rounds)))
        return
    of_processes = [measure_apart(arguments.rounds) for _ in range(arguments.processes)]

    def middle(kind: str, figure: int) -> float:
        return statistics.median(figures[kind][figure] for figures in of_processes)

    rows = [
        {
            "action": kind,
            "ms a micro-batch": 1e3 / MICRO_BATCHES * middle(kind, 0),
            "fastest": 1e3 / MICRO_BATCHES * middle(kind, 1),
            "of B": middle(kind, 2),
            "by process": f"{min(found := [each[kind][2] for each in of_processes]):.3f} to {max(found):.3f}",
        }
        for kind in ACTIONS
    ]
    claims = [Claim.below("I + W takes at most 3 % longer than B on the GPT", middle("I + W", 2), 1.03)]
    title = (
        f"GPT, {SHAPE.layers} layers of width {SHAPE.width}, {BATCH // MICRO_BATCHES} rows a micro-batch, both stages"
    )
    finish(title, rows, claims, arguments)


if __name__ == "__main__":
    # As a stage server begins, before anything is allocated.
    allocator.configure()
    main()
