"""What each stage does with its time, and whether stages are in balance."""

from __future__ import annotations

from grafana_foundation_sdk.models import units

from gradwire_dashboards.panels import (
    CLEAR,
    LARGEST_BUBBLE,
    LEAST_UTILISATION,
    RUN,
    SERVER,
    WIDTH,
    Board,
    at_least,
    at_most,
    bars,
    board,
    chart,
    chosen,
    now,
    quantile,
    query,
    row,
)

# Cold colours for work, warm ones for waits: a stage in order is blue and green.
_COLORS = {
    "forward": "#1F60C4",
    "backward": "#5794F2",
    "weight": "#8AB8FF",
    "update": "#37872D",
    "encode": "#96D98D",
    "decode": "#C8F2C2",
    "wait-activation": "#FFB357",
    "wait-gradient": "#FF780A",
    "wait-batch": "#F2CC0C",
    "wait-exchange": "#C4162A",
    "wait-step": "#B877D9",
}
_STAGE = f'{RUN}, stage=~"$stage"'
_COMPUTING = 'phase=~"forward|backward|weight|update"'


def pipeline() -> Board:
    made = board(
        "pipeline",
        "Gradwire: pipeline",
        "Each second of each stage's compute thread: what it did, or what it waited for.",
        chosen("stage", "Stage", f"label_values(gradwire_stage_busy_seconds_total{{{RUN}}}, stage)"),
    )
    for add in (_time, _balance, _steps, _memory):
        add(made)
    return made


def _time(made: Board) -> None:
    made.with_row(row("What a stage does"))
    made.with_panel(
        chart(
            "Stage $stage",
            "Shares of a second, on average over the stage's replicas and shards, as they were when the last entry "
            "ended. Work is blue and green: forward, backward, weight (gradients of weights, where they are a pass of "
            "their own), update (optimizer), encode and decode (what travels). Waits are warm: for an activation, a "
            "gradient, rows of the batch, the exchange with replicas or shards, and for the next step.",
            [
                query(
                    f"avg by (phase) (rate(gradwire_stage_busy_seconds_total{{{_STAGE}}}[$__rate_interval]))",
                    "{{phase}}",
                ),
                query(
                    f"avg by (reason) (rate(gradwire_stage_idle_seconds_total{{{_STAGE}}}[$__rate_interval]))",
                    "{{reason}}",
                ),
            ],
            unit=units.PercentUnit,
            span=WIDTH,
            stacked=True,
            most=1,
            colors=_COLORS,
        )
        .repeat("stage")
        .repeat_direction("h")
        .max_per_row(2)
    )


def _balance(made: Board) -> None:
    made.with_row(row("Balance"))
    made.with_panel(
        bars(
            "Utilisation now",
            "Share of the last five minutes that each stage computed. Bars of different length: stages are out of "
            "balance, and trainer.replan() can move the cuts. An alert fires where a bar is red for ten minutes.",
            now(f"stage:gradwire_utilisation:ratio_rate5m{{{_STAGE}}}", SERVER),
            unit=units.PercentUnit,
            limit=at_least(LEAST_UTILISATION),
            most=1,
        )
    )
    made.with_panel(
        chart(
            "Computing in a step",
            "Seconds of forward, backward, weight gradients and update in each training step, on average. The slowest "
            "stage sets the pace of all. Evaluations between the steps count in, too.",
            [
                query(
                    "sum by (run, stage, replica, shard) "
                    f"(rate(gradwire_stage_busy_seconds_total{{{_STAGE}, {_COMPUTING}}}[$__rate_interval]))"
                    " / sum by (run, stage, replica, shard) "
                    f"(rate(gradwire_step_duration_seconds_count{{{_STAGE}}}[$__rate_interval]))",
                    SERVER,
                )
            ],
            unit=units.Seconds,
        )
    )
    made.with_panel(
        chart(
            "Bubble over five minutes",
            "Share of the time that a stage has nothing to do, between steps too. An alert fires above the line.",
            [query(f"stage:gradwire_bubble:ratio_rate5m{{{_STAGE}}}", SERVER)],
            unit=units.PercentUnit,
            limit=at_most(LARGEST_BUBBLE, CLEAR),
            most=1,
        )
    )
    made.with_panel(
        chart(
            "Bubble of the last step",
            "Of the last training step alone, as the stage measured it: how steps differ.",
            [query(f"gradwire_bubble_ratio{{{_STAGE}}}", SERVER)],
            unit=units.PercentUnit,
            limit=at_most(LARGEST_BUBBLE, CLEAR),
            most=1,
        )
    )


def _steps(made: Board) -> None:
    made.with_row(row("Steps, as each stage sees them"))
    for share, name in ((0.5, "Median"), (0.95, "95th percentile"), (0.99, "99th percentile")):
        made.with_panel(
            chart(
                f"{name} of a step's time",
                "From the end of the entry before to the end of a training step, waits included. Read from buckets, so "
                "coarse. Far above the median: some steps wait for something, such as a checkpoint or an evaluation.",
                [
                    query(
                        quantile(share, "gradwire_step_duration_seconds", _STAGE, "run, stage"),
                        "stage {{stage}} ({{run}})",
                    )
                ],
                unit=units.Seconds,
                span=8,
            )
        )


def _memory(made: Board) -> None:
    made.with_row(row("Memory and generations"))
    made.with_panel(
        chart(
            "Messages that wait",
            "Bytes in each server's mailbox: what has come and was not taken yet. It is bounded; close to its bound, "
            "senders wait.",
            [query("gradwire_mailbox_bytes", "{{instance}}")],
            unit=units.BytesIEC,
            span=8,
        )
    )
    made.with_panel(
        chart(
            "Parameters held",
            "Bytes of parameters, buffers and constants of the run on each server.",
            [query(f"gradwire_parameters_bytes{{{RUN}}}", "{{instance}} ({{run}})")],
            unit=units.BytesIEC,
            span=8,
        )
    )
    made.with_panel(
        chart(
            "Generation",
            "Of the run: rises when another layout takes over.",
            [query(f"gradwire_generation{{{RUN}}}", "{{run}}")],
            unit=units.NoUnit,
            span=8,
        )
    )
