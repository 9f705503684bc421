"""How replicas agree, and whether they share the optimizer's state: by plan, codec, exchange and optimizer."""

from __future__ import annotations

import pytest
from graph_text import plan

from gradwire_coordinator.sharing import ChosenCodec, Sharing
from gradwire_protocol.errors import PlanError
from gradwire_protocol.exchanges import Exchange
from gradwire_protocol.gradient_codecs import parse_compression
from gradwire_protocol.optimizer_state import NEED_WHOLE_PARAMETERS


def of(optimizer: str = "AdamW", *, replicas: int = 3, **fields: object) -> Sharing:
    return Sharing.of(plan(2, replicas=replicas, **fields), optimizer)


def test_what_the_plan_leaves_open_is_filled_in() -> None:
    found = of()
    assert (found.exchange, str(found.codec)) == (Exchange(), "none")
    assert of(exchange="local").exchange == Exchange(name="local")
    assert str(of(compression="topk").codec) == "topk(density=0.01)"


@pytest.mark.parametrize(
    ("optimizer", "fields", "shards", "reason"),
    [
        ("AdamW", {}, True, "costs neither precision nor traffic"),
        ("SGD", {"zero": "auto"}, True, "costs neither precision nor traffic"),
        ("AdamW", {"zero": "on"}, True, "the plan wants it"),
        ("AdamW", {"zero": "off"}, False, "the plan does not want it"),
        ("AdamW", {"compression": "int8"}, False, "undo what int8 saves"),
        ("AdamW", {"compression": "powersgd(rank=4)"}, False, r"undo what powersgd\(rank=4\) saves"),
        ("AdamW", {"exchange": "local"}, False, "train alone need the whole"),
        ("AdamW", {"exchange": "local", "compression": "int8"}, False, "train alone need the whole"),
        ("AdamW", {"zero": "off", "compression": "int8"}, False, "the plan does not want it"),
    ],
)
def test_who_shares_the_optimizers_state_and_why(
    optimizer: str, fields: dict[str, object], shards: bool, reason: str
) -> None:
    found = of(optimizer, **fields)
    assert found.shards_optimizer == shards
    assert found.sharers == (3 if shards else 1)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(found.reason)


@pytest.mark.parametrize("transport", ["gloo", "nccl"])
def test_sums_that_are_whole_at_all_are_shared_only_if_the_plan_says_so(transport: str) -> None:
    left_open = of(transport=transport)
    assert (left_open.sums_by, left_open.shards_optimizer) == (transport, False)
    assert (
        left_open.reason == f"{transport} adds up the whole at each replica, so that gathering would be traffic on top"
    )
    assert of(transport=transport, zero="on").shards_optimizer
    # What is encoded goes as messages, and who is alone adds up nothing.
    for fields in ({"compression": "int8"}, {"replicas": 1}):
        assert of(transport=transport, **fields).sums_by == ""
    assert of(transport="grpc").sums_by == of().sums_by == ""
    assert of(transport="grpc").shards_optimizer


@pytest.mark.parametrize("optimizer", sorted(NEED_WHOLE_PARAMETERS))
def test_optimizers_of_whole_matrices_share_only_if_the_plan_says_so(optimizer: str) -> None:
    left_open = of(optimizer)
    assert (left_open.shards_optimizer, left_open.sharers) == (False, 1)
    assert left_open.reason.startswith(f"{optimizer} looks at whole matrices")
    assert of(optimizer, zero="on").shards_optimizer


@pytest.mark.parametrize("zero", ["auto", "on", "off"])
@pytest.mark.parametrize("fields", [{}, {"compression": "int8"}, {"exchange": "local"}])
def test_one_replica_has_nobody_to_share_with(zero: str, fields: dict[str, object]) -> None:
    found = of(replicas=1, zero=zero, **fields)
    assert (found.shards_optimizer, found.reason, found.sharers) == (False, "", 1)


@pytest.mark.parametrize(
    ("fields", "got"),
    [
        ({"compression": "int8"}, "undo what int8 saves"),
        ({"exchange": "local(every=8)"}, "need the whole of it each"),
    ],
)
def test_sharing_that_cannot_be_is_refused_where_it_is_asked_for(fields: dict[str, object], got: str) -> None:
    with pytest.raises(PlanError, match="cannot share the optimizer's state") as caught:
        of(zero="on", **fields)
    assert got in caught.value.got
    assert 'zero="off" or "auto"' in caught.value.expected


@pytest.mark.parametrize("fields", [{"zero": "2" * 99}, {"exchange": "gossip"}, {"compression": "fp8"}])
def test_what_is_not_known_is_refused_for_any_number_of_replicas(fields: dict[str, object]) -> None:
    for replicas in (1, 2):
        with pytest.raises(PlanError) as caught:
            of(replicas=replicas, **fields)
        assert len(caught.value.got) < 120


def test_servers_learn_of_local_steps_what_they_must_know() -> None:
    assert of().local_steps() is None
    sent = of(exchange="local(every=8, learning_rate=0.5, momentum=0)").local_steps()
    assert sent is not None
    assert (sent.learning_rate, sent.momentum) == (0.5, 0.0)


def test_a_codec_that_is_left_open_decides_when_it_is_known() -> None:
    asked = plan(2, replicas=2, compression="auto")
    before = Sharing.of(asked, "AdamW")
    assert (before.codec_is_open, before.shards_optimizer, before.sharers) == (True, False, 1)
    for codec, shards in (("none", True), ("int8", False)):
        after = Sharing.of(asked, "AdamW", ChosenCodec(parse_compression(codec), "a slow link"))
        assert (str(after.codec), after.codec_is_open, after.codec_reason) == (codec, False, "a slow link")
        assert after.shards_optimizer == shards
    # One replica has nothing to encode.
    assert not Sharing.of(plan(2, compression="auto"), "AdamW").codec_is_open
    with pytest.raises(PlanError, match="cannot share"):
        Sharing.of(plan(2, replicas=2, compression="auto", zero="on"), "AdamW")


def test_parameter_servers_have_the_optimizer() -> None:
    found = of(exchange="parameter-server(servers=3, staleness=1)")
    assert (found.parameter_servers, found.exchange.staleness) == (3, 1)
    assert (found.shards_optimizer, found.reason) == (False, "parameter servers have it")
    assert of().parameter_servers == 0
    for compression in ("topk", "powersgd", "auto"):
        with pytest.raises(PlanError, match="Parameter servers cannot work with"):
            of(exchange="parameter-server", compression=compression)
