"""Timeline: every nanosecond belongs to one phase, and the phases add up to the window."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gradwire_stage import timeline
from gradwire_stage.timeline import BUSY, IDLE, HostClock, Timeline


class FakeClock(HostClock):
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 0

    def mark(self) -> int:
        return self.now


def test_a_phase_gets_the_time_until_the_next_one() -> None:
    clock = FakeClock()
    watch = Timeline(clock)
    clock.now = 5
    assert watch.switch(timeline.FORWARD) == timeline.WAIT_STEP
    clock.now = 12
    watch.switch(timeline.WAIT_GRADIENT)
    clock.now = 20
    watch.switch(timeline.FORWARD)
    clock.now = 21
    window = watch.cut()
    assert window.nanoseconds == 21
    assert window.phases == {timeline.WAIT_STEP: 5, timeline.FORWARD: 8, timeline.WAIT_GRADIENT: 8}


def test_the_next_window_begins_where_the_last_one_ended() -> None:
    clock = FakeClock()
    watch = Timeline(clock, timeline.UPDATE)
    clock.now = 3
    watch.cut()
    clock.now = 10
    window = watch.cut()
    assert (window.nanoseconds, window.phases) == (7, {timeline.UPDATE: 7})


def test_the_report_parts_busy_from_idle() -> None:
    clock = FakeClock()
    watch = Timeline(clock, timeline.WAIT_BATCH)
    clock.now = 10**9
    watch.switch(timeline.BACKWARD)
    clock.now = 3 * 10**9
    timing = watch.cut().to_proto()
    assert timing.window_seconds == 3.0
    assert dict(timing.busy_seconds) == {"backward": 2.0}
    assert dict(timing.idle_seconds) == {"wait-batch": 1.0}


@given(
    st.lists(
        st.tuples(st.integers(0, 10**12), st.one_of(st.sampled_from(BUSY + IDLE), st.just("cut"))),
        max_size=60,
    )
)
def test_phases_always_add_up_to_the_window(events: list[tuple[int, str]]) -> None:
    clock = FakeClock()
    watch = Timeline(clock)
    windows = []
    for step, event in events:
        clock.now += step
        if event == "cut":
            windows.append(watch.cut())
        else:
            watch.switch(event)
    windows.append(watch.cut())
    for window in windows:
        assert sum(window.phases.values()) == window.nanoseconds
        assert window.phases.keys() <= set(BUSY + IDLE)
    assert sum(window.nanoseconds for window in windows) == clock.now


def test_the_host_clock_runs() -> None:
    watch = Timeline(HostClock())
    watch.switch(timeline.FORWARD)
    window = watch.cut()
    assert window.nanoseconds > 0
    assert sum(window.phases.values()) == window.nanoseconds
