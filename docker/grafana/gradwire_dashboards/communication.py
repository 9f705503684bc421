"""What travels between servers, how long it takes, and what codecs save."""

from __future__ import annotations

from grafana_foundation_sdk.models import units

from gradwire_dashboards.panels import (
    CLEAR,
    LARGEST_COMMUNICATION,
    RUN,
    SERVER,
    Board,
    at_most,
    board,
    chart,
    mirrored,
    quantile,
    query,
    row,
)

_BYTES = "gradwire_transfer_bytes_total"
_EXCHANGE = 'kind=~"reduce|weights|weight|norm|tied"'


def communication() -> Board:
    made = board(
        "communication",
        "Gradwire: communication",
        "What travels between servers, how long it takes, and what codecs save of it.",
    )
    for add in (_traffic, _latency, _exchange, _host):
        add(made)
    return made


def _rate(metric: str, matchers: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}{{{matchers}}}[$__rate_interval]))"


def _traffic(made: Board) -> None:
    made.with_row(row("Traffic"))
    made.with_panel(
        chart(
            "Communication",
            "Share of the last five minutes that a stage encoded, decoded, or waited for the exchange or for rows of "
            "the batch. Waits for activations and gradients are bubble alone. An alert fires above the line.",
            [query(f"stage:gradwire_communication:ratio_rate5m{{{RUN}}}", SERVER)],
            unit=units.PercentUnit,
            limit=at_most(LARGEST_COMMUNICATION, CLEAR),
            most=1,
        )
    )
    made.with_panel(
        mirrored(
            chart(
                "Bytes a second, by peer",
                "Payload of whole messages, as encoded: what servers have sent to each peer above the axis, what they "
                "have received from it below. What one server sends, another receives: above and below show the same "
                "traffic.",
                [
                    query(_rate(_BYTES, f'{RUN}, direction="sent"', "peer"), "to {{peer}}"),
                    query(_rate(_BYTES, f'{RUN}, direction="received"', "peer"), "from {{peer}}"),
                ],
                unit=units.BytesPerSecondIEC,
                least=None,
            ),
            "B",
        )
    )
    # What comes in counts each message between servers once, and the client's; what goes to the client is not among it.
    to_client = f'{RUN}, direction="sent", peer="client"'
    for label, about in (
        (
            "kind",
            "What the messages carry: boundary values (forward) and their gradients (backward), what replicas exchange "
            "(reduce, weights, weight, norm), what shards do (group), gradients of tied copies, rows of the batch, the "
            "initial state, results.",
        ),
        (
            "codec",
            "As encoded, by codec. Exchanged gradients count as none: they are encoded before they are messages.",
        ),
    ):
        made.with_panel(
            chart(
                f"Bytes a second, by {label}",
                f"Received by servers, and sent to the client. {about}",
                [
                    query(
                        f'sum by ({label}) (rate({_BYTES}{{{RUN}, direction="received"}}[$__rate_interval])'
                        f" or rate({_BYTES}{{{to_client}}}[$__rate_interval]))",
                        f"{{{{{label}}}}}",
                    )
                ],
                unit=units.BytesPerSecondIEC,
                stacked=True,
            )
        )


def _latency(made: Board) -> None:
    made.with_row(row("Latency: from queueing a message to its receipt"))
    about = "Queueing, the way there, and the receipt's way back. Read from buckets, so coarse."
    for title, share, by in (
        ("Median, by kind", 0.5, "kind"),
        ("99th percentile, by kind", 0.99, "kind"),
        ("95th percentile, by peer", 0.95, "peer"),
    ):
        hint = {
            "kind": "Large messages take longer: compare a kind with itself.",
            "peer": "One peer far above the others has a slow link, or a busy machine.",
        }[by]
        made.with_panel(
            chart(
                title,
                f"{about} {hint}",
                [query(quantile(share, "gradwire_transfer_seconds", RUN, by), f"{{{{{by}}}}}")],
                unit=units.Seconds,
                span=8,
            )
        )


def _exchange(made: Board) -> None:
    made.with_row(row("Exchange between replicas, and codecs"))
    gradients = _rate("gradwire_exchange_gradient_bytes_total", RUN, "run")
    sent = _rate(_BYTES, f'{RUN}, direction="sent", kind="reduce"', "run")
    made.with_panel(
        chart(
            "Gradients agreed on",
            "Bytes of gradients a second that replicas have agreed on, before any codec; 0 without replicas.",
            [query(_rate("gradwire_exchange_gradient_bytes_total", RUN, "run, stage, replica, shard"), SERVER)],
            unit=units.BytesPerSecondIEC,
            span=8,
        )
    )
    made.with_panel(
        chart(
            "Bytes sent for a byte of gradients",
            "Of a ring of R replicas 2 (R - 1) / R without a codec: 1 with two replicas, 1.5 with four. A "
            "codec divides that by what it saves. Without replicas: no value; what gloo and NCCL send is not counted.",
            [query(f"({sent} or {gradients} * 0) / {gradients}", "{{run}}")],
            unit=units.NoUnit,
            span=8,
        )
    )
    decoded = _rate("gradwire_transfer_decoded_bytes_total", f'{RUN}, kind=~"forward|backward"', "run, kind")
    encoded = _rate(_BYTES, f'{RUN}, direction="received", kind=~"forward|backward"', "run, kind")
    made.with_panel(
        chart(
            "Compression of what stages send each other",
            "Bytes without a codec for each byte that travelled: 1 without compression, nearly 4 with int8 of float32.",
            [query(f"{decoded} / {encoded}", "{{kind}} ({{run}})")],
            unit=units.NoUnit,
            span=8,
        )
    )
    made.with_panel(
        chart(
            "Waiting for the exchange",
            "Share of the time that a stage waits for what replicas or shards send. Compress it, take larger batches, "
            "or let replicas train alone for some steps.",
            [
                query(
                    f'rate(gradwire_stage_idle_seconds_total{{{RUN}, reason="wait-exchange"}}[$__rate_interval])',
                    SERVER,
                )
            ],
            unit=units.PercentUnit,
            span=8,
            most=1,
        )
    )
    by_kind = _rate(_BYTES, f'{RUN}, direction="sent", {_EXCHANGE}', "run, kind")
    made.with_panel(
        chart(
            "Exchanged, by kind",
            "Bytes a second that servers send each other at the end of a step: parts of gradients (reduce), updated "
            "parameters of parameter servers (weights), tied copies, norms and the batch's weight; 0 if there is none.",
            [
                query(
                    f'{by_kind} or on (run) label_replace({gradients} * 0, "kind", "none", "", "")',
                    "{{kind}} ({{run}})",
                )
            ],
            unit=units.BytesPerSecondIEC,
            span=8,
            stacked=True,
        )
    )
    made.with_panel(
        chart(
            "Updates behind",
            "With parameter servers: updates that the weights lacked when the last step ended. At most "
            "Plan(staleness); 0 otherwise.",
            [query(f"max by (run, stage, replica, shard) (gradwire_weights_behind_steps{{{RUN}}})", SERVER)],
            unit=units.NoUnit,
            span=8,
        )
    )


def _host(made: Board) -> None:
    made.with_row(row("On one host, and what went wrong"))
    sent = _rate(_BYTES, f'{RUN}, direction="sent"', "run")
    made.with_panel(
        chart(
            "Through shared memory",
            "Bytes a second that went to servers of the same host through memory instead of a socket.",
            [query(f"{_rate('gradwire_shared_memory_transfer_bytes_total', RUN, 'run')} or {sent} * 0", "{{run}}")],
            unit=units.BytesPerSecondIEC,
            span=6,
        )
    )
    made.with_panel(
        chart(
            "Shared memory held",
            "Memory that servers have made for payloads to others of their host, and streams over a unix socket.",
            [
                query("gradwire_shared_memory_bytes", "bytes, {{instance}}"),
            ],
            unit=units.BytesIEC,
            span=6,
        )
    )
    made.with_panel(
        chart(
            "Payloads and peers without shared memory",
            "A second, by why not: the other one is on another host, has it switched off, or the memory is used up "
            "(limit, no-slot).",
            [query("sum by (reason) (rate(gradwire_shared_memory_fallbacks_total[$__rate_interval]))", "{{reason}}")],
            unit=units.OpsPerSecond,
            span=6,
        )
    )
    made.with_panel(
        chart(
            "Messages dropped",
            "A second, by why: repeated after a broken connection, late, of a run that was released, of another run or "
            "generation. Some at the end of a run are normal; many in the midst of one are not.",
            [query("sum by (reason) (rate(gradwire_messages_dropped_total[$__rate_interval]))", "{{reason}}")],
            unit=units.OpsPerSecond,
            span=6,
        )
    )
