"""What a ring takes: bytes by codec and number of replicas, and a delay for each turn."""

from __future__ import annotations

import pytest
from graph_text import plan, tensor

from gradwire_coordinator.costs import Rates
from gradwire_coordinator.exchange_costs import Ring, choose_codec, exchange_bytes, exchange_seconds
from gradwire_coordinator.sharing import Sharing
from gradwire_protocol.gradient_codecs import encoded_bytes, parse_compression

TENSORS = [tensor("W", elements=1000), tensor("B", elements=24), tensor("running_mean", "buffer", elements=500)]
NONE = parse_compression("none")


@pytest.mark.parametrize(("replicas", "share", "turns"), [(2, 1.0, 2), (3, 4 / 3, 4), (4, 1.5, 6)])
def test_sums_go_around_twice(replicas: int, share: float, turns: int) -> None:
    """Two float32 parameters; what does not train is not exchanged."""
    ring = Ring(replicas, bytes_per_second=1e6, delay_seconds=1e-3)
    assert ring.sent_bytes(NONE, TENSORS) == pytest.approx(share * 4 * 1024)
    assert ring.seconds(NONE, TENSORS) == pytest.approx(share * 4 * 1024 / 1e6 + turns * 1e-3)
    half = parse_compression("bf16")
    assert ring.sent_bytes(half, TENSORS) == pytest.approx(share * 2 * 1024)


def test_sparse_parts_are_gathered_from_each_of_the_others() -> None:
    codec = parse_compression("topk(density=0.1)")
    own = sum(encoded_bytes(codec, (size,), 4) for size in (1000, 24))
    ring = Ring(4, bytes_per_second=1e6, delay_seconds=1e-3)
    assert ring.sent_bytes(codec, TENSORS) == 3 * own
    assert ring.seconds(codec, TENSORS) == pytest.approx(3 * own / 1e6 + 3e-3)


def sharing(exchange: str = "ring") -> Sharing:
    return Sharing.of(plan(2, replicas=2, exchange=exchange), "SGD")


def test_a_server_without_parameters_exchanges_nothing() -> None:
    ring = Ring(2, bytes_per_second=1e6, delay_seconds=1e-3)
    assert ring.seconds(NONE, TENSORS[2:]) == 0
    assert exchange_seconds([ring, ring], sharing(), [TENSORS[2:], TENSORS], 2) == [0, ring.seconds(NONE, TENSORS)]
    assert exchange_bytes([ring, ring], sharing(), [TENSORS[2:], TENSORS]) == 4 * 1024


def test_local_steps_exchange_once_in_so_many() -> None:
    ring = Ring(2, bytes_per_second=1e6, delay_seconds=1e-3)
    local = sharing("local(every=8)")
    assert exchange_seconds([ring], local, [TENSORS], 2) == pytest.approx([ring.seconds(NONE, TENSORS) / 8])
    assert exchange_bytes([ring], local, [TENSORS]) == 4 * 1024 // 8


def test_updated_weights_come_on_top_of_sums_that_are_whole() -> None:
    """By messages, parts of sums go round, and then parts of weights: as much as without sharing the optimizer."""
    ring = Ring(2, 1e6, 1e-3)
    for transport, share in (("grpc", 1.0), ("gloo", 1.5)):
        found = Sharing.of(plan(2, replicas=2, zero="on", transport=transport), "SGD")
        assert exchange_bytes([ring], found, [TENSORS]) == share * round(ring.sent_bytes(NONE, TENSORS))
        assert exchange_seconds([ring], found, [TENSORS], 2) == pytest.approx([share * ring.seconds(NONE, TENSORS)])
    assert exchange_bytes([ring], Sharing.of(plan(2, replicas=2, transport="gloo"), "SGD"), [TENSORS]) == round(
        ring.sent_bytes(NONE, TENSORS)
    )


def test_one_replica_has_no_exchange() -> None:
    assert exchange_seconds((), sharing(), [TENSORS], 1) == []
    assert exchange_bytes((), sharing(), [TENSORS]) == 0


def test_parameter_servers_are_sent_all_that_all_replicas_hold() -> None:
    one, two = (sharing(f"parameter-server(servers={servers})") for servers in (1, 2))
    assert exchange_bytes((), one, [TENSORS, TENSORS[:1]]) == 2 * (4096 + 4000)
    alone, shared = (exchange_seconds((), asked, [TENSORS, TENSORS[2:]], 8) for asked in (one, two))
    assert alone[1] == shared[1] == 0  # it holds nothing that is trained
    assert alone[0] > shared[0] > exchange_seconds((), two, [TENSORS], 1)[0]


@pytest.mark.parametrize(
    ("megabits", "compute_seconds", "expected"),
    [(100_000, 1.0, "none"), (100, 1.0, "int8"), (100, 1e4, "none"), (1000, 1e-3, "int8")],
)
def test_a_codec_is_chosen_where_it_makes_a_step_faster(megabits: float, compute_seconds: float, expected: str) -> None:
    """Ten million parameters: 40 MB. One that loses precision must pay for it by more than what noise is."""
    tensors = [[tensor("W", elements=10_000_000)]]
    ring = Ring(2, bytes_per_second=megabits * 1e6 / 8, delay_seconds=1e-3)
    chosen = choose_codec([ring], sharing(), tensors, [Rates(1e11, 1e10)], compute_seconds)
    assert str(chosen.codec) == expected
    assert f"{megabits} Mbit/s" in chosen.reason
    assert "none" in chosen.reason
