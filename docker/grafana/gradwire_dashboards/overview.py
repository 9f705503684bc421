"""The first look: is the cluster whole, do runs get on, is anything alarming?"""

from __future__ import annotations

from grafana_foundation_sdk.models import units

from gradwire_dashboards.panels import (
    BLUE,
    CLEAR,
    GREEN,
    LARGEST_BUBBLE,
    LARGEST_COMMUNICATION,
    LEAST_UTILISATION,
    LONGEST_STANDSTILL_SECONDS,
    RED,
    RUN,
    SERVER,
    Board,
    at_least,
    at_most,
    bars,
    board,
    chart,
    figure,
    now,
    quantile,
    query,
    row,
    scale,
    states,
)

_PLAIN = scale((None, BLUE))
_NONE_IS_GOOD = scale((None, GREEN), (1, RED))


def overview() -> Board:
    made = board("overview", "Gradwire: overview", "Servers, runs, and whether anything needs somebody.")
    for add in (_figures, _training, _efficiency, _health):
        add(made)
    return made


def _figures(made: Board) -> None:
    made.with_row(row("Now"))
    made.with_panel(
        figure(
            "Servers",
            "Stage and parameter servers that the coordinator knows: registered, and heard of lately.",
            now("sum by (role) (gradwire_servers)", "{{role}}"),
            limit=_PLAIN,
        )
    )
    made.with_panel(
        figure(
            "Active runs",
            "Runs that have had an entry and are not over.",
            now('sum(gradwire_runs{state="active"})'),
            limit=_PLAIN,
        )
    )
    made.with_panel(
        figure(
            "Lowest utilisation",
            "Of all stages of the chosen runs, over five minutes: the share of the time that it computes.",
            now(f"min(stage:gradwire_utilisation:ratio_rate5m{{{RUN}}})"),
            unit=units.PercentUnit,
            limit=at_least(LEAST_UTILISATION),
        )
    )
    made.with_panel(
        figure(
            "Alerts that fire",
            "Which ones is shown below. docs/observability.md says what to do about each.",
            now('count(ALERTS{alertname=~"Gradwire.+", alertstate="firing"}) or vector(0)'),
            limit=_NONE_IS_GOOD,
        )
    )
    made.with_panel(
        figure(
            "Servers lost",
            "Since the coordinator was started: servers that went silent, did not answer, or started again without a "
            "word.",
            now("sum(gradwire_servers_lost_total)"),
            limit=_NONE_IS_GOOD,
        )
    )
    made.with_panel(
        figure(
            "Runs failed",
            "Since the coordinator was started. Runs that were ended on request, or whose client left, are not among "
            "them.",
            now("sum(gradwire_runs_failed_total)"),
            limit=_NONE_IS_GOOD,
        )
    )


def _training(made: Board) -> None:
    made.with_row(row("Training"))
    made.with_panel(
        chart(
            "Loss",
            "Of the last training step of each run, over all of its micro-batches and replicas.",
            [query(f'gradwire_loss{{{RUN}, stage=""}}', "{{run}}")],
            unit=units.NoUnit,
            span=8,
            least=None,
        )
    )
    made.with_panel(
        chart(
            "Training steps a second",
            "Finished by all servers of the run; with steps in flight, several of them overlap.",
            [query(f"rate(gradwire_steps_total{{{RUN}}}[$__rate_interval])", "{{run}}")],
            unit=units.OpsPerSecond,
            span=8,
        )
    )
    series = f'{RUN}, stage=""'
    made.with_panel(
        chart(
            "Time a step takes",
            "From the first server's start of a training step to the last server's end. Steps may overlap, so a run "
            "can finish more of them than one over this a second. Quantiles are read from buckets, so they are coarse.",
            [
                query(
                    f"rate(gradwire_step_duration_seconds_sum{{{series}}}[$__rate_interval])"
                    f" / rate(gradwire_step_duration_seconds_count{{{series}}}[$__rate_interval])",
                    "mean ({{run}})",
                ),
                query(quantile(0.5, "gradwire_step_duration_seconds", series, "run"), "median ({{run}})"),
                query(quantile(0.95, "gradwire_step_duration_seconds", series, "run"), "95th percentile ({{run}})"),
            ],
            unit=units.Seconds,
            span=8,
        )
    )


def _efficiency(made: Board) -> None:
    made.with_row(row("Where the time of the stages goes, over five minutes"))
    for title, description, name, limit in (
        (
            "Utilisation",
            "Share of the time that a stage computes: forward, backward, weight gradients, update. An alert fires "
            "below the line.",
            "utilisation",
            at_least(LEAST_UTILISATION, CLEAR),
        ),
        (
            "Bubble",
            "Share of the time that a stage has nothing to do. An alert fires above the line.",
            "bubble",
            at_most(LARGEST_BUBBLE, CLEAR),
        ),
        (
            "Communication",
            "Share of the time that a stage encodes, decodes, or waits for the exchange or for rows of the batch. "
            "Waits for activations and gradients are bubble alone. An alert fires above the line.",
            "communication",
            at_most(LARGEST_COMMUNICATION, CLEAR),
        ),
    ):
        made.with_panel(
            chart(
                title,
                description,
                [query(f"stage:gradwire_{name}:ratio_rate5m{{{RUN}}}", SERVER)],
                unit=units.PercentUnit,
                span=8,
                limit=limit,
                most=1,
            )
        )


def _health(made: Board) -> None:
    made.with_row(row("Health"))
    firing = 'count by (alertname) (ALERTS{alertname=~"Gradwire.+", alertstate="firing"})'
    made.with_panel(
        states(
            "Alerts",
            'Alerts that fire, by name; "none" while there is none. docs/observability.md says what to do about each.',
            query(f'{firing} > bool 0 or on () label_replace(vector(0), "alertname", "none", "", "")', "{{alertname}}"),
            names={"0": ("quiet", GREEN), "1": ("fires", RED)},
        )
    )
    made.with_panel(
        states(
            "Services that Prometheus reaches",
            "A server that was stopped in good order disappears; one that is down stays, in red.",
            query('min by (job, instance) (up{job=~"gradwire-.+"})', "{{instance}} ({{job}})"),
            names={"0": ("down", RED), "1": ("up", GREEN)},
        )
    )
    made.with_panel(
        chart(
            "Standing still",
            "For how long nobody has made progress with an open entry; 0 between entries. The run ends when this "
            "reaches Plan(stall_seconds). An alert fires above the line.",
            [query(f"max by (run) (gradwire_run_still_seconds{{{RUN}}})", "{{run}}")],
            unit=units.Seconds,
            span=8,
            limit=at_most(LONGEST_STANDSTILL_SECONDS, CLEAR),
        )
    )
    made.with_panel(
        chart(
            "Since the last checkpoint",
            "That servers wrote, or since the run was created while there is none: what would have to be done again. "
            "What the client writes itself is not known here.",
            [
                query(
                    f"time() - max by (run) (gradwire_checkpoint_timestamp_seconds{{{RUN}}}"
                    f" or gradwire_run_start_timestamp_seconds{{{RUN}}})",
                    "{{run}}",
                )
            ],
            unit=units.DurationSeconds,
            span=8,
        )
    )
    made.with_panel(
        bars(
            "Certificates: time left",
            "Until each service's certificate ends. Whether it is time for another depends on its life; an alert says "
            "so.",
            now("gradwire_certificate_expiry_timestamp_seconds - time()", "{{instance}}"),
            unit=units.DurationSeconds,
            limit=scale((None, RED), (86400, GREEN)),
            span=8,
            most=90 * 86400,
        )
    )
