"""How an exchange and its settings are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwire_protocol.errors import PlanError
from gradwire_protocol.exchanges import Exchange, parse_exchange


@given(
    st.builds(
        Exchange,
        name=st.just("parameter-server"),
        servers=st.integers(1, 256),
        staleness=st.integers(0, 15),
    )
    | st.builds(
        Exchange,
        name=st.just("local"),
        every=st.integers(1, 10**6),
        learning_rate=st.floats(1e-6, 1e3),
        momentum=st.floats(0, 0.999),
    )
)
def test_what_is_written_is_read_as_it_was(exchange: Exchange) -> None:
    assert parse_exchange(str(exchange)) == exchange


def test_settings_may_be_left_out() -> None:
    assert parse_exchange("ring") == Exchange()
    assert parse_exchange(" local ") == Exchange(name="local")
    assert parse_exchange("local( every = 8 )") == Exchange(name="local", every=8)
    assert not parse_exchange("ring").is_local


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "rings",
            "ring(every=3)",
            "local(",
            "local(every)",
            "local(every=0)",
            "local(every=1.5)",
            "local(speed=1)",
        ),
        *(
            "local(every=2, every=3)",
            "local(learning_rate=0)",
            "local(learning_rate=nan)",
            "local(momentum=1)",
            "x" * 999,
        ),
    ],
)
def test_what_is_no_exchange_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"exchange|local steps|parameter servers"):
        parse_exchange(text)
